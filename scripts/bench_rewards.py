"""What the pool of reward processes costs, beside the same rewards in this process.

    python -m scripts.bench_rewards [--completions 64] [--group 8] [--workers N] [--repeats 30]

Prints a line of JSON: medians of milliseconds for a batch, the two taken in turns.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from random import Random
from typing import Any

from jaxgrpo.config import ScoringConfig
from jaxgrpo.rewards.build import resolve_rewards
from jaxgrpo.rewards.json_schema import SchemaReward, load_schema
from jaxgrpo.rewards.pool import Pool

INVOICES = Path(__file__).parents[1] / "configs" / "invoices"
WEIGHTS = {"graded": 1.0, "fields": 1.0}  # of the default run


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--completions", type=int, default=64)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()

    schema = load_schema(INVOICES / "schema.json")
    rewards, judge = resolve_rewards(WEIGHTS, schema), SchemaReward(schema).judge
    jobs = draw_jobs(args.completions // args.group, args.group)
    alone, pooled = [], []
    with Pool(schema, WEIGHTS, ScoringConfig(workers=args.workers)) as pool:
        for _ in range(args.repeats + 1):
            start = time.perf_counter()
            here = [
                [(rewards(text, row), judge(text, row)) for text in texts] for row, texts in jobs
            ]
            middle = time.perf_counter()
            there = pool.reward(jobs)
            pooled.append(1000 * (time.perf_counter() - middle))
            alone.append(1000 * (middle - start))
    totals = [[total for (total, _), _ in each] for each in here]
    assert totals == [[one.total for one in each] for each in there]
    medians = [statistics.median(times[1:]) for times in (alone, pooled)]  # the first is a warm-up
    print(
        json.dumps(
            {
                "completions": args.completions,
                "in_process_ms": round(medians[0], 2),
                "pool_ms": round(medians[1], 2),
                "overhead_ms": round(medians[1] - medians[0], 2),
            }
        )
    )


def draw_jobs(problems: int, group: int) -> list[tuple[dict[str, Any], list[str]]]:
    """Problems of the invoice task, each with right and wrong answers."""
    rng = Random(0)
    lines = (INVOICES / "train.jsonl").read_text("utf-8").splitlines()[:problems]
    jobs = []
    for row in map(json.loads, lines):
        right = row["ground_truth"]
        wrong: list[str] = [
            json.dumps(right),
            json.dumps(right | {"amount": str(right["amount"])}),
            f"```json\n{json.dumps(right)}\n```",
            f"Here it is: {json.dumps(right)}",
            json.dumps(right)[:-7],
        ]
        jobs.append((row, rng.choices(wrong, k=group)))
    return jobs


if __name__ == "__main__":
    main()
