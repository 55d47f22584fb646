"""Qwen3 on one page: config, parameters, forward pass, key/value cache.

The same page is Qwen2 (`qkv_bias`, no `qk_norm`) and Llama (neither).

One forward pass serves three uses. A *prefix* is a prompt without its last token; a *branch*
starts with that token and goes on with a completion; G branches share one prefix; a branch's
*past* is what it has of itself already.

- prefill: prefixes alone, `model.prefill(ids_PS, length_P)`, gives the `Prefix`;
- training: prefixes and whole branches against them, `model.with_prefixes(ids_PS, length_P,
  ids_PGC)`;
- decode: the next tokens of all branches, `model(ids_PGT, prefix, past)`.

Shape letters: P problems, G branches of each, T tokens per branch in this call, S tokens of a
prefix, C tokens of a past, D model width, N = K * R query heads (R to each of K key/value heads),
H head width, F feed-forward width, V vocabulary. Keys and values are stored heads first, as
`..KSH`, so that attention multiplies them where they lie.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxgrpo.sharding import FSDP, Rules, divide, gather, reshard


@dataclasses.dataclass(frozen=True)
class Qwen3Config:
    """Shape and arithmetic of a model; the first block is what Hugging Face's config.json says.

    Attributes:
      family: `qwen3`, `qwen2` or `llama`; only the exported config.json depends on it.
      qk_norm: RMSNorm over each query and key head before the rotation (Qwen3).
      qkv_bias: biases on the query, key and value projections (Qwen2).
      tied: the output projection is the embedding.
      dtype: of activations and of the weights as they are multiplied; parameters keep their own.
      remat: what the backward pass of `with_prefixes` computes again instead of keeping it:
        nothing, all but the products with weights, or whole layers.
      unroll: layers one by one in the update, not a loop over their stacked weights: faster on a
        CPU, which copies each layer out of the stack; longer to compile. The sampler's are so.
      attention: of whole sequences without a prefix, as in the prefill: written out here, or
        cuDNN's, which keeps no scores (NVIDIA GPUs; `dtype` bfloat16).
      rules: how parameters, activations and caches are divided over the mesh that it runs on.
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
    remat: Literal["none", "dots", "full"] = "none"
    unroll: bool = False
    attention: Literal["xla", "cudnn"] = "xla"
    rules: Rules = FSDP


class KV(NamedTuple):
    """Keys and values: `[P, K, S, H]` of prefixes, `[P, K, G, C, H]` of branches.

    Of all layers: with a leading axis, or a tuple of them where the model's layers are apart.
    """

    k: Array
    v: Array


class Prefix(NamedTuple):
    """What all branches of a problem see, and how many of its S tokens count."""

    kv: Any
    length_P: Array

    @property
    def seen(self) -> Array:
        """Which tokens count, to be broadcast to scores `[P, K, G, R, T, S]`."""
        size = jax.tree.leaves(self.kv)[0].shape[-2]
        return jnp.arange(size) < self.length_P[:, None, None, None, None, None]


