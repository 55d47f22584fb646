"""A run killed at random moments, and resumed."""

import shutil
import signal
import threading
from functools import partial
from pathlib import Path

import numpy as np

from scripts.inject.base import JOBS, Outcome, run_cases
from scripts.inject.runs import (
    EVERY,
    STEPS,
    Small,
    check_same_run,
    last_step,
    restored_step,
    send_after,
)

_TWICE = 4  # every so many cases is killed again while it resumes


def row_01(work_dir: Path, seed: int, count: int | None) -> Outcome:
    """SIGKILL at moments spread over the whole life of the process, start-up included."""
    small = Small(work_dir)
    whole = small.whole()
    tally = Tally()
    rng = np.random.default_rng(seed)
    count = count or 100
    # One moment in each of `count` equal parts of a run.
    moments = rng.permutation((np.arange(count) + rng.random(count)) / count)
    seconds = Seconds(small, work_dir, whole)
    cases = [
        (f"{i:03}", partial(_case, small, whole, seconds, tally, moment, i % _TWICE == 1))
        for i, moment in enumerate(moments)
    ]
    outcome = run_cases(work_dir, cases)
    return Outcome(outcome.passed, outcome.tried, (*outcome.notes, tally.line()))


class Seconds:
    """How long an undisturbed run takes with its programs compiled and `JOBS` at a time."""

    def __init__(self, small: Small, work_dir: Path, whole: Path):
        def undisturbed(place: Path) -> None:
            times.append(small.finish(place).seconds)
            check_same_run(place / "run", whole)

        times: list[float] = []
        jobs = [(f"undisturbed_{i}", undisturbed) for i in range(JOBS.get())]
        outcome = run_cases(work_dir, jobs)
        assert outcome.passed == outcome.tried, outcome.notes
        self.value = max(times)


class Tally:
    """What the kills hit."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kills: list[tuple[int, int]] = []

    def add(self, reached: int, restored: int) -> None:
        """A kill after step `reached`, from which the run went on at `restored`."""
        with self._lock:
            self._kills.append((reached, restored))

    def line(self) -> str:
        """One line about all of them."""
        if not self._kills:
            return "no kill"
        lost = [reached - restored for reached, restored in self._kills]
        return (
            f"{len(lost)} kills, {sum(reached == 0 for reached, _ in self._kills)} of them before"
            f" the first step was done and {sum(reached == STEPS for reached, _ in self._kills)}"
            f" after the last; steps done again: {np.mean(lost):.1f} on average, {max(lost)} at"
            f" most, with a checkpoint every {EVERY}"
        )


def _case(
    small: Small,
    whole: Path,
    seconds: Seconds,
    tally: Tally,
    moment: float,
    twice: bool,
    place: Path,
) -> None:
    after = moment * seconds.value
    run_dir = place / "run"
    while True:
        with small.start(place, name="killed_") as process:
            if send_after(process, after, signal.SIGKILL):
                break
        # It was faster than the one that was measured.
        shutil.rmtree(run_dir)
        after *= 0.9
    reached = last_step(run_dir)
    # The last due save may have been cut short; the one before it was complete.
    at_least = max(reached // EVERY - 1, 0) * EVERY
    if twice:
        with small.start(place, name="killed_again_") as process:
            send_after(process, (1 - moment) * seconds.value, signal.SIGKILL)
        reached = max(reached, last_step(run_dir))
    ended = small.finish(place, name="resumed_")
    restored = restored_step(ended.out)
    assert restored >= at_least, f"killed after step {reached}, went on from {restored}"
    tally.add(reached, restored)
    check_same_run(run_dir, whole)
