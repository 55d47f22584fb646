"""Sampling: prefill once per problem, then one jitted loop over all branches.

The key of a token is a function of (seed, step, problem, sample, position) alone: the same
completions come out whatever else is in the batch, however it is padded or divided over devices,
and however many tokens a pass of the loop proposes.

*Prompt lookup.* An extracted value stands in the prompt, and the words around it in the answers of
its siblings and of other problems. With `draft` = k, a pass looks up where a branch's last tokens
occurred in those texts, runs the k tokens that followed there together with the branch's last one,
and draws from the model's own distribution at each of these positions. Drawn tokens are kept up to
and including the first that differs from what was proposed, because up to there the model has seen
nothing but the branch. So the draws are those of plain sampling, token for token, from fewer passes
(speculative decoding, arXiv 2211.17192, where draft and model share their noise; lookup as in
arXiv 2304.04487).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxgrpo.logprobs import scaled_logits
from jaxgrpo.models.qwen3 import Past, Qwen3
from jaxgrpo.types import Completions, Prompts


class Truncation(NamedTuple):
    """Limits on which tokens may be drawn; the defaults limit nothing."""

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


NO_TRUNCATION = Truncation()

NO_TOKEN = -1  # between texts that are searched; equals no token id


@partial(jax.jit, static_argnames=("group", "max_tokens", "stop_ids", "truncation", "draft"))
def sample(
    model: Qwen3,
    prompts: Prompts,
    key: Array,
    problem_P: Array,
    temperature: Array | float,
    hints_X: Array | None = None,
    *,
    group: int,
    max_tokens: int,
    stop_ids: tuple[int, ...],
    truncation: Truncation = NO_TRUNCATION,
    draft: int = 0,
) -> Completions:
    """Draws `group` completions of every prompt.

    Args:
      model: the policy.
      prompts: prefixes and last tokens, see `Prompts`.
      key: of this step; problem, sample and position are folded into it.
      problem_P: a number that names each problem, for its keys.
      temperature: 0 takes the likeliest token; the log-probabilities are then those at 1.
      hints_X: tokens of other answers to look up proposals in, `NO_TOKEN` between them.
      group: completions of each problem, G.
      max_tokens: length limit C, the stop token included.
      stop_ids: any of these ends a completion and belongs to it.
      truncation: top-k, top-p, min-p; log-probabilities are those of the whole distribution.
      draft: tokens proposed in each pass by prompt lookup; 0 is one token a pass.

    Returns:
      `Completions` of shape `[P, G, C]`.
    """
    problems = problem_P.shape[0]
    model = model.cast(model.config.dtype).apart()
    head_VD = model.head_VD()
    prefix = model.prefill(prompts.prefix_PL, prompts.prefix_len_P)
    keys_PG = _branch_keys(key, problem_P, group)
    greedy = temperature == 0.0
    scale = jnp.where(greedy, 1.0, temperature)
    read_only_PX = _prompts_and_hints(prompts, hints_X) if draft else None

    def live(loop: _Loop) -> Array:
        return ~loop.done_PG & (loop.past.length_PG < max_tokens)

    def decode(loop: _Loop) -> _Loop:
        length_PG, live_PG = loop.past.length_PG, live(loop)
        ids_PGT = _at(loop.branch_PGB, length_PG, 1)
        if draft:
            proposed = _look_up(read_only_PX, loop.branch_PGB, length_PG, draft)
            ids_PGT = jnp.concatenate([ids_PGT, proposed], -1)
        hidden_PGTD, kv = model(jnp.maximum(ids_PGT, 0), prefix, loop.past)
        logits_PGTV = scaled_logits(hidden_PGTD, head_VD, scale)
        position_PGT = length_PG[..., None] + jnp.arange(1 + draft)
        token_PGT, logprob_PGT = _draw(logits_PGTV, keys_PG, position_PGT, greedy, truncation)

        # Draws count as long as what the model has seen before them is the branch itself.
        before_PGT = jnp.cumprod(token_PGT[..., :-1] == ids_PGT[..., 1:], -1)
        new_PG = 1 + before_PGT.sum(-1)
        stop_PGT = (token_PGT[..., None] == jnp.array(stop_ids, jnp.int32)).any(-1)
        until_stop_PG = jnp.where(stop_PGT.any(-1), 1 + jnp.argmax(stop_PGT, -1), 2 + draft)
        new_PG = jnp.minimum(jnp.minimum(new_PG, until_stop_PG), max_tokens - length_PG)
        new_PG = jnp.where(live_PG, new_PG, 0)
        return _Loop(
            Past(kv, length_PG + new_PG),
            _write(loop.branch_PGB, token_PGT, length_PG + 1),
            _write(loop.logprobs_PGC, logprob_PGT, length_PG),
            loop.done_PG | (live_PG & (new_PG == until_stop_PG)),
            loop.passes_PG + live_PG.astype(jnp.int32),
        )

    shape = (problems, group)
    first_PG1 = jnp.broadcast_to(prompts.last_P[:, None, None], (*shape, 1))
    nothing = jnp.full((*shape, max_tokens), NO_TOKEN, jnp.int32)
    loop = _Loop(
        model.no_past(problems, group, max_tokens),
        jnp.concatenate([first_PG1, nothing], -1),
        jnp.zeros((*shape, max_tokens), jnp.float32),
        jnp.zeros(shape, bool),
        jnp.zeros(shape, jnp.int32),
    )
    loop = jax.lax.while_loop(lambda loop: live(loop).any(), decode, loop)
    return Completions(
        loop.branch_PGB[..., 1:],
        loop.logprobs_PGC,
        loop.past.length_PG,
        loop.done_PG,
        loop.passes_PG,
    )


class _Loop(NamedTuple):
    """Where every branch is.

    Attributes:
      past: keys and values of the branch's tokens, and how many tokens have been drawn.
      branch_PGB: the prompt's last token and the completion; past its length whatever was written.
      logprobs_PGC: of the completion.
      done_PG: whether a stop token was drawn.
      passes_PG: passes that the branch took part in.
    """

    past: Past
    branch_PGB: Array
    logprobs_PGC: Array
    done_PG: Array
    passes_PG: Array


def _branch_keys(key: Array, problem_P: Array, group: int) -> Array:
    fold = jax.vmap(jax.random.fold_in, (None, 0))
    keys_P = fold(key, problem_P)
    return jax.vmap(fold, (0, None))(keys_P, jnp.arange(group))


# ---------------------------------------------------------------------------- drawing


def _draw(
    logits: Array, keys_PG: Array, position_PGT: Array, greedy: Array, truncation: Truncation
) -> tuple[Array, Array]:
    """A token of softmax(truncated logits) at each position, and its log-probability untruncated.

    By the Gumbel-max trick in two steps, first a block of the vocabulary by its mass, then a token
    of the block: the masses are wanted for the log-probability anyway, and noise for about
    2 sqrt(V) values is drawn instead of V.
    """
    raw = _blocks(logits)
    allowed = _blocks(_truncate(logits, truncation))
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


def _truncate(logits: Array, truncation: Truncation) -> Array:
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


# ---------------------------------------------------------------------------- prompt lookup


def _prompts_and_hints(prompts: Prompts, hints_X: Array | None) -> Array:
    """What is searched and does not change: hints, then the problem's prompt; `[P, X]`."""
    problems, size = prompts.prefix_PL.shape
    inside_PL = jnp.arange(size) < prompts.prefix_len_P[:, None]
    # On the right, so that the last token follows the prefix.
    prefix_PL = jnp.where(inside_PL, prompts.prefix_PL, NO_TOKEN)
    prefix_PL = jax.vmap(jnp.roll)(prefix_PL, size - prompts.prefix_len_P)
    texts = [prefix_PL, prompts.last_P[:, None]]
    if hints_X is not None:
        texts.insert(0, jnp.broadcast_to(hints_X, (problems, hints_X.size)))
    return jnp.concatenate(texts, -1)


