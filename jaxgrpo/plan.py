"""Says what a run will hold and cost on GPUs before one is paid for.

    python -m jaxgrpo.plan CONFIG.toml [--target h200|h100|FILE] [--devices 8] [--json] [--sweep]

Exit code 0 when the run fits, 1 when it does not, 2 on a mistake. docs/plan.md says what the
figures mean and how they come.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from jaxgrpo.chips import Target, attached_target, read_target
from jaxgrpo.cli import parse, run_main
from jaxgrpo.config import Config, check_ranges, check_settings
from jaxgrpo.config_file import parse_args
from jaxgrpo.estimate import Estimate, abstract_mesh
from jaxgrpo.models import lora
from jaxgrpo.models.qwen3 import Qwen3Config
from jaxgrpo.models.shapes import find_shape
from jaxgrpo.programs import (
    Measured,
    abstract_reference,
    abstract_state,
    bytes_on_device,
    measure,
    run_programs,
    train_rules,
)
from jaxgrpo.sharding import make_mesh, mesh_sizes, ways
from jaxgrpo.task import check_batch
from jaxgrpo.work import cache_reads

Depth = Literal["cuda", "cpu", "arithmetic"]

_DEPTHS = {
    "cuda": "compiled for this GPU, which need not be here",
    "cpu": "compiled for virtual CPU devices: temporaries are an upper estimate, traffic is"
    " arithmetic",
    "arithmetic": "arithmetic alone: temporaries and traffic are estimates",
}

# Triton's products can be counted in a program's text; tuning them would take a GPU.
_CUDA_OPTIONS = {"xla_gpu_autotune_level": 0}


# Context, NCCL's buffers, fragmentation: what XLA_PYTHON_CLIENT_MEM_FRACTION=0.92 leaves, at least.
_RESERVE_SHARE, _RESERVE = 0.08, 8 << 30


@dataclasses.dataclass(frozen=True)
class Options:
    """What to plan for, and how."""

    target: str = ""
    """h200, h100 or a GpuTargetConfigProto in text form; the GPU of this machine if not given, and
    h200 where there is none."""
    devices: int = 0
    """Number of GPUs; those of this machine, or those that the mesh asks for, if not given."""
    depth: Literal["auto", "cuda", "cpu", "arithmetic"] = "auto"
    """Compile for the GPU (needs JAX's CUDA plugin, no GPU: pip install 'jaxgrpo[plan]'), compile
    for virtual CPU devices, or do arithmetic alone; auto takes the first that works."""
    json: bool = False
    """One JSON object in place of tables."""
    sweep: bool = False
    """Compare meshes and numbers of micro-batches instead, by arithmetic if no depth is given."""


class Work(NamedTuple):
    """What one device does in a part of a step, and the least time for it.

    Attributes:
      name: of the part.
      flops: of matrix products.
      memory_bytes: read and written at least.
      received: bytes from other devices, by kind of collective.
      between_nodes: of them, those from other nodes.
      seconds: the longest of the times that each takes alone at the GPU's best.
      limit: which one that is.
    """

    name: str
    flops: float
    memory_bytes: float
    received: dict[str, float]
    between_nodes: float
    seconds: float
    limit: str


class Held(NamedTuple):
    """Bytes on a device while a program runs."""

    parameters: int
    optimizer: int
    reference: int
    batch: int
    sampler_copy: int
    cache: int
    rest: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run holds and costs.

    Attributes:
      depth: how the figures came.
      mesh: its sizes.
      parameters: of the model.
      held: by phase.
      donated: bytes of the update's state that its outputs lie in.
      work: of one step.
      checkpoint_bytes: of one on disk.
      host_bytes: of the reference, in the memory of all hosts together.
    """

    depth: Depth
    mesh: dict[str, int]
    parameters: int
    held: dict[str, Held]
    donated: int
    work: list[Work]
    checkpoint_bytes: int
    host_bytes: int

    @property
    def peak(self) -> int:
        """Most bytes on a device at any time."""
        return self.held[self.peak_phase].total

    @property
    def peak_phase(self) -> str:
        """The phase that needs them."""
        return max(self.held, key=lambda name: self.held[name].total)

    @property
    def step_seconds(self) -> float:
        """The least time for a step, rewards not counted."""
        return sum(work.seconds for work in self.work)


def main() -> None:
    """The command."""
    options, rest = parse(
        Options,
        prog="python -m jaxgrpo.plan CONFIG.toml [--section.field value ...]",
        description="Says what a run will hold and cost on GPUs that need not be here. CONFIG.toml"
        " and its options are those of jaxgrpo.train; of the model only config.json is read, or"
        " nothing where the last part of model.path is a known name as Qwen3-8B. Exit code 1: it"
        " does not fit.",
        args=sys.argv[1:],
        return_unknown_args=True,
    )
    config = parse_args(rest)
    check_ranges(config)
    check_settings(config)
    if not config.model.path:
        raise ValueError(
            "model.path is not set; name a model directory, or a known shape as Qwen3-8B"
        )
    shape = find_shape(config.model.path)
    target, devices = _hardware(options, config)
    if options.sweep:
        depth = choose_depth(options.depth, config) if options.depth != "auto" else "arithmetic"
        rows = list(sweep(config, shape, target, devices, depth))
        if options.json:
            print(json.dumps({"depth": depth, "target": target.name, "sweep": rows}))
        else:
            _print_sweep(rows, depth, target, devices)
        sys.exit(0 if any(row.get("fits") for row in rows) else 1)
    depth = choose_depth(options.depth, config)
    plan = make_plan(config, shape, target, devices, depth)
    fits = plan.peak <= budget(target)
    advice = [] if fits else advise(plan, config, shape, target, devices)
    if options.json:
        print(json.dumps(record(plan, config, target, devices, advice)))
    else:
        _print_plan(plan, config, target, devices, advice)
    sys.exit(0 if fits else 1)


# ---------------------------------------------------------------------------- what to plan with


def _hardware(options: Options, config: Config) -> tuple[Target, int]:
    """The GPU and the number of them."""
    # What was compiled for devices that are not here cannot be read back.
    jax.config.update("jax_enable_compilation_cache", False)
    if options.devices < 0:
        raise ValueError(f"--devices is {options.devices}; it must be at least 1")
    attached = Path("/proc/driver/nvidia/version").exists() and _has_plugin()
    if attached and not options.target and os.environ.get("JAX_PLATFORMS") != "cpu":
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        return attached_target(), options.devices or jax.device_count()
    jax.config.update("jax_platforms", "cpu")
    mesh = config.mesh
    devices = mesh.fsdp * mesh.tp if min(mesh.fsdp, mesh.tp) > 0 else 1
    return read_target(options.target or "h200"), options.devices or devices


def choose_depth(wanted: str, config: Config) -> Depth:
    """The deepest that works here, or the one that is wanted.

    Raises:
      ValueError: that one does not work here.
    """
    match wanted:
        case "auto":
            if _has_plugin() and _has_ptxas():
                return "cuda"
            return "arithmetic" if config.model.attention == "cudnn" else "cpu"
        case "cuda":
            if not _has_plugin():
                raise ValueError(
                    "--depth cuda needs JAX's CUDA plugin: pip install 'jaxgrpo[plan]'"
                )
            if not _has_ptxas():
                raise ValueError(
                    "--depth cuda needs ptxas: pip install nvidia-cuda-nvcc, or put it on the PATH"
                )
            return "cuda"
        case "cpu":
            if config.model.attention == "cudnn":
                raise ValueError(
                    "--depth cpu cannot compile model.attention = 'cudnn': use cuda or arithmetic"
                )
            return "cpu"
    return "arithmetic"


def _has_plugin() -> bool:
    names = ("xla_cuda13", "xla_cuda12")
    return importlib.util.find_spec("jax_plugins") is not None and any(
        importlib.util.find_spec(f"jax_plugins.{name}") for name in names
    )


def _has_ptxas() -> bool:
    spec = importlib.util.find_spec("nvidia")
    wheels = [Path(p) for p in (spec.submodule_search_locations or ())] if spec else []
    return shutil.which("ptxas") is not None or any(
        next(wheel.glob("*/bin/ptxas"), None) for wheel in wheels
    )


def budget(target: Target) -> int:
    """Bytes of a device that a run may use."""
    return target.memory - max(_RESERVE, int(_RESERVE_SHARE * target.memory))


@functools.cache
def _devices(depth: Depth, target: Target, count: int) -> list[jax.Device]:
    """Devices to compile for."""
    if depth == "cpu":
        with contextlib.suppress(RuntimeError):  # where the backend has started
            jax.config.update("jax_num_cpu_devices", count)
        devices = jax.devices("cpu")
        if len(devices) < count:
            raise ValueError(f"--depth cpu has {len(devices)} virtual devices, not {count}")
        return devices[:count]
    node = min(count, target.rates.node)
    if count % node:
        raise ValueError(
            f"--devices {count} is no number of whole nodes of {target.rates.node} devices"
        )
    return topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        topology=f"1x{count // node}x{node}",
        target_config=target.text,
    ).devices


