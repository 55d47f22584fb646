"""What a run writes down: the records of its steps, as JSON lines in its directory."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxgrpo import cluster
from jaxgrpo.rollout import Group

LOGS = ("metrics", "completions", "eval")


class RunLog:
    """The JSON-lines files of a run directory; every record has a `step`. Process 0 writes."""

    def __init__(self, run_dir: Path):
        self._dir = run_dir

    def write(self, name: str, records: Sequence[Mapping[str, Any]]) -> None:
        """Appends records to one of `LOGS`."""
        if not cluster.is_main():
            return
        lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
        with (self._dir / f"{name}.jsonl").open("a", encoding="utf-8") as file:
            file.write(lines)

    def read(self, name: str) -> list[dict[str, Any]]:
        """All whole records; a last line that a kill cut short does not count."""
        path = self._dir / f"{name}.jsonl"
        if not path.exists():
            return []
        lines = path.read_text("utf-8").split("\n")[:-1]
        return [json.loads(line) for line in lines]

    def rewind(self, step: int) -> None:
        """Drops what was written after `step` updates: a resumed run does those steps again."""
        if not cluster.is_main():
            return
        for name in LOGS:
            kept = [record for record in self.read(name) if record["step"] <= step]
            new = self._dir / f"{name}.jsonl.new"
            new.write_text("".join(json.dumps(record) + "\n" for record in kept), "utf-8")
            os.replace(new, self._dir / f"{name}.jsonl")


def summary(groups: Sequence[Group]) -> dict[str, Any]:
    """What a step sampled, filtered groups included."""
    rewards = np.stack([group.rewards_G for group in groups])
    verdicts = [verdict for group in groups for verdict in group.verdicts]
    lengths = np.stack([group.answers.length_G for group in groups])
    stopped = np.stack([group.answers.stopped_G for group in groups])
    with_signal = sum(group.has_signal for group in groups)
    return {
        "reward_mean": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "rewards": {
            name: float(np.mean([group.terms[name] for group in groups]))
            for name in groups[0].terms
        },
        "valid_share": float(np.mean([verdict.score == 1.0 for verdict in verdicts])),
        "groups_sampled": len(groups),
        "groups_with_signal": with_signal,
        "zero_variance_share": 1 - with_signal / len(groups),
        "truncated_share": float(1 - stopped.mean()),
        "length_mean": float(lengths.mean()),
        "length_max": int(lengths.max()),
        "tokens_per_pass": float(
            lengths.sum() / np.sum([group.answers.passes_G for group in groups])
        ),
    }


def speed(
    sampled: Sequence[Group], trained: Sequence[Group], seconds: dict[str, float], epochs: int
) -> dict[str, Any]:
    """Seconds of each phase of a step, and completion tokens per second of the two long ones."""

    def tokens(groups: Sequence[Group]) -> int:
        return sum(int(group.answers.length_G.sum()) for group in groups)

    return {
        "sample_tokens_per_s": tokens(sampled) / seconds["sample"],
        "train_tokens_per_s": epochs * tokens(trained) / seconds["update"],
        "seconds": {name: round(spent, 4) for name, spent in seconds.items()},
    }


def completion_records(step: int, groups: Sequence[Group]) -> Iterator[dict[str, Any]]:
    """A line of completions.jsonl for each completion."""
    for group in groups:
        for sample, text in enumerate(group.answers.texts):
            yield {
                "step": step,
                "problem": group.answers.problem.id,
                "sample": sample,
                "text": text,
                "reward": float(group.rewards_G[sample]),
                "reason": group.verdicts[sample].reason,
            }
