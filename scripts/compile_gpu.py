"""Compiles the update and the sampler for GPUs that need not be there, and says what they hold.

    python -m scripts.compile_gpu --target h200.txtpb --devices 1 --shape qwen3-0.6b

Prints one JSON line a program. Nothing is allocated: arguments are shapes with shardings. Needs
JAX's CUDA plugin and a `ptxas`, but no driver and no GPU. TARGET is a `GpuTargetConfigProto` in
text form; on a machine that has the GPU it is `target_config` of
`jaxlib.xla_client.get_topology_for_devices(jax.devices())`.

A program that needs more memory than there is compiles all the same: compare argument + temp +
output - alias with the device. Kernels are not tuned for want of a device, so speed is not told.
"""

import argparse
import json
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxgrpo.config import GrpoConfig, MeshConfig, UpdateConfig
from jaxgrpo.models.qwen3 import Qwen3, Qwen3Config
from jaxgrpo.sampling import sample
from jaxgrpo.sharding import FSDP, make_mesh, param_shardings
from jaxgrpo.types import Completions, Prompts, RolloutBatch, TrainState
from jaxgrpo.update import make_optimizer, train_step
from scripts import hlo

SHAPES: dict[str, dict[str, Any]] = {
    name: {
        "vocab": 151936,
        "width": width,
        "layers": layers,
        "heads": heads,
        "kv_heads": 8,
        "head_dim": 128,
        "ffn": ffn,
        "tied": tied,
        "dtype": jnp.dtype("bfloat16"),
    }
    for name, width, layers, heads, ffn, tied in (
        ("qwen3-0.6b", 1024, 28, 16, 3072, True),
        ("qwen3-1.7b", 2048, 28, 16, 6144, True),
        ("qwen3-4b", 2560, 36, 32, 9728, True),
        ("qwen3-8b", 4096, 36, 32, 12288, False),
    )
}

# Neither looks for the fastest kernels, which takes a device.
GEMMS = {
    "cublas": {"xla_gpu_enable_triton_gemm": False},
    "triton": {"xla_gpu_autotune_level": 0},
}


def main() -> None:
    """The command."""
    args = _arguments()
    jax.config.update("jax_platforms", "cpu")
    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        topology=f"1x1x{args.devices}",
        target_config=args.target.read_text("utf-8"),
    )
    mesh = make_mesh(MeshConfig(fsdp=args.devices), topology.devices)
    with jax.set_mesh(mesh):
        for program, lower in _programs(args, mesh):
            start = time.perf_counter()
            compiled = lower().compile(compiler_options=GEMMS[args.gemm])
            seconds = time.perf_counter() - start
            record = {"program": program, "devices": args.devices}
            record |= {"compile_seconds": round(seconds, 1)} | measure(compiled, args)
            print(json.dumps(record), flush=True)
            if args.hlo:
                args.hlo.mkdir(parents=True, exist_ok=True)
                name = program.replace(" ", "_").replace("=", "")
                (args.hlo / f"{name}.hlo").write_text(compiled.as_text(), "utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--target", type=Path, required=True, help="GpuTargetConfigProto, text")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-0.6b")
    parser.add_argument("--problems", type=int, default=16)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--prefix", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=128, help="of a completion, at most")
    parser.add_argument("--logits-mb", type=int, default=256, help="as model.logits_mb")
    parser.add_argument("--remat", nargs="*", default=["full", "dots"], help="of the updates")
    parser.add_argument("--microbatches", nargs="*", type=int, default=[1, 2], help="likewise")
    parser.add_argument("--draft", nargs="*", type=int, default=[0, 3], help="of the samplers")
    parser.add_argument("--unroll", action="store_true", help="layers apart in the updates")
    parser.add_argument(
        "--attention", choices=["xla", "cudnn"], default="xla", help="as Qwen3Config"
    )
    parser.add_argument("--gemm", choices=GEMMS, default="cublas", help="library of the products")
    parser.add_argument("--hlo", type=Path, help="directory for the programs' text")
    return parser.parse_args()


# ---------------------------------------------------------------------------- programs


