"""GPUs: what the compiler wants to know of one, and what one can do at best."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
from jaxlib import xla_client

from jaxgrpo.config import DEFAULT

TARGETS = DEFAULT.parent / "targets"


class Rates(NamedTuple):
    """What one GPU does at best.

    Attributes:
      flops: of dense bfloat16 products, per second.
      link: bytes per second that it receives from others of its node.
      network: bytes per second that it receives from other nodes, by its own adapter.
      node: GPUs of a node.
    """

    flops: float
    link: float
    network: float
    node: int


# By the name that a target has. NVIDIA's data sheets of H100 and H200: 989 dense bfloat16 TFLOP/s
# (1,979 with sparsity), NVLink 900 GB/s both ways together. Network: NVIDIA's DGX H100/H200 user
# guide, eight ConnectX-7 of 400 Gb/s for eight GPUs.
RATES = {
    "NVIDIA H200": Rates(989e12, 450e9, 50e9, 8),
    "NVIDIA H100 80GB HBM3": Rates(989e12, 450e9, 50e9, 8),
}
_NEAREST = "NVIDIA H100 80GB HBM3"


@dataclass(frozen=True)
class Target:
    """A GPU to plan for.

    Attributes:
      name: as its driver calls it.
      text: a `GpuTargetConfigProto` in text form, for the compiler.
      memory: bytes.
      bandwidth: of that memory, bytes per second.
      rates: see `Rates`.
      rates_of: the GPU that these are of; another one where this is not in the table.
    """

    name: str
    text: str
    memory: int
    bandwidth: float
    rates: Rates
    rates_of: str


def read_target(name: str) -> Target:
    """A GPU that need not be here.

    Args:
      name: of a file in `TARGETS` without its suffix, or a path to another.

    Raises:
      ValueError: there is no such file, or it lacks what is needed.
    """
    known = sorted(file.stem for file in TARGETS.glob("*.txtpb"))
    file = TARGETS / f"{name}.txtpb" if name in known else Path(name)
    try:
        text = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--target {name}: neither one of {', '.join(known)} nor a GpuTargetConfigProto in text"
            " form"
        ) from error
    return _target(text, f"--target {name}")


def attached_target() -> Target:
    """The GPU of this machine; JAX must have found it."""
    topology = xla_client.get_topology_for_devices(jax.devices())
    return _target(str(topology.target_config), "the GPU of this machine")


def _target(text: str, source: str) -> Target:
    def value(field: str, pattern: str) -> str:
        match = re.search(rf"^\s*{field}:\s*{pattern}", text, re.MULTILINE)
        if match is None:
            raise ValueError(f"{source}: has no {field}; it must be a GpuTargetConfigProto as text")
        return match[1]

    name = value("name", '"([^"]*)"')
    rates_of = name if name in RATES else _NEAREST
    return Target(
        name,
        text,
        int(value("device_memory_size", r"(\d+)")),
        float(value("memory_bandwidth", r"(\d+)")),
        RATES[rates_of],
        rates_of,
    )
