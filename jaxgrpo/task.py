"""What a run is about: its data, schema and rewards, checked before anything long starts."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from jax.sharding import AbstractMesh, Mesh

from jaxgrpo import cluster
from jaxgrpo.config import Config
from jaxgrpo.constrain import Constraint
from jaxgrpo.data import load_problems, read_frame
from jaxgrpo.models.hf_config import read_config
from jaxgrpo.models.qwen3 import Qwen3Config
from jaxgrpo.redact import printable
from jaxgrpo.rewards.build import full_marks
from jaxgrpo.rewards.json_schema import check_schema, load_schema
from jaxgrpo.rewards.pool import Pool, Rewarded
from jaxgrpo.rollout import Sampler, Scorer
from jaxgrpo.sharding import Rules, parse_rules, ways
from jaxgrpo.tokenizer import ChatTokenizer, load_tokenizer
from jaxgrpo.types import Problem


@dataclass(frozen=True)
class Task:
    """What is trained on, and how answers are judged.

    Attributes:
      sampler: draws completions.
      pool: judges them.
      scorer: gives them their rewards.
      problems: the training set.
      heldout: the held-out sets by file; the first one decides.
      full: see `full_marks`.
    """

    sampler: Sampler
    pool: Pool
    scorer: Scorer
    problems: list[Problem]
    heldout: dict[str, list[Problem]]
    full: float | None


@contextmanager
def load_task(config: Config, mesh: Mesh) -> Iterator[Task]:
    """Reads everything that the configuration names but the weights; rewards run until the end.

    Raises:
      ValueError: a file or reward is at fault; one line with its place.
    """
    platform = mesh.devices.flat[0].platform
    if config.model.attention == "cudnn" and platform != "gpu":
        raise ValueError(
            f"model.attention = 'cudnn' needs NVIDIA GPUs, the devices are {platform}: use 'xla'"
        )
    sample_rules = parse_rules(config.mesh.sample_rules, "mesh.sample_rules")
    shape = read_config(config.model.path)
    tokenizer = load_tokenizer(config.model.path)
    check_fits(shape, tokenizer, config.data.max_prompt_tokens, config.sampling.max_tokens)
    # Any JSON meets the schema `true`.
    json_schema = load_schema(config.data.schema) if config.data.schema else True
    frame = read_frame(config.data.system, config.data.examples)

    constraint = None
    if config.sampling.constrain:
        constraint = Constraint(tokenizer, shape.vocab, json_schema)
        constraint.check(json_schema, config.data.schema)

    def problems(path: str) -> list[Problem]:
        check = check_schemas(constraint)
        return load_problems(path, tokenizer, config.data.max_prompt_tokens, check, frame)

    train = problems(config.data.train)
    heldout = {path: problems(path) for path in config.data.heldout}
    if "fields" in config.rewards and not any(problem.ground_truth for problem in train):
        raise ValueError(f"{config.data.train}: no row has ground_truth for the reward `fields`")
    with Pool(json_schema, config.rewards, config.scoring) as pool:
        for part in (train[:1], train[1:]):  # one that hangs on every row does so once
            check_rewards(pool, part, config.data.train)
        yield Task(
            Sampler(
                tokenizer,
                config.sampling,
                config.data.max_prompt_tokens,
                mesh,
                sample_rules,
                constraint,
            ),
            pool,
            Scorer(pool, config.scoring, config.grpo, config.sampling.max_tokens),
            train,
            heldout,
            full_marks(config.rewards, json_schema, [problem.row for problem in train]),
        )


def check_schemas(constraint: Constraint | None) -> Callable[[dict[str, Any], str], None]:
    """What refuses a row's schema: if it is none, or answers cannot be constrained to it."""

    def check(schema: dict[str, Any], where: str) -> None:
        check_schema(schema, where)
        if constraint:
            constraint.check(schema, where)

    return check


def check_rewards(pool: Pool, problems: Sequence[Problem], path: str) -> None:
    """Tries the rewards on the completion '{}' of each problem; the processes share the work.

    Raises:
      ValueError: a reward cannot be loaded, or cannot score one; with the file and the problem.
    """

    def reward(part: Sequence[Problem]) -> list[list[Rewarded]]:
        return pool.reward([(problem.row, ["{}"]) for problem in part], most_failures=0)

    for problem, [answer] in zip(problems, cluster.divided(reward, problems), strict=True):
        one = Rewarded(*answer)
        if one.failure and one.reason != "abandoned":
            raise ValueError(
                f"'{{}}' of the problem {problem.id!r} in {path} cannot be scored:"
                f" {printable(one.failure, 500)}"
            )


def check_fits(
    shape: Qwen3Config, tokenizer: ChatTokenizer, prompt_tokens: int, max_tokens: int
) -> None:
    """The model must have every id of the tokenizer and every position of a sequence.

    Raises:
      ValueError: it has not.
    """
    if len(tokenizer.hf) > shape.vocab:
        raise ValueError(
            f"the tokenizer has {len(tokenizer.hf)} tokens, the model {shape.vocab}:"
            " they do not belong together"
        )
    if prompt_tokens + max_tokens > shape.max_positions:
        raise ValueError(
            f"prompts of {prompt_tokens} tokens and completions of {max_tokens} are beyond the"
            f" model's {shape.max_positions} positions: lower data.max_prompt_tokens or"
            " sampling.max_tokens"
        )


def check_batch(config: Config, mesh: Mesh | AbstractMesh, rules: Rules) -> None:
    """Every part of a batch must divide over the devices that problems are divided over.

    Raises:
      ValueError: it does not.
    """
    update, devices = config.update, ways(rules.problems, mesh)
    parts = devices * update.minibatches * update.microbatches
    if config.rollout.problems % parts:
        raise ValueError(
            f"rollout.problems = {config.rollout.problems} does not divide by {devices} devices"
            f" that share problems x update.minibatches = {update.minibatches}"
            f" x update.microbatches = {update.microbatches}: make it a multiple of {parts}"
        )
