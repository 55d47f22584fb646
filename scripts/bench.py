"""Times a GRPO step on random weights, beside what the machine could do at best.

    python -m scripts.bench --shape M                      # sample, update and step
    python -m scripts.bench --shape M --phase update --plain
    python -m scripts.bench --shape L --counts             # no clock: FLOPs and bytes

Every completion has exactly its full length. JSON lines: the machine's own rates, then one record
for each phase. What the fields mean and where the floors come from: docs/performance.md.
"""

import argparse
import dataclasses
import json
import resource
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from jaxgrpo import grpo, hlo
from jaxgrpo.clock import Compilations
from jaxgrpo.config import GrpoConfig, UpdateConfig
from jaxgrpo.logprobs import token_logprobs
from jaxgrpo.models.qwen3 import Qwen3
from jaxgrpo.sampling import sample
from jaxgrpo.types import Completions, Prompts, RolloutBatch, TrainState
from jaxgrpo.update import make_optimizer, train_step
from jaxgrpo.work import Machine, Shape, sample_floor, update_floor, update_flops

# S, M and L are those of the comparison with other trainers; the last is Qwen3-0.6B's.
SHAPES = {
    "XS": Shape(256, 64, 2, 2, 1, 32, 128, problems=2, group=4, prompt=16, completion=8),
    "S": Shape(512, 128, 4, 4, 2, 32, 384, problems=8, group=8, prompt=128, completion=64),
    "M": Shape(8192, 512, 8, 8, 4, 64, 1536, problems=4, group=8, prompt=256, completion=64),
    "L": Shape(32768, 768, 12, 12, 4, 64, 2048, problems=2, group=8, prompt=256, completion=64),
    "0.6B": Shape(
        151936, 1024, 28, 16, 8, 128, 3072, problems=1, group=8, prompt=256, completion=64
    ),
}

OBJECTIVE = GrpoConfig(loss="grpo")
OPTIMIZER = UpdateConfig(lr=1e-4)


# ---------------------------------------------------------------------------- the machine


def best_seconds(run: Callable[[], Any], at_least: float = 1.5) -> float:
    """The fastest of several runs: what is slower was somebody else's doing."""
    run()
    times: list[float] = []
    end = time.perf_counter() + at_least
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def measure_machine(dtype: str, megabytes: int, size: int = 2048) -> Machine:
    """The rate of a square matrix product, and of updating an array in place."""
    a = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
    product = jax.jit(jnp.matmul)
    seconds = best_seconds(lambda: product(a, a).block_until_ready())
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = [jnp.ones(megabytes << 18, jnp.float32)]

    def update() -> None:
        x[0] = add(x[0]).block_until_ready()

    return Machine(2 * size**3 / seconds, 2 * (megabytes << 20) / best_seconds(update))


# ---------------------------------------------------------------------------- the work


def make_model(shape: Shape, dtype: str, *, unroll: bool, remat: str) -> Qwen3:
    """Random weights."""
    config = shape.config(dtype, unroll=unroll, remat=remat)
    return jax.jit(lambda: Qwen3(config, nnx.Rngs(0)))()


def make_batch(shape: Shape) -> RolloutBatch:
    """Random prompts, completions and advantages, all of full length."""
    rng = np.random.default_rng(0)
    p, g, c = shape.problems, shape.group, shape.completion
    ids = rng.integers(0, shape.vocab, (p, shape.prompt)).astype(np.int32)
    prefix_len_P = np.full(p, shape.prompt - 1, np.int32)
    return RolloutBatch(
        Prompts(ids[:, :-1].copy(), prefix_len_P, ids[:, -1].copy()),
        Completions(
            rng.integers(0, shape.vocab, (p, g, c)).astype(np.int32),
            np.full((p, g, c), -np.log(shape.vocab), np.float32),
            np.full((p, g), c, np.int32),
            np.ones((p, g), bool),
        ),
        rng.standard_normal((p, g)).astype(np.float32),
        np.ones((p, g), bool),
    )


