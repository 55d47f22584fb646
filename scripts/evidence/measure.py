"""What a model's answers to a set of problems are worth: counted, and kept problem by problem."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from statistics import fmean
from typing import Any

from jaxgrpo.evaluate import Evaluation, evaluate_heldout, wilson
from jaxgrpo.models.qwen3 import Qwen3
from jaxgrpo.rewards.pool import Compared, Pool
from jaxgrpo.rewards.strict_json import ParseError, parse_answer
from jaxgrpo.rollout import Answers, Sampler
from jaxgrpo.types import Problem
from scripts.evidence.statistics import pass_at_k

Judged = list[tuple[Answers, list[Compared]]]
TEMPERATURE = 1.0
DECODINGS = ("free", "constrained")


def measure(
    sampler: Sampler,
    pool: Pool,
    model: Qwen3,
    problems: Sequence[Problem],
    *,
    constrained: bool,
    samples: int,
    seed: int,
    is_grounded: Callable[[str, Any, str], bool],
) -> dict[str, Any]:
    """Greedy answers and `samples` at temperature 1 of every problem.

    Args:
      sampler: with a constraint.
      pool: judges the answers.
      model: the policy.
      problems: with ground truth.
      constrained: whether the sampler's constraint holds.
      samples: of each problem; 0 leaves them out.
      seed: of the random keys.
      is_grounded: whether a field's value comes from the text: (field, value, text).

    Returns:
      `greedy`: the record of `jaxgrpo.evaluate`, with `invented` and `abstained` (see `_values`)
      and `right`, whether all fields of each problem are; `sampled`, if there are samples: a record
      too, with `pass_at`: by k, the chance that one of k answers is all right.
    """
    sampler = replace(sampler, constraint=sampler.constraint if constrained else None)

    def answered(temperature: float, samples: int) -> tuple[dict[str, Any], Judged]:
        judged: Judged = []
        record = evaluate_heldout(
            sampler,
            pool,
            model,
            {"": problems},
            Evaluation("", temperature, samples),
            batch=50,
            seed=seed,
            seen=judged.append,
        )
        return record, judged

    record, judged = answered(0.0, 1)
    right = [compared[0].exact for _, compared in judged]
    result = {"greedy": {**record, **_values(judged, is_grounded), "right": right}}
    if samples:
        record, judged = answered(TEMPERATURE, samples)
        exact = [[one.exact for one in compared] for _, compared in judged]
        passes = {str(k): pass_at_k(exact, k) for k in range(1, samples + 1)}
        result["sampled"] = {**record, **_values(judged, is_grounded), "pass_at": passes}
    return result


def _values(judged: Judged, is_grounded: Callable[[str, Any, str], bool]) -> dict[str, Any]:
    """Values without a source, and whether nothing is said where there is nothing to say.

    Returns:
      `invented`: of the answers that are JSON objects, how many have a value that is neither right
      nor grounded in the text (`is_grounded`); `abstained`: of the fields whose right value is
      null, how many are null in the answer; each as a share with its Wilson interval.
    """
    objects = invented = empty = abstained = 0
    for answers, compared in judged:
        text = answers.problem.row["messages"][-1]["content"]
        truth = answers.problem.ground_truth or {}
        for written, one in zip(answers.texts, compared, strict=True):
            answer: Any = None
            with suppress(ParseError):
                answer = parse_answer(written)
            fields = one.fields or {}
            absent = [name for name, value in truth.items() if value is None]
            empty += len(absent)
            abstained += sum(fields.get(name, False) for name in absent)
            if isinstance(answer, dict):
                objects += 1
                invented += any(
                    value is not None
                    and not fields.get(name)
                    and not is_grounded(name, _plain(value), text)
                    for name, value in answer.items()
                )
    return {
        "invented": wilson(invented, objects) if objects else None,
        "abstained": wilson(abstained, empty) if empty else None,
    }


def _plain(value: Any) -> Any:
    """A number of a JSON answer as a float."""
    return float(value) if not isinstance(value, (str, bool, list, dict)) else value


def over_seeds(results: Sequence[dict[str, Any]], *path: str) -> dict[str, float] | None:
    """A share over several seeds: the mean rate, and from the lowest low to the highest high."""
    shares = []
    for result in results:
        share: Any = result
        for key in path:
            share = share.get(key) if share else None
        if share:
            shares.append(share)
    if not shares:
        return None
    return {
        "rate": fmean(share["rate"] for share in shares),
        "low": min(share["low"] for share in shares),
        "high": max(share["high"] for share in shares),
    }
