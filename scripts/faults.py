"""The fault campaign: what is done to runs, and how often what must hold did hold.

    python -m scripts.faults [--rows 1,3,...] [--seed S] [--count N] [--jobs J] [--markdown FILE]
                             [--work DIR]

Every fault is a real one: processes that are killed, disks that are full, files that are changed.
The exit code is 1 if a case failed. Its directory is kept then, and the seed makes it again.
"""

import argparse
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from scripts.inject.base import JOBS, ROWS, Outcome


@dataclass(frozen=True)
class Line:
    """A row that was run: what came of it, and how long it took."""

    number: str
    outcome: Outcome
    seconds: float

    @property
    def good(self) -> bool:
        """Whether every case held."""
        return 0 < self.outcome.tried == self.outcome.passed

    def cells(self) -> tuple[str, ...]:
        """The table's columns."""
        row, outcome = ROWS[self.number], self.outcome
        held = f"{outcome.passed:,}/{outcome.tried:,}"
        return self.number, row.fault, held, row.checked, f"{self.seconds:.0f}"


_HEAD = ("row", "fault", "passed/tried", "what was checked", "seconds")


def main() -> None:
    """The command."""
    options = _options()
    numbers = options.rows.split(",") if options.rows else list(ROWS)
    unknown = [number for number in numbers if number not in ROWS]
    if unknown:
        sys.exit(f"error: no row {', '.join(unknown)}; there are {', '.join(ROWS)}")
    JOBS.set(options.jobs)
    work = Path(options.work or tempfile.mkdtemp(prefix="faults_"))
    lines = []
    for number in numbers:
        line = run_row(number, work, options.seed, options.count)
        lines.append(line)
        print(" | ".join(line.cells()), *line.outcome.notes, sep="\n    ", flush=True)
        if options.markdown:
            Path(options.markdown).write_text(markdown(lines, options.seed), "utf-8")
    failed = [line.number for line in lines if not line.good]
    if failed:
        again = f"python -m scripts.faults --rows {','.join(failed)} --seed {options.seed}"
        again += f" --count {options.count}" if options.count else ""
        sys.exit(f"failed: rows {', '.join(failed)}; what is left of them is in {work}. {again}")
    if not options.work:
        shutil.rmtree(work)


def run_row(number: str, work: Path, seed: int, count: int | None) -> Line:
    """Runs a row in a directory of its own, which is kept if a case failed."""
    place = work / f"row_{number}"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    start = time.monotonic()
    try:
        outcome = ROWS[number](place, seed, count)
    except Exception as error:  # the others are to be run all the same
        outcome = Outcome(0, 1, (f"{place}: {type(error).__name__}: {error}",))
    line = Line(number, outcome, time.monotonic() - start)
    if line.good:
        shutil.rmtree(place)
    return line


def markdown(lines: list[Line], seed: int) -> str:
    """The table, with the notes under it."""
    rows = [_HEAD, ("---",) * len(_HEAD), *(line.cells() for line in lines)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
    notes = [
        f"- Row {line.number}: {note.replace('|', '&#124;')}"
        for line in lines
        for note in line.outcome.notes
    ]
    return "\n".join([f"Seed {seed}.", "", table, "", *notes, ""])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.faults", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--rows", help=f"some of {','.join(ROWS)}; all if not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, help="cases of each row; all if not given")
    parser.add_argument("--jobs", type=int, default=2, help="cases at the same time")
    parser.add_argument("--markdown", metavar="FILE", help="where the table is to be written")
    parser.add_argument("--work", metavar="DIR", help="where the runs are to be")
    return parser.parse_args()


if __name__ == "__main__":
    main()
