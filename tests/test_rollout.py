"""What becomes of sampled groups: rewards, refills, and the batch of an update."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxgrpo.clock import Clock
from jaxgrpo.config import GrpoConfig, MeshConfig, RolloutConfig, SamplingConfig
from jaxgrpo.data import draw, pack_prompts
from jaxgrpo.rewards.base import WeightedRewards
from jaxgrpo.rewards.json_schema import SchemaReward
from jaxgrpo.rollout import Answers, Scorer, collect, pack
from jaxgrpo.sharding import make_mesh
from jaxgrpo.types import Problem

LIMIT = 8
# Problems with an even number get answers of different worth, the others do not.
PROBLEMS = [Problem(i, str(i), (1, 2, 3 + i), {"worth": i}) for i in range(12)]


class FakeSampler:
    """Answers at once: sample g of problem i is `g` where the problem is divided, else `1`."""

    config = SamplingConfig(max_tokens=LIMIT)

    def __init__(self, lengths=(2, 3, 4)):
        self.mesh = make_mesh(MeshConfig(1, 1), jax.devices()[:1])
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


def scorer(**config):
    rewards = WeightedRewards([("value", lambda text, row: float(text), 0.5)])
    return Scorer(SchemaReward({"minimum": 1}), rewards, GrpoConfig(**config), LIMIT)


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
