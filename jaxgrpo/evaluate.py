"""Evaluation: how many answers parse, meet the schema and say what is right; what rewards give.

python -m jaxgrpo.evaluate --model HF_DIR|RUN_DIR --data FILE.jsonl --schema FILE.json
python -m jaxgrpo.evaluate --endpoint URL --model NAME --data FILE.jsonl --schema FILE.json
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import tyro

from jaxgrpo import cluster
from jaxgrpo.cli import parse, run_main
from jaxgrpo.config import Config, MeshConfig, RewardName, SamplingConfig, check_ranges
from jaxgrpo.config_file import registry_of_weights
from jaxgrpo.constrain import Constraint
from jaxgrpo.data import load_problems, read_frame
from jaxgrpo.endpoint import EndpointConfig, connect
from jaxgrpo.models.hf_config import read_config
from jaxgrpo.models.qwen3 import Qwen3
from jaxgrpo.policy import find_policy
from jaxgrpo.redact import json_lines
from jaxgrpo.rewards.build import full_marks
from jaxgrpo.rewards.json_schema import check_schema, load_schema
from jaxgrpo.rewards.pool import Compared, Pool, Rewarded
from jaxgrpo.rollout import Answers, Sampler
from jaxgrpo.sharding import make_mesh, parse_rules
from jaxgrpo.task import check_fits, check_schemas
from jaxgrpo.terminal import Display, evaluation_table
from jaxgrpo.tokenizer import load_tokenizer
from jaxgrpo.types import Answered, Problem

A = TypeVar("A", bound=Answered)

# Step of the random keys of every evaluation: the same draws each time, and none of training's.
_KEY_STEP = 2**32 - 1


@dataclass(frozen=True)
class Evaluation:
    """What to evaluate.

    Attributes:
      data: the file of problems.
      temperature: 0 is greedy.
      samples: completions of each problem.
    """

    data: str
    temperature: float = 0.0
    samples: int = 1


def evaluate_heldout(
    sampler: Sampler,
    pool: Pool,
    model: Qwen3,
    heldout: Mapping[str, Sequence[Problem]],
    what: Evaluation,
    *,
    batch: int,
    seed: int,
    before: Callable[[], None] = lambda: None,
    seen: Callable[[tuple[Answers, list[Compared]]], None] = lambda judged: None,
) -> dict[str, Any]:
    """Answers every problem of a file with a model and counts.

    Args:
      sampler: draws the completions.
      pool: judges them; one that cannot be judged is not valid, with the reason why.
      model: the policy.
      heldout: problems by file.
      what: which of them, and how.
      batch: problems decoded together.
      seed: of the random keys.
      before: called before each batch; what it raises ends the evaluation.
      seen: called with each problem's answers and what is right of them, in the order of the file.

    Returns:
      See `evaluate`.
    """
    key = jax.random.fold_in(jax.random.key(seed), _KEY_STEP)
    problems = heldout[what.data]
    batch = min(batch, len(problems))
    sampler = replace(sampler, hints=[])  # the run goes on with its own

    def answer() -> list[Answers]:
        answers: list[Answers] = []
        for first in range(0, len(problems), batch):
            before()
            part = [(problem.number, problem) for problem in problems[first : first + batch]]
            answers += sampler(
                model, part, key, temperature=what.temperature, group=what.samples, batch=batch
            )
        return answers

    return evaluate(answer, pool, what, seen)


def evaluate(
    answer: Callable[[], Sequence[A]],
    pool: Pool,
    what: Evaluation,
    seen: Callable[[tuple[A, list[Compared]]], None] = lambda judged: None,
) -> dict[str, Any]:
    """Has every problem of a file answered, by whatever answers, and counts.

    Args:
      answer: gives `what.samples` completions of each problem, in the order of the file.
      pool: judges them; one that cannot be judged is not valid, with the reason why.
      what: the file, and how the completions are drawn.
      seen: called with each problem's answers and what is right of them, in the order of the file.

    Returns:
      A JSON object: `data`, `temperature`, `n` completions; `decides`, which of its numbers tells
      the best model: `exact` or, without ground truth, `schema_valid`; `reward_mean` where rewards
      alone say what is right (`full_marks`); `parses`, `schema_valid` and, of those
      whose problem has ground truth, `exact` (valid, all fields right and no other), each with
      `count`, `rate` and the Wilson 95 % interval `low`, `high`, which takes completions as
      independent and so is too narrow for several of one problem; `fields` and `fields_if_valid`,
      the share of all and of the valid completions that have a field right; `reward_mean`, the
      mean weighted sum of the rewards, `rewards`, the mean of each, and `unscored`, how many
      completions have none and count 0 in these; `reasons` with their counts; `truncated`, the
      share cut at the limit; `tokens`, the mean length; `seconds`.
    """
    start = time.perf_counter()
    answers = answer()
    return {
        "data": what.data,
        "temperature": what.temperature,
        **count(answers, pool, seen),
        "seconds": round(time.perf_counter() - start, 3),
    }


def count(
    answers: Sequence[A],
    pool: Pool,
    seen: Callable[[tuple[A, list[Compared]]], None] = lambda judged: None,
) -> dict[str, Any]:
    """The counts of `evaluate`; the processes share the judging."""
    by_rewards = full_marks(pool.rewards, pool.schema, [each.problem.row for each in answers])

    def compare(part: Sequence[A]) -> list[list[Compared]]:
        return pool.compare([(each.problem.row, each.texts) for each in part])

    reasons: Counter[str] = Counter()
    n = parses = labelled = exact = 0
    asked, right, asked_if_valid, right_if_valid = (Counter[str]() for _ in range(4))
    for each, compared in zip(answers, cluster.divided(compare, answers), strict=True):
        judged = [Compared(*values) for values in compared]  # of other processes, lists
        seen((each, judged))
        truth = each.problem.ground_truth
        for one in judged:
            valid = one.score == 1.0
            n += 1
            parses += one.score > 0.0
            reasons[one.reason] += 1
            if truth is not None:
                fields = one.fields or {}
                labelled += 1
                exact += one.exact
                asked.update(truth.keys())
                right.update(name for name, ok in fields.items() if ok)
                if valid:
                    asked_if_valid.update(truth.keys())
                    right_if_valid.update(name for name, ok in fields.items() if ok)
    record: dict[str, Any] = {
        "n": n,
        "decides": "exact" if labelled else "schema_valid",
        "schema_valid": wilson(reasons["valid"], n),
        "parses": wilson(parses, n),
    }
    if labelled:
        record |= {
            "exact": wilson(exact, labelled),
            "fields": {name: right[name] / asked[name] for name in asked},
            "fields_if_valid": {
                name: right_if_valid[name] / asked_if_valid[name] for name in asked_if_valid
            },
        }
    if pool.rewards:
        record |= _mean_rewards(answers, pool)
    if by_rewards is not None:
        record["decides"] = "reward_mean"
    return record | {
        "reasons": dict(reasons.most_common()),
        "truncated": sum(int((~each.stopped_G).sum()) for each in answers) / n,
        "tokens": sum(int(each.length_G.sum()) for each in answers) / n,
    }


def _mean_rewards(answers: Sequence[A], pool: Pool) -> dict[str, Any]:
    """What the rewards give; by itself, so that one that fails leaves the other counts as they are.

    A completion without a score counts 0, as one that cannot be judged counts as not valid.
    """

    def reward(part: Sequence[A]) -> list[list[Rewarded]]:
        return pool.reward([(each.problem.row, each.texts) for each in part])

    scored = [Rewarded(*one) for each in cluster.divided(reward, answers) for one in each]
    return {
        "reward_mean": math.fsum(one.total for one in scored) / len(scored),
        "rewards": {
            name: math.fsum(one.terms.get(name, 0.0) for one in scored) / len(scored)
            for name in pool.rewards
        },
        "unscored": sum(bool(one.failure) for one in scored),
    }


def best_evaluation(
    records: Sequence[Mapping[str, Any]], steps: Collection[int]
) -> dict[str, Any] | None:
    """The best of some steps by the file and temperature of the first record, the decisive ones.

    Args:
      records: of eval.jsonl.
      steps: which of them may be chosen.

    Returns:
      Its `step` and `rate`, the share or the mean reward that decides (see `evaluate`); the last
      one of equals. None if no such step was evaluated.
    """
    kinds = [(record["data"], record["temperature"]) for record in records]
    rates = [
        (_decisive(record), record["step"])
        for kind, record in zip(kinds, records, strict=True)
        if kind == kinds[0] and record["step"] in steps
    ]
    if not rates:
        return None
    rate, step = max(rates)
    return {"step": step, "rate": rate}


def _decisive(record: Mapping[str, Any]) -> float:
    # Runs that were begun before there was `decides` go on as they were.
    number = record[record.get("decides", "exact" if "exact" in record else "schema_valid")]
    return float(number["rate"] if isinstance(number, Mapping) else number)


def wilson(count: int, n: int) -> dict[str, float]:
    """A share with its Wilson 95 % score interval (E. B. Wilson, JASA 22, 1927).

    >>> share = wilson(41, 50)
    >>> f"{share['rate']:.0%} [{share['low']:.1%}, {share['high']:.1%}]"
    '82% [69.2%, 90.2%]'
    """
    z = 1.959964
    rate = count / n
    centre = rate + z * z / (2 * n)
    spread = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return {
        "count": count,
        "rate": rate,
        "low": max(0.0, (centre - spread) / scale),
        "high": min(1.0, (centre + spread) / scale),
    }


@dataclass(frozen=True)
class SamplingArguments:
    """How completions are drawn."""

    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the likeliest tokens that together have this probability."""
    min_p: float = 0.0
    """Keep tokens at least this share as likely as the likeliest."""
    constrain: bool = False
    """Draw only tokens after which an answer can still meet its schema."""
    max_tokens: int | None = None
    """Completion limit; that of the run, or 256 for a Hugging Face directory, if not given."""
    draft: int = 0
    """Tokens that a decoding pass proposes by prompt lookup; the answers are the same."""


