"""What becomes of sampled groups: rewards, refills, and the batch of an update."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxgrpo.clock import Clock
from jaxgrpo.config import GrpoConfig, MeshConfig, RolloutConfig, SamplingConfig, ScoringConfig
from jaxgrpo.data import draw, pack_prompts
from jaxgrpo.metrics import completion_records, summary, unscored
from jaxgrpo.rewards.pool import Rewarded
from jaxgrpo.rollout import Answers, Scorer, collect, pack
from jaxgrpo.sharding import make_mesh
from jaxgrpo.types import Problem, Verdict

LIMIT = 8
# Problems with an even number get answers of different worth, the others do not.
PROBLEMS = [Problem(i, str(i), (1, 2, 3 + i), {"worth": i}) for i in range(12)]


class FakeSampler:
    """Answers at once: sample g of problem i is `g` where the problem is divided, else `1`."""

    config = SamplingConfig(max_tokens=LIMIT)

    def __init__(self, lengths=(2, 3, 4)):
        self.mesh = make_mesh(MeshConfig(1, 1), jax.devices()[:1])
        self.constraint = None
        self.lengths = np.array(lengths, np.int32)
        self.drawn = []

    def __call__(self, model, problems, key, *, temperature, group, batch):
        self.drawn.append([number for number, _ in problems])
        return [
            Answers(
                problem,
                np.full((group, LIMIT), problem.number, np.int32),
                np.full((group, LIMIT), -0.5, np.float32),
                self.lengths,
                self.lengths < LIMIT,
                self.lengths,
                [str(g if problem.number % 2 == 0 else 1) for g in range(group)],
            )
            for _, problem in problems
        ]

    def pack_prompts(self, problems):
        return pack_prompts(problems, 4)


class FakePool:
    """A number is worth half of itself, and valid from 1 on; what is none has no score."""

    def reward(self, jobs, most_failures):
        return [[self.one(text) for text in texts] for _, texts in jobs]

    def one(self, text):
        try:
            value = float(text)
        except ValueError:
            return Rewarded(0.0, text.split()[0], failure=f"failed: {text}")
        judged = (1.0, "valid", "") if value >= 1 else (0.5, "minimum@", "")
        return Rewarded(*judged, 0.5 * value, {"value": value})


def scorer(max_failed=0.0, **config):
    scoring = ScoringConfig(max_failed=max_failed)
    return Scorer(FakePool(), scoring, GrpoConfig(**config), LIMIT)


def run(sampler, refills, position=0, problems=4):
    config = RolloutConfig(problems=problems, group=3, max_refills=refills)
    return collect(
        sampler,
        scorer(),
        None,
        PROBLEMS,
        position,
        jax.random.key(0),
        config,
        seed=0,
        clock=Clock(),
    )


def test_groups_are_scored_by_weight_and_judged():
    (answers,) = FakeSampler()(None, [(0, PROBLEMS[0])], None, temperature=1, group=3, batch=1)
    (group,) = scorer()([answers])
    np.testing.assert_allclose(group.rewards_G, [0, 0.5, 1.0])
    np.testing.assert_allclose(group.terms["value"], [0, 1, 2])
    assert [verdict.reason for verdict in group.verdicts] == ["minimum@", "valid", "valid"]
    assert group.has_signal


@pytest.mark.parametrize("refills", [0, 1, 5])
def test_flat_groups_are_replaced_while_refills_last(refills):
    sampler = FakeSampler()
    batch, sampled, position = run(sampler, refills)
    order = [problem.number for _, problem in draw(PROBLEMS, 0, 4 * (1 + refills), 0)]
    needed = next(
        (n for n in range(1, refills + 2) if sum(i % 2 == 0 for i in order[: 4 * n]) >= 4),
        refills + 1,
    )
    assert len(sampler.drawn) == needed
    assert position == len(sampled) == 4 * needed
    numbers = order[: 4 * needed]
    divided, flat = ([i for i in numbers if i % 2 == rest] for rest in (0, 1))
    got = [group.answers.problem.number for group in batch]
    assert got == (divided + flat)[:4]


def test_batch_is_cut_to_the_longest_and_advantages_are_those_of_the_group():
    sampler = FakeSampler(lengths=(1, 2, 3))
    batch, _, _ = run(sampler, refills=5)
    packed = jax.device_get(pack(batch, GrpoConfig(advantage="mean"), sampler))
    assert packed.completions.tokens_PGC.shape == (4, 3, 4)  # half of the limit holds them all
    numbers = [group.answers.problem.number for group in batch]
    assert packed.completions.tokens_PGC[:, 0, 0].tolist() == numbers
    assert packed.prompts.last_P.tolist() == [3 + number for number in numbers]
    np.testing.assert_allclose(packed.advantage_PG, np.tile([-0.5, 0, 0.5], (4, 1)), atol=1e-6)
    assert packed.train_PG.all()


def test_completions_cut_at_the_limit():
    sampler = FakeSampler(lengths=(2, 7, LIMIT))
    batch, _, _ = run(sampler, refills=5)
    assert jax.device_get(pack(batch, GrpoConfig(), sampler)).train_PG.all()
    masked = jax.device_get(pack(batch, GrpoConfig(overlong="mask"), sampler))
    assert masked.train_PG.tolist() == [[True, True, False]] * 4
    # From 4 tokens on the punishment grows to 1 at 8.
    (soft,) = scorer(overlong="soft", overlong_buffer=4)([batch[0].answers])
    np.testing.assert_allclose(soft.terms["overlong"], [0, -0.75, -1])
    np.testing.assert_allclose(soft.rewards_G, [0, 0.5 - 0.75, 1.0 - 1])
    # A group that differs in length alone has something to learn.
    flat = replace(batch[0].answers, texts=["1"] * 3)
    assert not scorer()([flat])[0].has_signal
    assert scorer(overlong="soft", overlong_buffer=4)([flat])[0].has_signal


def sampled(*texts):
    """One group with these completions."""
    sampler = FakeSampler(lengths=range(2, 2 + len(texts)))
    (answers,) = sampler(None, [(0, PROBLEMS[0])], None, temperature=1, group=len(texts), batch=1)
    return sampler, replace(answers, texts=list(texts))


def test_what_has_no_score_is_as_if_it_had_not_been_sampled():
    sampler, answers = sampled("1", "deadline", "3")
    for overlong in ("keep", "soft"):
        (group,) = scorer(overlong=overlong, overlong_buffer=6)([answers])
        assert group.scored_G.tolist() == [True, False, True]
        assert group.verdicts[1] == Verdict(0.0, "deadline")
        assert group.failures == ["", "failed: deadline", ""]
        assert (group.rewards_G[1], group.terms["value"][1]) == (0, 0)
    (group,) = scorer()([answers])
    packed = jax.device_get(pack([group], GrpoConfig(advantage="mean"), sampler))
    np.testing.assert_allclose(packed.advantage_PG, [[-0.5, 0, 0.5]], atol=1e-6)
    assert packed.train_PG.tolist() == [[True, False, True]]

    assert "valid_share" not in summary([group], by_schema=False)
    record = summary([group])
    assert record["valid_share"] == pytest.approx(2 / 3)
    assert record["unscored"] == 1
    assert record["reward_mean"] == 1.0
    assert record["rewards"] == {"value": 2.0}
    assert [r["reward"] for r in completion_records(7, [group])] == [0.5, None, 1.5]
    assert [r["reason"] for r in completion_records(7, [group])] == ["valid", "deadline", "valid"]
    (line,) = unscored(7, [group])
    assert line == "step 7: 1 completions have no score; the first: failed: deadline"
    assert unscored(7, scorer()([sampled("1")[1]])) == []


def test_a_group_without_two_scores_has_no_signal():
    (group,) = scorer(max_failed=0.9)([sampled("1", "crash", "crash")[1]])
    assert not group.has_signal
    (other,) = scorer(max_failed=0.9)([sampled("1", "crash", "2")[1]])
    assert other.has_signal
    record = summary([group, other])
    assert (record["unscored"], record["groups_with_signal"]) == (3, 1)
    assert record["reward_mean"] == pytest.approx((0.5 + 0.5 + 1.0) / 3)


def test_too_many_without_a_score_end_the_run():
    texts = ["1", "crash", "deadline x", "exception", "deadline", "2", "3", "4", "5", "6"]
    answers = [sampled(*texts)[1]]
    assert scorer(max_failed=0.4)(answers)[0].scored_G.sum() == 6
    with pytest.raises(ValueError, match=r"scoring\.max_failed") as caught:
        scorer(max_failed=0.3)(answers)
    assert str(caught.value).startswith(
        "4 of 10 completions could not be scored, 2 of them for the reason deadline:"
        " failed: deadline for the completion 'deadline'; "
    )
    # One alone never does.
    assert scorer()([sampled("1", "crash")[1]])[0].scored_G.tolist() == [True, False]
