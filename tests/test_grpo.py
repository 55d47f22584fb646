"""GRPO's arithmetic against values worked out by hand and against plain loops over NumPy floats."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrpo import grpo

LOSSES = ["grpo", "bnpo", "dapo", "dr_grpo", "gspo", "cispo"]
KINDS = ["std", "mean", "leave_one_out"]
CLIP = {"clip_low": 0.2, "clip_high": 0.28}
LIMIT = 9

# Compiled, as training runs them.
group_advantages = jax.jit(grpo.group_advantages, static_argnames="kind")
has_signal = jax.jit(grpo.has_signal)
completion_mask = jax.jit(grpo.completion_mask, static_argnames="C")
token_weights = jax.jit(grpo.token_weights, static_argnames=("loss", "limit"))
kl_penalty = jax.jit(grpo.kl_penalty, static_argnames="kind")
ratio_stats = jax.jit(grpo.ratio_stats)


@functools.partial(jax.jit, static_argnames="loss")
def loss_and_gradient(loss, logp_PGC, *constants):
    """((loss, stats), gradient)."""
    policy_loss = functools.partial(grpo.policy_loss, loss=loss, **CLIP)
    return jax.value_and_grad(policy_loss, has_aux=True)(logp_PGC, *constants)


@pytest.fixture(autouse=True)
def _strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


def array(values) -> jax.Array:
    return jnp.asarray(values, jnp.float32)


def close(actual, desired, rtol=1e-5, atol=1e-7):
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(actual))
    np.testing.assert_allclose(np.asarray(actual), desired, rtol=rtol, atol=atol)


# --- advantages -----------------------------------------------------------------------------------


def test_advantages_by_hand():
    # Mean 1/4. Squares 9/16 + 3/16 = 3/4, over n - 1 = 3 gives 1/4: the std is 1/2.
    rewards_PG = [[1.0, 0.0, 0.0, 0.0]]
    close(group_advantages(rewards_PG, "std", eps=0.0), [[1.5, -0.5, -0.5, -0.5]])
    # An eps as large as the std halves it.
    close(group_advantages(rewards_PG, "std", eps=0.5), [[0.75, -0.25, -0.25, -0.25]])
    close(group_advantages(rewards_PG, "mean"), [[0.75, -0.25, -0.25, -0.25]])
    # The others of the 1 have the mean 0; the others of a 0 have the mean 1/3.
    close(group_advantages(rewards_PG, "leave_one_out"), [[1, -1 / 3, -1 / 3, -1 / 3]])


def test_unscored_samples_are_not_in_their_group():
    # What is left is the group [1, 0]: mean 1/2, std sqrt(1/4 + 1/4) = 0.7071.
    rewards_PG = [[1.0, math.nan, 0.0, 5.0]]
    valid_PG = jnp.array([[True, False, True, False]])
    half = math.sqrt(0.5)
    expected = {"std": [[half, 0, -half, 0]], "mean": [[0.5, 0, -0.5, 0]]}
    expected["leave_one_out"] = [[1, 0, -1, 0]]
    for kind in KINDS:
        close(group_advantages(rewards_PG, kind, 0.0, valid_PG), expected[kind])
    assert has_signal(rewards_PG, valid_PG).tolist() == [True]


@pytest.mark.parametrize("kind", KINDS)
def test_advantages_against_loops(kind):
    rng = np.random.default_rng(1)
    rewards_PG = rng.normal(2.0, 3.0, (5, 6)).astype(np.float32)
    valid_PG = rng.random((5, 6)) < 0.7
    assert 2 <= valid_PG.sum(1).min() < valid_PG.sum(1).max()
    expected = np.zeros((5, 6))
    for p in range(5):
        group = [float(r) for r, ok in zip(rewards_PG[p], valid_PG[p], strict=True) if ok]
        mean = sum(group) / len(group)
        std = math.sqrt(sum((r - mean) ** 2 for r in group) / (len(group) - 1))
        for g in np.flatnonzero(valid_PG[p]):
            r = float(rewards_PG[p, g])
            others = (sum(group) - r) / (len(group) - 1)
            value = {
                "std": (r - mean) / (std + 0.01),
                "mean": r - mean,
                "leave_one_out": r - others,
            }
            expected[p, g] = value[kind]
    close(group_advantages(rewards_PG, kind, 0.01, valid_PG), expected, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_rewards_have_exactly_no_advantage(kind):
    rng = np.random.default_rng(2)
    values = np.concatenate([[0.0, 0.1 + 0.2, 1 / 3], rng.random(61)])
    rounded_off = 0
    for G in (3, 7):
        rewards_PG = np.repeat(values[:, None], G, axis=1)
        assert not np.any(group_advantages(rewards_PG, kind))
        assert not np.any(has_signal(rewards_PG))
        rewards_PG = array(rewards_PG)
        mean_P1 = rewards_PG.sum(1, keepdims=True) / G
        rounded_off += int(jnp.sum(rewards_PG != mean_P1))
    assert rounded_off > 0  # so the mean alone would not have given 0


@pytest.mark.parametrize("kind", KINDS)
def test_groups_without_a_rival(kind):
    assert group_advantages([[3.0]], kind).tolist() == [[0.0]]
    one_and_none_PG = jnp.array([[True, False], [False, False]])
    rewards_PG = array([[1, 2], [3, 4]])
    assert not np.any(group_advantages(rewards_PG, kind, valid_PG=one_and_none_PG))
    assert has_signal(rewards_PG, one_and_none_PG).tolist() == [False, False]


def test_signal():
    rewards_PG = [[0, 0, 0], [0.5, 0.5, 0.5], [0, 0, 1], [0.3, 0.3, 0.3000001]]
    assert has_signal(rewards_PG).tolist() == [False, False, True, True]
    valid_PG = jnp.array([[True, True, False]] * 4)
    assert not np.any(has_signal(rewards_PG, valid_PG))


def test_a_nan_reward_is_not_a_silent_zero():
    rewards_PG = [[math.nan, 1.0], [0.0, 1.0]]
    assert np.isnan(group_advantages(rewards_PG)).tolist() == [[True, True], [False, False]]


def test_overlong_penalty_by_hand():
    # 20 tokens of buffer before 100: 80 is the last free length, 85 is a quarter of the way.
    length_PG = jnp.array([[1, 79, 80, 81], [85, 90, 99, 100]])
    expected = [[0, 0, 0, -0.05], [-0.25, -0.5, -0.95, -1]]
    close(grpo.soft_overlong_penalty(length_PG, limit=100, buffer=20), expected)
    close(grpo.soft_overlong_penalty(jnp.array([[0, 5, 10]]), 10, 10), [[0, -0.5, -1]])


@pytest.mark.parametrize("buffer", [0, -1, 11])
def test_overlong_buffer_is_checked(buffer):
    with pytest.raises(ValueError, match=f"within 1 and the limit 10, not {buffer}"):
        grpo.soft_overlong_penalty(jnp.array([[1]]), 10, buffer)


# --- masks and weights ----------------------------------------------------------------------------


def test_mask_by_hand():
    mask_PGC = completion_mask(jnp.array([[0, 1], [2, 3]]), 3)
    assert mask_PGC.astype(int).tolist() == [[[0, 0, 0], [1, 0, 0]], [[1, 1, 0], [1, 1, 1]]]


def test_weights_by_hand():
    # Completions of 1, 3 and 0 tokens, and of 4: eight tokens in three completions that count.
    mask_PGC = completion_mask(jnp.array([[1, 3], [0, 4]]), 4)
    third = 1 / 3
    per_completion = [
        [[third, 0, 0, 0], [third / 3, third / 3, third / 3, 0]],
        [[0, 0, 0, 0], [third / 4, third / 4, third / 4, third / 4]],
    ]
    counted = np.asarray(mask_PGC, np.float32)
    for loss in ("grpo", "gspo"):
        close(token_weights(mask_PGC, loss, LIMIT), per_completion)
    for loss in ("bnpo", "dapo", "cispo"):
        close(token_weights(mask_PGC, loss, LIMIT), counted / 8)
    # Four completions of up to 10 tokens, the empty one included.
    close(token_weights(mask_PGC, "dr_grpo", 10), counted / 40)


@pytest.mark.parametrize("loss", LOSSES)
def test_empty_batch_weighs_nothing(loss):
    mask_PGC = jnp.zeros((2, 3, 4), bool)
    # Not compiled: XLA turns mask / 0 into a select and would hide a division by zero.
    close(grpo.token_weights(mask_PGC, loss, LIMIT), np.zeros((2, 3, 4)))


# --- losses ---------------------------------------------------------------------------------------


def one_completion(loss, logps, old_logps, advantage):
    """Loss, gradient per token and stats of one completion whose tokens all count."""
    mask_PGC = jnp.ones((1, 1, len(logps)), bool)
    weight_PGC = token_weights(mask_PGC, loss, len(logps))
    arrays = array([[logps]]), array([[old_logps]]), array([[advantage]])
    (value, stats), gradient_PGC = loss_and_gradient(loss, *arrays, mask_PGC, weight_PGC)
    return value, gradient_PGC[0, 0], {name: float(count) for name, count in stats.items()}


LOG2 = math.log(2)


@pytest.mark.parametrize("loss", ["grpo", "bnpo", "dapo", "dr_grpo", "gspo"])
@pytest.mark.parametrize(
    ("log_ratio", "advantage", "value", "gradient", "low", "high"),
    [
        (LOG2, 1, -1.28, 0, 0, 1),  # min(2, 1.28): gone up far enough
        (LOG2, -1, 2, 2, 0, 0),  # min(-2, -1.28): went up though it is bad, pulled back
        (-LOG2, -1, 0.8, 0, 1, 0),  # min(-1/2, -0.8): gone down far enough
        (-LOG2, 1, -0.5, -0.5, 0, 0),  # min(1/2, 0.8): went down though it is good
        (0, 1, -1, -1, 0, 0),
        (0, -3, 3, 3, 0, 0),
        (LOG2, 0, 0, 0, 0, 0),
    ],
)
def test_clipped_surrogate_by_hand(loss, log_ratio, advantage, value, gradient, low, high):
    actual, gradients, stats = one_completion(loss, [log_ratio - 1], [-1], advantage)
    close(actual, value)
    close(gradients, [gradient])
    assert stats == {"tokens": 1, "clipped_low": low, "clipped_high": high}


def test_gspo_by_hand():
    # Ratios 4 and 1: the completion's is sqrt(4 · 1) = 2. Each of two tokens weighs 1/2.
    value, gradients, stats = one_completion("gspo", [2 * LOG2 - 3, -1], [-3, -1], -1)
    close(value, 2)
    close(gradients, [1, 1])
    assert stats == {"tokens": 2, "clipped_low": 0, "clipped_high": 0}
    # With a good advantage it is clipped at 1.28, the token of ratio 1 too.
    value, gradients, stats = one_completion("gspo", [2 * LOG2 - 3, -1], [-3, -1], 1)
    close(value, -1.28)
    close(gradients, [0, 0])
    assert stats == {"tokens": 2, "clipped_low": 0, "clipped_high": 2}


def test_cispo_by_hand():
    # The ratio 2 becomes the factor 1.28 of log 1/2, and the gradient stays, whatever the sign.
    for advantage in (1, -1):
        value, gradients, stats = one_completion("cispo", [-LOG2], [-2 * LOG2], advantage)
        close(value, advantage * 1.28 * LOG2)
        close(gradients, [-1.28 * advantage])
        assert stats == {"tokens": 1, "clipped_low": 0, "clipped_high": 1}
    value, gradients, stats = one_completion("cispo", [-3 * LOG2], [-2 * LOG2], 1)
    close(value, 0.8 * 3 * LOG2)
    close(gradients, [-0.8])
    assert stats == {"tokens": 1, "clipped_low": 1, "clipped_high": 0}
    # Without an advantage there is no gradient that clipping could change.
    for logp in (-LOG2, -3 * LOG2):
        *_, stats = one_completion("cispo", [logp], [-2 * LOG2], 0)
        assert stats == {"tokens": 1, "clipped_low": 0, "clipped_high": 0}


def random_batch(seed, P=4, G=3, C=6):
    """Off-policy arrays with an empty completion, one of one token and one that fills its row."""
    rng = np.random.default_rng(seed)
    length_PG = rng.integers(1, C + 1, (P, G))
    length_PG[0, :3] = [0, 1, C]
    old_PGC = -rng.exponential(1.5, (P, G, C)).astype(np.float32)
    # Completions drift as a whole, too, so that GSPO's ratios leave the clip range.
    drift_PGC = rng.normal(0, 0.4, (P, G, 1)) + rng.normal(0, 0.4, (P, G, C))
    logp_PGC = old_PGC + drift_PGC.astype(np.float32)
    advantage_PG = rng.normal(0, 1, (P, G)).astype(np.float32)
    return logp_PGC, old_PGC, advantage_PG, length_PG


def plain_loss(loss, logp_PGC, frozen_PGC, old_PGC, advantage_PG, length_PG):
    """The loss as its paper writes it, in Python floats; `frozen` stands for what is detached.

    Returns the loss and the number of tokens clipped low and high.
    """
    P, G, _ = logp_PGC.shape
    low = high = 0
    sums = []
    for p in range(P):
        for g in range(G):
            n, A = int(length_PG[p, g]), float(advantage_PG[p, g])
            differences = [float(logp_PGC[p, g, t]) - float(old_PGC[p, g, t]) for t in range(n)]
            total = 0.0
            for t in range(n):
                if loss == "cispo":
                    ratio = math.exp(float(frozen_PGC[p, g, t]) - float(old_PGC[p, g, t]))
                    total -= min(max(ratio, 0.8), 1.28) * A * float(logp_PGC[p, g, t])
                    low, high = low + (ratio < 0.8), high + (ratio > 1.28)
                    continue
                ratio = math.exp(sum(differences) / n if loss == "gspo" else differences[t])
                total -= min(ratio * A, min(max(ratio, 0.8), 1.28) * A)
                low, high = low + (ratio < 0.8 and A < 0), high + (ratio > 1.28 and A > 0)
            sums.append((total, n))
    if loss in ("grpo", "gspo"):
        means = [total / n for total, n in sums if n > 0]
        return sum(means) / len(means), low, high
    everything = sum(total for total, _ in sums)
    if loss == "dr_grpo":
        return everything / (P * G * LIMIT), low, high
    return everything / sum(n for _, n in sums), low, high


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_and_gradients_against_loops(loss, seed):
    logp_PGC, old_PGC, advantage_PG, length_PG = random_batch(seed)
    mask_PGC = completion_mask(length_PG, logp_PGC.shape[2])
    weight_PGC = token_weights(mask_PGC, loss, LIMIT)
    (value, stats), gradient_PGC = loss_and_gradient(
        loss, logp_PGC, old_PGC, advantage_PG, mask_PGC, weight_PGC
    )
    constants = (old_PGC, advantage_PG, length_PG)
    expected, low, high = plain_loss(loss, logp_PGC, logp_PGC, *constants)
    assert (float(stats["clipped_low"]), float(stats["clipped_high"])) == (low, high)
    assert low > 0
    assert high > 0
    assert float(stats["tokens"]) == length_PG.sum()
    close(value, expected, rtol=1e-5, atol=1e-6)

    # Central differences of the loops, in float64. For GSPO they differentiate the completion's
    # own ratio, so this also shows that the token form has the same gradient.
    differences = np.zeros(logp_PGC.shape)
    for place in np.ndindex(logp_PGC.shape):
        ends = []
        for step in (1e-5, -1e-5):
            moved_PGC = logp_PGC.astype(np.float64)
            moved_PGC[place] += step
            ends.append(plain_loss(loss, moved_PGC, logp_PGC, *constants)[0])
        differences[place] = (ends[0] - ends[1]) / 2e-5
    close(gradient_PGC, differences, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("loss", LOSSES)
def test_on_policy_gradient_is_the_policy_gradient(loss):
    logp_PGC, _, advantage_PG, length_PG = map(jnp.asarray, random_batch(3))
    mask_PGC = completion_mask(length_PG, logp_PGC.shape[2])
    weight_PGC = token_weights(mask_PGC, loss, LIMIT)

    @jax.jit
    def gradient(logp_PGC):
        def total(logp_PGC):
            # The policy's own log-probabilities stand in for the old ones.
            batch = (logp_PGC, logp_PGC, advantage_PG, mask_PGC, weight_PGC)
            return grpo.policy_loss(*batch, loss=loss, **CLIP)

        return jax.grad(total, has_aux=True)(logp_PGC)

    gradient_PGC, stats = gradient(logp_PGC)
    close(gradient_PGC, -weight_PGC * advantage_PG[..., None])
    assert stats["clipped_low"] == stats["clipped_high"] == 0


@pytest.mark.parametrize("loss", LOSSES)
def test_micro_batches_add_up(loss):
    logp_PGC, old_PGC, advantage_PG, length_PG = map(jnp.asarray, random_batch(4))
    mask_PGC = completion_mask(length_PG, logp_PGC.shape[2])
    weight_PGC = token_weights(mask_PGC, loss, LIMIT)
    batch = (logp_PGC, old_PGC, advantage_PG, mask_PGC, weight_PGC)
    full, gradient_PGC = loss_and_gradient(loss, *batch)

    def add(sums, micro_batch):
        part, part_gradient = loss_and_gradient(loss, *micro_batch)
        return jax.tree.map(jnp.add, sums, part), part_gradient

    @jax.jit
    def accumulate(batch):
        micro_batches = jax.tree.map(lambda a: a.reshape(2, 2, *a.shape[1:]), batch)
        return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, full), micro_batches)

    (value, stats), parts = accumulate(batch)
    close(value, full[0], rtol=1e-6)
    assert stats == full[1]
    close(parts.reshape(gradient_PGC.shape), gradient_PGC, rtol=1e-6, atol=0)


def spoil(mask_PGC, *arrays):
    """Replaces what is masked by NaN, -inf, inf and 1e30 in turn, shifted from array to array."""
    junk = np.resize([math.nan, -math.inf, math.inf, 1e30], mask_PGC.size + len(arrays))
    for i, values in enumerate(arrays):
        junk_PGC = junk[i : i + mask_PGC.size].reshape(mask_PGC.shape)
        yield np.where(mask_PGC, values, junk_PGC).astype(np.float32)


@pytest.mark.parametrize("loss", LOSSES)
def test_what_is_masked_does_not_reach_the_loss(loss):
    logp_PGC, old_PGC, advantage_PG, length_PG = random_batch(5)
    mask_PGC = completion_mask(length_PG, logp_PGC.shape[2])
    constants = (advantage_PG, mask_PGC, token_weights(mask_PGC, loss, LIMIT))
    clean = loss_and_gradient(loss, logp_PGC, old_PGC, *constants)
    spoilt = loss_and_gradient(loss, *spoil(mask_PGC, logp_PGC, old_PGC), *constants)
    assert jax.tree.all(jax.tree.map(np.array_equal, clean, spoilt))
    gradient_PGC = np.asarray(spoilt[1])
    assert np.all(gradient_PGC[~mask_PGC] == 0)
    assert np.any(gradient_PGC != 0)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_what_is_masked_does_not_reach_the_kl(kind):
    logp_PGC, ref_PGC, _, length_PG = random_batch(5)
    mask_PGC = completion_mask(length_PG, logp_PGC.shape[2])

    @jax.jit
    @jax.value_and_grad
    def total(logp_PGC, ref_PGC):
        return jnp.sum(grpo.kl_penalty(logp_PGC, ref_PGC, mask_PGC, kind))

    clean, spoilt = total(logp_PGC, ref_PGC), total(*spoil(mask_PGC, logp_PGC, ref_PGC))
    assert jax.tree.all(jax.tree.map(np.array_equal, clean, spoilt))
    assert np.any(spoilt[1] != 0)


def test_what_is_masked_does_not_reach_the_ratios():
    logp_PGC, sampler_PGC, _, length_PG = random_batch(5)
    mask_PGC = completion_mask(length_PG, logp_PGC.shape[2])
    spoilt = ratio_stats(*spoil(mask_PGC, logp_PGC, sampler_PGC), mask_PGC)
    assert ratio_stats(logp_PGC, sampler_PGC, mask_PGC) == spoilt
    assert np.isfinite(spoilt["max"])


@pytest.mark.parametrize("loss", LOSSES)
def test_an_empty_batch_has_no_loss_and_no_gradient(loss):
    logp_PGC, old_PGC, advantage_PG, _ = random_batch(6)
    mask_PGC = np.zeros(logp_PGC.shape, bool)
    weight_PGC = token_weights(mask_PGC, loss, LIMIT)
    nan_PGC = logp_PGC * np.float32(math.nan)
    result = loss_and_gradient(loss, nan_PGC, old_PGC, advantage_PG, mask_PGC, weight_PGC)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(result))


def test_unknown_names_are_refused():
    a_PGC, a_PG, mask_PGC = jnp.zeros((1, 2, 3)), jnp.zeros((1, 2)), jnp.ones((1, 2, 3), bool)
    with pytest.raises(ValueError, match=r"unknown loss 'ppo': use grpo, "):
        token_weights(mask_PGC, "ppo", 3)
    with pytest.raises(ValueError, match=r"unknown loss 'ppo': use grpo, "):
        grpo.policy_loss(a_PGC, a_PGC, a_PG, mask_PGC, a_PGC, loss="ppo", **CLIP)
    with pytest.raises(ValueError, match=r"unknown advantage 'rloo': use std, "):
        group_advantages(a_PG, "rloo")
    with pytest.raises(ValueError, match=r"unknown KL estimator 'k4': use k1, "):
        kl_penalty(a_PGC, a_PGC, mask_PGC, "k4")


# --- KL -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "value", "gradient"),
    [
        ("k1", LOG2, 1),  # log p - log q
        ("k2", LOG2**2 / 2, LOG2),  # its square / 2
        ("k3", 0.5 + LOG2 - 1, 0.5),  # q/p - log(q/p) - 1, whose slope is 1 - q/p
    ],
)
def test_kl_by_hand(kind, value, gradient):
    # The policy gives the token 1/2, the reference 1/4.
    logp_PGC, ref_PGC, mask_PGC = array([[[-LOG2]]]), array([[[-2 * LOG2]]]), jnp.array([[[True]]])
    close(kl_penalty(logp_PGC, ref_PGC, mask_PGC, kind), [[[value]]])
    slope = jax.grad(lambda x: kl_penalty(x, ref_PGC, mask_PGC, kind).sum())(logp_PGC)
    close(slope, [[[gradient]]])
    # The reference is a constant.
    slope = jax.grad(lambda x: kl_penalty(logp_PGC, x, mask_PGC, kind).sum())(ref_PGC)
    assert slope.tolist() == [[[0.0]]]


def test_kl_against_loops():
    logp_PGC, ref_PGC, _, length_PG = random_batch(7)
    mask_PGC = completion_mask(jnp.asarray(length_PG), logp_PGC.shape[2])
    expected = {kind: np.zeros(logp_PGC.shape) for kind in ("k1", "k2", "k3")}
    for p, g, t in np.ndindex(logp_PGC.shape):
        if t < length_PG[p, g]:
            d = float(ref_PGC[p, g, t]) - float(logp_PGC[p, g, t])
            expected["k1"][p, g, t] = -d
            expected["k2"][p, g, t] = d * d / 2
            expected["k3"][p, g, t] = math.exp(d) - d - 1
    for kind, values in expected.items():
        close(kl_penalty(logp_PGC, ref_PGC, mask_PGC, kind), values, atol=1e-6)


def test_kl_means_over_a_whole_vocabulary():
    # Every token of a vocabulary of seven, weighed with its probability: expectations, no sampling.
    rng = np.random.default_rng(8)
    logits_V, ref_logits_V = (array(rng.normal(0, 1, 7)) for _ in range(2))
    logp_V, ref_logp_V = jax.nn.log_softmax(logits_V), jax.nn.log_softmax(ref_logits_V)
    p_V, q_V = np.exp(logp_V), np.exp(ref_logp_V)
    kl = float(np.sum(p_V * (logp_V - ref_logp_V)))

    def mean(logits_V, kind):
        logp_11V = jax.nn.log_softmax(logits_V)[None, None]
        mask_11V = jnp.ones((1, 1, 7), bool)
        return jnp.sum(p_V * kl_penalty(logp_11V, ref_logp_V[None, None], mask_11V, kind))

    close(mean(logits_V, "k1"), kl)
    close(mean(logits_V, "k3"), kl)
    gradient = jax.grad(mean)
    close(gradient(logits_V, "k1"), np.zeros(7), atol=1e-6)
    # d KL(p ‖ q) / d logit = p (log p/q - KL), d KL(q ‖ p) / d logit = p - q.
    close(gradient(logits_V, "k2"), p_V * (logp_V - ref_logp_V - kl), atol=1e-6)
    close(gradient(logits_V, "k3"), p_V - q_V, atol=1e-6)


# --- ratios ---------------------------------------------------------------------------------------


def test_ratios_by_hand():
    # Ratios 1, 2, 4, 1/2 and 8; the 8 is masked out, so are the two beyond the length.
    logp_PGC = array([[[0, LOG2, 2 * LOG2], [-LOG2, 3 * LOG2, 9]]])
    mask_PGC = jnp.array([[[True, True, True], [True, False, False]]])
    stats = ratio_stats(logp_PGC, jnp.zeros_like(logp_PGC), mask_PGC)
    assert {name: round(float(x), 5) for name, x in stats.items()} == {
        "min": 0.5, "p01": 0.5, "median": 2.0, "p99": 4.0, "max": 4.0,
    }  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ratios_against_numpy(seed):
    logp_PGC, sampler_PGC, _, length_PG = random_batch(seed, P=9, G=8, C=31)
    mask_PGC = np.arange(31) < length_PG[..., None]
    ratios = np.exp(np.float64(logp_PGC) - np.float64(sampler_PGC))[mask_PGC]
    expected = np.quantile(ratios, [0, 0.01, 0.5, 0.99, 1], method="nearest")
    stats = ratio_stats(logp_PGC, sampler_PGC, mask_PGC)
    assert len(set(expected)) == 5
    for name, value in zip(("min", "p01", "median", "p99", "max"), expected, strict=True):
        close(stats[name], value)


def test_ratios_of_nothing_and_of_one_token():
    logp_PGC, sampler_PGC = array([[[LOG2, 5]]]), array([[[0, math.nan]]])
    nothing = ratio_stats(logp_PGC, sampler_PGC, jnp.zeros((1, 1, 2), bool))
    assert set(map(float, nothing.values())) == {1.0}
    one = ratio_stats(logp_PGC, sampler_PGC, jnp.array([[[True, False]]]))
    assert set(map(float, one.values())) == {2.0}


def test_a_nan_that_counts_is_seen_in_the_ratios():
    logp_PGC, sampler_PGC = array([[[0, math.nan, 0]]]), jnp.zeros((1, 1, 3))
    for length in (2, 3):
        mask_PGC = completion_mask(jnp.array([[length]]), 3)
        stats = ratio_stats(logp_PGC, sampler_PGC, mask_PGC)
        assert not np.isfinite(stats["max"])