class Past(NamedTuple):
    """What each branch has of itself, and how many of its C tokens count."""

    kv: Any
    length_PG: Array

    @property
    def size(self) -> int:
        """Room for tokens, C."""
        return jax.tree.leaves(self.kv)[0].shape[-2]


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
        self, ids_PGT: Array, prefix: Prefix | None = None, past: Past | None = None
    ) -> tuple[Array, Any]:
        """Runs T tokens of P·G branches through all layers.

        Args:
          ids_PGT: token ids; each sees itself and those before it.
          prefix: what all G branches of a problem see before themselves.
          past: what each branch has of itself; its length is the index of the first of the T
            tokens in the branch. Positions go on from the prefix through the past.

        Returns:
          The final hidden states `[P, G, T, D]` in the compute dtype, and the keys and values:
          those of the past with the T new ones written behind its length (what would lie behind
          its end is dropped), or without a past those of these tokens.
        """
        block = self._block(ids_PGT.shape[-1], prefix and prefix.length_P, past)

        def layer(x_PGTD: Array, xs: tuple) -> tuple[Array, KV]:
            weights, past_kv, prefix_kv = xs
            return block(weights, x_PGTD, past_kv, prefix and prefix._replace(kv=prefix_kv))

        xs = (self.layers, past and past.kv, prefix and prefix.kv)
        x_PGTD, kv = _through(layer, self._embedded(ids_PGT), xs)
        return _rms_norm(x_PGTD, self.norm, self.config.norm_eps), kv

    def with_prefixes(self, ids_PS: Array, length_P: Array, ids_PGC: Array) -> Array:
        """`self(ids_PGC, self.prefill(ids_PS, length_P))` in one pass through the layers.

        For training: each layer's weights are gathered once for both, forward and backward, and
        there is one set of gradients, not one from the prefixes and one from the branches.

        Returns:
          The final hidden states of the branches.
        """
        c = self.config
        of_prefix = self._block(ids_PS.shape[-1])
        of_branch = self._block(ids_PGC.shape[-1], length_P)

        def layer(xs: tuple[Array, Array], weights_only: tuple) -> tuple[tuple[Array, Array], None]:
            (x_P1SD, x_PGCD), (weights,) = xs, weights_only
            weights = gather(jax.tree.map(lambda w: w.astype(c.dtype), weights), c.rules)
            x_P1SD, kv = of_prefix(weights, x_P1SD)
            prefix = Prefix(_without_branches(kv), length_P)
            x_PGCD, _ = of_branch(weights, x_PGCD, prefix=prefix)
            return (x_P1SD, x_PGCD), None

        layer = _rematerialised(layer, c.remat)
        xs = (self._embedded(ids_PS[:, None]), self._embedded(ids_PGC))
        (_, x_PGCD), _ = _through(layer, xs, (self.layers,))
        return _rms_norm(x_PGCD, self.norm, c.norm_eps)

    def _embedded(self, ids_PGT: Array) -> Array:
        x_PGTD = self.embed[...][ids_PGT].astype(self.config.dtype)
        return divide(x_PGTD, self.config.rules, "problems")

    def _block(
        self, tokens: int, prefix_len_P: Array | None = None, past: Past | None = None
    ) -> Callable[..., tuple[Array, KV]]:
        """What one layer does to `tokens` of each branch, given where these are.

        Returns:
          A function of the layer's weights, x_PGTD and the layer's keys and values of the past and
          `Prefix`; its results are the next x_PGTD and, as in `__call__`, keys and values.
        """
        c = self.config
        index_T = jnp.arange(tokens)
        index = index_T if past is None else past.length_PG[..., None] + index_T
        positions = index if prefix_len_P is None else prefix_len_P[:, None, None] + index
        rope = _rope_table(positions, c.head_dim, c.rope_theta)
        own_seen = _up_to(index, tokens if past is None else past.size)

        def block(
            weights: Layer, x_PGTD: Array, past_kv: Any = None, prefix: Prefix | None = None
        ) -> tuple[Array, KV]:
            q_PKGRTH, own = weights.qkv(x_PGTD, rope)
            if past is not None:
                own = _extend(past_kv, own, past.length_PG)
            q_PKGRTH, own = divide((q_PKGRTH, own), c.rules, "problems", "kv_heads")
            contexts = [(own, own_seen)]
            if prefix is not None:
                contexts.append((prefix.kv, prefix.seen))
            if c.attention == "cudnn" and past is None and prefix is None:
                mixed_PGTNH = _attend_by_cudnn(q_PKGRTH, own)
            else:
                mixed_PGTNH = _attend(q_PKGRTH, contexts)
            x_PGTD = weights.residuals(x_PGTD, mixed_PGTNH)
            return divide(x_PGTD, c.rules, "problems"), own

        return block

    def prefill(self, ids_PS: Array, length_P: Array) -> Prefix:
        """Runs prefixes, padded on the right, once for all their branches."""
        _, kv = self(ids_PS[:, None])
        return Prefix(_without_branches(kv), length_P)

    def no_past(self, problems: int, branches: int, tokens: int) -> Past:
        """Room for `tokens` of each branch, in the compute dtype; their number is 0."""
        c = self.config
        shape = (problems, c.kv_heads, branches, tokens, c.head_dim)
        apart = isinstance(self.layers, nnx.List)
        zeros = jnp.zeros(shape if apart else (c.layers, *shape), c.dtype)
        names = ("problems", "kv_heads") if apart else ("layers", "problems", "kv_heads")
        kv = divide(KV(zeros, zeros), c.rules, *names)
        length_PG = jnp.zeros((problems, branches), jnp.int32)
        return Past((kv,) * c.layers if apart else kv, length_PG)

    def cast(self, dtype: Any) -> "Qwen3":
        """The same model with its parameters rounded to `dtype`."""
        return jax.tree.map(lambda w: w.astype(dtype), self)

    def apart(self) -> "Qwen3":
        """The model with its layers apart, to be run one by one."""
        layers = [jax.tree.map(lambda w, i=i: w[i], self.layers) for i in range(self.config.layers)]
        model = jax.tree.map(lambda w: w, self)
        model.layers = nnx.List(layers)
        return model

    def under(self, rules: Rules) -> "Qwen3":
        """The model divided by another table; inside of `jax.jit`."""
        model = reshard(self, rules)
        for module in (model, model.layers):
            module.config = dataclasses.replace(module.config, rules=rules)
        return model

    def head_VD(self) -> Array:
        """The output projection in the compute dtype; logits are the products of its rows.

        Its width is whole, because those who take logits in chunks would gather it for each.
        """
        head = self.embed if self.lm_head is None else self.lm_head
        rounded = jax.tree.map(lambda w: w.astype(self.config.dtype), head)
        return reshard(rounded, dataclasses.replace(self.config.rules, embed=()))[...]

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


