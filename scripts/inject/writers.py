"""Two runs that want the same directory."""

import hashlib
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from scripts.inject.base import Outcome, run_cases
from scripts.inject.runs import Ended, Small, check_same_run

_POINTS = ("load:1", "preflight:1", "sample:6", "save:2", "log:20", "evaluate:5")


def row_10(work_dir: Path, seed: int, count: int | None) -> Outcome:
    """A second run while the first is alive, after its SIGKILL, and two at the same moment."""
    del seed  # nothing here is random
    small = Small(work_dir)
    whole = small.whole()
    cases: list[tuple[str, Callable[[Path], object]]] = []
    for point in _POINTS:
        for case in (_refused, _killed):
            name = f"{case.__name__[1:]}_{point.replace(':', '_')}"
            cases.append((name, partial(case, small, whole, point)))
    cases += [(f"race_{i}", partial(_race, small, whole)) for i in range(4)]
    return run_cases(work_dir, cases[:count])


def _refused(small: Small, whole: Path, point: str, place: Path) -> None:
    run_dir = place / "run"
    with small.hold(place, point, "first_") as first:
        before = _settled(run_dir)
        for name, more in (("second_", ()), ("fresh_", ("--run.fresh",))):
            with small.start(place, *more, name=name) as second:
                ended = second.end()
            _check_refused(ended, run_dir, first.pid)
        assert _digests(run_dir) == before, "the refused run has changed something"
        (place / "go").touch()
        ended = first.end()
    assert ended.code == 0, f"the first run: exit code {ended.code}: {ended.last_line}"
    check_same_run(run_dir, whole)


def _killed(small: Small, whole: Path, point: str, place: Path) -> None:
    with small.hold(place, point, "killed_") as first:
        first.send(signal.SIGKILL)
        first.end()
    small.finish(place, name="second_")
    check_same_run(place / "run", whole)


def _race(small: Small, whole: Path, place: Path) -> None:
    with small.start(place, name="a_") as a, small.start(place, name="b_") as b:
        ends = {a.pid: a.end(), b.pid: b.end()}
    (winner, _), (_, loser) = sorted(ends.items(), key=lambda item: item[1].code)
    codes = sorted(ended.code for ended in ends.values())
    assert codes == [0, 2], f"exit codes {codes}: {loser.last_line}"
    _check_refused(loser, place / "run", winner)
    check_same_run(place / "run", whole)


def _check_refused(ended: Ended, run_dir: Path, holder: int) -> None:
    assert ended.code == 2, f"exit code {ended.code}: {ended.last_line}"
    start = f"error: {run_dir} is in use by process {holder} on "
    assert ended.err.startswith(start), ended.err
    assert ended.err.count("\n") == 1, ended.err


def _settled(run_dir: Path) -> dict[str, str]:
    """The digests once the run stands still: a save may end in the background."""
    before, now = None, _digests(run_dir)
    while before != now:
        time.sleep(1)
        before, now = now, _digests(run_dir)
    return now


def _digests(run_dir: Path) -> dict[str, str]:
    files = sorted(file for file in run_dir.rglob("*") if file.is_file())
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
