"""Problems in, scored groups of completions out, and groups packed into the batch of an update."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import numpy as np
from jax.sharding import Mesh

from jaxgrpo import cluster
from jaxgrpo.clock import Clock
from jaxgrpo.config import GrpoConfig, RolloutConfig, SamplingConfig, ScoringConfig
from jaxgrpo.constrain import Constraint
from jaxgrpo.data import bucket_for, draw, pack_prompts
from jaxgrpo.drawing import Truncation
from jaxgrpo.grpo import group_advantages, soft_overlong_penalty
from jaxgrpo.lookup import NO_TOKEN
from jaxgrpo.models.qwen3 import Qwen3
from jaxgrpo.redact import printable
from jaxgrpo.rewards.pool import Pool, Rewarded
from jaxgrpo.sampling import sample
from jaxgrpo.sharding import FSDP, GATHERED, Rules, fetch, put_batch, ways
from jaxgrpo.tokenizer import ChatTokenizer
from jaxgrpo.types import Completions, Problem, Prompts, RolloutBatch, Verdict

HINTS = 4  # answers, one from each of a batch's first problems

_advantages = jax.jit(group_advantages, static_argnums=1)


@dataclass(frozen=True)
class Answers:
    """One problem's completions, on the host.

    Attributes:
      problem: what was asked.
      tokens_GC: and the next three, see `Completions`.
      logprobs_GC: float32.
      length_G: tokens.
      stopped_G: bool.
      passes_G: int32.
      texts: the completions decoded.
    """

    problem: Problem
    tokens_GC: np.ndarray
    logprobs_GC: np.ndarray
    length_G: np.ndarray
    stopped_G: np.ndarray
    passes_G: np.ndarray
    texts: list[str]


@dataclass(frozen=True)
class Group:
    """One problem's completions with what they are worth.

    Attributes:
      answers: see `Answers`.
      verdicts: what the schema says of each, or why it has no score.
      rewards_G: float32, the weighted sum of all rewards; 0 without a score.
      scored_G: bool; the others are as if they had not been sampled.
      terms: each reward by itself, float32 `[G]`; 0 without a score.
      failures: of each that has no score more about why, else empty.
    """

    answers: Answers
    verdicts: list[Verdict]
    rewards_G: np.ndarray
    scored_G: np.ndarray
    terms: dict[str, np.ndarray]
    failures: list[str]

    @property
    def has_signal(self) -> bool:
        """Whether the rewards differ: without that there is nothing to learn from the group."""
        return len(np.unique(self.rewards_G[self.scored_G])) > 1


@dataclass
class Sampler:
    """Draws completions for one batch of prompts after the other.

    Attributes:
      tokenizer: decodes completions and knows the stop ids.
      config: limits.
      max_prompt_tokens: no prompt is longer; bounds the buckets.
      mesh: the devices.
      rules: what the sampler divides over them.
      constraint: what holds completions to their schemas; None leaves them free.
      hints: some of the last batch's answers, where the next one's are looked up
        (`sampling.draft`). They change its speed, never its tokens.
    """

    tokenizer: ChatTokenizer
    config: SamplingConfig
    max_prompt_tokens: int
    mesh: Mesh
    rules: Rules = GATHERED
    constraint: Constraint | None = None
    hints: list[list[int]] = field(default_factory=list)

    def __call__(
        self,
        model: Qwen3,
        problems: Sequence[tuple[int, Problem]],
        key: jax.Array,
        *,
        temperature: float,
        group: int,
        batch: int,
    ) -> list[Answers]:
        """Draws completions of at most `batch` problems.

        The program is compiled for `batch`, rounded up to what divides over the devices; places
        without a problem are filled and their completions thrown away.

        Args:
          model: the policy.
          problems: each with the number that its random keys are made of.
          key: of this step.
          temperature: 0 is greedy.
          group: completions of each problem.
          batch: problems drawn together.
        """
        batch += -batch % ways(self.rules.problems, self.mesh)
        filled = [*problems, *[problems[-1]] * (batch - len(problems))]
        numbers_P = np.array([number for number, _ in filled], np.uint32)
        if self.constraint:
            self.constraint.begin([problem.row for _, problem in filled], group)
        completions = sample(
            model,
            put_batch(self.pack_prompts([problem for _, problem in filled]), self.mesh, self.rules),
            key,
            put_batch(numbers_P, self.mesh, self.rules),
            np.float32(temperature),
            self._hints_X() if self.config.draft else None,
            group=group,
            max_tokens=self.config.max_tokens,
            stop_ids=self.tokenizer.stop_ids,
            truncation=Truncation(self.config.top_k, self.config.top_p, self.config.min_p),
            draft=self.config.draft,
            constraint=self.constraint,
            rules=self.rules,
        )
        tokens_PGC, logprobs_PGC, length_PG, stopped_PG, passes_PG = fetch(completions)
        if self.config.draft:
            first = zip(tokens_PGC[:HINTS, 0], length_PG[:HINTS, 0], strict=True)
            self.hints = [tokens_C[:length].tolist() for tokens_C, length in first]
        return [
            Answers(
                problem,
                tokens_PGC[p],
                logprobs_PGC[p],
                length_PG[p],
                stopped_PG[p],
                passes_PG[p],
                [
                    self.tokenizer.decode(tokens_C[:length])
                    for tokens_C, length in zip(tokens_PGC[p], length_PG[p], strict=True)
                ],
            )
            for p, (_, problem) in enumerate(problems)
        ]

    def _hints_X(self) -> np.ndarray:
        hints = np.full((HINTS, self.config.max_tokens + 1), NO_TOKEN, np.int32)
        for row, tokens in zip(hints, self.hints, strict=False):
            row[: len(tokens)] = tokens
        return hints.ravel()

    def pack_prompts(self, problems: Sequence[Problem]) -> Prompts:
        """Prompts as arrays, padded to the bucket of the longest."""
        longest = max(len(problem.prompt) for problem in problems)
        return pack_prompts(problems, bucket_for(longest, self.max_prompt_tokens))


@dataclass(frozen=True)
class Scorer:
    """How completions are judged and what they earn.

    Attributes:
      pool: judges them and gives them their rewards.
      scoring: how many may be left without.
      config: says whether long completions are punished.
      max_tokens: their limit.
    """

    pool: Pool
    scoring: ScoringConfig
    config: GrpoConfig
    max_tokens: int

    def __call__(self, answers: Sequence[Answers]) -> list[Group]:
        """Judges each completion and gives it its rewards; the processes share the work.

        Raises:
          ValueError: too many could not be scored, or a reward cannot be loaded.
        """
        total = sum(len(each.texts) for each in answers)
        most_failures = max(1.0, self.scoring.max_failed * total)

        def reward(part: Sequence[Answers]) -> list[list[Rewarded]]:
            jobs = [(each.problem.row, each.texts) for each in part]
            return self.pool.reward(jobs, most_failures)

        scored = [
            [Rewarded(*one) for one in each]  # from other processes they come as lists
            for each in cluster.divided(reward, answers)
        ]
        _check_failures(answers, scored, most_failures)
        return [self._group(*each) for each in zip(answers, scored, strict=True)]

    def _group(self, answers: Answers, rewarded: Sequence[Rewarded]) -> Group:
        rewards_G = np.array([one.total for one in rewarded], np.float32)
        scored_G = np.array([not one.failure for one in rewarded])
        names = dict.fromkeys(name for one in rewarded for name in one.terms)
        terms = {
            name: np.array([one.terms.get(name, 0) for one in rewarded], np.float32)
            for name in names
        }
        if self.config.overlong == "soft":
            penalty = soft_overlong_penalty(
                answers.length_G, self.max_tokens, self.config.overlong_buffer
            )
            terms["overlong"] = np.where(scored_G, penalty, 0)
            rewards_G = rewards_G + terms["overlong"]
        verdicts = [Verdict(one.score, one.reason, one.path) for one in rewarded]
        return Group(
            answers, verdicts, rewards_G, scored_G, terms, [one.failure for one in rewarded]
        )


def _check_failures(
    answers: Sequence[Answers], scored: Sequence[Sequence[Rewarded]], most: float
) -> None:
    """Raises ValueError if more completions than that have no score."""
    failed = [
        (one, text)
        for each, group in zip(scored, answers, strict=True)
        for one, text in zip(each, group.texts, strict=True)
        if one.failure
    ]
    if len(failed) <= most:
        return
    tried = [(one, text) for one, text in failed if one.reason != "abandoned"]
    [(reason, count)] = Counter(one.reason for one, _ in tried).most_common(1)
    # The shortest is the easiest to try by hand.
    text, failure = min(
        ((text, one.failure) for one, text in tried if one.reason == reason),
        key=lambda pair: len(pair[0]),
    )
    raise ValueError(
        f"{len(failed)} of {sum(map(len, scored))} completions could not be scored, {count} of them"
        f" for the reason {reason}: {printable(failure, 500)} for the completion"
        f" '{printable(text)}'; mend the reward, or raise scoring.deadline, scoring.memory_mb or"
        " scoring.max_failed"
    )


def collect(
    sampler: Sampler,
    scorer: Scorer,
    model: Qwen3,
    problems: Sequence[Problem],
    position: int,
    key: jax.Array,
    config: RolloutConfig,
    *,
    seed: int,
    clock: Clock,
) -> tuple[list[Group], list[Group], int]:
    """Samples until a batch of groups with signal is full, or the refills are used up.

    Args:
      sampler: draws the completions.
      scorer: judges them.
      model: the policy.
      problems: the training set.
      position: problems drawn so far in the run.
      key: of this step.
      config: problems in a batch, completions of each, refills.
      seed: of the data order.
      clock: takes the phases `sample` and `reward`.

    Returns:
      The batch (groups without signal only where the others do not fill it), all that was
      sampled, and the new position.
    """
    sampled: list[Group] = []
    for _ in range(1 + config.max_refills):
        drawn = draw(problems, position, config.problems, seed)
        position += config.problems
        with clock("sample"):
            answers = sampler(
                model,
                drawn,
                key,
                temperature=sampler.config.temperature,
                group=config.group,
                batch=config.problems,
            )
        with clock("reward"):
            sampled += scorer(answers)
        if sum(group.has_signal for group in sampled) >= config.problems:
            break
    # Stable: within each kind the order is that of the data.
    batch = sorted(sampled, key=lambda group: not group.has_signal)[: config.problems]
    return batch, sampled, position


def pack(
    groups: Sequence[Group], config: GrpoConfig, sampler: Sampler, rules: Rules = FSDP
) -> RolloutBatch:
    """The batch of an update: advantages, prompts and completions padded to their buckets.

    Args:
      groups: P of them.
      config: how advantages are taken, and whether completions cut at the limit are trained.
      sampler: the one they came from.
      rules: what the update divides over its devices.
    """
    all_answers = [group.answers for group in groups]
    longest, bucket = max(a.length_G.max() for a in all_answers), sampler.config.max_tokens
    while longest <= bucket // 2:  # few buckets: each is a program to compile
        bucket //= 2
    completions = Completions(
        np.stack([a.tokens_GC[:, :bucket] for a in all_answers]),
        np.stack([a.logprobs_GC[:, :bucket] for a in all_answers]),
        np.stack([a.length_G for a in all_answers]),
        np.stack([a.stopped_G for a in all_answers]),
    )
    rewards_PG = np.stack([group.rewards_G for group in groups])
    scored_PG = np.stack([group.scored_G for group in groups])
    masks = None
    if sampler.constraint:
        rows = [a.problem.row for a in all_answers]
        masks = sampler.constraint.replay(rows, completions.tokens_PGC, completions.length_PG)
    return put_batch(
        RolloutBatch(
            sampler.pack_prompts([a.problem for a in all_answers]),
            completions,
            jax.device_get(_advantages(rewards_PG, config.advantage, valid_PG=scored_PG)),
            scored_PG & (completions.stopped_PG | (config.overlong != "mask")),
            masks,
        ),
        sampler.mesh,
        rules,
    )
