"""The work of a GRPO step: the least that the algorithm needs.

A multiply-add is two FLOPs; attention is counted causally; a backward pass costs twice its forward.
What an implementation computes beyond this (masked scores, logits made again) is not useful work.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from jaxgrpo.models.qwen3 import Qwen3Config


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model, and P problems with G completions of C tokens to prompts of L tokens."""

    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    problems: int
    group: int
    prompt: int
    completion: int

    @classmethod
    def of(cls, c: Qwen3Config, problems: int, group: int, prompt: int, completion: int) -> "Shape":
        """That of a model's configuration."""
        sizes = (c.vocab, c.width, c.layers, c.heads, c.kv_heads, c.head_dim, c.ffn)
        return cls(*sizes, problems, group, prompt, completion)

    def config(self, dtype: str, *, unroll: bool, remat: Any = "none") -> Qwen3Config:
        """The model's configuration, embeddings tied."""
        names = ("vocab", "width", "layers", "heads", "kv_heads", "head_dim", "ffn")
        values = {name: getattr(self, name) for name in names}
        return Qwen3Config(**values, dtype=jnp.dtype(dtype), unroll=unroll, remat=remat)

    @property
    def branches(self) -> int:
        """Completions in a step."""
        return self.problems * self.group

    @property
    def layer_weights(self) -> int:
        """Weights of all layers' products."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return self.layers * self.width * (2 * q + 2 * kv + 3 * self.ffn)

    @property
    def head_weights(self) -> int:
        """Weights of the output projection, which is the embedding."""
        return self.vocab * self.width

    def forward_tokens(self, *, plain: bool) -> int:
        """Tokens that go through the layers: prompts once, or (plain) once for each completion."""
        prefixes = (self.branches if plain else self.problems) * (self.prompt - 1)
        return prefixes + self.branches * self.completion


def prefill_flops(s: Shape) -> int:
    """The prefixes once. Of the last layer only their keys and values are wanted."""
    tokens, kv = s.problems * (s.prompt - 1), 2 * s.kv_heads * s.head_dim
    pairs = s.problems * (s.prompt - 1) * s.prompt // 2
    whole_layers = 2 * s.layer_weights * tokens // s.layers + 4 * s.heads * s.head_dim * pairs
    return (s.layers - 1) * whole_layers + 2 * s.width * kv * tokens


def branch_flops(s: Shape) -> int:
    """All branches once against their prefixes, with logits."""
    own = s.completion
    pairs = s.branches * (own * (s.prompt - 1) + own * (own + 1) // 2)
    weights = s.layer_weights + s.head_weights
    return 2 * weights * s.branches * own + 4 * s.layers * s.heads * s.head_dim * pairs


def update_flops(s: Shape) -> int:
    """Forward and backward pass."""
    return 3 * (prefill_flops(s) + branch_flops(s))


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a machine does at best, measured in the same run.

    Attributes:
      flops: of a large matrix product in the compute dtype, per second.
      bandwidth: bytes read and written per second while an array is updated in place.
    """

    flops: float
    bandwidth: float

    def seconds(self, flops: float, bytes_: float) -> float:
        """The least time for work that can overlap its arithmetic with its memory traffic."""
        return max(flops / self.flops, bytes_ / self.bandwidth)


def sample_floor(s: Shape, machine: Machine, itemsize: int) -> dict[str, float]:
    """Seconds that prefill and decoding take at least.

    A decoding pass reads all weights once and the cache, and multiplies one token of every branch.
    """
    weights = itemsize * s.completion * (s.layer_weights + s.head_weights)
    return {
        "prefill": machine.seconds(prefill_flops(s), itemsize * s.layer_weights),
        "decode": machine.seconds(branch_flops(s), weights + cache_reads(s, itemsize)),
    }


def cache_bytes(s: Shape, itemsize: int) -> int:
    """Keys and values of all prefixes, and room for those of all branches."""
    tokens = s.problems * (s.prompt - 1) + s.branches * s.completion
    return itemsize * 2 * s.layers * s.kv_heads * s.head_dim * tokens


def cache_reads(s: Shape, itemsize: int) -> int:
    """Bytes that decoding reads of the cache.

    In each pass the prefixes' keys and values once for each problem, and each branch's own.
    """
    seen = s.completion * s.problems * (s.prompt - 1)
    seen += s.branches * s.completion * (s.completion + 1) // 2
    return itemsize * 2 * s.layers * s.kv_heads * s.head_dim * seen


def update_floor(s: Shape, machine: Machine, itemsize: int) -> dict[str, float]:
    """Seconds that gradients and AdamW take at least.

    Weights are read forward and backward and gradients written once; AdamW reads parameter,
    gradient and two moments and writes all but the gradient, in float32.
    """
    weights = s.layer_weights + s.head_weights
    gradients = machine.seconds(update_flops(s), (2 * itemsize + 4) * weights)
    return {"gradients": gradients, "adamw": machine.seconds(0, 7 * 4 * weights)}