def _programs(args: argparse.Namespace, mesh: Mesh) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Names of programs, and what lowers each."""
    for remat, parts in product(args.remat, args.microbatches):
        config = Qwen3Config(
            **SHAPES[args.shape], remat=remat, unroll=args.unroll, attention=args.attention
        )
        name = f"update remat={remat} microbatches={parts}"
        yield name, partial(_update, config, parts, args, mesh)
    for draft in args.draft:
        config = Qwen3Config(**SHAPES[args.shape], attention=args.attention)
        yield f"sample draft={draft}", partial(_sample, config, draft, args, mesh)


def _update(config: Qwen3Config, microbatches: int, args: argparse.Namespace, mesh: Mesh) -> Any:
    model = _model(config, mesh)
    tx = make_optimizer(UpdateConfig(warmup_steps=8, microbatches=microbatches), 100)
    opt_state = _on(mesh, jax.eval_shape(tx.init, model))
    shape = (args.problems, args.group)
    completions = Completions(
        _problems(mesh, (*shape, args.tokens), jnp.int32),
        _problems(mesh, (*shape, args.tokens), jnp.float32),
        _problems(mesh, shape, jnp.int32),
        _problems(mesh, shape, jnp.bool),
    )
    advantage_PG = _problems(mesh, shape, jnp.float32)
    batch = RolloutBatch(
        _prompts(args, mesh), completions, advantage_PG, _problems(mesh, shape, jnp.bool)
    )
    step: Any = _whole(mesh, (), jnp.int32)
    return train_step.lower(
        TrainState(model, opt_state, step),
        batch,
        None,
        completions.logprobs_PGC,
        tx=tx,
        config=GrpoConfig(kl_beta=0.02),
        microbatches=microbatches,
        temperature=1.0,
        max_tokens=args.tokens,
        chunk_bytes=args.logits_mb << 20,
    )


def _sample(config: Qwen3Config, draft: int, args: argparse.Namespace, mesh: Mesh) -> Any:
    return sample.lower(
        _model(config, mesh),
        _prompts(args, mesh),
        _whole(mesh, (), jax.eval_shape(lambda: jax.random.key(0)).dtype),
        _problems(mesh, (args.problems,), jnp.uint32),
        _whole(mesh, (), jnp.float32),
        _whole(mesh, (4 * (args.tokens + 1),), jnp.int32) if draft else None,
        group=args.group,
        max_tokens=args.tokens,
        stop_ids=(0,),
        draft=draft,
    )


def _model(config: Qwen3Config, mesh: Mesh) -> Qwen3:
    return _on(mesh, jax.eval_shape(lambda: Qwen3(config, nnx.Rngs(0))))


def _prompts(args: argparse.Namespace, mesh: Mesh) -> Prompts:
    prefix_PL, each_P = (args.problems, args.prefix), (args.problems,)
    return Prompts(*(_problems(mesh, s, jnp.int32) for s in (prefix_PL, each_P, each_P)))


def _on(mesh: Mesh, tree: Any) -> Any:
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        param_shardings(tree, mesh),
    )


def _problems(mesh: Mesh, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    sharding = NamedSharding(mesh, PartitionSpec(FSDP.problems))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _whole(mesh: Mesh, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))


# ---------------------------------------------------------------------------- what they hold


def measure(compiled: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Memory of a compiled program, on each device, and what in its text is to be looked at.

    Returns:
      Bytes of arguments, of outputs, of outputs that lie in donated arguments, and of all else;
      the largest logits; how often an array shaped as the embedding is written; bytes of at least
      1 MiB that a pass of the decoding loop only moves, by shape; and bytes that a device gets from
      collectives, in the whole program with one pass of that loop, and in such a pass.
    """
    memory, program = compiled.memory_analysis(), hlo.parse(compiled.as_text())
    moved: Counter[str] = Counter()
    exchanged: Counter[str] = Counter()
    for instruction, times in hlo.written(program, program.entry):
        exchanged["all"] += times * hlo.exchanged(instruction)
    for body in hlo.open_loops(program):
        for instruction, times in hlo.written(program, body):
            size = sum(shape.nbytes for shape in instruction.results)
            exchanged["decode"] += times * hlo.exchanged(instruction)
            if size >= 1 << 20 and hlo.moves_only(program, instruction):
                moved[" ".join(map(str, instruction.results))] += times * size
    logits, embeddings = _vocabulary(program, SHAPES[args.shape]["vocab"])
    return {
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "largest_logits": logits and {"shape": str(logits), "bytes": logits.nbytes},
        "embedding_writes": embeddings,
        "decode_moved_bytes": dict(moved),
        "exchanged_bytes": exchanged["all"],
        "decode_exchanged_bytes": exchanged["decode"],
        "host_peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
    }


def _vocabulary(program: hlo.Program, vocab: int) -> tuple[hlo.Shape | None, dict[str, int]]:
    """The largest logits written, and how often what is shaped as the embedding `[V, D]`."""
    largest: hlo.Shape | None = None
    embeddings: Counter[str] = Counter()
    for instruction, times in hlo.written(program, program.entry):
        for shape in instruction.results:
            if len(shape.dims) == 2 and shape.dims[0] == vocab:
                embeddings[str(shape)] += times
            elif hlo.spans(shape.dims, vocab) and shape.nbytes > (largest.nbytes if largest else 0):
                largest = shape
    return largest, dict(embeddings)


if __name__ == "__main__":
    main()
