"""What a run says on the terminal: a live line, evaluations, and the table at the end."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from jaxgrpo import cluster
from jaxgrpo.redact import harmless, printable, redact


class Display:
    """Progress on the terminal: a live line there, plain lines anywhere else; on process 0 only."""

    def __init__(self, steps: int, quiet: bool):
        self._console = Console(highlight=False, soft_wrap=True, quiet=not cluster.is_main())
        self._steps = steps
        self._live = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=20),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.description}"),
            console=self._console,
            # A run that another process ends could not put the cursor back.
            disable=quiet or cluster.count() > 1 or not self._console.is_terminal,
        )
        self._task = self._live.add_task("", total=steps)

    def __enter__(self) -> "Display":
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def say(self, *lines: Any) -> None:
        """Prints above the live line; strings without markup, secrets and control characters."""
        for line in lines:
            self._console.print(Text(harmless(redact(line))) if isinstance(line, str) else line)

    def step(self, record: Mapping[str, Any]) -> None:
        """Shows a record of metrics.jsonl."""
        text = (
            f"reward {record['reward_mean']:.3f}  valid {record['valid_share']:.0%}"
            f"  signal {record['groups_with_signal']}/{record['groups_sampled']}"
            f"  {record['sample_tokens_per_s']:,.0f} tokens/s sampling,"
            f" {record['train_tokens_per_s']:,.0f} training"
        )
        if self._live.disable:
            self.say(f"step {record['step']}/{self._steps}  {text}")
        else:
            self._live.update(self._task, completed=record["step"], description=text)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Shows a record of eval.jsonl in one line."""
        exact = f"  exact {_interval(record['exact'])}" if "exact" in record else ""
        self.say(
            f"evaluation at step {record['step']}: {Path(record['data']).name}"
            f" T={record['temperature']:g} n={record['n']}"
            f"  valid {_interval(record['schema_valid'])}{exact}  {record['seconds']:.1f} s"
        )

    def before_and_after(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Shows the first and the last evaluation of each kind side by side."""
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
        kind = record["data"], record["temperature"], record["n"]
        kinds.setdefault(kind, []).append(record)
    return kinds


def when(record: Mapping[str, Any]) -> str:
    """When an evaluation was."""
    return f"step {record['step']}" if record["step"] else "before"


def evaluation_table(records: Sequence[Mapping[str, Any]], titles: Sequence[str]) -> Table:
    """Evaluations side by side: shares with Wilson 95 % intervals, fields, failure reasons."""
    table = Table(box=None, pad_edge=False)
    table.add_column()
    for title in titles:
        table.add_column(title, justify="right")

    def add(name: str, cells: Sequence[str]) -> None:
        table.add_row(Text(name), *[Text(cell) for cell in cells])

    for name in ("parses", "schema_valid", "exact"):
        if all(name in record for record in records):
            add(name.replace("_", " "), [_interval(record[name]) for record in records])
    for field in records[-1].get("fields", {}) if "fields" in records[0] else ():
        add(
            f"  {printable(field, 30)} right (of valid)",
            [
                f"{r['fields'][field]:.1%} ({r['fields_if_valid'].get(field, 0):.1%})"
                for r in records
            ],
        )
    most: dict[str, int] = {}
    for record in records:
        for reason, count in record["reasons"].items():
            most[reason] = max(count, most.get(reason, 0))
    most.pop("valid", None)
    for reason in sorted(most, key=lambda reason: -most[reason])[:8]:
        add(f"  {printable(reason, 40)}", [str(r["reasons"].get(reason, 0)) for r in records])
    add("tokens an answer", [f"{record['tokens']:.1f}" for record in records])
    return table


def _interval(share: Mapping[str, float]) -> str:
    return f"{share['rate']:.1%} [{share['low']:.1%}, {share['high']:.1%}]"
