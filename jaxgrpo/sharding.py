"""The device mesh, and one table from logical axes to mesh axes."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxgrpo.config import MeshConfig

# What each logical axis of a parameter or batch array is divided over; axes not named stay whole.
RULES: dict[str, str] = {
    "problems": "fsdp",
    "embed": "fsdp",
    "vocab": "tp",
    "heads": "tp",
    "kv_heads": "tp",
    "ffn": "tp",
}


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The `(fsdp, tp)` mesh.

    Args:
      config: its sizes.
      devices: what it is made of; all of this run's if not given.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"fsdp": config.fsdp, "tp": config.tp}
    given = [size for size in sizes.values() if size != -1]
    if not given or min(given) < 1:
        raise ValueError(
            f"mesh {sizes}: sizes are at least 1, and at most one may be -1 (the rest)"
        )
    rest = max(1, len(devices) // math.prod(given))
    sizes = {name: rest if size == -1 else size for name, size in sizes.items()}
    if sizes["fsdp"] * sizes["tp"] != len(devices):
        raise ValueError(
            f"mesh fsdp={sizes['fsdp']} x tp={sizes['tp']} does not make {len(devices)} devices;"
            " set mesh.fsdp and mesh.tp so that they multiply to it, or one of them to -1"
        )
    auto = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=auto, devices=devices)


def param_shardings(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """A sharding for every array of a model, its gradients or its optimiser state.

    Args:
      tree: arrays or `ShapeDtypeStruct`s; those inside an `nnx.Param` are divided as its `axes`
        say, all others (counters) are on every device.
      mesh: from `make_mesh`.

    Returns:
      The same pytree with a `NamedSharding` in place of each array.

    Raises:
      ValueError: an axis does not divide by the mesh; the message names both.
    """

    def of(node: Any) -> Any:
        if isinstance(node, nnx.Variable):
            spec = _spec(node.get_metadata()["axes"], node.shape, mesh)
            return jax.tree.unflatten(jax.tree.structure(node), [NamedSharding(mesh, spec)])
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree.map(of, tree, is_leaf=lambda node: isinstance(node, nnx.Variable))


def over_problems(x: jax.Array) -> jax.Array:
    """Keeps an activation, whose first axis is P, divided over problems.

    Left alone the compiler divides its width, as the embedding's is, and every device then works
    on all problems. Where P does not divide, or under no mesh, nothing is asked.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axis = RULES["problems"]
    if mesh.empty or x.shape[0] % mesh.shape[axis]:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(axis)))


def gathered(tree: Any) -> Any:
    """Parameters whole on every device, but for what is divided over `tp`.

    For loops: of parameters divided over `fsdp` every pass gathers all again.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree
    shardings = jax.tree.map(
        lambda s: NamedSharding(mesh, PartitionSpec(*(a if a == "tp" else None for a in s.spec))),
        param_shardings(tree, mesh),
    )
    # The barrier, because the compiler would gather first and round to a narrower type after.
    return jax.lax.with_sharding_constraint(jax.lax.optimization_barrier(tree), shardings)


def put_batch(tree: Any, mesh: Mesh) -> Any:
    """Puts host arrays whose first axis is P on the devices, divided over it.

    Raises:
      ValueError: P does not divide by the mesh.
    """
    return jax.tree.map(
        lambda x: jax.device_put(x, NamedSharding(mesh, _spec(("problems",), x.shape, mesh))), tree
    )


def _spec(
    axes: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    spec = []
    for name, size in zip(axes, shape, strict=False):  # a batch names its first axis only
        axis = RULES.get(name)
        if axis is not None and size % mesh.shape[axis]:
            raise ValueError(
                f"{name} of {size} does not divide over mesh axis {axis} of"
                f" {mesh.shape[axis]} devices"
            )
        spec.append(axis)
    return PartitionSpec(*spec)
