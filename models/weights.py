"""A parameter here and its tensors in a Hugging Face directory: one table, read both ways.

There a weight is one matrix `[out, in]` a layer. Here the layers are stacked, the heads are an axis
of their own, and matrices are `[in, out]`. `WEIGHTS` names both and spells out how their axes
correspond; the reader, which fetches only the part of a file that a device is to hold, and the
writer both follow it.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple, get_args

import jax
import numpy as np

from jaxgrpo.config import LoraTarget


@dataclasses.dataclass(frozen=True)
class Weight:
    """A parameter here and its tensors there.

    Attributes:
      axes: of one layer here, a letter each: D model width, N query heads, K key/value heads,
        H head width, F feed-forward width, V vocabulary, R rank of an adapter.
      name: there; `{}` is the number of the layer, and stands where the parameter is a stack.
      hf_axes: of the tensor there; letters written together are one axis.
    """

    axes: str
    name: str
    hf_axes: str

    @property
    def stacked(self) -> bool:
        """Whether the parameter has a leading layer axis."""
        return "{}" in self.name

    def hf_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape there of one layer of this shape here."""
        size = dict(zip(self.axes, shape, strict=True))
        return tuple(math.prod(size[a] for a in group) for group in self.hf_axes.split())

    def from_hf(self, tensor: Any, shape: tuple[int, ...], index: tuple[slice, ...]) -> np.ndarray:
        """The part `index` of a layer of this shape; no other rows and columns are fetched."""
        size = dict(zip(self.axes, shape, strict=True))
        span = {a: slice(*s.indices(size[a])[:2]) for a, s in zip(self.axes, index, strict=True)}
        fetch, split, keep = [], [], []
        for group in self.hf_axes.split():
            first, rest = span[group[0]], group[1:]
            step = math.prod(size[a] for a in rest)
            fetch.append(slice(first.start * step, first.stop * step))
            split += [first.stop - first.start, *(size[a] for a in rest)]
            keep += [slice(None), *(span[a] for a in rest)]
        piece = tensor[tuple(fetch)].reshape(split)[tuple(keep)]
        return piece.transpose(np.argsort(self._order))

    def to_hf(self, layer: np.ndarray) -> np.ndarray:
        """A layer as the tensor there."""
        return np.ascontiguousarray(layer.transpose(self._order)).reshape(
            self.hf_shape(layer.shape)
        )

    @property
    def _order(self) -> list[int]:
        return [self.axes.index(a) for a in self.hf_axes.replace(" ", "")]


WEIGHTS = {
    "embed": Weight("VD", "model.embed_tokens.weight", "V D"),
    "layers.attn_norm": Weight("D", "model.layers.{}.input_layernorm.weight", "D"),
    "layers.q": Weight("DNH", "model.layers.{}.self_attn.q_proj.weight", "NH D"),
    "layers.k": Weight("DKH", "model.layers.{}.self_attn.k_proj.weight", "KH D"),
    "layers.v": Weight("DKH", "model.layers.{}.self_attn.v_proj.weight", "KH D"),
    "layers.q_bias": Weight("NH", "model.layers.{}.self_attn.q_proj.bias", "NH"),
    "layers.k_bias": Weight("KH", "model.layers.{}.self_attn.k_proj.bias", "KH"),
    "layers.v_bias": Weight("KH", "model.layers.{}.self_attn.v_proj.bias", "KH"),
    "layers.q_norm": Weight("H", "model.layers.{}.self_attn.q_norm.weight", "H"),
    "layers.k_norm": Weight("H", "model.layers.{}.self_attn.k_norm.weight", "H"),
    "layers.o": Weight("NHD", "model.layers.{}.self_attn.o_proj.weight", "D NH"),
    "layers.mlp_norm": Weight("D", "model.layers.{}.post_attention_layernorm.weight", "D"),
    "layers.gate": Weight("DF", "model.layers.{}.mlp.gate_proj.weight", "F D"),
    "layers.up": Weight("DF", "model.layers.{}.mlp.up_proj.weight", "F D"),
    "layers.down": Weight("FD", "model.layers.{}.mlp.down_proj.weight", "D F"),
    "norm": Weight("D", "model.norm.weight", "D"),
    "lm_head": Weight("VD", "lm_head.weight", "V D"),
}


def _adapter(weight: Weight) -> dict[str, Weight]:
    """The two matrices of a weight's adapter, as PEFT names them."""
    outputs, inputs = weight.hf_axes.split()
    module = "base_model.model." + weight.name.removesuffix(".weight")
    return {
        "a": Weight(f"{inputs}R", f"{module}.lora_A.weight", f"R {inputs}"),
        "b": Weight(f"R{outputs}", f"{module}.lora_B.weight", f"{outputs} R"),
    }


WEIGHTS |= {
    f"{target}.{half}": matrix
    for target in get_args(LoraTarget)
    for half, matrix in _adapter(WEIGHTS[f"layers.{target}"]).items()
}


def weight_of(keys: tuple) -> Weight:
    """The table's row for a leaf of a model, or of adapters."""
    return WEIGHTS[jax.tree_util.keystr(keys, simple=True, separator=".").removesuffix(".value")]


class Entry(NamedTuple):
    """A tensor that a directory has for a model, and where in the model it is."""

    name: str
    weight: Weight
    parameter: Any
    layer: int

    @property
    def shape(self) -> tuple[int, ...]:
        """In the file."""
        return self.weight.hf_shape(self.parameter.shape[self.weight.stacked :])

    @property
    def nbytes(self) -> int:
        """In the file, with the dtype of the parameter."""
        return math.prod(self.shape) * self.parameter.dtype.itemsize

    def to_hf(self) -> np.ndarray:
        """The tensor, on the host."""
        layer = self.parameter
        if self.weight.stacked:
            layer = jax.lax.dynamic_index_in_dim(layer, self.layer, keepdims=False)
        return self.weight.to_hf(np.asarray(layer))


def entries(tree: Any) -> Iterator[Entry]:
    """All tensors of a model or of adapters, which may be abstract."""
    for keys, parameter in jax.tree_util.tree_leaves_with_path(tree):
        weight = weight_of(keys)
        for layer in range(parameter.shape[0] if weight.stacked else 1):
            yield Entry(weight.name.format(layer), weight, parameter, layer)
