"""The work of a GRPO step: shapes to measure it at, and the least that the algorithm needs.

A multiply-add is two FLOPs; attention is counted causally; a backward pass costs twice its forward.
What an implementation computes beyond this (masked scores, logits made again) is not useful work.
"""

import dataclasses

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

    def config(self, dtype: str, *, unroll: bool, remat: str = "none") -> Qwen3Config:
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

    A decoding pass reads all weights once, the prefixes' keys and values once for each problem and
    each branch's own, and multiplies one token of every branch.
    """
    weights = s.layer_weights + s.head_weights
    per_token = 2 * s.layers * s.kv_heads * s.head_dim  # keys and values
    seen = s.completion * s.problems * (s.prompt - 1)
    seen += s.branches * s.completion * (s.completion + 1) // 2
    decode_bytes = itemsize * (s.completion * weights + per_token * seen)
    return {
        "prefill": machine.seconds(prefill_flops(s), itemsize * s.layer_weights),
        "decode": machine.seconds(branch_flops(s), decode_bytes),
    }


def update_floor(s: Shape, machine: Machine, itemsize: int) -> dict[str, float]:
    """Seconds that gradients and AdamW take at least.

    Weights are read forward and backward and gradients written once; AdamW reads parameter,
    gradient and two moments and writes all but the gradient, in float32.
    """
    weights = s.layer_weights + s.head_weights
    gradients = machine.seconds(update_flops(s), (2 * itemsize + 4) * weights)
    return {"gradients": gradients, "adamw": machine.seconds(0, 7 * 4 * weights)}