@dataclass(frozen=True)
class Arguments:
    """Evaluates a model on problems it has not seen."""

    model: str
    """Hugging Face directory, or a run directory, whose newest checkpoint is then meant; with
    --endpoint what the model is called there."""
    data: str
    """JSON lines with `messages`, and `ground_truth` if fields are to be compared."""
    schema: str = ""
    """JSON Schema file; a row's own `schema` comes before it. That of the run if not given; for a
    Hugging Face directory or an endpoint any JSON is valid then."""
    system: str = ""
    """Text file: the system message of every problem, in place of the rows' own. That of the run if
    not given."""
    examples: str = ""
    """JSON lines: questions and answers that every prompt shows before its own question. Those of
    the run if not given."""
    rewards: dict[RewardName, float] = field(default_factory=dict)
    """Rewards whose means are reported, each with its weight, as in a configuration; those of the
    run if not given."""
    output: str = ""
    """File to write the result to, as one JSON object."""
    samples: int = 1
    """Completions of each problem; more than one makes sense at a temperature above 0."""
    batch: int = 50
    """Problems decoded together."""
    seed: int = 0
    """Of the random keys."""
    max_prompt_tokens: int = 4096
    """A longer prompt is refused."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the computation; that of the run, or float32, if not given."""
    sampling: SamplingArguments = field(default_factory=SamplingArguments)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    server: tyro.conf.OmitArgPrefixes[EndpointConfig] = field(default_factory=EndpointConfig)


