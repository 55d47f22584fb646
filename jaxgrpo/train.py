"""Trains a model with GRPO and proves it on held-out problems.

    python -m jaxgrpo.train [CONFIG.toml] [--section.field value ...]

Without CONFIG.toml it is the tiny invoice run that ships with the package. The same command on an
existing run directory goes on where that run stopped; `--run.fresh` starts anew.
"""

import math
import sys
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxgrpo import cluster, preflight
from jaxgrpo.checkpoint import Checkpoints, abstract_on
from jaxgrpo.cli import run_main
from jaxgrpo.clock import Clock, Compilations
from jaxgrpo.config import Config, validate
from jaxgrpo.config_file import parse_args
from jaxgrpo.data import draw
from jaxgrpo.evaluate import Evaluation, evaluate_heldout
from jaxgrpo.metrics import RunLog, completion_records, speed, summary
from jaxgrpo.models import lora
from jaxgrpo.models.hf import load_hf
from jaxgrpo.models.qwen3 import Qwen3
from jaxgrpo.rollout import Group, collect, pack
from jaxgrpo.sharding import make_mesh, move_to, parse_rules
from jaxgrpo.task import Task, check_batch, fingerprint, load_task, open_run_dir
from jaxgrpo.terminal import Display
from jaxgrpo.types import RolloutBatch, TrainState
from jaxgrpo.update import (
    batch_logprobs,
    init_train_state,
    make_optimizer,
    take_part,
    train_step,
)

# Step of the preflight's random keys; training counts from 0, evaluation has one of its own.
_PREFLIGHT = 2**32 - 2
_BAD_UPDATES = 3  # in a row, that end a run


def main() -> None:
    """The command."""
    config = parse_args(sys.argv[1:])
    with cluster.join(config.cluster):
        train(config)


def train(config: Config) -> None:
    """Runs a configuration to its last step, from the start or from the last checkpoint.

    Raises:
      ValueError: the configuration, a file that it names or the rewards' signal is at fault, in
        one line that says what to do.
    """
    validate(config)
    cluster.check_same(partial(fingerprint, config))
    mesh = make_mesh(config.mesh)
    rules = parse_rules(config.mesh.train_rules, "mesh.train_rules")
    check_batch(config, mesh, rules)
    task = load_task(config, mesh)
    run_dir = open_run_dir(config)
    log, clock, compilations = RunLog(run_dir), Clock(), Compilations()
    key = jax.random.key(config.run.seed)
    with (
        jax.set_mesh(mesh),
        Checkpoints(run_dir / "checkpoints", config.checkpoint.keep) as checkpoints,
        Display(config.run.steps, config.run.quiet) as display,
    ):
        dtype = jnp.dtype(config.model.dtype)
        model = load_hf(
            config.model.path,
            mesh,
            dtype if config.lora.rank else jnp.float32,
            compute_dtype=dtype,
            remat=config.model.remat,
            unroll=config.model.unroll,
            attention=config.model.attention,
            rules=rules,
        )
        model = lora.adapt(model, config.lora, jax.random.fold_in(key, 0))  # steps count from 1
        # A copy, because the update donates its state; weights are multiplied in `dtype` anyway.
        reference = None
        if config.grpo.kl_beta and not config.lora.rank:
            reference = jax.tree.map(lambda w: jnp.array(w, dtype, copy=True), model)
            if config.grpo.reference == "host":
                reference = move_to(reference, "pinned_host")
        tx = make_optimizer(config.update, config.run.steps)
        state = init_train_state(model, tx, mesh)
        del model
        position, patience, bad_updates = 0, preflight.Patience(config.signal), 0

        def evaluate(step: int, plan: Sequence[Evaluation]) -> None:
            records = []
            for what in plan:
                record = evaluate_heldout(
                    task.sampler,
                    task.schema,
                    state.model,
                    task.heldout,
                    what,
                    batch=config.eval.batch,
                    seed=config.run.seed,
                )
                records.append({"step": step} | record)
                display.evaluation(records[-1])
            log.write("eval", records)

        every, now_and_then = evaluation_plan(config)
        saved = cluster.on_main(checkpoints.latest)
        if saved is None:
            log.rewind(-1)
            size, learned = (
                sum(leaf.size for leaf in jax.tree.leaves(part))
                for part in (state.model, lora.split(state.model)[0])
            )
            display.say(
                f"{config.model.path}: {size:,} parameters, of which {learned:,} are trained, on"
                f" {mesh.size} {mesh.devices.flat[0]}",
                f"{len(task.problems)} problems, run directory {run_dir}",
            )
            look_first(config, task, state.model, key, display)
            evaluate(0, every)
        else:
            trained, frozen = lora.split(state.model)
            abstract = abstract_on(state._replace(model=trained), mesh, rules)
            del state, trained
            state, progress = checkpoints.restore(saved, abstract)
            state = state._replace(model=lora.join(state.model, frozen))
            position, patience.idle = progress["position"], progress["idle"]
            task.sampler.hints = progress["hints"]
            log.rewind(saved)
            display.say(f"restored step {saved} from {run_dir}, {position} problems drawn")

        for step in range(int(state.step) + 1, config.run.steps + 1):
            batch_groups, sampled, position = collect(
                task.sampler,
                task.scorer,
                state.model,
                task.problems,
                position,
                jax.random.fold_in(key, step),
                config.rollout,
                seed=config.run.seed,
                clock=clock,
            )
            batch = pack(batch_groups, config.grpo, task.sampler, rules)
            state, metrics = learn(config, tx, state, reference, batch, clock)

            record = {"step": step, "position": position, **summary(sampled), **metrics}
            record |= speed(sampled, batch_groups, clock.take(), config.update.epochs)
            record["compilations"] = compilations.count
            log.write("metrics", [record])
            log.write("completions", list(completion_records(step, sampled)))
            display.step(record)

            patience.see(sampled)
            bad_updates = bad_updates + 1 if metrics["skipped"] else 0
            if bad_updates == _BAD_UPDATES:
                raise ValueError(
                    f"step {step}: loss or gradient was not finite {bad_updates} times in a row;"
                    " no such update was applied. Lower update.lr or set model.dtype to float32"
                )
            last = step == config.run.steps
            if config.eval.every and step % config.eval.every == 0 and not last:
                evaluate(step, now_and_then)
            if step % config.checkpoint.every == 0 or last:
                progress = {"position": position, "idle": patience.idle}
                progress |= {"hints": task.sampler.hints}
                trained, _ = lora.split(state.model)
                checkpoints.save(step, state._replace(model=trained), progress)

        if cluster.on_main(lambda: log.read("eval")[-1]["step"]) != config.run.steps:
            evaluate(config.run.steps, every[::-1])
        display.before_and_after(log.read("eval"))
        display.say(
            f"\nThe run is in {run_dir}. Next:",
            f"  python -m jaxgrpo.export {run_dir} OUT_DIR      a Hugging Face directory, to serve",
            f"  python -m jaxgrpo.evaluate --model {run_dir} --data FILE.jsonl --schema FILE.json",
        )


