"""GRPO's arithmetic: advantages, token weights, losses and KL, as pure functions of arrays.

Everything here runs inside or outside of `jax.jit`, in float32. Nothing knows of models,
tokens or configuration. Shape letters: P problems, G completions per problem, C completion tokens,
padded on the right. What lies past a completion's end never counts, whatever is stored there:
NaN or -inf behind the mask reaches neither a value nor a gradient.

Sources, by the names that the options have: GRPO arXiv 2402.03300, Dr. GRPO 2503.20783,
DAPO 2503.14476, GSPO 2507.18071, CISPO 2506.13585, leave-one-out 2402.14740; the KL estimators
k1, k2, k3 are J. Schulman's, http://joschu.net/blog/kl-approx.html.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jax.typing import ArrayLike

Advantage = Literal["std", "mean", "leave_one_out"]
Loss = Literal["grpo", "bnpo", "dapo", "dr_grpo", "gspo", "cispo"]
KL = Literal["k1", "k2", "k3"]


def has_signal(rewards_PG: ArrayLike, valid_PG: ArrayLike | None = None) -> jax.Array:
    """Whether a group's rewards differ at all; where they do not, there is nothing to learn.

    >>> has_signal([[0.5, 1.0], [0.5, 0.5]]).tolist()
    [True, False]

    Args:
      rewards_PG: rewards, compared as float32.
      valid_PG: bool; samples where it is False are left out. None: all count.

    Returns:
      Bool [P]. False for a group with fewer than two valid samples.
    """
    rewards_PG = jnp.asarray(rewards_PG, jnp.float32)
    highest_P = jnp.max(rewards_PG, axis=1, initial=-jnp.inf, where=valid_PG)
    lowest_P = jnp.min(rewards_PG, axis=1, initial=jnp.inf, where=valid_PG)
    # Negated, so that a NaN reward makes NaN advantages and is noticed, instead of a silent zero.
    return ~(highest_P <= lowest_P)


def group_advantages(
    rewards_PG: ArrayLike,
    kind: Advantage = "std",
    eps: float = 1e-4,
    valid_PG: ArrayLike | None = None,
) -> jax.Array:
    """How much better each completion is than its group.

    - `std`: (r - mean) / (std + eps), GRPO. The std is that of a sample, with n - 1 below the
      sum, as `torch.std` has it and so most GRPO trainers.
    - `mean`: r - mean, Dr. GRPO.
    - `leave_one_out`: r - mean of the others, RLOO; that is (r - mean) n / (n - 1).

    >>> group_advantages([[1.0, 0.5, 0.0], [0.5, 0.5, 0.5]], "mean").tolist()
    [[0.5, 0.0, -0.5], [0.0, 0.0, 0.0]]
    >>> group_advantages([[1.0, 0.5, 0.0]], "std", eps=0.0).tolist()
    [[1.0, 0.0, -1.0]]

    Args:
      rewards_PG: rewards.
      kind: one of the above.
      eps: added to the std, in units of the reward.
      valid_PG: bool; a sample where it is False (not scored) has advantage 0 and is not part of
        its group's mean and std, so its reward may be anything. None: all count.

    Returns:
      Float32 [P, G]; exactly 0 for a group without signal (`has_signal`).

    Raises:
      ValueError: unknown `kind`.
    """
    rewards_PG = jnp.asarray(rewards_PG, jnp.float32)
    valid_PG = jnp.asarray(True if valid_PG is None else valid_PG)
    valid_PG = jnp.broadcast_to(valid_PG, rewards_PG.shape)
    n_P1 = jnp.sum(valid_PG, axis=1, keepdims=True, dtype=jnp.float32)
    others_P1 = jnp.maximum(n_P1 - 1, 1)
    sum_P1 = jnp.sum(rewards_PG, axis=1, keepdims=True, where=valid_PG)
    centred_PG = rewards_PG - sum_P1 / jnp.maximum(n_P1, 1)
    match kind:
        case "std":
            squares_P1 = jnp.sum(centred_PG**2, axis=1, keepdims=True, where=valid_PG)
            advantage_PG = centred_PG / (jnp.sqrt(squares_P1 / others_P1) + eps)
        case "mean":
            advantage_PG = centred_PG
        case "leave_one_out":
            advantage_PG = centred_PG * n_P1 / others_P1
        case _:
            raise ValueError(f"unknown advantage {kind!r}: use std, mean or leave_one_out")
    # Rounding leaves r - mean of equal rewards a little off 0, and 1/eps would magnify it.
    signal_P1 = has_signal(rewards_PG, valid_PG)[:, None]
    return jnp.where(valid_PG & signal_P1, advantage_PG, 0.0)


def soft_overlong_penalty(length_PG: ArrayLike, limit: int, buffer: int) -> jax.Array:
    """DAPO's soft overlong punishment, to be added to the reward.

    >>> soft_overlong_penalty([[85, 90, 100]], limit=100, buffer=20).tolist()
    [[-0.25, -0.5, -1.0]]

    Args:
      length_PG: completion lengths in tokens.
      limit: the maximum completion length in tokens.
      buffer: over how many tokens before the limit the penalty grows.

    Returns:
      Float32 [P, G]: 0 up to `limit - buffer` tokens, from there linear to -1 at `limit`.

    Raises:
      ValueError: `buffer` is not within 1 and `limit`.
    """
    if not 1 <= buffer <= limit:
        raise ValueError(
            f"the overlong buffer must be within 1 and the limit {limit}, not {buffer}"
        )
    over_PG = jnp.asarray(length_PG, jnp.float32) - (limit - buffer)
    return -jnp.clip(over_PG / buffer, 0.0, 1.0)


def completion_mask(length_PG: jax.Array, C: int) -> jax.Array:
    """Which positions hold a token of the completion, its stop token included.

    From lengths, never from ids: a pad id may well be a token that was sampled.

    Args:
      length_PG: int32 lengths in tokens; 0 leaves a completion out altogether.
      C: the padded length.

    Returns:
      Bool [P, G, C].
    """
    return jnp.arange(C) < length_PG[..., None]


def token_weights(mask_PGC: jax.Array, loss: Loss, limit: int) -> jax.Array:
    """The weight of each token, so that the loss of a batch is a plain weighted sum over tokens.

    - `grpo`, `gspo`: the mean over a completion's tokens, then over completions. A completion
      without a token in the mask is not part of that mean.
    - `bnpo`, `dapo`, `cispo`: the mean over all tokens of the batch. The first two names are told
      apart elsewhere by whether devices average on their own; here they are the same.
    - `dr_grpo`: the sum over tokens / (P · G · limit). A constant, so completions without a token
      in the mask are counted.

    All counts run over the whole batch of one optimiser step, so take the weights from the whole
    batch's mask and slice them: the losses and gradients of micro-batches, summed, are then those
    of the full batch, however unevenly the tokens are spread.

    Args:
      mask_PGC: bool; the tokens that count.
      loss: the loss that the weights are for.
      limit: the maximum completion length in tokens; only `dr_grpo` uses it.

    Returns:
      Float32 [P, G, C]; 0 outside of the mask.

    Raises:
      ValueError: unknown `loss`.
    """
    tokens_PG1 = jnp.sum(mask_PGC, axis=2, keepdims=True)
    match loss:
        case "grpo" | "gspo":
            divisor = jnp.maximum(tokens_PG1, 1) * jnp.maximum(jnp.sum(tokens_PG1 > 0), 1)
        case "bnpo" | "dapo" | "cispo":
            divisor = jnp.maximum(jnp.sum(tokens_PG1), 1)
        case "dr_grpo":
            divisor = jnp.asarray(tokens_PG1.size * limit)
        case _:
            raise _unknown_loss(loss)
    return mask_PGC.astype(jnp.float32) / divisor.astype(jnp.float32)


def policy_loss(
    logp_PGC: jax.Array,
    old_logp_PGC: jax.Array,
    advantage_PG: jax.Array,
    mask_PGC: jax.Array,
    weight_PGC: jax.Array,
    *,
    loss: Loss,
    clip_low: float,
    clip_high: float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The policy's loss over a batch or a micro-batch, and what the clipping did.

    With ratio = exp(logp - old_logp) and clipped = the ratio within [1 - clip_low, 1 + clip_high],
    a token's loss is

    - `grpo`, `bnpo`, `dapo`, `dr_grpo`: -min(ratio · advantage, clipped · advantage). They differ
      in their weights alone.
    - `gspo`: the same with one ratio for the completion, the geometric mean of its tokens' ratios,
      as GSPO-token: each token passes the gradient ratio · ∇logp. With weights that are equal
      within a completion, as those of `token_weights`, this is GSPO's gradient. Ratios of
      whole completions stay near 1: its authors clip at 3e-4 and 4e-4.
    - `cispo`: -clipped · advantage · logp with the gradient through logp alone, so that no token
      loses its gradient. Its authors leave the lower side open: clip_low = 1.

    Args:
      logp_PGC: float32 log-probabilities under the policy in training.
      old_logp_PGC: the same under the policy that the ratio is taken to; a constant. On-policy,
        with one update per rollout, pass `logp_PGC` itself: the ratio is 1, the gradient right.
      advantage_PG: float32, from `group_advantages`.
      mask_PGC: bool; the tokens that count.
      weight_PGC: float32, from `token_weights` over the whole batch; 0 outside of the mask.
      loss: which of the above.
      clip_low: how far below 1 the ratio may fall.
      clip_high: how far above 1 the ratio may rise; larger than `clip_low` in DAPO (0.28).

    Returns:
      The loss, a float32 scalar, and float32 counts of tokens: `tokens`, and `clipped_low` and
      `clipped_high`, those where clipping changed the gradient. All add up over micro-batches.

    Raises:
      ValueError: unknown `loss`.
    """
    # Before any exp or product: 0 · NaN is NaN in the backward pass, too.
    logp_PGC = jnp.where(mask_PGC, logp_PGC, 0.0)
    old_logp_PGC = stop_gradient(jnp.where(mask_PGC, old_logp_PGC, 0.0))
    advantage_PG1 = advantage_PG[..., None]

    log_ratio_PGC = logp_PGC - old_logp_PGC
    if loss == "gspo":
        tokens_PG1 = jnp.sum(mask_PGC, axis=2, keepdims=True, dtype=jnp.float32)
        mean_PG1 = jnp.sum(log_ratio_PGC, axis=2, keepdims=True) / jnp.maximum(tokens_PG1, 1)
        log_ratio_PGC = stop_gradient(mean_PG1) + (logp_PGC - stop_gradient(logp_PGC))
    ratio_PGC = jnp.exp(log_ratio_PGC)
    clipped_PGC = jnp.clip(ratio_PGC, 1 - clip_low, 1 + clip_high)
    low_PGC = mask_PGC & (ratio_PGC < 1 - clip_low)
    high_PGC = mask_PGC & (ratio_PGC > 1 + clip_high)

    match loss:
        case "grpo" | "bnpo" | "dapo" | "dr_grpo" | "gspo":
            gain_PGC = jnp.minimum(ratio_PGC * advantage_PG1, clipped_PGC * advantage_PG1)
            # The minimum takes the clipped side only where the ratio has gone too far already.
            low_PGC &= advantage_PG1 < 0
            high_PGC &= advantage_PG1 > 0
        case "cispo":
            gain_PGC = stop_gradient(clipped_PGC) * advantage_PG1 * logp_PGC
            low_PGC &= advantage_PG1 != 0
            high_PGC &= advantage_PG1 != 0
        case _:
            raise _unknown_loss(loss)

    stats = {
        "tokens": jnp.sum(mask_PGC, dtype=jnp.float32),
        "clipped_low": jnp.sum(low_PGC, dtype=jnp.float32),
        "clipped_high": jnp.sum(high_PGC, dtype=jnp.float32),
    }
    return -jnp.sum(weight_PGC * gain_PGC), stats


