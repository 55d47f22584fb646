"""Trains a model with GRPO and proves it on held-out problems.

    python -m jaxgrpo.train [CONFIG.toml] [--section.field value ...]

Without CONFIG.toml it is the tiny invoice run that ships with the package. The same command on an
existing run directory goes on where that run stopped; `--run.fresh` starts anew.
"""

import signal

if __name__ == "__main__":
    # Some extension modules turn a KeyboardInterrupt while they load into an ImportError.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import math
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxgrpo import cluster, preflight
from jaxgrpo.checkpoint import Checkpoints, abstract_on
from jaxgrpo.cli import run_main
from jaxgrpo.clock import Clock, Compilations
from jaxgrpo.config import Config, validate
from jaxgrpo.config_file import parse_args
from jaxgrpo.data import draw
from jaxgrpo.evaluate import Evaluation, best_evaluation, evaluate_heldout
from jaxgrpo.heap import limit_heaps
from jaxgrpo.identity import digests, identity, settings
from jaxgrpo.metrics import (
    RunLog,
    answer_records,
    completion_records,
    speed,
    summary,
    unscored,
    write_batch,
)
from jaxgrpo.models import lora
from jaxgrpo.models.hf import load_hf
from jaxgrpo.models.qwen3 import Qwen3
from jaxgrpo.report import write_report
from jaxgrpo.rewards.pool import Compared
from jaxgrpo.rollout import Answers, Group, collect, pack
from jaxgrpo.run_dir import open_run_dir
from jaxgrpo.sharding import Rules, fetch, make_mesh, move_to, parse_rules
from jaxgrpo.stop import Stopped, StopSignals
from jaxgrpo.task import Task, check_batch, load_task
from jaxgrpo.terminal import Display
from jaxgrpo.trackers import Trackers, check_installed
from jaxgrpo.types import RolloutBatch, TrainState
from jaxgrpo.update import (
    batch_logprobs,
    init_train_state,
    make_optimizer,
    take_part,
    train_step,
)
from jaxgrpo.watchdog import Watchdog

# Step of the preflight's random keys; training counts from 0, evaluation has one of its own.
_PREFLIGHT = 2**32 - 2
_BAD_UPDATES = 3  # in a row, that end a run


def main() -> None:
    """The command."""
    limit_heaps()
    config = parse_args(sys.argv[1:])
    with cluster.join(config.cluster):
        train(config)


def train(config: Config) -> None:
    """Runs a configuration to its last step, from the start or from the last checkpoint.

    Raises:
      ValueError: the configuration, a file that it names or the rewards' signal is at fault, in
        one line that says what to do.
      OSError: a checkpoint cannot be written.
      Stopped: SIGTERM or SIGINT came; what was done is saved.
    """
    validate(config)
    check_installed(config.run.trackers)
    files = digests(config)
    cluster.check_same(lambda: {"the version of jax": jax.__version__, **settings(config), **files})
    mesh = make_mesh(config.mesh)
    rules = parse_rules(config.mesh.train_rules, "mesh.train_rules")
    check_batch(config, mesh, rules)
    me = identity(config, files)
    key = jax.random.key(config.run.seed)
    with (
        StopSignals() as stop,
        load_task(config, mesh) as task,
        jax.set_mesh(mesh),
        Display(config.run.steps, config.run.quiet) as display,
        open_run_dir(config, me, display.say) as (run_dir, saved),
        Trackers(config, run_dir, display.say) as trackers,
        Checkpoints(run_dir / "checkpoints", config.checkpoint.keep) as checkpoints,
    ):
        log, compilations = RunLog(run_dir, display.say, trackers), Compilations()
        task.pool.output = run_dir / f"rewards_{cluster.index()}.log"
        stacks = run_dir / f"stacks_{cluster.index()}.txt"
        watch = Watchdog(stacks, config.run.stall, display.say)
        look = partial(stop_together, stop)
        clock = Clock(look, watch)
        model = load_policy(config, mesh, rules, key)
        reference = copy_reference(config, model)
        tx = make_optimizer(config.update, config.run.steps)
        state = init_train_state(model, tx, mesh)
        del model
        progress: dict[str, Any] = {"identity": me, "position": 0, "idle": 0, "hints": []}
        every, now_and_then = evaluation_plan(config)

        def evaluate(plan: Sequence[Evaluation]) -> None:
            step, records = int(state.step), []
            answered: list[dict[str, Any]] = []
            for what in plan:
                judged: list[tuple[Answers, list[Compared]]] = []
                with watch("evaluate"):
                    record = evaluate_heldout(
                        task.sampler,
                        task.pool,
                        state.model,
                        task.heldout,
                        what,
                        batch=config.eval.batch,
                        seed=config.run.seed,
                        before=look,
                        seen=judged.append,
                    )
                if what == every[0]:
                    answered += answer_records(step, judged)
                records.append({"step": step} | record)
                display.evaluation(records[-1])
            log.write("eval", records)
            log.write("answers", answered)

        def evaluate_on_the_way() -> None:
            step = int(state.step)
            if config.eval.every and step % config.eval.every == 0 and step < config.run.steps:
                evaluate(now_and_then)

        def last_evaluated() -> int:
            steps = [record["step"] for record in log.read("eval")]
            return max(steps, default=-1)

        def save() -> None:
            step = int(state.step)
            checkpoints.wait()  # all of them: where the last save failed, `steps` would not return
            best = cluster.on_main(
                lambda: best_evaluation(log.read("eval"), [*checkpoints.steps(), step])
            )
            trained, _ = lora.split(state.model)
            with watch("save"):
                checkpoints.save(
                    step,
                    state._replace(model=trained),
                    progress | {"best": best},
                    best=None if best is None else best["step"],
                )

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
            evaluate(every)
        else:
            trained, frozen = lora.split(state.model)
            abstract = abstract_on(state._replace(model=trained), mesh, rules)
            del state, trained
            state, restored = checkpoints.restore(saved, abstract)
            state = state._replace(model=lora.join(state.model, frozen))
            progress |= restored | {"identity": me}
            log.rewind(saved)
            display.say(
                f"restored step {saved} from {run_dir}, {progress['position']} problems drawn"
            )
            if cluster.on_main(last_evaluated) < saved:  # it was stopped while it evaluated
                evaluate_on_the_way()

        task.sampler.hints = progress["hints"]
        patience = preflight.Patience(config.signal, progress["idle"], task.full)
        bad_updates = 0
        try:
            with stop.deferred():
                for step in range(int(state.step) + 1, config.run.steps + 1):
                    groups, sampled, position = collect(
                        task.sampler,
                        task.scorer,
                        state.model,
                        task.problems,
                        progress["position"],
                        jax.random.fold_in(key, step),
                        config.rollout,
                        seed=config.run.seed,
                        clock=clock,
                    )
                    batch = pack(groups, config.grpo, task.sampler, rules)
                    state, metrics = learn(config, tx, state, reference, batch, clock)

                    record = {"step": step, "position": position}
                    record |= summary(sampled, by_schema=task.full is None) | metrics
                    record |= speed(sampled, groups, clock.take(), config.update.epochs)
                    record["compilations"] = compilations.count
                    log.write("metrics", [record])
                    log.write("completions", list(completion_records(step, sampled)))
                    display.step(record)
                    display.say(*unscored(step, sampled))

                    patience.see(sampled)
                    progress |= {"position": position, "idle": patience.idle}
                    progress |= {"hints": task.sampler.hints}
                    bad_updates = bad_updates + 1 if metrics["skipped"] else 0
                    if bad_updates == _BAD_UPDATES:
                        give_up(step, batch, metrics, run_dir)
                    evaluate_on_the_way()
                    if step % config.checkpoint.every == 0 or step == config.run.steps:
                        save()
        except Stopped as stopped:
            step = int(state.step)
            checkpoints.wait()  # it may be this very step's
            if step and step not in cluster.on_main(checkpoints.steps):
                save()
                checkpoints.wait()
            log.finish()
            where = f"step {step} is saved in {run_dir}; the same command goes on from it"
            raise Stopped(stopped.number, where if step else "no step was done") from None

        checkpoints.wait()  # from here on nothing is lost, whatever ends the process
        log.finish()
        if cluster.on_main(last_evaluated) != config.run.steps:
            evaluate(every[::-1])
        log.finish()
        display.before_and_after(log.read("eval"))
        if cluster.is_main():
            write_report([run_dir], run_dir / "report.html", display.say)
        display.say(
            f"\nThe run is in {run_dir}, and shown in its report.html. Next:",
            f"  python -m jaxgrpo.export {run_dir} OUT_DIR      a Hugging Face directory, to serve",
            f"  python -m jaxgrpo.evaluate --model {run_dir} --data FILE.jsonl --schema FILE.json",
        )