# ---------------------------------------------------------------------------- the plan


def make_plan(
    config: Config, shape: Qwen3Config, target: Target, devices: int, depth: Depth
) -> Plan:
    """Plans a run.

    Args:
      config: of the run.
      shape: of its model.
      target: the GPU.
      devices: how many of them.
      depth: how to come to the figures.

    Raises:
      ValueError: the mesh does not make that many devices, or does not divide the model or batch.
    """
    sizes = mesh_sizes(config.mesh, devices)
    mesh = abstract_mesh(**sizes)
    check_batch(config, mesh, train_rules(config))
    estimate = Estimate(config, shape, mesh, target.rates.node)
    programs = estimate.programs()
    # Not to be looked at where it samples no more than a step does.
    if programs["evaluate"].temporaries < 1.05 * programs["sample"].temporaries:
        del programs["evaluate"]
    if depth != "arithmetic":
        for name, compiled in _compile(config, shape, target, devices, depth, programs).items():
            if depth == "cpu":  # whose collectives are others
                ours = programs[name]
                compiled = compiled._replace(
                    once=ours.once._replace(flops=compiled.once.flops),
                    each_pass=ours.each_pass._replace(flops=compiled.each_pass.flops),
                )
            programs[name] = compiled
    state = abstract_state(config, shape, mesh)
    reference = abstract_reference(config, state.model)
    on_host = config.grpo.reference == "host"
    trained, frozen = lora.split(state.model)
    parameters, optimizer, reference_bytes = map(
        bytes_on_device, (state.model, state.opt_state, reference if frozen is None else None)
    )
    held = {}
    for name, program in programs.items():
        sampler = {"sample": estimate.rollout, "evaluate": estimate.evaluation}.get(name)
        copy = estimate.sampler_copy if sampler else 0
        cache = estimate.cache(sampler) if sampler else 0
        own = {"update": parameters + optimizer, "reference": bytes_on_device(reference)}
        held[name] = Held(
            parameters,
            optimizer,
            0 if on_host and name != "reference" else reference_bytes,
            program.arguments - own.get(name, parameters),
            copy,
            cache,
            program.temporaries + program.outputs - program.aliased - copy - cache,
        )
    saved = jax.tree.leaves(state._replace(model=trained))
    return Plan(
        depth,
        sizes,
        sum(leaf.size for leaf in jax.tree.leaves(state.model)),
        held,
        programs["update"].aliased,
        list(_work(config, estimate, programs, target)),
        sum(leaf.size * leaf.dtype.itemsize for leaf in saved),
        reference_bytes * devices if on_host else 0,
    )


