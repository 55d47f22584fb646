"""Sampling: prefill once per problem, then one jitted loop over all branches.

The key of a token is a function of (seed, step, problem, sample, position) alone: the same
completions come out whatever else is in the batch, however it is padded or divided over devices.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxgrpo.logprobs import at_token, scaled_logits
from jaxgrpo.models.qwen3 import Qwen3
from jaxgrpo.types import Completions, Prompts


class Truncation(NamedTuple):
    """Limits on which tokens may be drawn; the defaults limit nothing."""

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


NO_TRUNCATION = Truncation()


@partial(jax.jit, static_argnames=("group", "max_tokens", "stop_ids", "truncation"))
def sample(
    model: Qwen3,
    prompts: Prompts,
    key: Array,
    problem_P: Array,
    temperature: Array | float,
    *,
    group: int,
    max_tokens: int,
    stop_ids: tuple[int, ...],
    truncation: Truncation = NO_TRUNCATION,
) -> Completions:
    """Draws `group` completions of every prompt.

    Args:
      model: the policy.
      prompts: prefixes and last tokens, see `Prompts`.
      key: of this step; problem, sample and position are folded into it.
      problem_P: a number that names each problem, for its keys.
      temperature: 0 takes the likeliest token; the log-probabilities are then those at 1.
      group: completions of each problem, G.
      max_tokens: length limit C, the stop token included.
      stop_ids: any of these ends a completion and belongs to it.
      truncation: top-k, top-p, min-p; log-probabilities are those of the whole distribution.

    Returns:
      `Completions` of shape `[P, G, C]`.
    """
    model = model.cast(model.config.dtype)
    head_VD = model.head_VD()
    prefix = model.prefill(prompts.prefix_PL, prompts.prefix_len_P)
    keys_PG = _branch_keys(key, problem_P, group)
    problems = problem_P.shape[0]
    greedy = temperature == 0.0
    scale = jnp.where(greedy, 1.0, temperature)

    def unfinished(loop: tuple) -> Array:
        t, _, done_PG, *_ = loop
        return (t < max_tokens) & ~done_PG.all()

    def decode(loop: tuple) -> tuple:
        t, token_PG, done_PG, cache, tokens_PGC, logprobs_PGC, length_PG = loop
        hidden, cache = model(token_PG[..., None], prefix, cache, t)
        logits_PGV = scaled_logits(hidden[:, :, 0], head_VD, scale)
        allowed_PGV = _truncate(logits_PGV, truncation)
        noisy_PGV = jax.lax.cond(
            greedy, lambda: allowed_PGV, lambda: _perturb(allowed_PGV, keys_PG, t)
        )
        token_PG = jnp.argmax(noisy_PGV, -1)
        logprob_PG = at_token(logits_PGV, token_PG) - jax.nn.logsumexp(logits_PGV, -1)
        tokens_PGC = jax.lax.dynamic_update_index_in_dim(tokens_PGC, token_PG, t, 2)
        logprobs_PGC = jax.lax.dynamic_update_index_in_dim(logprobs_PGC, logprob_PG, t, 2)
        length_PG += (~done_PG).astype(jnp.int32)
        done_PG |= (token_PG[..., None] == jnp.array(stop_ids)).any(-1)
        return t + 1, token_PG, done_PG, cache, tokens_PGC, logprobs_PGC, length_PG

    shape = (problems, group)
    loop = (
        jnp.int32(0),
        jnp.broadcast_to(prompts.last_P[:, None], shape),
        jnp.zeros(shape, bool),
        model.empty_cache(problems, group, max_tokens),
        jnp.zeros((*shape, max_tokens), jnp.int32),
        jnp.zeros((*shape, max_tokens), jnp.float32),
        jnp.zeros(shape, jnp.int32),
    )
    _, _, done_PG, _, tokens_PGC, logprobs_PGC, length_PG = jax.lax.while_loop(
        unfinished, decode, loop
    )
    return Completions(tokens_PGC, logprobs_PGC, length_PG, done_PG)


def _branch_keys(key: Array, problem_P: Array, group: int) -> Array:
    fold = jax.vmap(jax.random.fold_in, (None, 0))
    keys_P = fold(key, problem_P)
    return jax.vmap(fold, (0, None))(keys_P, jnp.arange(group))


def _perturb(logits_PGV: Array, keys_PG: Array, t: Array) -> Array:
    """Adds Gumbel noise: the largest is then a draw from softmax(logits)."""

    def one(key: Array, logits_V: Array) -> Array:
        return logits_V + jax.random.gumbel(jax.random.fold_in(key, t), logits_V.shape)

    return jax.vmap(jax.vmap(one))(keys_PG, logits_PGV)


def _truncate(logits_PGV: Array, truncation: Truncation) -> Array:
    """Sets the logits of tokens that may not be drawn to -inf: top-k, then top-p, then min-p."""
    top_k, top_p, min_p = truncation
    if top_k:
        kept = jax.lax.top_k(logits_PGV, min(top_k, logits_PGV.shape[-1]))[0]
        logits_PGV = jnp.where(logits_PGV >= kept[..., -1:], logits_PGV, -jnp.inf)
    if top_p < 1.0:
        sorted_PGV = jnp.flip(jnp.sort(logits_PGV, -1), -1)
        probability_PGV = jax.nn.softmax(sorted_PGV, -1)
        before_PGV = jnp.cumsum(probability_PGV, -1) - probability_PGV
        # The likeliest token is always kept: nothing comes before it.
        least = jnp.min(jnp.where(before_PGV < top_p, sorted_PGV, jnp.inf), -1, keepdims=True)
        logits_PGV = jnp.where(logits_PGV >= least, logits_PGV, -jnp.inf)
    if min_p > 0.0:
        least = jnp.max(logits_PGV, -1, keepdims=True) + jnp.log(min_p)
        logits_PGV = jnp.where(logits_PGV >= least, logits_PGV, -jnp.inf)
    return logits_PGV