def _look_up(read_only_PX: Array, branch_PGB: Array, length_PG: Array, draft: int) -> Array:
    """`[P, G, draft]`: what followed where a branch's last tokens occurred before.

    The place is the one where most of the last three tokens agree; of several the last, in the
    order hints, prompt, branches of the problem. `NO_TOKEN` where nothing is known.
    """
    problems, group, size = branch_PGB.shape
    drawn_PGB = jnp.where(jnp.arange(size) <= length_PG[..., None], branch_PGB, NO_TOKEN)
    drawn_PGB = jnp.pad(drawn_PGB, [(0, 0), (0, 0), (1, 0)], constant_values=NO_TOKEN)
    text_PX = jnp.concatenate([read_only_PX, drawn_PGB.reshape(problems, -1)], -1)
    text_PX = jnp.pad(text_PX, [(0, 0), (0, draft)], constant_values=NO_TOKEN)

    # The last three tokens: the prompt's end comes before the branch's first.
    before_PG2 = jnp.broadcast_to(read_only_PX[:, None, -3:-1], (problems, group, 2))
    last_PG3 = _at(jnp.concatenate([before_PG2, branch_PGB], -1), length_PG, 3)
    width = text_PX.shape[-1] - 3
    agree, score = text_PX[:, None, 3:] != NO_TOKEN, 0  # something follows
    for back in range(3):
        same = text_PX[:, 2 - back : 2 - back + width][:, None] == last_PG3[..., 2 - back, None]
        agree = agree & same
        score = score + agree.astype(jnp.int32)
    # One number for both, because a maximum is cheaper to find than its place.
    best_PG1 = (score * width + jnp.arange(width)).max(-1, keepdims=True)
    following = best_PG1 % width + 3 + jnp.arange(draft)
    found = jnp.take_along_axis(text_PX[:, None], following, -1)
    return jnp.where(best_PG1 >= width, found, NO_TOKEN)


# ---------------------------------------------------------------------------- each branch's place


def _at(x_PGB: Array, start_PG: Array, size: int) -> Array:
    """`[P, G, size]` from each branch's own start."""
    return jnp.take_along_axis(x_PGB, start_PG[..., None] + jnp.arange(size), -1)


def _write(x_PGB: Array, new_PGT: Array, start_PG: Array) -> Array:
    """Writes each branch's T values at its own start; what lies behind the end is dropped."""
    p, g, t = jnp.ogrid[: new_PGT.shape[0], : new_PGT.shape[1], : new_PGT.shape[2]]
    return x_PGB.at[p, g, start_PG[..., None] + t].set(new_PGT, mode="drop")