def _compile(
    config: Config,
    shape: Qwen3Config,
    target: Target,
    devices: int,
    depth: Depth,
    names: Iterable[str],
) -> dict[str, Measured]:
    """The programs of these names, several at a time."""
    mesh = make_mesh(config.mesh, _devices(depth, target, devices))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = {
            name: pool.submit(_compile_one, name, config, shape, mesh, target.rates.node, depth)
            for name in names
        }
        return {name: future.result() for name, future in futures.items()}


def _compile_one(
    name: str, config: Config, shape: Qwen3Config, mesh: Mesh, node: int, depth: Depth
) -> Measured:
    options: Any = _CUDA_OPTIONS if depth == "cuda" else {}
    with jax.set_mesh(mesh):
        lowered = run_programs(config, shape, mesh)[name].lower()
        return measure(lowered.compile(compiler_options=options), mesh.size, node)


def _work(
    config: Config, estimate: Estimate, programs: dict[str, Measured], target: Target
) -> Iterator[Work]:
    """A step's parts in their order; bytes of memory are what cannot be done without."""
    s, update = estimate.rollout, config.update
    train, sampling, item = estimate.train, estimate.sampler, estimate.itemsize
    weights = item * (s.layer_weights + s.head_weights)
    steps = update.epochs * update.minibatches
    sampler = programs["sample"]
    layers = item * s.layer_weights / sampling.products
    yield _least("prefill", sampler.once, layers, 1, target)
    decode = s.completion * weights / sampling.products + cache_reads(s, item) / sampling.work
    yield _least(f"decode, {s.completion} passes", sampler.each_pass, decode, s.completion, target)
    for name in ("reference", "old"):
        if name in programs:
            yield _least(name, programs[name].once, weights / train.products, 1, target)
    # Weights forward and backward, and of what is trained: the gradient written, then parameter,
    # gradient and two moments read by AdamW and all but the gradient written.
    moment = 2 if update.moments == "bfloat16" else 4
    adamw = (4 + (4 + 4 + 4 + moment) + (4 + 4 + moment)) * estimate.trained
    gradients = 2 * update.microbatches * weights / train.products
    name = "update" if steps == 1 else f"update, {steps} optimiser steps"
    yield _least(name, programs["update"].once, steps * (gradients + adamw), steps, target)


