"""What a run holds and costs on GPUs: its programs compiled for them, or counted."""

import contextlib
import dataclasses
import functools
import importlib.util
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from jaxgrpo.chips import Target
from jaxgrpo.config import Config
from jaxgrpo.estimate import Estimate, abstract_mesh
from jaxgrpo.models import lora
from jaxgrpo.models.qwen3 import Qwen3Config
from jaxgrpo.programs import (
    Measured,
    abstract_reference,
    abstract_state,
    bytes_on_device,
    measure,
    run_programs,
    train_rules,
)
from jaxgrpo.sharding import make_mesh, mesh_sizes
from jaxgrpo.task import check_batch
from jaxgrpo.work import cache_reads

Depth = Literal["cuda", "cpu", "arithmetic"]

DEPTHS = {
    "cuda": "compiled for this GPU, which need not be here",
    "cpu": "compiled for virtual CPU devices: temporaries are an upper estimate, traffic is"
    " arithmetic",
    "arithmetic": "arithmetic alone: temporaries and traffic are estimates",
}

# Triton's products can be counted in a program's text; tuning them would take a GPU.
_CUDA_OPTIONS = {"xla_gpu_autotune_level": 0}

# Context, NCCL's buffers, fragmentation: what XLA_PYTHON_CLIENT_MEM_FRACTION=0.92 leaves, at least.
_RESERVE_SHARE, _RESERVE = 0.08, 8 << 30


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


def choose_depth(wanted: str, config: Config) -> Depth:
    """The deepest that works here, or the one that is wanted.

    Raises:
      ValueError: that one does not work here.
    """
    match wanted:
        case "auto":
            if has_plugin() and _has_ptxas():
                return "cuda"
            return "arithmetic" if config.model.attention == "cudnn" else "cpu"
        case "cuda":
            if not has_plugin():
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


def has_plugin() -> bool:
    """Whether JAX's CUDA plugin is installed; it needs no GPU."""
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
