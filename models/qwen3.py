"""Qwen3 on one page: config, parameters, forward pass, key/value cache.

The same page is Qwen2 (`qkv_bias`, no `qk_norm`) and Llama (neither).

One forward pass serves three uses. A *prefix* is a prompt without its last token; a *branch*
starts with that token and goes on with a completion; G branches share one prefix.

- prefill: prefixes alone, `model.prefill(ids_PS, length_P)`, gives the `Prefix`;
- training: whole branches against their prefix, `model(ids_PGC, prefix)`;
- decode: the next tokens of all branches, `model(ids_PGT, prefix, cache, start)`, which are written
  into the branches' own `cache` at `start`.

Shape letters: P problems, G branches of each, T tokens per branch in this call, S tokens of a
prefix, C tokens of a cache, D model width, N = K * R query heads (R to each of K key/value heads),
H head width, F feed-forward width, V vocabulary. Keys and values are stored heads first, as
`..KSH`, so that attention multiplies them where they lie.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxgrpo.sharding import over_problems


@dataclasses.dataclass(frozen=True)
class Qwen3Config:
    """Shape and arithmetic of a model; the first block is what Hugging Face's config.json says.

    Attributes:
      family: `qwen3`, `qwen2` or `llama`; only the exported config.json depends on it.
      qk_norm: RMSNorm over each query and key head before the rotation (Qwen3).
      qkv_bias: biases on the query, key and value projections (Qwen2).
      tied: the output projection is the embedding.
      dtype: of activations and of the weights as they are multiplied; parameters keep their own.
      remat: recompute each layer in the backward pass instead of keeping its activations.
    """

    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    tied: bool = True
    qk_norm: bool = True
    qkv_bias: bool = False
    max_positions: int = 40960
    family: Literal["qwen3", "qwen2", "llama"] = "qwen3"

    dtype: Any = jnp.float32
    remat: bool = False


class KV(NamedTuple):
    """Keys and values of every layer.

    `[layers, P, K, S, H]` for prefixes, `[layers, P, K, G, C, H]` for branches.
    """

    k: Array
    v: Array


class Prefix(NamedTuple):
    """What branches attend to before themselves, and how many of its S tokens count."""

    kv: KV
    length_P: Array


class Qwen3(nnx.Module):
    """A decoder whose layers are stacked along their first axis and scanned over.

    A pytree: pass it to `jax.jit`, `jax.grad` and `optax` as it is.
    """

    def __init__(self, config: Qwen3Config, rngs: nnx.Rngs):
        c = self.config = config
        self.embed = _normal(rngs, (c.vocab, c.width), ("vocab", "embed"))
        self.layers = Layer(c, rngs)
        self.norm = _ones((c.width,), ("norm",))
        self.lm_head = None if c.tied else _normal(rngs, (c.vocab, c.width), ("vocab", "embed"))

    def __call__(
        self,
        ids_PGT: Array,
        prefix: Prefix | None = None,
        cache: KV | None = None,
        start: Array | int = 0,
    ) -> tuple[Array, KV]:
        """Runs T tokens of P·G branches through all layers.

        Args:
          ids_PGT: token ids.
          prefix: what all G branches of a problem see; their positions go on where it ends.
          cache: the branches' own keys and values, `[layers, P, K, G, C, H]`; the T new ones are
            written at `start`. Without it the T tokens see each other and nothing is kept back.
          start: index in the branches of the first of the T tokens.

        Returns:
          The final hidden states `[P, G, T, D]` in the compute dtype, and the cache as it is now
          (without one: the keys and values of these tokens, in its layout).
        """
        c = self.config
        tokens = ids_PGT.shape[-1]
        index_T = start + jnp.arange(tokens)
        # Which own tokens each query sees: itself and those before it.
        own_TC = jnp.arange(tokens if cache is None else cache.k.shape[-2]) <= index_T[:, None]
        positions_PT = index_T[None] if prefix is None else prefix.length_P[:, None] + index_T
        rope = _rope_table(positions_PT[:, None], c.head_dim, c.rope_theta)

        def layer(carry: tuple, xs: tuple) -> tuple[tuple, Any]:
            x_PGTD, cache = carry
            weights, prefix_kv, index = xs
            q_PKGRTH, own = weights.qkv(x_PGTD, rope)
            if cache is not None:
                # Written into the one buffer that the loop carries: no copy of the cache.
                at = (index, 0, 0, 0, start, 0)
                cache = jax.tree.map(
                    lambda old, new: jax.lax.dynamic_update_slice(old, new[None], at), cache, own
                )
                own = jax.tree.map(lambda layers: layers[index], cache)
            seen = None if prefix is None else Prefix(prefix_kv, prefix.length_P)
            x_PGTD = weights.residuals(x_PGTD, _attend(q_PKGRTH, own, own_TC, seen))
            x_PGTD = over_problems(x_PGTD)
            return (x_PGTD, cache), own if cache is None else None

        if c.remat:
            layer = jax.checkpoint(layer)
        x_PGTD = over_problems(self.embed[...][ids_PGT].astype(c.dtype))
        xs = (self.layers, prefix and prefix.kv, jnp.arange(c.layers))
        (x_PGTD, cache), own = jax.lax.scan(layer, (x_PGTD, cache), xs)
        hidden_PGTD = _rms_norm(x_PGTD, self.norm, c.norm_eps)
        return hidden_PGTD, own if cache is None else cache

    def prefill(self, ids_PS: Array, length_P: Array) -> Prefix:
        """Runs prefixes, padded on the right, once for all their branches."""
        _, kv = self(ids_PS[:, None])
        return Prefix(KV(kv.k[:, :, :, 0], kv.v[:, :, :, 0]), length_P)

    def head_VD(self) -> Array:
        """The output projection in the compute dtype; logits are the products of its rows."""
        head = self.embed if self.lm_head is None else self.lm_head
        return head[...].astype(self.config.dtype)

    @jax.jit
    def logits(self, ids_BT: Array, lengths_B: Array | None = None) -> Array:
        """Plain full-sequence logits, for inspection and parity tests.

        Args:
          ids_BT: token ids, padded on the right.
          lengths_B: tokens that count in each row; all of them if not given.

        Returns:
          float32 `[B, T, V]`; zero past a row's length.
        """
        ids_BT = jnp.asarray(ids_BT)
        hidden, _ = self(ids_BT[:, None])
        logits = jnp.einsum(
            "btd,vd->btv", hidden[:, 0], self.head_VD(), preferred_element_type=jnp.float32
        )
        if lengths_B is None:
            return logits
        counts_BT = jnp.arange(ids_BT.shape[1]) < jnp.asarray(lengths_B)[:, None]
        return jnp.where(counts_BT[..., None], logits, 0.0)

    def empty_cache(self, problems: int, branches: int, tokens: int) -> KV:
        """A zeroed cache `[layers, P, K, G, C, H]` in the compute dtype."""
        c = self.config
        zeros = jnp.zeros((c.layers, problems, c.kv_heads, branches, tokens, c.head_dim), c.dtype)
        return KV(zeros, zeros)

    def cast(self, dtype: Any) -> "Qwen3":
        """The same model with its parameters rounded to `dtype`."""
        return jax.tree.map(lambda w: w.astype(dtype), self)


class Layer(nnx.Module):
    """The weights of all layers, each with a leading layer axis; the methods are one layer's."""

    def __init__(self, c: Qwen3Config, rngs: nnx.Rngs):
        n, d, k, h, f = c.layers, c.width, c.kv_heads, c.head_dim, c.ffn
        self.config = c
        self.attn_norm = _ones((n, d), ("layers", "norm"))
        self.q = _normal(rngs, (n, d, c.heads, h), ("layers", "embed", "heads", "head_dim"))
        self.k = _normal(rngs, (n, d, k, h), ("layers", "embed", "kv_heads", "head_dim"))
        self.v = _normal(rngs, (n, d, k, h), ("layers", "embed", "kv_heads", "head_dim"))
        self.o = _normal(rngs, (n, c.heads, h, d), ("layers", "heads", "head_dim", "embed"))
        q_axes, kv_axes = ("layers", "heads", "head_dim"), ("layers", "kv_heads", "head_dim")
        self.q_bias = _zeros((n, c.heads, h), q_axes) if c.qkv_bias else None
        self.k_bias = _zeros((n, k, h), kv_axes) if c.qkv_bias else None
        self.v_bias = _zeros((n, k, h), kv_axes) if c.qkv_bias else None
        self.q_norm = _ones((n, h), ("layers", "norm")) if c.qk_norm else None
        self.k_norm = _ones((n, h), ("layers", "norm")) if c.qk_norm else None
        self.mlp_norm = _ones((n, d), ("layers", "norm"))
        self.gate = _normal(rngs, (n, d, f), ("layers", "embed", "ffn"))
        self.up = _normal(rngs, (n, d, f), ("layers", "embed", "ffn"))
        self.down = _normal(rngs, (n, f, d), ("layers", "ffn", "embed"))

    def qkv(self, x_PGTD: Array, rope: tuple[Array, Array]) -> tuple[Array, KV]:
        """Rotated, scaled queries `[P, K, G, R, T, H]`; keys and values `[P, K, G, T, H]`."""
        c = self.config
        y = _rms_norm(x_PGTD, self.attn_norm, c.norm_eps)
        q = jnp.einsum("pgtd,dnh->pgtnh", y, _as(self.q, y))
        k = jnp.einsum("pgtd,dkh->pgtkh", y, _as(self.k, y))
        v = jnp.einsum("pgtd,dkh->pgtkh", y, _as(self.v, y))
        if self.q_bias is not None and self.k_bias is not None and self.v_bias is not None:
            q, k, v = q + _as(self.q_bias, q), k + _as(self.k_bias, k), v + _as(self.v_bias, v)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = _rms_norm(q, self.q_norm, c.norm_eps), _rms_norm(k, self.k_norm, c.norm_eps)
        q, k = _rotate(q, rope) * c.head_dim**-0.5, _rotate(k, rope)
        q_PGTKRH = q.reshape(*q.shape[:3], c.kv_heads, -1, c.head_dim)
        own = KV(k.transpose(0, 3, 1, 2, 4), v.transpose(0, 3, 1, 2, 4))
        return q_PGTKRH.transpose(0, 3, 1, 4, 2, 5), own

    def residuals(self, x_PGTD: Array, mixed_PGTNH: Array) -> Array:
        """Adds the attention's output projection, then the feed-forward block."""
        x = x_PGTD + jnp.einsum("pgtnh,nhd->pgtd", mixed_PGTNH, _as(self.o, x_PGTD))
        y = _rms_norm(x, self.mlp_norm, self.config.norm_eps)
        gate, up = y @ _as(self.gate, y), y @ _as(self.up, y)
        return x + (jax.nn.silu(gate) * up) @ _as(self.down, y)