def _least(name: str, costs: Any, memory_bytes: float, times: int, target: Target) -> Work:
    received = {kind: times * size for kind, size in costs.received.items()}
    between = times * costs.between_nodes
    seconds = {
        "arithmetic": times * costs.flops / target.rates.flops,
        "memory": memory_bytes / target.bandwidth,
        "links": sum(received.values()) / target.rates.link,
        "network": between / target.rates.network,
    }
    limit = max(seconds, key=lambda what: seconds[what])
    flops = times * costs.flops
    return Work(name, flops, memory_bytes, received, between, seconds[limit], limit)


# ---------------------------------------------------------------------------- what to change


Settings = dict[str, Any]  # `section.field` to value; `devices` to a number of them


def advise(
    plan: Plan, config: Config, shape: Qwen3Config, target: Target, devices: int
) -> list[dict[str, Any]]:
    """What to change first for a run that does not fit, and how many devices would do instead.

    Changes are tried by arithmetic, as far as it differs from the run's own arithmetic: one by one
    in the order of what they cost in time, then one upon the other. What is returned has been
    planned to the depth of the plan.

    Returns:
      `options`, the `peak_bytes` with them, and whether it `fits`.
    """
    before = make_plan(config, shape, target, devices, "arithmetic")

    def predicted(settings: Settings) -> tuple[int, str]:
        """Peak and its phase; a mesh that divides neither model nor batch never suffices."""
        try:
            after = make_plan(*_with(config, shape, target, devices, settings), "arithmetic")
        except ValueError:
            return sys.maxsize, plan.peak_phase
        more = {name: plan.held[name].total - before.held[name].total for name in plan.held}
        return max((held.total + more.get(name, 0), name) for name, held in after.held.items())

    def fits(settings: Settings) -> bool:
        return predicted(settings)[0] <= budget(target)

    def planned(settings: Settings) -> dict[str, Any]:
        arguments = _with(config, shape, target, devices, settings)
        try:
            peak = make_plan(*arguments, plan.depth).peak
        except ValueError:  # as more devices than there are virtual ones
            peak = predicted(settings)[0]
        options = [f"--{name.replace('_', '-')} {value}" for name, value in settings.items()]
        return {
            "options": " ".join(options),
            "peak_bytes": peak,
            "fits": peak <= budget(target),
        }

    def upon_each_other() -> Settings | None:
        settings: Settings = {}
        peak, phase = plan.peak, plan.peak_phase
        while peak > budget(target):
            here = _with(config, shape, target, devices, settings)[0]
            tried = (
                (settings | change, predicted(settings | change))
                for change in changes(here, devices, phase)
            )
            better = next((each for each in tried if each[1][0] < 0.995 * peak), None)
            if better is None:
                return None
            settings, (peak, phase) = better
        for name in list(settings):  # what a later change made needless
            fewer = {other: value for other, value in settings.items() if other != name}
            settings = fewer if fits(fewer) else settings
        parts = range(config.update.microbatches + 1, settings.get("update.microbatches", 0))
        less = ({"update.microbatches": count} for count in parts)
        return settings | next((each for each in less if fits(settings | each)), {})

    advice = []
    for change in filter(fits, changes(config, devices, plan.peak_phase)):
        advice.append(planned(change))
        if advice[-1]["fits"]:
            break
    else:
        if together := upon_each_other():
            advice.append(planned(together))
    more = ({"devices": devices << n, "mesh.fsdp": -1} for n in range(1, 7))
    if enough := next(filter(fits, more), None):
        advice.append(planned(enough))
    return advice


