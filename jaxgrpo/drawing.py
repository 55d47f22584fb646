"""Drawing tokens from logits: noise by key and position, block by block; truncation."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Truncation(NamedTuple):
    """Limits on which tokens may be drawn; the defaults limit nothing."""

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


NO_TRUNCATION = Truncation()


def draw_tokens(
    logits: Array, keys_PG: Array, position_PGT: Array, greedy: Array, truncation: Truncation
) -> tuple[Array, Array]:
    """A token of softmax(truncated logits) at each position, and its log-probability untruncated.

    By the Gumbel-max trick in two steps, first a block of the vocabulary by its mass, then a token
    of the block: the masses are wanted for the log-probability anyway, and noise for about
    2 sqrt(V) values is drawn instead of V.
    """
    raw = _blocks(logits)
    allowed = _blocks(truncate(logits, truncation))
    blocks, size = raw.shape[-2:]
    fold = jax.vmap(jax.vmap(jax.vmap(jax.random.fold_in, (None, 0))))
    noise = jax.vmap(jax.vmap(jax.vmap(lambda key: jax.random.gumbel(key, (blocks + size,)))))
    noise_PGTX = jnp.where(greedy, 0.0, noise(fold(keys_PG, position_PGT)))
    mass = jnp.where(greedy, allowed.max(-1), _logsumexp(allowed))
    block = jnp.argmax(mass + noise_PGTX[..., :blocks], -1)
    within = jnp.argmax(_take(allowed, block) + noise_PGTX[..., blocks:], -1)
    chosen = _take(_take(raw, block)[..., None], within)[..., 0]
    return block * size + within, chosen - _logsumexp(_logsumexp(raw))


def _blocks(logits: Array) -> Array:
    """`[.., V] -> [.., blocks, size]`, with -inf behind V where the sizes do not multiply to it.

    The size is a power of two near sqrt(V), and the number of blocks a multiple of 8 where V
    allows it, so that a vocabulary divided over devices is divided between blocks. It depends on V
    alone, and so do the tokens that a key draws.
    """
    vocab = logits.shape[-1]
    sizes = [1 << i for i in range(3, 11) if vocab % (8 << i) == 0 and 1 << 2 * i <= vocab]
    size = max(sizes, default=32)
    logits = jnp.pad(
        logits, [(0, 0)] * (logits.ndim - 1) + [(0, -vocab % size)], constant_values=-jnp.inf
    )
    return logits.reshape(*logits.shape[:-1], -1, size)


def _take(values: Array, index: Array) -> Array:
    """`values[.., index, :]` by comparison: no gather across a vocabulary divided over devices."""
    chosen = jnp.arange(values.shape[-2]) == index[..., None]
    return jnp.sum(jnp.where(chosen[..., None], values, 0.0), -2)


def _logsumexp(x: Array) -> Array:
    """Over the last axis; -inf where all are."""
    top = x.max(-1)
    finite = jnp.where(jnp.isfinite(top), top, 0.0)
    return jnp.log(jnp.exp(x - finite[..., None]).sum(-1)) + finite


def truncate(logits: Array, truncation: Truncation) -> Array:
    """Sets the logits of tokens that may not be drawn to -inf: top-k, then top-p, then min-p."""
    top_k, top_p, min_p = truncation
    if 0 < top_k < logits.shape[-1]:
        least = _largest_threshold(logits, jnp.ones_like(logits), float(top_k))
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    if top_p < 1.0:
        # The least logit with what is likelier not making up top_p yet.
        least = _largest_threshold(logits, jax.nn.softmax(logits, -1), top_p)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    if min_p > 0.0:
        least = jnp.max(logits, -1, keepdims=True) + jnp.log(min_p)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return logits


def _largest_threshold(logits: Array, weights: Array, target: float) -> Array:
    """`[.., 1]`: the largest logit such that those at least as large weigh `target` together.

    Without sorting: 32 halvings of the range of a float's bits, whose order as integers is that of
    the floats. Falls to the least logit where all together weigh less, by rounding.
    """

    def weight_from(threshold: Array) -> Array:
        return jnp.sum(weights, -1, keepdims=True, where=order >= threshold)

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends  # `low` is light enough, `high` is not
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        enough = weight_from(middle) >= target
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    bits = jax.lax.bitcast_convert_type(logits, jnp.int32)
    order = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    low = order.min(-1, keepdims=True)
    low, _ = jax.lax.fori_loop(0, 32, halve, (low, order.max(-1, keepdims=True) + 1))
    bits = jnp.where(low < 0, low ^ 0x7FFFFFFF, low)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