class Layer(nnx.Module):
    """The weights of all layers, each with a leading layer axis; the methods are one layer's.

    Attributes:
      adapters: None, or by the name of a weight the `Adapter` of it (`jaxgrpo.models.lora`).
    """

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
        self.adapters = nnx.data(None)

    def qkv(self, x_PGTD: Array, rope: tuple[Array, Array]) -> tuple[Array, KV]:
        """Rotated, scaled queries `[P, K, G, R, T, H]`; keys and values `[P, K, G, T, H]`."""
        c = self.config
        y = _rms_norm(x_PGTD, self.attn_norm, c.norm_eps)
        q, k, v = self.product(y, "q"), self.product(y, "k"), self.product(y, "v")
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
        x = x_PGTD + self.product(mixed_PGTNH, "o", inputs=2)
        y = _rms_norm(x, self.mlp_norm, self.config.norm_eps)
        gate, up = self.product(y, "gate"), self.product(y, "up")
        return x + self.product(jax.nn.silu(gate) * up, "down")

    def product(self, x: Array, name: str, inputs: int = 1) -> Array:
        """`x` times the weight of that name, and its adapter's part."""
        y = _linear(x, getattr(self, name), inputs)
        if self.adapters is None or name not in self.adapters:
            return y
        adapter = self.adapters[name]
        return y + adapter.scale * _linear(_linear(x, adapter.a, inputs), adapter.b)


class Adapter(nnx.Module):
    """What training adds to a weight of all layers: `a @ b * scale`, of low rank (LoRA).

    Attributes:
      a: `[layers, inputs of the weight .., rank]`, drawn at first as PEFT does.
      b: `[layers, rank, outputs of the weight ..]`, 0 at first: so is the product.
      scale: alpha / rank.
    """

    def __init__(self, weight: nnx.Param, inputs: int, rank: int, alpha: float, rngs: nnx.Rngs):
        n, *shape = weight.shape
        layers, *axes = weight.get_metadata()["axes"]
        bound = math.prod(shape[:inputs]) ** -0.5  # Kaiming's with a = sqrt(5)
        a = jax.random.uniform(rngs.params(), (n, *shape[:inputs], rank), minval=-1, maxval=1)
        self.a = nnx.Param(bound * a, axes=(layers, *axes[:inputs], "rank"))
        self.b = _zeros((n, rank, *shape[inputs:]), (layers, "rank", *axes[inputs:]))
        self.scale = alpha / rank


def _through(layer: Callable, x: Any, xs: tuple) -> tuple[Any, Any]:
    """A scan over stacked layers, a plain loop over layers apart."""
    layers, *contexts = xs
    if not isinstance(layers, nnx.List):
        return jax.lax.scan(layer, x, xs)
    kv = []
    for i, weights in enumerate(layers):
        x, own = layer(x, (weights, *(context and context[i] for context in contexts)))
        kv.append(own)
    return x, tuple(kv)


def _rematerialised(layer: Callable, remat: str) -> Callable:
    match remat:
        case "none":
            return layer
        case "dots":
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
            return jax.checkpoint(layer, policy=policy)
        case "full":
            return jax.checkpoint(layer)
    raise ValueError(f"unknown remat {remat!r}: use none, dots or full")


def _up_to(index: Array, size: int) -> Array:
    """Which of a branch's tokens each query sees, from indices `[T]` or `[P, G, T]`.

    To be broadcast to scores `[P, K, G, R, T, size]`.
    """
    seen = jnp.arange(size) <= index[..., None]
    return seen if index.ndim == 1 else seen[:, None, :, None]


def _without_branches(kv: Any) -> Any:
    """Keys and values of prefixes, which ran as one branch each: `[.., 1, S, H] -> [.., S, H]`."""
    return jax.tree.map(lambda x: x.squeeze(-3), kv)