def kl_penalty(
    logp_PGC: jax.Array, ref_logp_PGC: jax.Array, mask_PGC: jax.Array, kind: KL = "k3"
) -> jax.Array:
    """An estimate, per token, of how far the policy has moved from a frozen reference.

    With d = ref_logp - logp and tokens sampled from the policy, k1 and k3 have the mean
    KL(policy ‖ reference) and k2 is near it. As a term of the loss, what counts is the gradient:

    - `k1` = -d; gradient ∇logp, whose mean is 0. Good to report, no good as a loss: it adds noise
      and does not hold the policy.
    - `k2` = d² / 2; gradient -d ∇logp, whose mean is ∇KL(policy ‖ reference).
    - `k3` = exp(d) - d - 1, GRPO's, never negative; gradient (1 - exp(d)) ∇logp, whose mean is
      ∇KL(reference ‖ policy): the other direction, the same to first order near the reference.

    Args:
      logp_PGC: float32 log-probabilities under the policy.
      ref_logp_PGC: float32 log-probabilities under the reference; a constant.
      mask_PGC: bool; the tokens that count.
      kind: the estimator.

    Returns:
      Float32 [P, G, C] in nats; 0 outside of the mask.

    Raises:
      ValueError: unknown `kind`.
    """
    d_PGC = jnp.where(mask_PGC, stop_gradient(ref_logp_PGC) - logp_PGC, 0.0)
    match kind:
        case "k1":
            return -d_PGC
        case "k2":
            return d_PGC**2 / 2
        case "k3":
            return jnp.expm1(d_PGC) - d_PGC
        case _:
            raise ValueError(f"unknown KL estimator {kind!r}: use k1, k2 or k3")


