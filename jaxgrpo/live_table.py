"""The table that a terminal shows while a run trains: its last steps, and where it stands.

A frame is made whole and never changed, so that another thread may draw it; it fits whatever size
the terminal has at that moment.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from jaxgrpo.redact import printable

Record = Mapping[str, Any]

ROWS = 8
_GAP = 2  # blanks between columns and between pieces of a line
_WIDEST_BAR = 80


def by_rewards(record: Mapping[str, Any]) -> bool:
    """Whether rewards alone say what is right, so that a record's counts of JSON say nothing."""
    return record.get("decides") == "reward_mean"


@dataclass(frozen=True)
class Memory:
    """Bytes that this process holds; None where that is not known.

    Attributes:
      host: resident.
      device: in use on the fullest of this process' devices.
    """

    host: int | None
    device: int | None


def memory_in_use() -> Memory:
    """As it is now."""
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
        host = pages * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux
        host = None
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    in_use = [each["bytes_in_use"] for each in stats if "bytes_in_use" in each]
    return Memory(host, max(in_use, default=None))


@dataclass(frozen=True)
class Frame:
    """What is shown between two steps.

    Attributes:
      steps: of the whole run.
      records: of metrics.jsonl, the newest last; at least one.
      step_s: seconds from step to step, all that happens in between included; None after one step.
      memory: in use after the newest step.
      evaluated: the first and the newest record of the evaluation that decides, if there is one.
      since: when the newest step was done, by `time.monotonic`.
    """

    steps: int
    records: tuple[Record, ...]
    step_s: float | None
    memory: Memory
    evaluated: tuple[Record, Record] | None
    since: float

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType | Segment]:
        """Bar, table and lines, as many as the terminal has room for."""
        width = options.max_width
        step = self.records[-1]["step"]
        lines = [*pack(self._progress(), width), *pack(self._evaluation(), width)]
        # A line for the bar, one for the head, one for the cursor.
        rows = max(1, min(ROWS, options.size.height - len(lines) - 3))
        yield ProgressBar(self.steps, step, width=min(width, _WIDEST_BAR))
        yield Segment.line()  # it has no end of its own
        yield _table(self.records[-rows:], width, "+-" if options.ascii_only else "±")
        for line in lines:
            yield Text(line, no_wrap=True, overflow="crop")

    def _progress(self) -> Iterator[str]:
        step = self.records[-1]["step"]
        yield f"step {step}/{self.steps}"
        if self.step_s is not None and step < self.steps:
            yield f"{_duration(self.step_s * (self.steps - step))} left at {self.step_s:.2g} s each"
        waited = time.monotonic() - self.since
        if step < self.steps and waited > max(2.0, 2 * (self.step_s or 0.0)):
            yield f"the last {_duration(waited)} ago"
        for phase, share in _shares(self.records).items():
            yield f"{phase} {share:.0%}"
        if self.memory.host is not None:
            yield f"host {self.memory.host / 1e9:.2f} GB"
        if self.memory.device is not None:
            yield f"device {self.memory.device / 1e9:.2f} GB"

    def _evaluation(self) -> Iterator[str]:
        if self.evaluated is None:
            return
        first, last = self.evaluated
        yield f"evaluation at step {last['step']}"
        yield printable(Path(last["data"]).name, 40)
        if "reward_mean" in last:
            before = f"{first['reward_mean']:.3f} to " if first is not last else ""
            yield f"reward {before}{last['reward_mean']:.3f}"
        for name, key in (("valid", "schema_valid"), ("exact", "exact")):
            if key in last and not by_rewards(last):
                before = f"{first[key]['rate']:.1%} to " if first is not last else ""
                low, high = last[key]["low"], last[key]["high"]
                yield f"{name} {before}{last[key]['rate']:.1%} [{low:.1%}, {high:.1%}]"


def pack(pieces: Iterator[str], width: int) -> list[str]:
    """Pieces of text as lines no wider than that, broken between pieces alone.

    >>> pack(iter(["step 3/9", "0:10 left", "host 1.00 GB"]), 20)
    ['step 3/9  0:10 left', 'host 1.00 GB']
    """
    lines: list[str] = []
    for piece in pieces:
        if lines and cell_len(lines[-1]) + _GAP + cell_len(piece) <= width:
            lines[-1] += " " * _GAP + piece
        else:
            lines.append(piece)
    return lines


def _table(records: Sequence[Record], width: int, plus_minus: str) -> Table:
    """The columns that fit, what matters most first; one without any value is left out."""
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), expand=False)
    left = width
    cells: list[list[str]] = []
    for title, cell in _columns(records, plus_minus):
        column = [cell(record) for record in records]
        if not any(column):
            continue
        needed = max(map(cell_len, [title, *column])) + (_GAP if cells else 0)
        if needed <= left:
            left -= needed
            table.add_column(title, justify="right", no_wrap=True)
            cells.append(column)
    for record, *row in zip(records, *cells, strict=True):
        table.add_row(*map(Text, row), style="red" if record.get("skipped") else None)
    return table


def _columns(
    records: Sequence[Record], plus_minus: str
) -> Iterator[tuple[str, Callable[[Record], str]]]:
    """Title and text of each column that there may be; an empty text where there is no value."""

    def number(name: str, form: str) -> Callable[[Record], str]:
        return lambda r: "" if r.get(name) is None else format(r[name], form)

    def count(name: str) -> Callable[[Record], str]:
        return lambda r: f"{r[name]:.2g}" if r.get(name) else ""

    def term(name: str) -> Callable[[Record], str]:
        return lambda r: f"{r['rewards'][name]:.3f}" if name in r["rewards"] else ""

    yield "step", number("step", "d")
    yield "reward", lambda r: f"{r['reward_mean']:.3f} {plus_minus} {r['reward_std']:.3f}"
    yield "valid", number("valid_share", ".0%")
    if any("fields" in record["rewards"] for record in records):
        yield "fields", term("fields")
    yield "signal", lambda r: f"{r['groups_with_signal']}/{r['groups_sampled']}"
    yield "skipped", count("skipped")
    yield "no score", count("unscored")
    yield "KL", number("kl", ".3f")
    yield "entropy", number("entropy", ".3f")
    yield "cut", number("truncated_share", ".0%")
    yield "|ratio-1|", _ratio
    yield "sampled/s", number("sample_tokens_per_s", ",.0f")
    yield "trained/s", number("train_tokens_per_s", ",.0f")
    yield "tokens", number("length_mean", ".1f")
    yield "gradient", number("grad_norm", ".2g")
    names = dict.fromkeys(name for record in records for name in record["rewards"])
    if len(names) > 1:  # one by itself is the reward
        for name in names:
            if name != "fields":
                yield printable(name.rpartition(":")[2], 12), term(name)


def _ratio(record: Record) -> str:
    """How far the trainer's probability of a token is from the sampler's, at most."""
    ends = [record.get("ratio_min"), record.get("ratio_max")]
    return "" if None in ends else f"{max(abs(end - 1) for end in ends if end is not None):.1g}"


def _shares(records: Sequence[Record]) -> dict[str, float]:
    """Of the time of all phases, by phase, over these steps."""
    total: dict[str, float] = {}
    for record in records:
        for phase, seconds in record["seconds"].items():
            total[phase] = total.get(phase, 0.0) + seconds
    whole = sum(total.values())
    return {phase: seconds / whole for phase, seconds in total.items()} if whole else {}


def _duration(seconds: float) -> str:
    """Hours, minutes and seconds, as a clock shows them.

    >>> _duration(59.6), _duration(7325)
    ('1:00', '2:02:05')
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