def _attend(q_PKGRTH: Array, own: KV, own_TC: Array, prefix: Prefix | None) -> Array:
    """Softmax attention over prefix and own tokens as one distribution, in two products.

    The prefix is multiplied once for all G·R·T queries of a problem's key/value head and is never
    repeated; scores and the softmax are float32.

    Args:
      q_PKGRTH: rotated, scaled queries.
      own: one layer's keys and values of the branches, `[P, K, G, C, H]`.
      own_TC: which of them each query sees.
      prefix: one layer's keys and values of the prefixes, `[P, K, S, H]`.

    Returns:
      `[P, G, T, N, H]`.
    """
    scores = [_scores("pkgrth,pkgch->pkgrtc", q_PKGRTH, own.k, own_TC)]
    if prefix is not None:
        length_P, size = prefix.length_P, prefix.kv.k.shape[-2]
        seen = jnp.arange(size) < length_P[:, None, None, None, None, None]
        scores.append(_scores("pkgrth,pksh->pkgrts", q_PKGRTH, prefix.kv.k, seen))
    # A query always sees its own token, so the maximum is finite. It cancels: no gradient.
    top = jax.lax.stop_gradient(jnp.max(jnp.stack([s.max(-1) for s in scores]), 0))[..., None]
    weights = [jnp.exp(s - top) for s in scores]
    total = sum(w.sum(-1, keepdims=True) for w in weights)
    weights = [(w / total).astype(q_PKGRTH.dtype) for w in weights]
    mixed = jnp.einsum("pkgrtc,pkgch->pkgrth", weights[0], own.v)
    if prefix is not None:
        mixed += jnp.einsum("pkgrts,pksh->pkgrth", weights[1], prefix.kv.v)
    p, k, g, r, t, h = mixed.shape
    return mixed.transpose(0, 2, 4, 1, 3, 5).reshape(p, g, t, k * r, h)


