"""The device mesh, and tables that say what each logical axis of an array is divided over."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxgrpo.config import MeshConfig

Axes = tuple[str, ...]


@dataclass(frozen=True)
class Rules:
    """What each logical axis is divided over: mesh axes, the one with the larger strides first.

    An empty tuple is whole on every device, as are axes that have no rule. Parameters name their
    axes in `models/qwen3.py`; batches, activations and caches begin with `problems`.
    """

    problems: Axes = ("fsdp",)
    embed: Axes = ("fsdp",)
    vocab: Axes = ("tp",)
    heads: Axes = ("tp",)
    kv_heads: Axes = ("tp",)
    ffn: Axes = ("tp",)

    def over(self, name: str) -> Axes:
        """The mesh axes of a logical axis."""
        return getattr(self, name, ())


FSDP = Rules()
GATHERED = Rules(embed=())
_ALL = ("tp", "fsdp")
TABLES: dict[str, Rules] = {
    # Parameters and optimiser over all devices; every layer is gathered over `fsdp` when it runs.
    "fsdp": FSDP,
    # Parameters over `tp` alone. To sample: `fsdp`'s shards are gathered once, not per token.
    "gathered": GATHERED,
    # Tensor parallel over all devices: no gathers and the smallest copy to sample from, but every
    # device works on all problems and exchanges activations twice a layer.
    "tp": Rules((), (), vocab=_ALL, heads=_ALL, kv_heads=_ALL, ffn=_ALL),
}


def parse_rules(text: str, field: str) -> Rules:
    """A table from a configuration: the name of one, then changes, as in `fsdp embed= ffn=tp+fsdp`.

    >>> parse_rules("fsdp embed= ffn=tp+fsdp", "mesh.train_rules").ffn
    ('tp', 'fsdp')
    >>> parse_rules("fsdp embeds=", "mesh.train_rules")
    Traceback (most recent call last):
    ValueError: mesh.train_rules: 'embeds=' is no AXIS=MESH_AXES with an AXIS of [...]

    Args:
      text: what the field says.
      field: its name, for the message.

    Raises:
      ValueError: it names no table, logical axis or mesh axis that there is.
    """
    name, *changes = text.split() or [""]
    if name not in TABLES:
        raise ValueError(f"{field} is {text!r}; it begins with the name of a table: {[*TABLES]}")
    names = [each.name for each in dataclasses.fields(Rules)]
    changed: dict[str, Axes] = {}
    for change in changes:
        logical, equals, over = change.partition("=")
        axes = tuple(over.split("+")) if over else ()
        if logical not in names or not equals:
            raise ValueError(f"{field}: {change!r} is no AXIS=MESH_AXES with an AXIS of {names}")
        if len({"fsdp", "tp"}.intersection(axes)) != len(axes):
            raise ValueError(
                f"{field}: {change!r} must end in fsdp, tp, fsdp+tp, tp+fsdp or nothing"
            )
        changed[logical] = axes
    return dataclasses.replace(TABLES[name], **changed)


def mesh_sizes(config: MeshConfig, devices: int) -> dict[str, int]:
    """Devices along each axis of the mesh, with -1 resolved.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    sizes = {"fsdp": config.fsdp, "tp": config.tp}
    given = [size for size in sizes.values() if size != -1]
    if not given or min(given) < 1:
        raise ValueError(
            f"mesh {sizes}: sizes are at least 1, and at most one may be -1 (the rest)"
        )
    rest = max(1, devices // math.prod(given))
    sizes = {name: rest if size == -1 else size for name, size in sizes.items()}
    if sizes["fsdp"] * sizes["tp"] != devices:
        raise ValueError(
            f"mesh fsdp={sizes['fsdp']} x tp={sizes['tp']} does not make {devices} devices;"
            " set mesh.fsdp and mesh.tp so that they multiply to it, or one of them to -1"
        )
    return sizes


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The `(fsdp, tp)` mesh.

    Args:
      config: its sizes.
      devices: what it is made of; all of this run's if not given.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(config, len(devices))
    auto = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=auto, devices=devices)