def ratio_stats(
    logp_PGC: jax.Array, sampler_logp_PGC: jax.Array, mask_PGC: jax.Array
) -> dict[str, jax.Array]:
    """The spread of the trainer's token probabilities over the sampler's, before any clipping.

    On-policy all are 1 up to rounding; more means that sampling and training disagree. Quantiles
    do not add up over micro-batches: call this once, with the whole batch.

    Args:
      logp_PGC: float32 log-probabilities as the trainer computes them.
      sampler_logp_PGC: float32 log-probabilities that the sampler reported.
      mask_PGC: bool; the tokens that count.

    Returns:
      Float32 scalars `min`, `p01`, `median`, `p99`, `max` of exp(logp - sampler_logp), each a
      ratio that occurs (the nearest rank); all 1 where the mask is empty.
    """
    ratio_PGC = jnp.exp(logp_PGC - sampler_logp_PGC)
    # Sorting puts what is masked behind every ratio, and a NaN that does count behind even that,
    # so a NaN shows: as a maximum of inf, or as itself.
    ordered = jnp.sort(jnp.where(mask_PGC, ratio_PGC, jnp.inf), axis=None)
    last = jnp.maximum(jnp.sum(mask_PGC), 1) - 1
    place = jnp.array([0.0, 0.01, 0.5, 0.99, 1.0]) * last.astype(jnp.float32)
    quantiles = jnp.where(jnp.any(mask_PGC), ordered[jnp.rint(place).astype(jnp.int32)], 1.0)
    return dict(zip(("min", "p01", "median", "p99", "max"), quantiles, strict=True))


def _unknown_loss(loss: str) -> ValueError:
    return ValueError(f"unknown loss {loss!r}: use grpo, bnpo, dapo, dr_grpo, gspo or cispo")
