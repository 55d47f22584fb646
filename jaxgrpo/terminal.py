"""What a run says on the terminal: the live table, evaluations, and the table at the end."""

import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from jaxgrpo import cluster
from jaxgrpo.live_table import ROWS, Frame, by_rewards, memory_in_use
from jaxgrpo.redact import harmless, printable, redact

_REDRAWS = 2  # a second: each holds up the thread that trains for some milliseconds
_STEPS_TIMED = 20  # that the time left is told from


class Display:
    """What a run shows: a live table on a terminal, plain lines anywhere else; on process 0 only.

    Args:
      steps: of the whole run.
      quiet: plain lines on a terminal, too.
      console: where to; standard output if not given.
    """

    def __init__(self, steps: int, quiet: bool, console: Console | None = None):
        if console is None:
            console = Console(
                highlight=False,
                soft_wrap=True,
                quiet=not cluster.is_main(),
                # FORCE_COLOR makes a terminal of a file: good for colours, not for redrawing.
                force_interactive=None if sys.stdout.isatty() else False,
            )
        self._console = console
        self._steps = steps
        # A run that another process ends could not put the cursor back.
        plain = quiet or cluster.count() > 1 or not console.is_interactive
        self._live = None if plain else Live(console=console, refresh_per_second=_REDRAWS)
        self._records: tuple[Mapping[str, Any], ...] = ()
        self._times: deque[float] = deque(maxlen=_STEPS_TIMED + 1)
        self._evaluated: tuple[Mapping[str, Any], Mapping[str, Any]] | None = None

    def __enter__(self) -> "Display":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def say(self, *lines: Any) -> None:
        """Prints above the live table; strings without markup, secrets and control characters."""
        for line in lines:
            self._console.print(Text(harmless(redact(line))) if isinstance(line, str) else line)

    def step(self, record: Mapping[str, Any]) -> None:
        """Shows a record of metrics.jsonl."""
        if self._live:
            self._records = (*self._records[1 - ROWS :], record)
            self._times.append(time.monotonic())
            self._draw(self._live)
            return
        self.say(
            f"step {record['step']}/{self._steps}  reward {record['reward_mean']:.3f}"
            f"{_valid(record)}"
            f"  signal {record['groups_with_signal']}/{record['groups_sampled']}"
            f"  {record['sample_tokens_per_s']:,.0f} tokens/s sampling,"
            f" {record['train_tokens_per_s']:,.0f} training"
        )

    def _draw(self, live: Live) -> None:
        """Hands the next frame to the thread that draws."""
        times = self._times
        step_s = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None
        live.update(
            Frame(self._steps, self._records, step_s, memory_in_use(), self._evaluated, times[-1])
        )

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Shows a record of eval.jsonl in one line."""
        if by_rewards(record):
            found = f"reward {record['reward_mean']:.3f}"
        else:
            exact = f"  exact {_interval(record['exact'])}" if "exact" in record else ""
            found = f"valid {_interval(record['schema_valid'])}{exact}"
        self.say(
            f"evaluation at step {record['step']}: {Path(record['data']).name}"
            f" T={record['temperature']:g} n={record['n']}  {found}  {record['seconds']:.1f} s"
        )
        first = self._evaluated[0] if self._evaluated else record
        if _kind(record) == _kind(first):  # the first of all decides
            self._evaluated = first, record
            if self._live and self._records:
                self._draw(self._live)

    def before_and_after(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Ends the table, and shows the first and the last evaluation of each kind side by side."""
        if self._live:
            self._live.stop()
        for (data, temperature, n), same in by_kind(records).items():
            ends = [same[0], same[-1]] if len(same) > 1 else same
            self.say(
                f"\n{data}, {f'temperature {temperature:g}' if temperature else 'greedy'},"
                f" n = {n}, Wilson 95 % intervals",
                evaluation_table(ends, [when(record) for record in ends]),
            )


def by_kind(
    records: Iterable[Mapping[str, Any]],
) -> dict[tuple[str, float, int], list[Mapping[str, Any]]]:
    """Records of eval.jsonl by data, temperature and number of answers, each in their order."""
    kinds: dict[tuple[str, float, int], list[Mapping[str, Any]]] = {}
    for record in records:
        kinds.setdefault(_kind(record), []).append(record)
    return kinds


def _kind(record: Mapping[str, Any]) -> tuple[str, float, int]:
    return record["data"], record["temperature"], record["n"]


def when(record: Mapping[str, Any]) -> str:
    """When an evaluation was."""
    return f"step {record['step']}" if record["step"] else "before"


def evaluation_table(records: Sequence[Mapping[str, Any]], titles: Sequence[str]) -> Table:
    """Evaluations side by side: shares with Wilson 95 % intervals, fields, rewards, reasons."""
    table = Table(box=None, pad_edge=False)
    table.add_column()
    for title in titles:
        table.add_column(title, justify="right")

    def add(name: str, cells: Sequence[str]) -> None:
        table.add_row(Text(name), *[Text(cell) for cell in cells])

    about_json = [] if by_rewards(records[-1]) else [*records]
    for name in ("parses", "schema_valid", "exact"):
        if about_json and all(name in record for record in records):
            add(name.replace("_", " "), [_interval(record[name]) for record in records])
    for field in records[-1].get("fields", {}) if about_json and "fields" in records[0] else ():
        add(
            f"  {printable(field, 30)} right (of valid)",
            [
                f"{r['fields'][field]:.1%} ({r['fields_if_valid'].get(field, 0):.1%})"
                for r in records
            ],
        )
    if all("rewards" in record for record in records):
        add("reward", [f"{record['reward_mean']:.3f}" for record in records])
        for name in records[-1]["rewards"]:
            means = [record["rewards"].get(name, 0.0) for record in records]
            add(f"  {short_name(name)}", [f"{mean:.3f}" for mean in means])
        if any(record["unscored"] for record in records):
            add("  no score", [str(record["unscored"]) for record in records])
    most: dict[str, int] = {}
    for record in about_json:
        for reason, count in record["reasons"].items():
            most[reason] = max(count, most.get(reason, 0))
    most.pop("valid", None)
    for reason in sorted(most, key=lambda reason: -most[reason])[:8]:
        add(f"  {printable(reason, 40)}", [str(r["reasons"].get(reason, 0)) for r in records])
    add("tokens an answer", [f"{record['tokens']:.1f}" for record in records])
    return table


def short_name(reward: str) -> str:
    """A reward's name without its file or module."""
    return printable(reward.rpartition(":")[2], 30)


def _valid(record: Mapping[str, Any]) -> str:
    return f"  valid {record['valid_share']:.0%}" if "valid_share" in record else ""


def _interval(share: Mapping[str, float]) -> str:
    return f"{share['rate']:.1%} [{share['low']:.1%}, {share['high']:.1%}]"
