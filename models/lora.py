"""LoRA: a frozen model and the low-rank adapters that are trained beside it (arXiv 2106.09685).

An adapted model is a `Qwen3` like any other, for the sampler and for the update; what is trained
of a model, and what is not, is asked here. Adapters are never added into the weights while a run
lasts: in bfloat16 that would round a small change away, and the sampler would draw from another
policy than is trained.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxgrpo.config import LoraConfig
from jaxgrpo.models.qwen3 import Adapter, Qwen3
from jaxgrpo.sharding import param_shardings

_INPUTS = {"o": 2}  # axes of a weight that are contracted, where they are not one


def adapt(model: Qwen3, config: LoraConfig, key: Array) -> Qwen3:
    """A model with new adapters, which change nothing yet.

    Args:
      model: without adapters; its parameters are shared, not copied.
      config: rank, scale and which weights.
      key: of the random halves; on any mesh they come out the same.

    Returns:
      The model with float32 adapters, divided over the mesh that is set as their weights are; at
      rank 0 the model as it is.
    """
    if not config.rank:
        return model

    @jax.jit
    def new(key: Array) -> nnx.Dict:
        rngs = nnx.Rngs(params=key)
        adapters: dict[str, Adapter] = {}
        for name in config.targets:
            weight, inputs = getattr(model.layers, name), _INPUTS.get(name, 1)
            adapters[name] = Adapter(weight, inputs, config.rank, config.alpha, rngs)
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            return nnx.Dict(adapters)
        shardings = param_shardings(adapters, mesh, model.config.rules)
        return nnx.Dict(jax.lax.with_sharding_constraint(adapters, shardings))

    return join(new(key), model)


def split(model: Qwen3) -> tuple[Any, Qwen3 | None]:
    """What is trained of a model, and what is not.

    Returns:
      The adapters and the model without them, which is what training started from; for a model
      without adapters, that model and None.
    """
    adapters = model.layers.adapters
    return (model, None) if adapters is None else (adapters, join(None, model))


def join(trained: Any, frozen: Qwen3 | None) -> Qwen3:
    """The inverse of `split`."""
    if frozen is None:
        return trained
    model = jax.tree.map(lambda w: w, frozen)  # its own modules, the same arrays
    model.layers.adapters = trained
    return model


def merge(model: Qwen3) -> Qwen3:
    """A model without adapters that computes the same.

    Args:
      model: with adapters; its weights are donated. The products are taken and added in float32,
        and the sums rounded to the dtype of the weights.
    """
    adapters, frozen = split(model)
    return _sums(frozen, adapters)


@partial(jax.jit, donate_argnames="frozen")
def _sums(frozen: Qwen3, adapters: nnx.Dict) -> Qwen3:
    for name, adapter in adapters.items():
        weight = getattr(frozen.layers, name)
        n, rank = weight.shape[0], adapter.b.shape[1]
        a, b = adapter.a[...].reshape(n, -1, rank), adapter.b[...].reshape(n, rank, -1)
        added = adapter.scale * jnp.matmul(a, b, precision="highest")
        total = weight[...].astype(jnp.float32) + added.reshape(weight.shape)
        weight[...] = total.astype(weight.dtype)
    return frozen
