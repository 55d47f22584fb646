"""Log-probability and entropy of tokens without the logits of a whole batch in memory."""

import jax
import jax.numpy as jnp
from jax import Array

from jaxgrpo.types import Masks

_NEVER = -1e30  # a logit; finite, because zero times infinity is no number


def token_logprobs(
    hidden_PGCD: Array,
    head_VD: Array,
    targets_PGC: Array,
    temperature: Array | float = 1.0,
    chunk_bytes: int = 256 << 20,
    masks: Masks | None = None,
) -> tuple[Array, Array]:
    """Log-probability of each target and entropy at each position.

    Both are of softmax(logits / temperature), over the tokens that `masks` allow. The logits are
    made in chunks of positions (along C, so a division of the batch over devices stays as it is)
    and made again in the backward pass; none are kept.

    Args:
      hidden_PGCD: final hidden states; position t predicts target t.
      head_VD: output projection, in the same dtype.
      targets_PGC: token ids.
      temperature: of the distribution that is meant; positive.
      chunk_bytes: most memory for one chunk's float32 logits; at least one position is taken.
      masks: what the targets were drawn from; None for the whole vocabulary.

    Returns:
      Two float32 arrays `[P, G, C]`; the entropy in nats.
    """
    p, g, c, _ = hidden_PGCD.shape
    per_position = 4 * p * g * head_VD.shape[0]
    size = min(c, max(1, chunk_bytes // per_position))
    chunks = -(-c // size)
    size = -(-c // chunks)
    pad = chunks * size - c

    def split(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 3))
        return jnp.moveaxis(x.reshape(p, g, chunks, size, *x.shape[3:]), 2, 0)

    def one(hidden: Array, targets: Array, index: Array | None) -> tuple[Array, Array]:
        logits = scaled_logits(hidden, head_VD, temperature)
        if masks is not None and index is not None:
            logits = allow(logits, _words(masks.table_PUW, index))
        return _logprob_and_entropy(logits, targets)

    if chunks == 1:  # no more memory than a chunk that is made again
        return one(hidden_PGCD, targets_PGC, masks and masks.index_PGC)
    again = jax.checkpoint(one)
    sequences = (hidden_PGCD, targets_PGC, masks and masks.index_PGC)
    parts = jax.lax.map(lambda xs: again(*xs), jax.tree.map(split, sequences))
    logp, entropy = (jnp.moveaxis(x, 0, 2).reshape(p, g, -1)[..., :c] for x in parts)
    return logp, entropy


def _logprob_and_entropy(logits: Array, targets: Array) -> tuple[Array, Array]:
    total = jax.nn.logsumexp(logits, axis=-1)
    logp = at_token(logits, targets) - total
    entropy = total - jnp.sum(jnp.exp(logits - total[..., None]) * logits, -1)
    return logp, entropy


def scaled_logits(hidden: Array, head_VD: Array, temperature: Array | float) -> Array:
    """float32 logits `[..., V]` of hidden states `[..., D]`, divided by the temperature."""
    # Two matrices: see `_linear` in `jaxgrpo.models.qwen3`.
    rows = hidden.reshape(-1, hidden.shape[-1])
    logits = jnp.einsum("td,vd->tv", rows, head_VD, preferred_element_type=jnp.float32)
    return logits.reshape(*hidden.shape[:-1], -1) / temperature


def allow(logits: Array, words: Array) -> Array:
    """Logits `[..., V]` without the tokens whose bit in `words`, uint32 `[..., V / 32]`, is 0."""
    bits = (words[..., None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    bits = bits.reshape(*words.shape[:-1], -1)[..., : logits.shape[-1]]
    return jnp.where(bits == 1, logits, _NEVER)


def _words(table_PUW: Array, index_PGC: Array) -> Array:
    """`[P, G, C, W]`: the bits at each position, see `Masks`."""
    return jax.vmap(lambda table_UW, index_GC: table_UW[index_GC])(table_PUW, index_PGC)


def at_token(values: Array, tokens: Array) -> Array:
    """`values[..., token]` by comparison: no gather across a vocabulary divided over devices."""
    chosen = jnp.arange(values.shape[-1]) == tokens[..., None]
    return jnp.sum(jnp.where(chosen, values, 0.0), -1)