def main() -> None:
    """The command."""
    args: Arguments = parse(
        Arguments, prog="python -m jaxgrpo.evaluate", registry=registry_of_weights()
    )
    if args.samples < 1 or args.batch < 1 or args.max_prompt_tokens < 1:
        raise ValueError("--samples, --batch and --max-prompt-tokens are at least 1")
    output = Path(args.output).absolute()
    if args.output and (output.is_dir() or not output.parent.is_dir()):
        raise ValueError(f"--output {args.output} is not a file in an existing directory")
    _check_of_use(args)
    with Display(1, quiet=True) as display:
        record = _evaluate_endpoint(args) if args.server.endpoint else _evaluate_model(args)
        display.say(evaluation_table([record], [f"{record['n']} completions"]))
    if args.output:
        output.write_text(json_lines([record], indent=2), "utf-8")


def _check_of_use(args: Arguments) -> None:
    """Refuses options of the other way to get answers, which would change nothing."""
    default = Arguments(args.model, args.data)
    if args.server.endpoint:
        names = ["batch", "max_prompt_tokens", "dtype", "mesh"]
        names += ["sampling.constrain", "sampling.draft"]
        why = "it is for a model that is loaded here, not for an --endpoint"
    else:
        names = [f"server.{each.name}" for each in fields(EndpointConfig)]
        why = "it is for an --endpoint, and none is given"
    for name in names:
        if attrgetter(name)(args) != attrgetter(name)(default):
            option = name.removeprefix("server.").replace("_", "-")
            raise ValueError(f"--{option} is of no use here: {why}")


