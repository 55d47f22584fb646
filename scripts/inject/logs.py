"""A run whose logs cannot be written for a while: no room, read-only, I/O errors.

The run's directory is a small file system of its own, in a mount namespace that ends with
the run; `checkpoints` in it is a folder outside, so that the logs alone are concerned.
"""

import shlex
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from scripts.inject.base import Outcome, run_cases
from scripts.inject.runs import (
    DRIVER,
    STEPS,
    Ended,
    Process,
    Small,
    check_same_run,
    programs,
    records,
)

_SIZE = 1024  # KiB; a whole run's logs and its report take a third of it
# In a process namespace, too, so that nothing in it outlives it.
_NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount", "--pid", "--fork", "--kill-child")
_PREPARE = """
mkdir -p KEPT/checkpoints && cp RUN/config.toml KEPT && mount -t tmpfs -o size=SIZEk none RUN &&
cp KEPT/config.toml RUN && mkdir RUN/checkpoints &&
mount --bind KEPT/checkpoints RUN/checkpoints
"""
_FAULTS = {
    "full": ("! dd if=/dev/zero of=RUN/filler bs=4096 2>/dev/null", "rm RUN/filler"),
    "read_only": (
        "mount --rbind RUN RUN && mount -o remount,bind,ro RUN",
        "umount --lazy RUN",
    ),
}
"""How each begins and ends, as shell commands."""
_WRITES = 2 * STEPS  # of a run's logs, at least: each step has two
_LONG = 16  # writes: more than find room in what is left of a page


def row_05_log(work_dir: Path, seed: int, count: int | None) -> Outcome:
    """Each fault from a random write of the logs to another; and a disk that stays full."""
    small = Small(work_dir)
    whole = small.whole()
    rng = np.random.default_rng(seed)
    tried = subprocess.run([*_NAMESPACE, "true"], capture_output=True, text=True, check=False)
    cases: list[tuple[str, Callable[[Path], object]]] = []
    for i in range(6):
        first = int(rng.integers(2, _WRITES - _LONG))
        last = int(rng.integers(first + _LONG, _WRITES + 1))
        if not tried.returncode:
            cases += [
                (f"{fault}_{i}", partial(_for_a_while, small, whole, fault, first, last))
                for fault in _FAULTS
            ]
        cases.append((f"broken_{i}", partial(_broken, small, whole, first, last)))
    if not tried.returncode:
        cases.append(("full_for_good", partial(_for_good, small)))
    outcome = run_cases(work_dir, cases[:count])
    notes = (f"no disks to fill here: {tried.stderr.strip()}",) if tried.returncode else ()
    return Outcome(outcome.passed, outcome.tried, (*outcome.notes, *notes))


def _for_a_while(small: Small, whole: Path, fault: str, first: int, last: int, place: Path) -> None:
    begin, end = _FAULTS[fault]
    ended = _run_apart(small, place, f"log:{first}:run={begin}", f"log:{last}:run={end}")
    _check_recovered(ended, place / "kept", whole)


def _broken(small: Small, whole: Path, first: int, last: int, place: Path) -> None:
    """Writes of which half arrives, and then there is an I/O error."""
    writes = ",".join(map(str, range(first, last)))
    with small.start(place, hooks=[f"log:{writes}:break="]) as process:
        ended = process.end()
    _check_recovered(ended, place / "run", whole)


def _for_good(small: Small, place: Path) -> None:
    """The run is done and saved, and says that its log is not."""
    ended = _run_apart(small, place, f"log:6:run={_FAULTS['full'][0]}")
    assert ended.code == 2, f"exit code {ended.code}: {ended.last_line}"
    assert ended.err.startswith("error: [Errno 28] No space left on device: "), ended.err
    assert ended.err.count("\n") == 1, ended.err
    for name in ("metrics", "completions"):
        steps = [record["step"] for record in records(place / "kept", name)]
        assert steps == sorted(steps), f"{name}.jsonl has steps {steps}"
    assert (place / "kept" / "checkpoints" / str(STEPS)).is_dir()


def _check_recovered(ended: Ended, run_dir: Path, whole: Path) -> None:
    assert ended.code == 0, f"exit code {ended.code}: {ended.last_line}"
    for words in ("kept in memory until there is room", "written, with what was kept"):
        assert words in ended.out, f"{words!r} was not said"
    check_same_run(run_dir, whole)


def _run_apart(small: Small, place: Path, *hooks: str) -> Ended:
    """A run whose directory is a small disk; what it has left there is in `place/kept`."""
    run_dir, kept = place / "run", place / "kept"

    def fill_in(command: str) -> str:
        words = {"RUN": shlex.quote(str(run_dir)), "KEPT": shlex.quote(str(kept))}
        for word, value in {**words, "SIZE": str(_SIZE)}.items():
            command = command.replace(word, value)
        return command

    # The directory must be the run's own before it becomes another disk.
    hooks = tuple(fill_in(hook) for hook in (f"load:1:run={_PREPARE}", *hooks))
    after = fill_in('"$@"; code=$?; cp RUN/*.jsonl KEPT; exit $code')
    command = [*_NAMESPACE, "sh", "-c", after, "sh", *DRIVER, *hooks, "--", *small.options(run_dir)]
    with Process(place, command, JAX_COMPILATION_CACHE_DIR=programs(small.shared)) as process:
        return process.end()