def _extend(past: KV, own: KV, length_PG: Array) -> KV:
    """Writes a layer's new keys and values behind what each branch has, in place.

    Attention reads what was written: that order is what lets the compiler do without a copy.
    """
    g, t = jnp.ogrid[: own.k.shape[2], : own.k.shape[3]]

    def one(past_KGCH: Array, own_KGTH: Array, length_G: Array) -> Array:
        at = past_KGCH.at[:, g, length_G[:, None] + t]
        return at.set(own_KGTH, mode="drop")

    # Mapped over problems, so that a division of them over devices stays as it is.
    return jax.tree.map(lambda old, new: jax.vmap(one)(old, new, length_PG), past, own)


def _attend(q_PKGRTH: Array, contexts: Sequence[tuple[KV, Array]]) -> Array:
    """Softmax attention over all contexts as one distribution.

    A prefix is multiplied once for all G·R·T queries of a problem's key/value head and is never
    repeated; scores and the softmax are float32.

    Args:
      q_PKGRTH: rotated, scaled queries.
      contexts: one layer's keys and values, `[P, K, G, C, H]` or those of prefixes `[P, K, S, H]`,
        and which of them each query sees. The first are the queries' own.

    Returns:
      `[P, G, T, N, H]`.
    """
    scores = []
    for kv, seen in contexts:
        products = "pkgrth,pkgch->pkgrtc" if kv.k.ndim == 5 else "pkgrth,pkch->pkgrtc"
        score = jnp.einsum(products, q_PKGRTH, kv.k, preferred_element_type=jnp.float32)
        scores.append(jnp.where(seen, score, -jnp.inf))
    # A query always sees its own token, so the maximum is finite. It cancels: no gradient.
    top = jax.lax.stop_gradient(reduce(jnp.maximum, [s.max(-1) for s in scores]))[..., None]
    weights = [jnp.exp(s - top) for s in scores]
    total = sum(w.sum(-1, keepdims=True) for w in weights)
    mixed = jnp.zeros(q_PKGRTH.shape, jnp.float32)
    for (kv, _), weight in zip(contexts, weights, strict=True):
        products = "pkgrtc,pkgch->pkgrth" if kv.v.ndim == 5 else "pkgrtc,pkch->pkgrth"
        mixed += jnp.einsum(
            products, weight.astype(kv.v.dtype), kv.v, preferred_element_type=jnp.float32
        )
    mixed = (mixed / total).astype(q_PKGRTH.dtype)
    p, k, g, r, t, h = mixed.shape
    return mixed.transpose(0, 2, 4, 1, 3, 5).reshape(p, g, t, k * r, h)


def _attend_by_cudnn(q_PKGRTH: Array, own: KV) -> Array:
    """`_attend` where each query sees its own sequence up to itself and nothing else."""
    p, k, g, r, t, h = q_PKGRTH.shape
    q = q_PKGRTH.transpose(0, 2, 4, 1, 3, 5).reshape(p * g, t, k * r, h)
    keys, values = (x.transpose(0, 2, 3, 1, 4).reshape(p * g, t, k, h) for x in own)
    mixed = jax.nn.dot_product_attention(
        q, keys, values, scale=1.0, is_causal=True, implementation="cudnn"
    )
    return mixed.reshape(p, g, t, k * r, h)


def _rms_norm(x: Array, weight: nnx.Param, eps: float) -> Array:
    """RMSNorm over the last axis, in float32."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps)
    return y.astype(x.dtype) * _as(weight, x)


def _rope_table(positions: Array, head_dim: int, theta: float) -> tuple[Array, Array]:
    """Cosines and sines `[.., T, 1, H/2]` of positions `[.., T]` in float32.

    The rotary embedding of arXiv 2104.09864.
    """
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def _rotate(x: Array, rope: tuple[Array, Array]) -> Array:
    """Rotates the pairs (i, i + H/2) of each head, in float32."""
    cos, sin = rope
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def _linear(x: Array, weight: nnx.Param, inputs: int = 1) -> Array:
    """Contracts the last `inputs` axes of `x` with the first of a weight.

    As one product of two matrices: with more axes than two, XLA's CPU backend transposes the
    activations element by element for the weight's gradient, which doubled the update's time.
    """
    rows = x.reshape(-1, math.prod(x.shape[x.ndim - inputs :]))
    w = _as(weight, x)
    y = rows @ w.reshape(rows.shape[-1], -1)
    return y.reshape(*x.shape[: x.ndim - inputs], *w.shape[inputs:])


def _as(weight: nnx.Param, x: Array) -> Array:
    """A weight in the dtype of what it meets."""
    return weight[...].astype(x.dtype)


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
    return nnx.Param(0.02 * jax.random.normal(rngs.params(), shape), axes=axes)


def _ones(shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
    return nnx.Param(jnp.ones(shape), axes=axes)


def _zeros(shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
    return nnx.Param(jnp.zeros(shape), axes=axes)