def each_completion_alone(batch: RolloutBatch) -> RolloutBatch:
    """The same batch with a prompt for every completion: nothing is shared."""
    group = batch.advantage_PG.shape[1]
    prompts = jax.tree.map(lambda x: np.repeat(x, group, 0), batch.prompts)
    rest = jax.tree.map(lambda x: x.reshape(-1, 1, *x.shape[2:]), batch._replace(prompts=None))
    return rest._replace(prompts=prompts)


@partial(jax.jit, static_argnames=("tx", "full_head"), donate_argnames="state")
def whole_sequence_step(
    state: TrainState, batch: RolloutBatch, *, tx: optax.GradientTransformation, full_head: bool
) -> TrainState:
    """The update done the ordinary way, on prompt and completion as one sequence each.

    Args:
      state: donated.
      batch: from `each_completion_alone`, all of full length.
      tx: from `make_optimizer`.
      full_head: logits at the prompt's positions too.
    """
    prompts, done = batch.prompts, batch.completions
    ids_BT = jnp.concatenate(
        [prompts.prefix_PL, prompts.last_P[:, None], done.tokens_PGC[:, 0, :-1]], 1
    )
    start = 0 if full_head else prompts.prefix_PL.shape[1]
    targets_B1T = jnp.concatenate([ids_BT[:, 1:], done.tokens_PGC[:, 0, -1:]], 1)[:, None, start:]
    mask_PGC = grpo.completion_mask(done.length_PG, done.tokens_PGC.shape[-1])
    weight_PGC = grpo.token_weights(mask_PGC, OBJECTIVE.loss, done.tokens_PGC.shape[-1])

    def loss(model: Qwen3) -> Array:
        model = model.apart()
        hidden, _ = model(ids_BT[:, None])
        logp, _ = token_logprobs(hidden[:, :, start:], model.head_VD(), targets_B1T)
        logp_PGC = logp[..., -done.tokens_PGC.shape[-1] :]
        clips = {"clip_low": OBJECTIVE.clip_low, "clip_high": OBJECTIVE.clip_high}
        return grpo.policy_loss(
            logp_PGC, logp_PGC, batch.advantage_PG, mask_PGC, weight_PGC,
            loss=OBJECTIVE.loss, **clips,
        )[0]  # fmt: skip

    grads = jax.grad(loss)(state.model)
    with jax.numpy_dtype_promotion("standard"):  # as in `train_step`
        updates, opt_state = tx.update(grads, state.opt_state, state.model)
    return TrainState(optax.apply_updates(state.model, updates), opt_state, state.step + 1)


class Bench:
    """The two programs of a step, on one batch of one shape."""

    def __init__(self, shape: Shape, model: Qwen3, *, plain: bool, full_head: bool):
        self.shape, self.plain = shape, plain
        self._batch = make_batch(shape)
        if plain:
            self._batch = each_completion_alone(self._batch)
        prompts = self._batch.prompts
        self._sample = partial(
            sample,
            prompts=prompts,
            key=jax.random.key(0),
            problem_P=np.arange(len(prompts.last_P), dtype=np.uint32),
            temperature=np.float32(1),
            group=1 if plain else shape.group,
            max_tokens=shape.completion,
            stop_ids=(shape.vocab,),  # never drawn
        )
        tx = make_optimizer(OPTIMIZER, 1000)
        if plain:
            self._update = partial(
                whole_sequence_step, batch=self._batch, tx=tx, full_head=full_head
            )
        else:
            self._update = partial(
                train_step, batch=self._batch, old_PGC=None, ref_PGC=None, tx=tx, config=OBJECTIVE,
                microbatches=1, temperature=1.0, max_tokens=shape.completion,
                chunk_bytes=256 << 20,
            )  # fmt: skip
        opt_state = jax.jit(tx.init)(model)
        self._state = TrainState(model, opt_state, jnp.int32(0))

    def sample(self) -> None:
        """Draws all completions."""
        done = jax.block_until_ready(self._sample(self._state.model))
        assert (np.asarray(done.length_PG) == self.shape.completion).all()

    def update(self) -> None:
        """One optimiser step on completions that are there already."""
        state = self._update(self._state)
        self._state = jax.block_until_ready(state if self.plain else state[0])

    def step(self) -> None:
        """Both."""
        self.sample()
        self.update()

    def counts(self) -> dict[str, dict[str, int]]:
        """What the compiled programs compute and hold."""
        lowered = {
            "sample": self._sample.func.lower(self._state.model, **self._sample.keywords),
            "update": self._update.func.lower(self._state, **self._update.keywords),
        }
        records = {}
        for name, program in lowered.items():
            compiled = program.compile()
            memory = compiled.memory_analysis()
            records[name] = {
                "forward_tokens": self.shape.forward_tokens(plain=self.plain),
                "matmul_flops": hlo.matmul_flops(
                    hlo.parse(compiled.as_text()), self.shape.completion
                ),
                "temp_bytes": memory.temp_size_in_bytes,
                "argument_bytes": memory.argument_size_in_bytes,
                "donated_bytes": memory.alias_size_in_bytes,
            }
        return records


