"""What a run writes down: the records of its steps, as JSON lines in its directory."""

import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from jaxgrpo import cluster
from jaxgrpo.files import replace_file
from jaxgrpo.redact import json_lines, printable
from jaxgrpo.rewards.pool import Compared
from jaxgrpo.rollout import Group
from jaxgrpo.trackers import Trackers
from jaxgrpo.types import Answered, RolloutBatch

LOGS = ("metrics", "completions", "eval", "answers")
KEPT_ANSWERS = 10  # the first problems of the first held-out file


def read_records(path: Path, lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The records of a log; a last line that a kill cut short does not count.

    Args:
      path: the file, to name in an error.
      lines: of the file, with their ends.

    Raises:
      ValueError: a line is no record, with its place.
    """
    for number, line in enumerate(lines, start=1):
        if not line.endswith(b"\n"):
            return
        try:
            record = json.loads(line)
            record["step"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}:{number}: no record of a step; take the line out") from None
        yield record


class RunLog:
    """The JSON-lines files of a run directory; every record has a `step`. Process 0 writes.

    Where a record cannot be written (the disk is full) it is kept, and written with those after it
    once that is possible: a run need not end because of its log.

    Args:
      run_dir: the directory.
      say: takes a line when a record cannot be written, and when it could after all.
      trackers: get the numbers too, after the file.
    """

    def __init__(self, run_dir: Path, say: Callable[[str], None], trackers: Trackers | None = None):
        self._dir = run_dir
        self._say = say
        self._trackers = trackers
        self._kept: dict[str, bytes] = dict.fromkeys(LOGS, b"")

    def write(self, name: str, records: Sequence[Mapping[str, Any]]) -> None:
        """Appends records to one of `LOGS`."""
        if not cluster.is_main():
            return
        waited = bool(self._kept[name])
        self._kept[name] += json_lines(records).encode()
        try:
            self._append(name)
        except OSError as error:
            if not waited:
                self._say(f"{error}: kept in memory until there is room")
        else:
            if waited:
                self._say(f"{self._path(name)}: written, with what was kept")
        if self._trackers:
            self._trackers.log(name, records)

    def finish(self) -> None:
        """Writes what is still kept.

        Raises:
          OSError: it cannot be written yet.
        """
        for name in LOGS:
            if self._kept[name]:
                self._append(name)

    def read(self, name: str) -> list[dict[str, Any]]:
        """All records, see `read_records`.

        Raises:
          ValueError: a line is no record, with its place.
        """
        path = self._path(name)
        data = (path.read_bytes() if path.exists() else b"") + self._kept[name]
        return list(read_records(path, io.BytesIO(data)))

    def rewind(self, step: int) -> None:
        """Drops what was written after `step` updates: a resumed run does those steps again.

        Then the trackers start.

        Raises:
          ValueError: a line is no record, with its place; or a tracker of a new run does not start.
        """
        if not cluster.is_main():
            return
        last = {}
        for name in LOGS:
            records = self.read(name)
            last[name] = max((record["step"] for record in records), default=-1)
            kept = [record for record in records if record["step"] <= step]
            replace_file(self._path(name), json_lines(kept).encode())
        if self._trackers:
            self._trackers.start(step, last)

    def _append(self, name: str) -> None:
        path = self._path(name)
        with path.open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                # A file without a buffer may take a part.
                left = memoryview(self._kept[name])
                while left:
                    left = left[file.write(left) :]
            except OSError as error:
                with suppress(OSError):
                    file.truncate(end)  # no half line for the next to go on from
                error.filename = str(path)
                raise
        self._kept[name] = b""

    def _path(self, name: str) -> Path:
        return self._dir / f"{name}.jsonl"


def summary(groups: Sequence[Group], *, by_schema: bool = True) -> dict[str, Any]:
    """What a step sampled, filtered groups included; rewards are of what has a score.

    Args:
      groups: the completions.
      by_schema: whether it says anything of one that it is valid.
    """
    scored = np.stack([group.scored_G for group in groups])
    valid_share = float(np.mean([v.score == 1.0 for group in groups for v in group.verdicts]))
    lengths = np.stack([group.answers.length_G for group in groups])
    stopped = np.stack([group.answers.stopped_G for group in groups])
    with_signal = sum(group.has_signal for group in groups)
    rewards = np.concatenate([group.rewards_G[group.scored_G] for group in groups])
    terms: dict[str, list[np.ndarray]] = {}  # none of a group in which no completion is scored
    for group in groups:
        for name, term_G in group.terms.items():
            terms.setdefault(name, []).append(term_G[group.scored_G])
    return {
        "reward_mean": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "rewards": {name: float(np.concatenate(each).mean()) for name, each in terms.items()},
        "unscored": int((~scored).sum()),
        **({"valid_share": valid_share} if by_schema else {}),
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


def unscored(step: int, groups: Sequence[Group]) -> list[str]:
    """A line about the completions without a score, if there are any."""
    failures = [failure for group in groups for failure in group.failures if failure]
    if not failures:
        return []
    first = f"{len(failures)} completions have no score; the first: {printable(failures[0], 500)}"
    return [f"step {step}: {first}"]


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
                "reward": float(group.rewards_G[sample]) if group.scored_G[sample] else None,
                "reason": group.verdicts[sample].reason,
            }


def answer_records(
    step: int, judged: Sequence[tuple[Answered, list[Compared]]]
) -> Iterator[dict[str, Any]]:
    """The lines of answers.jsonl of an evaluation: one for each of the first problems.

    Args:
      step: of the evaluation.
      judged: answers and what is right of them, as `evaluate_heldout` has seen them.
    """
    for answers, compared in judged[:KEPT_ANSWERS]:
        yield {
            "step": step,
            "problem": answers.problem.id,
            "text": answers.texts[0],
            "reason": compared[0].reason,
        }


def write_batch(path: Path, batch: RolloutBatch) -> None:
    """Writes a batch's arrays, by their names, as a NumPy archive."""
    arrays: dict[str, Any] = {}
    for name, part in batch._asdict().items():
        arrays |= part._asdict() if hasattr(part, "_asdict") else {name: part}
    np.savez_compressed(path, **{name: x for name, x in arrays.items() if x is not None})
