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

from jaxgrpo.constrain import Constraint
from jaxgrpo.drawing import NO_TRUNCATION, Truncation, draw_tokens
from jaxgrpo.logprobs import allow, scaled_logits
from jaxgrpo.lookup import NO_TOKEN, look_up, prompts_and_hints, window
from jaxgrpo.models.qwen3 import Past, Qwen3
from jaxgrpo.sharding import GATHERED, Rules
from jaxgrpo.types import Completions, Prompts


@partial(
    jax.jit,
    static_argnames=(
        "group",
        "max_tokens",
        "stop_ids",
        "truncation",
        "draft",
        "constraint",
        "rules",
    ),
)
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
    constraint: Constraint | None = None,
    rules: Rules = GATHERED,
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
      constraint: says which tokens may be drawn, and has been told of these problems
        (`Constraint.begin`); log-probabilities are those among them. None allows all.
      rules: how the copy of the parameters that the loop reads, its caches and the problems are
        divided; the prompts are to be put there by the same.

    Returns:
      `Completions` of shape `[P, G, C]`.
    """
    problems = problem_P.shape[0]
    # Apart, because every pass of the loop would copy stacked weights and caches, layer by layer.
    model = model.cast(model.config.dtype).under(rules).apart()
    head_VD = model.head_VD()
    prefix = model.prefill(prompts.prefix_PL, prompts.prefix_len_P)
    keys_PG = _branch_keys(key, problem_P, group)
    greedy = jnp.asarray(temperature == 0.0)
    scale = jnp.where(greedy, 1.0, temperature)
    read_only_PX = prompts_and_hints(prompts, hints_X)

    def live(loop: _Loop) -> Array:
        return ~loop.done_PG & (loop.past.length_PG < max_tokens)

    def decode(loop: _Loop) -> _Loop:
        length_PG, live_PG = loop.past.length_PG, live(loop)
        ids_PGT = window(loop.branch_PGB, length_PG, 1)
        if draft:
            proposed = look_up(read_only_PX, loop.branch_PGB, length_PG, draft)
            ids_PGT = jnp.concatenate([ids_PGT, proposed], -1)
        hidden_PGTD, kv = model(jnp.maximum(ids_PGT, 0), prefix, loop.past)
        logits_PGTV = scaled_logits(hidden_PGTD, head_VD, scale)
        if constraint:
            row_P = jnp.arange(problems)
            asked = (row_P, loop.branch_PGB, length_PG, ids_PGT)
            logits_PGTV = allow(logits_PGTV, constraint.masks(*asked, rules))
        position_PGT = length_PG[..., None] + jnp.arange(1 + draft)
        token_PGT, logprob_PGT = draw_tokens(logits_PGTV, keys_PG, position_PGT, greedy, truncation)

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


def _write(x_PGB: Array, new_PGT: Array, start_PG: Array) -> Array:
    """Writes each branch's T values at its own start; what lies behind the end is dropped."""
    g, t = jnp.ogrid[: new_PGT.shape[1], : new_PGT.shape[2]]

    def one(x_GB: Array, new_GT: Array, start_G: Array) -> Array:
        return x_GB.at[g, start_G[:, None] + t].set(new_GT, mode="drop")

    return jax.vmap(one)(x_PGB, new_PGT, start_PG)  # as in `_extend` of the model