def _evaluate_endpoint(args: Arguments) -> dict[str, Any]:
    """Has a server answer, and judges here."""
    run = Config(sampling=SamplingConfig(**_given(args.sampling)))
    check_ranges(replace(run, run=replace(run.run, seed=args.seed)))
    schema = load_schema(args.schema) if args.schema else True
    frame = read_frame(args.system, args.examples)
    problems = load_problems(args.data, None, args.max_prompt_tokens, check_schema, frame)
    endpoint = connect(args.server, args.model, run.sampling, args.seed, schema)
    with Pool(schema, args.rewards, run.scoring) as pool:
        return evaluate(
            lambda: endpoint(problems, args.samples),
            pool,
            Evaluation(args.data, run.sampling.temperature, args.samples),
        )


def _given(arguments: SamplingArguments) -> dict[str, Any]:
    return {name: value for name, value in vars(arguments).items() if value is not None}


def _evaluate_model(args: Arguments) -> dict[str, Any]:
    """Loads a model and has it answer."""
    policy = find_policy(args.model)
    run = policy.config
    sampling = SamplingConfig(**{"max_tokens": run.sampling.max_tokens} | _given(args.sampling))
    check_ranges(replace(run, sampling=sampling))
    dtype = jnp.dtype(args.dtype or run.model.dtype)

    schema_file = args.schema or run.data.schema
    schema = load_schema(schema_file) if schema_file else True
    tokenizer = load_tokenizer(run.model.path)
    shape = read_config(run.model.path)
    constraint = None
    if sampling.constrain:
        constraint = Constraint(tokenizer, shape.vocab, schema)
        constraint.check(schema, schema_file)
    check = check_schemas(constraint)
    frame = read_frame(args.system or run.data.system, args.examples or run.data.examples)
    problems = load_problems(args.data, tokenizer, args.max_prompt_tokens, check, frame)
    longest = max(len(problem.prompt) for problem in problems)
    check_fits(shape, tokenizer, longest, sampling.max_tokens)
    mesh = make_mesh(args.mesh)
    rules = parse_rules(args.mesh.train_rules, "mesh.train_rules")
    sample_rules = parse_rules(args.mesh.sample_rules, "mesh.sample_rules")
    rewards = args.rewards or (run.rewards if policy.is_run else {})
    with jax.set_mesh(mesh), Pool(schema, rewards, run.scoring) as pool:
        return evaluate_heldout(
            Sampler(tokenizer, sampling, args.max_prompt_tokens, mesh, sample_rules, constraint),
            pool,
            policy.load(mesh, dtype, rules),
            {args.data: problems},
            Evaluation(args.data, sampling.temperature, args.samples),
            batch=args.batch,
            seed=args.seed,
        )


if __name__ == "__main__":
    run_main(main)