def load_policy(config: Config, mesh: Mesh, rules: Rules, key: jax.Array) -> Qwen3:
    """The model to train, with fresh adapters if there are to be any."""
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
    return lora.adapt(model, config.lora, jax.random.fold_in(key, 0))  # steps count from 1


def copy_reference(config: Config, model: Qwen3) -> Qwen3 | None:
    """What the KL term holds the policy to; None where there is none, or adapters leave it as is.

    A copy, because the update donates its state; weights are multiplied in `model.dtype` anyway.
    """
    if not config.grpo.kl_beta or config.lora.rank:
        return None
    dtype = jnp.dtype(config.model.dtype)
    reference = jax.tree.map(lambda w: jnp.array(w, dtype, copy=True), model)
    return move_to(reference, "pinned_host") if config.grpo.reference == "host" else reference


def stop_together(stop: StopSignals) -> None:
    """Looks whether any process was told to stop; all of them are at the same place.

    Raises:
      Stopped: one was.
    """
    for number in cluster.gather(lambda: stop.received):
        if number is not None:
            raise Stopped(number)


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


def give_up(
    step: int, batch: RolloutBatch, metrics: Mapping[str, float | None], run_dir: Path
) -> NoReturn:
    """Ends a run whose updates are not finite any more, with the last batch in its directory."""
    file = run_dir / f"nonfinite_step_{step}.npz"
    arrays = fetch(batch)
    if cluster.is_main():
        write_batch(file, arrays)
    which = ", ".join(name for name, value in metrics.items() if value is None)
    raise ValueError(
        f"step {step}: {_BAD_UPDATES} updates in a row were not finite ({which}); none was"
        f" applied, and the batch is in {file}. Lower update.lr or set model.dtype to float32"
    )


def look_first(config: Config, task: Task, model: Qwen3, key: jax.Array, display: Display) -> None:
    """The preflight: samples some groups, shows them, and refuses to start without signal."""
    rollout = config.rollout
    groups: list[Group] = []
    # A few groups may all be without by chance: four times as many are seen before refusing.
    for wanted in (config.signal.preflight_groups, 4 * config.signal.preflight_groups):
        while len(groups) < wanted:
            answers = task.sampler(
                model,
                draw(task.problems, len(groups), rollout.problems, config.run.seed),
                jax.random.fold_in(key, _PREFLIGHT),
                temperature=config.sampling.temperature,
                group=rollout.group,
                batch=rollout.problems,
            )
            groups += task.scorer(answers)
        if not groups or preflight.has_enough(groups, config.signal):
            break
    if groups:
        display.say(*preflight.describe(groups))
        preflight.check(groups, config.signal, task.full)


if __name__ == "__main__":
    run_main(main)
