"""Evaluation: how many answers parse, meet the schema and say what is right.

    python -m jaxgrpo.evaluate --model HF_DIR|RUN_DIR --data FILE.jsonl --schema FILE.json
"""

import collections
import dataclasses
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

from jaxgrpo.cli import run_main
from jaxgrpo.checkpoint import load_run_model
from jaxgrpo.config import DataConfig, MeshConfig, SamplingConfig
from jaxgrpo.data import load_problems
from jaxgrpo.metrics import print_evaluations
from jaxgrpo.models.hf import load_hf
from jaxgrpo.models.qwen3 import Qwen3
from jaxgrpo.rewards.fields import fields_right, is_exact
from jaxgrpo.rewards.json_schema import SchemaReward, load_schema
from jaxgrpo.rollout import Answers, Sampler
from jaxgrpo.sharding import make_mesh
from jaxgrpo.tokenizer import load_tokenizer
from jaxgrpo.types import Problem

# Step of the random keys of every evaluation: the same draws each time, and none of training's.
_KEY_STEP = 2**32 - 1


def evaluate(
    sampler: Sampler,
    schema: SchemaReward,
    model: Qwen3,
    problems: Sequence[Problem],
    *,
    temperature: float,
    samples: int,
    batch: int,
    seed: int,
) -> dict[str, Any]:
    """Answers every problem and counts.

    Args:
      sampler: draws the completions.
      schema: judges them; a row's own schema comes before it.
      model: the policy.
      problems: the held-out set.
      temperature: 0 is greedy.
      samples: completions of each problem.
      batch: problems decoded together.
      seed: of the random keys.

    Returns:
      A JSON object: `n` completions; `parses`, `schema_valid` and, where there is ground truth,
      `exact` (valid and all fields right), each with `count`, `rate` and the Wilson 95 % interval
      `low`, `high`; `fields` and `fields_if_valid`, the share of all and of the valid completions
      that have a field right; `reasons` with their counts; `truncated`, the share cut at the
      limit; `tokens`, the mean length; `seconds`.
    """
    start = time.perf_counter()
    key = jax.random.fold_in(jax.random.key(seed), _KEY_STEP)
    answers: list[Answers] = []
    for first in range(0, len(problems), batch):
        part = problems[first : first + batch]
        numbered = [(problem.number, problem) for problem in part]
        answers += sampler(
            model, numbered, key, temperature=temperature, group=samples, batch=batch
        )
    return _count(answers, schema) | {"seconds": round(time.perf_counter() - start, 3)}


def _count(answers: Sequence[Answers], schema: SchemaReward) -> dict[str, Any]:
    n = exact = labelled = parses = 0
    reasons: collections.Counter[str] = collections.Counter()
    right: collections.Counter[str] = collections.Counter()
    right_if_valid: collections.Counter[str] = collections.Counter()
    asked: collections.Counter[str] = collections.Counter()
    asked_if_valid: collections.Counter[str] = collections.Counter()
    for each in answers:
        truth = each.problem.ground_truth
        for text in each.texts:
            n += 1
            verdict = schema.judge(text, each.problem.row)
            valid = verdict.score == 1.0
            parses += verdict.score > 0.0
            reasons[verdict.reason] += 1
            if truth is None:
                continue
            labelled += 1
            fields = fields_right(text, truth)
            exact += valid and is_exact(text, truth)
            asked.update(fields.keys())
            right.update(name for name, ok in fields.items() if ok)
            if valid:
                asked_if_valid.update(fields.keys())
                right_if_valid.update(name for name, ok in fields.items() if ok)
    record = {
        "n": n,
        "schema_valid": wilson(reasons["valid"], n),
        "parses": wilson(parses, n),
    }
    if labelled:
        record["exact"] = wilson(exact, labelled)
        record["fields"] = {name: right[name] / asked[name] for name in asked}
        record["fields_if_valid"] = {
            name: right_if_valid[name] / asked_if_valid[name] for name in asked_if_valid
        }
    lengths = [int(length) for each in answers for length in each.completions.length_PG]
    stopped = [bool(stop) for each in answers for stop in each.completions.stopped_PG]
    return record | {
        "reasons": dict(reasons.most_common()),
        "truncated": 1 - sum(stopped) / n,
        "tokens": sum(lengths) / n,
    }


def wilson(count: int, n: int) -> dict[str, float]:
    """A share with its Wilson 95 % score interval (E. B. Wilson, JASA 22, 1927)."""
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