def changes(config: Config, devices: int, peak: str) -> Iterator[Settings]:
    """What would need less memory on the same devices, the cheapest in time first.

    Args:
      config: of the run.
      devices: that it has.
      peak: the phase that needs most.
    """
    update, model, rollout = config.update, config.model, config.rollout
    if peak == "update":
        sharing = ways(
            train_rules(config).problems, abstract_mesh(**mesh_sizes(config.mesh, devices))
        )
        parts = rollout.problems // (sharing * update.minibatches)
        for count in range(update.microbatches + 1, parts + 1):
            if parts % count == 0:
                yield {"update.microbatches": count}
        if model.remat != "full":
            yield {"model.remat": "full"}
    if peak == "evaluate" and config.eval.batch > 1:
        yield {"eval.batch": config.eval.batch // 2}
    if model.attention == "xla" and model.dtype == "bfloat16":
        yield {"model.attention": "cudnn"}
    if peak not in ("sample", "evaluate") and model.logits_mb > 64:
        yield {"model.logits_mb": model.logits_mb // 4}
    if config.grpo.kl_beta and config.grpo.reference == "device":
        yield {"grpo.reference": "host"}
    if update.moments == "float32":
        yield {"update.moments": "bfloat16"}
    if peak in ("sample", "evaluate") and config.mesh.sample_rules != "tp":
        yield {"mesh.sample_rules": "tp"}


def _with(
    config: Config, shape: Qwen3Config, target: Target, devices: int, settings: Settings
) -> tuple[Config, Qwen3Config, Target, int]:
    """The arguments of `make_plan` with some settings changed."""
    for name, value in settings.items():
        if name == "devices":
            devices = value
            continue
        section, field = name.split(".")
        values = dataclasses.replace(getattr(config, section), **{field: value})
        config = dataclasses.replace(config, **{section: values})
    return config, shape, target, devices


def sweep(
    config: Config, shape: Qwen3Config, target: Target, devices: int, depth: Depth
) -> Iterator[dict[str, Any]]:
    """A row for every mesh and number of micro-batches, or why that mesh cannot be."""
    for fsdp in (n for n in range(devices, 0, -1) if devices % n == 0):
        mesh = dataclasses.replace(config.mesh, fsdp=fsdp, tp=devices // fsdp)
        row = {"fsdp": fsdp, "tp": devices // fsdp}
        parts = config.rollout.problems // (fsdp * config.update.minibatches)
        for count in (n for n in range(1, max(1, parts) + 1) if max(1, parts) % n == 0):
            update = dataclasses.replace(config.update, microbatches=count)
            here = dataclasses.replace(config, mesh=mesh, update=update)
            try:
                plan = make_plan(here, shape, target, devices, depth)
            except ValueError as error:
                yield row | {"microbatches": count, "error": str(error)}
                break
            yield row | {
                "microbatches": count,
                "peak_bytes": plan.peak,
                "peak_phase": plan.peak_phase,
                "fits": plan.peak <= budget(target),
                "step_seconds": plan.step_seconds,
            }


# ---------------------------------------------------------------------------- what it says


def record(
    plan: Plan, config: Config, target: Target, devices: int, advice: list[dict[str, Any]]
) -> dict[str, Any]:
    """The plan as a JSON object."""
    return {
        "depth": plan.depth,
        "target": {
            "name": target.name,
            "memory_bytes": target.memory,
            "budget_bytes": budget(target),
            "memory_bytes_per_second": target.bandwidth,
            "rates_of": target.rates_of,
            **target.rates._asdict(),
        },
        "devices": devices,
        "mesh": plan.mesh,
        "parameters": plan.parameters,
        "phases": {
            name: {**held._asdict(), "total": held.total} for name, held in plan.held.items()
        },
        "donated_bytes": plan.donated,
        "work": [work._asdict() for work in plan.work],
        "step_seconds": plan.step_seconds,
        "run_gpu_hours": _gpu_hours(plan, config, devices),
        "checkpoint_bytes": plan.checkpoint_bytes,
        "checkpoint_bytes_at_most": plan.checkpoint_bytes * (config.checkpoint.keep + 1),
        "host_bytes": plan.host_bytes,
        "peak_bytes": plan.peak,
        "spare_bytes": budget(target) - plan.peak,
        "fits": plan.peak <= budget(target),
        "advice": advice,
    }


def _gpu_hours(plan: Plan, config: Config, devices: int) -> float:
    return devices * config.run.steps * plan.step_seconds / 3600


def _print_plan(
    plan: Plan, config: Config, target: Target, devices: int, advice: list[dict[str, Any]]
) -> None:
    spare = budget(target) - plan.peak
    worst = plan.peak_phase
    mesh = " x ".join(f"{name} {size}" for name, size in plan.mesh.items())
    name = Path(config.model.path).name
    print(f"{name}, {plan.parameters:,} parameters, on {devices} x {target.name} ({mesh})")
    print(f"Figures: {_DEPTHS[plan.depth]}.")
    if target.rates_of != target.name:
        print(f"Rates are those of {target.rates_of}: none are known of this GPU.")
    print(
        f"A device has {_gb(target.memory)} GB, of which {_gb(target.memory - budget(target))} stay"
        f" in reserve: {_gb(budget(target))} GB to use.\n"
    )
    held = {name: {**h._asdict(), "total": h.total} for name, h in plan.held.items()}
    columns = ["parameters", "optimizer", "reference", "batch", "sampler_copy", "cache", "rest"]
    titles = ["params", "optimiser", "reference", "batch", "copy", "KV cache", "rest", "total"]
    _table(
        ["GB on a device", *titles],
        [[name, *(_gb(h[c]) for c in [*columns, "total"])] for name, h in held.items()],
    )
    print()
    _table(
        ["a step, each device", "TFLOP", "HBM GB", "received GB", "least s", "limited by"],
        [
            [
                w.name,
                f"{w.flops / 1e12:.1f}",
                _gb(w.memory_bytes),
                _gb(sum(w.received.values())),
                f"{w.seconds:.3f}",
                w.limit,
            ]
            for w in plan.work
        ],
    )
    kinds = sorted({kind for w in plan.work for kind in w.received})
    received = {kind: sum(w.received.get(kind, 0.0) for w in plan.work) for kind in kinds}
    if received:
        print("received: " + ", ".join(f"{_gb(n)} GB by {kind}" for kind, n in received.items()))
    keep = config.checkpoint.keep
    print(
        f"\nA step takes {plan.step_seconds:.2f} s at least, {config.run.steps} steps"
        f" {_gpu_hours(plan, config, devices):.2f} GPU-hours: every part at the GPU's best,"
        " rewards, evaluation and refills not counted.\n"
        f"A checkpoint takes {_gb(plan.checkpoint_bytes)} GB on disk,"
        f" {_gb((keep + 1) * plan.checkpoint_bytes)} while one is written beside"
        f" {keep} kept."
    )
    if plan.host_bytes:
        print(f"The reference takes {_gb(plan.host_bytes)} GB of host memory in all.")
    if spare >= 0:
        print(
            f"\nFITS: at most {_gb(plan.peak)} GB on a device ({worst}), {_gb(spare)} GB to spare."
        )
        return
    print(f"\nDOES NOT FIT: {worst} needs {_gb(plan.peak)} GB, {_gb(-spare)} GB too much.")
    for start, each in zip(["change first:", *["or:"] * len(advice)], advice, strict=False):
        verdict = "fits" if each["fits"] else "does not suffice"
        print(f"  {start} {each['options']}  ({_gb(each['peak_bytes'])} GB: {verdict})")
    if not any(each["fits"] for each in advice):
        print("  no change that is known here suffices: take more devices or another GPU")


def _print_sweep(rows: list[dict[str, Any]], depth: Depth, target: Target, devices: int) -> None:
    print(f"{devices} x {target.name}, {_gb(budget(target))} GB to use on each")
    print(f"Figures: {_DEPTHS[depth]}.\n")
    cells = []
    for row in rows:
        head = [str(row["fsdp"]), str(row["tp"]), str(row["microbatches"])]
        if "error" in row:
            cells.append([*head, "-", "-", "-", row["error"]])
        else:
            verdict = "fits" if row["fits"] else "does not fit"
            peak, seconds = _gb(row["peak_bytes"]), f"{row['step_seconds']:.2f}"
            cells.append([*head, peak, row["peak_phase"], seconds, verdict])
    _table(["fsdp", "tp", "micro-batches", "peak GB", "in", "least s a step", ""], cells)


def _table(titles: list[str], rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    for row in [titles, *rows]:
        first, *rest = (
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join([first, *rest]).rstrip())


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f}" if nbytes < 100e9 else f"{nbytes / 1e9:.1f}"


if __name__ == "__main__":
    run_main(main)
