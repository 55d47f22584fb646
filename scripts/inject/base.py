"""What a fault's row is: a function that injects the fault many times and counts what held.

    def row_02(work_dir: Path, seed: int, count: int | None) -> Outcome: ...

`work_dir` is empty and the row's own, `seed` makes everything that is random in it, and `count` is
how many cases to try: all that the campaign promises if None. `ROWS` names the function of each.
"""

import contextvars
import importlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

JOBS: contextvars.ContextVar[int] = contextvars.ContextVar("JOBS", default=1)
"""Cases of a row that run at the same time (`run_cases`)."""


@dataclass(frozen=True)
class Outcome:
    """What became of a row.

    Attributes:
      passed: cases that held.
      tried: all cases.
      notes: a line for each failed case, with its directory, and for what was measured.
    """

    passed: int
    tried: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """A line of the campaign's table.

    Attributes:
      fault: what is done to a run.
      checked: what must hold then.
      function: `module:name` in this package, imported when the row is run.
    """

    fault: str
    checked: str
    function: str

    def __call__(self, work_dir: Path, seed: int, count: int | None) -> Outcome:
        """Runs the row."""
        module, _, name = self.function.partition(":")
        row = getattr(importlib.import_module(f"{__package__}.{module}"), name)
        return row(work_dir, seed, count)


ROWS: Mapping[str, Row] = {
    "1": Row(
        "SIGKILL at random moments of a 20-step run, some a second time while it resumes",
        "resumed run ends bit-equal to the undisturbed one: parameters, Adam's moments, data order;"
        " at most one save interval is lost, and what was done while a save was written",
        "kills:row_01",
    ),
    "2": Row(
        "SIGKILL inside a save",
        "the newest complete step is found",
        "store:row_02",
    ),
    "3": Row(
        "SIGTERM and SIGINT in each phase of a run; a second signal",
        "saved, exit code 143 or 130 within 30 s, resumed run equal to the undisturbed one; the"
        " second signal ends the run at once",
        "signals:row_03",
    ),
    "4": Row(
        "a byte flipped, a file cut short or deleted, each file of a checkpoint in turn",
        "noticed, the file named, the step before it used",
        "store:row_04",
    ),
    "5-save": Row(
        "disk full, I/O error, read-only at a save",
        "earlier steps intact, remains removed, one clear line, exit code not 0",
        "store:row_05_save",
    ),
    "5-export": Row(
        "disk full, I/O error, read-only at an export",
        "remains removed, one clear line, exit code not 0",
        "export:row_05_export",
    ),
    "5-log": Row(
        "disk full, I/O error, read-only at the run's logs",
        "the run goes on; once there is room the log has every line, each whole",
        "logs:row_05_log",
    ),
    "6": Row(
        "NaN in loss, gradient, reward, log-probability",
        "no parameter changed, the step counted as skipped; three in a row end the run with exit"
        " code 2 and a dump of the batch, two do not",
        "nonfinite:row_06",
    ),
    "7": Row(
        "rewards that hang, crash, eat memory, lie",
        "the step ends by the deadline + 2 s, only that sample is unscored",
        "rewards:row_07",
    ),
    "8": Row(
        "saved on one mesh, restored on another",
        "parameters bit-equal, next loss within 1e-5",
        "store:row_08",
    ),
    "9": Row(
        "changed config, tokenizer, schema, reward file, data, weights on resume",
        "refused in one line with the difference; goes on with --run.allow-change",
        "changes:row_09",
    ),
    "10": Row(
        "two writers on one run directory",
        "the second is refused in one line, the first is undisturbed; a killed one leaves no lock",
        "writers:row_10",
    ),
    "11": Row(
        "SIGKILL at random moments of an export",
        "never a directory that loads and is wrong",
        "export:row_11",
    ),
    "12": Row(
        "2,000 steps of the default run",
        "resident memory grows under 1 MB in 100 steps, nothing is compiled after warm-up, open"
        " files constant",
        "long_run:row_12",
    ),
    "13": Row(
        "fuzzed completions against fuzzed schemas, two validators",
        "no crash; every disagreement is explained",
        "fuzz:row_13",
    ),
}


def run_cases(work_dir: Path, cases: Sequence[tuple[str, Callable[[Path], object]]]) -> Outcome:
    """Tries every case, `JOBS` at a time, in threads.

    Args:
      work_dir: of the row; each case has a directory of its own in it, kept only if it fails.
      cases: each with its name, which must do for a directory, and what is tried. It is given the
        directory, and fails by raising: AssertionError for what did not hold.
    """

    def attempt(case: tuple[str, Callable[[Path], object]]) -> str | None:
        name, function = case
        place = work_dir / name
        place.mkdir()
        try:
            function(place)
        except Exception as error:
            return f"{place}: {type(error).__name__}: {' '.join(str(error).split())}"
        shutil.rmtree(place)
        return None

    with ThreadPoolExecutor(JOBS.get()) as pool:
        failures = [failure for failure in pool.map(attempt, cases) if failure]
    return Outcome(len(cases) - len(failures), len(cases), tuple(failures))