def _scores(products: str, q: Array, k: Array, seen: Array) -> Array:
    """float32 query-key products; -inf where a key is not seen."""
    scores = jnp.einsum(products, q, k, preferred_element_type=jnp.float32)
    return jnp.where(seen, scores, -jnp.inf)


def _rms_norm(x: Array, weight: nnx.Param, eps: float) -> Array:
    """RMSNorm over the last axis, in float32."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps)
    return y.astype(x.dtype) * _as(weight, x)


def _rope_table(positions_P1T: Array, head_dim: int, theta: float) -> tuple[Array, Array]:
    """Cosines and sines `[P, 1, T, 1, H/2]` in float32 (rotary embedding, arXiv 2104.09864)."""
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = positions_P1T[..., None, None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def _rotate(x: Array, rope: tuple[Array, Array]) -> Array:
    """Rotates the pairs (i, i + H/2) of each head, in float32."""
    cos, sin = rope
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def _as(weight: nnx.Param, x: Array) -> Array:
    """A weight in the dtype of what it meets."""
    return weight[...].astype(x.dtype)


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
    return nnx.Param(0.02 * jax.random.normal(rngs.params(), shape), axes=axes)


def _ones(shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
    return nnx.Param(jnp.ones(shape), axes=axes)


def _zeros(shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
    return nnx.Param(jnp.zeros(shape), axes=axes)
