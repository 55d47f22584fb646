"""SIGTERM and SIGINT in each phase of a run."""

import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from scripts.inject.base import Outcome, run_cases
from scripts.inject.runs import (
    Ended,
    Process,
    Small,
    check_same_run,
    last_step,
    restored_step,
    send_after,
)

GRACE, AT_ONCE = 30.0, 3.0  # seconds
_APART = 0.5  # seconds between two signals; closer ones may be one that timeout(1) has doubled

SAVED, NO_STEP, AT_REST = "saved", "no step", "at rest"
_POINTS = {
    "sample:14": SAVED,
    "save:2": SAVED,
    "update:7": SAVED,
    "reward:9": SAVED,
    "evaluate:2": SAVED,
    "reference:4": SAVED,
    "log:12": SAVED,
    "sample:1": NO_STEP,
    "evaluate:5": AT_REST,  # the last one
    "preflight:1": AT_REST,
    "evaluate:1": AT_REST,
    "load:1": AT_REST,
}
"""Where a run stands when the signal comes; and what it does then.

`SAVED`: it goes on to the next border of a phase and saves. `NO_STEP`: there it finds that there is
nothing to save. `AT_REST`: it knows that at once.
"""
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def row_03(work_dir: Path, seed: int, count: int | None) -> Outcome:
    """Each phase with each signal, once and twice; and at random moments."""
    small = Small(work_dir)
    run = _Runs(small, small.whole())
    cases: list[tuple[str, Callable[[Path], object]]] = []
    for point, does in _POINTS.items():
        for number in _SIGNALS:
            where = f"{number.name}_{point.replace(':', '_')}"
            cases.append((f"once_{where}", partial(run.stop_once, point, does, number)))
            if does != AT_REST:
                cases.append((f"twice_{where}", partial(run.stop_twice, point, number)))
    # Start-up has few places to stand in, so moments are drawn; from where there is a Python.
    rng = np.random.default_rng(seed)
    for i, seconds in enumerate(rng.uniform(0.2, 6, 16)):
        number = _SIGNALS[i % 2]
        cases.append((f"moment_{number.name}_{i}", partial(run.stop_after, seconds, number)))
    outcome = run_cases(work_dir, cases[:count])
    longest = f"from the signal to the end {max(run.seconds, default=0):.1f} s at most"
    return Outcome(outcome.passed, outcome.tried, (*outcome.notes, longest))


class _Runs:
    """Runs that are stopped, and how long that took."""

    def __init__(self, small: Small, whole: Path):
        self._small = small
        self._whole = whole
        self.seconds: list[float] = []

    def stop_once(self, point: str, does: str, number: signal.Signals, place: Path) -> None:
        """Stops a run that stands at a point."""
        with self._small.hold(place, point, "stopped_") as process:
            sent = time.monotonic()
            process.send(number)
            if does != AT_REST:
                _wait_to_hear(process, "saving, then stopping")
                (place / "go").touch()
            ended = self._end(process, sent)
        _check_code(ended, number)
        reached = last_step(place / "run")
        words = {SAVED: f"step {reached} is saved", NO_STEP: "no step was done"}
        words[AT_REST] = "there was nothing to save"
        assert words[does] in ended.last_line, ended.last_line
        self._resume(place, reached)

    def stop_twice(self, point: str, number: signal.Signals, place: Path) -> None:
        """Signals again to a run that is never told to go on."""
        with self._small.hold(place, point, "stopped_") as process:
            process.send(number)
            _wait_to_hear(process, "saving, then stopping")
            time.sleep(_APART)
            process.send(number)
            ended = process.end(AT_ONCE)
        _check_code(ended, number)
        assert "again: stopped at once" in ended.last_line, ended.last_line
        self._resume(place)

    def stop_after(self, seconds: float, number: signal.Signals, place: Path) -> None:
        """Stops a run whatever it does."""
        while True:
            with self._small.start(place, name="stopped_") as process:
                if send_after(process, seconds, number):
                    _check_code(self._end(process, time.monotonic()), number)
                    break
            shutil.rmtree(place / "run")
            seconds *= 0.8
        self._resume(place)

    def _end(self, process: Process, sent: float) -> Ended:
        ended = process.end(GRACE)
        self.seconds.append(time.monotonic() - sent)
        return ended

    def _resume(self, place: Path, at: int | None = None) -> None:
        """Runs it to its end, from step `at` if that is given."""
        resumed = self._small.finish(place, name="resumed_")
        restored = restored_step(resumed.out)
        assert at in (None, restored), f"stopped after step {at}, went on from {restored}"
        check_same_run(place / "run", self._whole)


def _check_code(ended: Ended, number: signal.Signals) -> None:
    # Before the run's own handlers are there the signal itself ends the process, of which a shell
    # says the same number.
    assert ended.code in (128 + number, -number), f"exit code {ended.code}: {ended.last_line}"


def _wait_to_hear(process: Process, words: str) -> None:
    end = time.monotonic() + GRACE
    while words not in process.stderr():
        assert process.running(), f"ended: {process.end().last_line}"
        assert time.monotonic() < end, f"nothing said of {words!r} in {GRACE:g} s"
        time.sleep(0.01)