def ways(axes: Axes, mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts mesh axes divide."""
    return math.prod(mesh.shape[axis] for axis in axes)


def param_shardings(tree: Any, mesh: Mesh | AbstractMesh, rules: Rules = FSDP) -> Any:
    """A sharding for every array of a model, its gradients or its optimiser state.

    Args:
      tree: arrays or `ShapeDtypeStruct`s; those inside an `nnx.Param` are divided as its `axes`
        say (the last of them, for a layer taken out of a stack), all others (counters) are on every
        device.
      mesh: from `make_mesh`.
      rules: the table.

    Returns:
      The same pytree with a `NamedSharding` in place of each array.

    Raises:
      ValueError: an axis does not divide by the mesh, or two of one array are over the same mesh
        axis; the message names them.
    """

    def of(node: Any) -> Any:
        if isinstance(node, nnx.Variable):
            axes = node.get_metadata()["axes"]
            spec = _spec(axes[len(axes) - node.ndim :], node.shape, mesh, rules)
            return jax.tree.unflatten(jax.tree.structure(node), [NamedSharding(mesh, spec)])
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree.map(of, tree, is_leaf=lambda node: isinstance(node, nnx.Variable))


def reshard(tree: Any, rules: Rules) -> Any:
    """Parameters inside of `jax.jit`, divided by a table; as they are under no mesh.

    For loops: of parameters divided over `embed` every pass gathers all again.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree
    shardings = param_shardings(tree, mesh, rules)
    # The barrier, because the compiler would gather first and round to a narrower type after.
    return jax.lax.with_sharding_constraint(jax.lax.optimization_barrier(tree), shardings)


def gather(tree: Any, rules: Rules) -> Any:
    """Parameters whole along `embed`, inside of what is differentiated.

    Left alone the compiler gathers a weight for each of its uses and scatters the gradient of each;
    so it is gathered once, and its gradients are added up before they are divided again.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or ways(rules.embed, mesh) == 1:
        return tree
    divided = param_shardings(tree, mesh, rules)
    whole = param_shardings(tree, mesh, dataclasses.replace(rules, embed=()))
    return jax.tree.map(_gather, tree, whole, divided)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x: jax.Array, whole: NamedSharding, divided: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(jax.lax.optimization_barrier(x), whole)


_gather.defvjp(
    lambda x, whole, divided: (_gather(x, whole, divided), None),
    lambda whole, divided, _, g: (jax.lax.with_sharding_constraint(g, divided),),
)


def divide(tree: Any, rules: Rules, *names: str) -> Any:
    """Keeps activations, whose first axes have these names, divided by a table.

    Left alone the compiler divides their width, as the embedding's is, and every device then works
    on all problems. An axis that does not divide stays whole; under no mesh nothing is asked.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree

    def constrained(x: jax.Array) -> jax.Array:
        over = [rules.over(name) for name in names]
        fits = [axes if n % ways(axes, mesh) == 0 else () for axes, n in zip(over, x.shape)]  # noqa: B905
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*fits)))

    return jax.tree.map(constrained, tree)


def put_batch(tree: Any, mesh: Mesh, rules: Rules = FSDP) -> Any:
    """Puts host arrays whose first axis is P on the devices, divided over it.

    Every process holds the whole arrays and puts the parts of its own devices there.

    Raises:
      ValueError: P does not divide by the mesh.
    """
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(
            x.shape, NamedSharding(mesh, _spec(("problems",), x.shape, mesh, rules)), x.__getitem__
        ),
        tree,
    )


def fetch(tree: Any) -> Any:
    """Arrays on the devices as host arrays, whole on every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def move_to(tree: Any, memory: Literal["device", "pinned_host"]) -> Any:
    """The same arrays, divided as they are, in the devices' memory or in that of their hosts.

    What is there already is not copied.
    """
    shardings = jax.tree.map(lambda x: x.sharding.with_memory_kind(memory), tree)
    return jax.device_put(tree, shardings)


def _spec(
    names: Sequence[str], shape: Sequence[int], mesh: Mesh | AbstractMesh, rules: Rules
) -> PartitionSpec:
    spec: list[Axes] = []
    for name, size in zip(names, shape, strict=False):  # a batch names its first axis only
        axes = rules.over(name)
        if size % ways(axes, mesh):
            raise ValueError(
                f"{name} of {size} does not divide over mesh axis {' x '.join(axes)} of"
                f" {ways(axes, mesh)} devices"
            )
        if twice := {axis for other in spec for axis in other}.intersection(axes):
            raise ValueError(
                f"{name} cannot be divided over mesh axis {twice.pop()}: another axis of the same"
                f" array ({', '.join(names)}) is"
            )
        spec.append(axes)
    return PartitionSpec(*spec)