def evaluation_plan(config: Config) -> tuple[list[Evaluation], list[Evaluation]]:
    """What is evaluated before training, and what on the way; after it, the first in reverse.

    So the ends of eval.jsonl are the two records to compare: the first file, greedily.
    """
    first, *others = (Evaluation(path) for path in config.data.heldout)
    every = [first]
    if config.eval.samples:
        every.append(Evaluation(first.data, config.sampling.temperature, config.eval.samples))
    return every + others, [first]


def learn(
    config: Config,
    tx: optax.GradientTransformation,
    state: TrainState,
    reference: Qwen3 | None,
    batch: RolloutBatch,
    clock: Clock,
) -> tuple[TrainState, dict[str, float | None]]:
    """All optimiser steps on one rollout.

    Returns:
      The next state, and the metrics of `train_step` over its steps: means, but of the ratio the
      extremes; None for a value that is not finite.
    """
    update, temperature = config.update, config.sampling.temperature
    chunk_bytes = config.model.logits_mb << 20
    logprobs = partial(batch_logprobs, temperature=temperature, chunk_bytes=chunk_bytes)
    ref_PGC = old_PGC = None
    if config.grpo.kl_beta:
        _, frozen = lora.split(state.model)
        reference = reference if frozen is None else frozen  # without adapters it is what it was
        with clock("reference"):
            # A no-op but for one that is kept in the host's memory.
            ref_PGC = jax.block_until_ready(logprobs(move_to(reference, "device"), batch))
    if update.epochs * update.minibatches > 1:  # else the step's own are the old ones
        with clock("old"):
            old_PGC = jax.block_until_ready(logprobs(state.model, batch))
    steps = []
    with clock("update"):
        for minibatch in [*range(update.minibatches)] * update.epochs:
            part = take_part((batch, old_PGC, ref_PGC), minibatch, update.minibatches)
            state, metrics = train_step(
                state,
                *part,
                tx=tx,
                config=config.grpo,
                microbatches=update.microbatches,
                temperature=temperature,
                max_tokens=config.sampling.max_tokens,
                chunk_bytes=chunk_bytes,
            )
            steps.append(jax.device_get(metrics))
    # The extremes of the ratio stay extremes over the steps.
    over_steps = {"ratio_min": np.min, "ratio_max": np.max}
    values = {
        name: float(over_steps.get(name, np.mean)([m[name] for m in steps])) for name in steps[0]
    }
    # JSON has no words for NaN and infinity.
    return (
        state._replace(step=state.step + 1),
        {name: value if math.isfinite(value) else None for name, value in values.items()},
    )


def look_first(config: Config, task: Task, model: Qwen3, key: jax.Array, display: Display) -> None:
    """The preflight: samples some groups, shows them, and refuses to start without signal."""
    rollout = config.rollout
    groups: list[Group] = []
    while len(groups) < config.signal.preflight_groups:
        answers = task.sampler(
            model,
            draw(task.problems, len(groups), rollout.problems, config.run.seed),
            jax.random.fold_in(key, _PREFLIGHT),
            temperature=config.sampling.temperature,
            group=rollout.group,
            batch=rollout.problems,
        )
        groups += task.scorer(answers)
    if groups:
        display.say(*preflight.describe(groups))
        preflight.check(groups, config.signal)


if __name__ == "__main__":
    run_main(main)