def time_phase(run: Callable[[], None], repeats: int) -> dict[str, float]:
    """Seconds of the first run, which compiles, and of the others."""
    start = time.perf_counter()
    run()
    first = time.perf_counter() - start
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return {
        "seconds": statistics.median(times),
        "seconds_min": min(times),
        "seconds_max": max(times),
        "first_seconds": first,
    }


def rates(name: str, seconds: float, shape: Shape, machine: Machine, itemsize: int) -> dict:
    """Throughput, the floor of the phase, and how much of the roof that is."""
    floors = {
        "sample": sample_floor(shape, machine, itemsize),
        "update": update_floor(shape, machine, itemsize),
    }
    parts = floors["sample"] | floors["update"] if name == "step" else floors[name]
    record = {
        "floor_seconds": sum(parts.values()),
        "fraction_of_roof": sum(parts.values()) / seconds,
        "tokens_per_second": shape.branches * shape.completion / seconds,
    }
    if name == "update":
        record["useful_share_of_matmul_rate"] = update_flops(shape) / seconds / machine.flops
    return record


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="S")
    parser.add_argument("--phase", choices=("all", "sample", "update", "step"), default="all")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    for name in ("problems", "group", "prompt", "completion", "vocab"):
        parser.add_argument(f"--{name}", type=int, help=f"in place of the shape's {name}")
    parser.add_argument("--plain", action="store_true", help="every sequence whole, none shared")
    parser.add_argument("--full-head", action="store_true", help="plain: logits of prompts, too")
    parser.add_argument("--scan", action="store_true", help="layers in a loop, as model.unroll off")
    parser.add_argument("--remat", choices=("none", "dots", "full"), default="none")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--counts", action="store_true", help="count in the programs, time nothing")
    args = parser.parse_args()
    if args.full_head and not args.plain:
        parser.error("--full-head goes with --plain")

    given = {name: value for name, value in vars(args).items() if value is not None}
    fields = {field.name for field in dataclasses.fields(Shape)}
    shape = dataclasses.replace(
        SHAPES[args.shape], **{name: value for name, value in given.items() if name in fields}
    )
    compilations = Compilations()
    model = make_model(shape, args.dtype, unroll=not args.scan, remat=args.remat)
    bench = Bench(shape, model, plain=args.plain, full_head=args.full_head)
    what = {name: given[name] for name in ("shape", "dtype", "plain", "full_head", "scan", "remat")}
    what |= {name: getattr(shape, name) for name in ("problems", "group", "prompt", "completion")}
    if args.counts:
        for name, counted in bench.counts().items():
            print(json.dumps({"program": name} | what | counted), flush=True)
        return
    weights = 4 * (shape.layer_weights + shape.head_weights)
    machine = measure_machine(args.dtype, max(64, weights >> 20))
    print(json.dumps({"machine": dataclasses.asdict(machine)}), flush=True)
    for name in ("sample", "update", "step") if args.phase == "all" else (args.phase,):
        record = time_phase(getattr(bench, name), args.repeats)
        itemsize = jnp.dtype(args.dtype).itemsize
        record |= rates(name, record["seconds"], shape, machine, itemsize)
        record = {key: float(f"{value:.4g}") for key, value in record.items()}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        more = {"peak_rss_mb": peak, "compilations": compilations.count}
        print(json.dumps({"phase": name} | what | record | more), flush=True)


if __name__ == "__main__":
    main()
