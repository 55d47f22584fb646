"""What a report draws and counts of runs: learning curves, fields, reasons, panels and tables.

Of one run the curves of a chart have a colour each; of several, each run has its own.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

from jaxgrpo.charts import (
    COLOURS,
    DASHES,
    Axis,
    Layer,
    Line,
    bar_chart,
    line_chart,
    spread,
    thin,
)
from jaxgrpo.live_table import by_rewards
from jaxgrpo.redact import printable
from jaxgrpo.terminal import by_kind, short_name, when

_POINTS = 120  # of a curve
_BARS = 40  # of a chart
_REASONS = COLOURS - 1  # that have a colour; grey is for the others
_GREY = COLOURS
_NAME = 40  # characters
_EXTREMES = {"max": max, "min": min}  # of many steps, where a key ends so

_SHARES = {"schema_valid": "schema-valid", "exact": "all fields right", "parses": "parses"}
_ANSWERS = Axis("share of answers", percent=True, whole=True)
_REWARD = Axis("mean reward")


@dataclass(frozen=True)
class Run:
    """What a report knows of a run.

    Attributes:
      name: of its directory.
      settings: its configuration by `section.field`.
      metrics: metrics.jsonl; objects in a record are flattened to `name.key`.
      evaluations: eval.jsonl.
      reasons: how often samples got each, by step.
      groups: of samples, as `excerpts.choose_groups` has chosen them.
      answers: to some held-out problems, as `excerpts.answer_versions` has them.
    """

    name: str
    settings: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Mapping[str, Any]]
    reasons: Mapping[int, Counter[str]]
    groups: Sequence[Mapping[str, Any]]
    answers: Sequence[Mapping[str, Any]]

    @property
    def decisive(self) -> Sequence[Mapping[str, Any]]:
        """The evaluations of the same kind as the first."""
        return next(iter(by_kind(self.evaluations).values()), [])

    @property
    def about_json(self) -> bool:
        """Whether it says anything of an answer that it is valid; else rewards alone decide."""
        return not any(map(by_rewards, self.decisive))


@dataclass(frozen=True)
class Chart:
    """A figure of the page.

    Attributes:
      title: above it.
      svgs: one for any page, or one for wide and one for narrow ones.
      legend: the class of a colour, that of dashes or none, and what they stand for; empty where
        the title says it.
      note: below it.
    """

    title: str
    svgs: Sequence[str]
    legend: Sequence[tuple[str, str, str]]
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table; the first cell of a row is its heading."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class _Panel:
    """A chart of metrics.jsonl.

    Attributes:
      title: what it shows.
      axis: of its values.
      curves: keys of a record with their names; a key that ends with a dot stands for all that
        begin with it.
      compared: those that are drawn where runs are compared; all if empty.
    """

    title: str
    axis: Axis
    curves: Mapping[str, str]
    compared: Sequence[str] = ()


_PANELS = (
    _Panel(
        "Reward of the samples",
        Axis("mean reward"),
        {"reward_mean": "sum", "rewards.": ""},
        ["reward_mean"],
    ),
    _Panel("KL to the reference", Axis("nats a token"), {"kl": "KL"}),
    _Panel("Entropy", Axis("nats a token"), {"entropy": "entropy"}),
    _Panel(
        "Probability in the update / in the sampler",
        Axis("ratio of a token", log=True),
        {
            "ratio_max": "largest",
            "ratio_p99": "99th percentile",
            "ratio_median": "median",
            "ratio_p01": "1st percentile",
            "ratio_min": "smallest",
        },
        ["ratio_max", "ratio_min"],
    ),
    _Panel(
        "Clipped tokens",
        Axis("share of tokens", percent=True),
        {"clipped_high": "ratio too high", "clipped_low": "ratio too low"},
    ),
    _Panel("Gradient norm before clipping", Axis("norm", log=True), {"grad_norm": "gradient"}),
    _Panel(
        "Groups with unequal rewards",
        Axis("share of groups", percent=True, whole=True),
        {"signal_share": "with signal"},
    ),
    _Panel(
        "Cut at the token limit",
        Axis("share of completions", percent=True),
        {"truncated_share": "truncated"},
    ),
    _Panel(
        "Length of the completions",
        Axis("tokens"),
        {"length_mean": "mean", "length_max": "longest"},
    ),
    _Panel(
        "Speed",
        Axis("completion tokens/s", log=True),
        {"sample_tokens_per_s": "sampling", "train_tokens_per_s": "training"},
    ),
    _Panel(
        "Time of a step",
        Axis("seconds", log=True),
        {"seconds": "all", "seconds.": ""},
        ["seconds"],
    ),
)


def question(run: Run) -> str:
    """What the decisive evaluations asked; empty where nothing was evaluated."""
    return "".join(_kind(record) for record in run.decisive[:1])


def learning_curves(runs: Sequence[Run]) -> list[Chart]:
    """The shares of right answers and the rewards over steps; of several runs a chart for each."""
    if len(runs) == 1:
        run, shares = runs[0], [_share(runs[0], key, colour) for colour, key in enumerate(_SHARES)]
        return [
            *_charts("Held-out problems", [*shares, _sampled(run)], _ANSWERS, wide=True),
            *_charts("Held-out problems: rewards", _rewards(run), _REWARD, wide=not run.about_json),
        ]
    return [
        *(
            chart
            for key, label in _SHARES.items()
            for chart in _charts(
                f"Held-out problems: {label}",
                [_share(run, key, colour, run.name) for colour, run in enumerate(runs)],
                _ANSWERS,
            )
        ),
        *_charts("Held-out problems: reward", _reward_of_each(runs), _REWARD),
    ]


def picture(runs: Sequence[Run]) -> tuple[list[Line], Axis, str]:
    """The learning curves that one picture has room for: lines, axis and title.

    Rewards where no run has a share that says anything.
    """
    title = "; ".join(dict.fromkeys(question(run) for run in runs if run.evaluations))
    if lines := _picture_lines(runs):
        axis = Axis("share of answers (%)", percent=True, whole=True)
        return lines, axis, f"{title}; Wilson 95 % intervals"
    lines = _rewards(runs[0]) if len(runs) == 1 else _reward_of_each(runs)
    return lines, _REWARD, title


def _picture_lines(runs: Sequence[Run]) -> list[Line]:
    if len(runs) == 1:
        lines = [_share(runs[0], "schema_valid", 0), _share(runs[0], "exact", 1), _sampled(runs[0])]
    else:
        lines = [
            _share(run, key, colour, f"{run.name}, {_SHARES[key]}", dash)
            for colour, run in enumerate(runs)
            for dash, key in enumerate(("schema_valid", "exact"))
        ]
    return [line for line in lines if line.points]


def field_curves(runs: Sequence[Run]) -> list[Chart]:
    """How often each field is right; of several runs a chart for each field."""
    about_json = [(colour, run) for colour, run in enumerate(runs) if run.about_json]
    records = [(colour, run, record) for colour, run in about_json for record in run.decisive]
    names = [*dict.fromkeys(name for *_, record in records for name in record.get("fields", {}))]
    shown, left = names[:COLOURS], len(names) - COLOURS

    def line(run: Run, name: str, label: str, colour: int) -> Line:
        having = [e for e in run.decisive if name in e.get("fields", {})]
        points = [(e["step"], e["fields"][name]) for e in _few(having)]
        return Line(label, points, colour, colour % DASHES if len(runs) == 1 else 0)

    if len(runs) == 1:
        lines = [line(runs[0], name, printable(name, _NAME), i) for i, name in enumerate(shown)]
        note = f"{left} more fields are not drawn." if left > 0 else ""
        return _charts("Each field right", lines, _ANSWERS, note)
    return [
        chart
        for name in shown
        for chart in _charts(
            f"Right: {printable(name, _NAME)}",
            [line(run, name, run.name, colour) for colour, run in enumerate(runs)],
            _ANSWERS,
        )
    ]


def reason_bars(runs: Sequence[Run]) -> list[list[Chart]]:
    """For each run, why answers and samples failed over time; a reason has one colour in all."""
    titles = {
        "Why held-out answers failed": "share of answers",
        "Why samples failed": "share of completions",
    }
    found = [
        (_bars_of_answers(run), _bars_of_samples(run)) if run.about_json else ([], [])
        for run in runs
    ]
    weight: dict[str, float] = defaultdict(float)
    for bars in chain.from_iterable(found):
        for _, shares in bars:
            for reason, share in shares.items():
                weight[reason] += share / len(bars)
    weight.pop("valid", None)
    names = sorted(weight, key=lambda reason: -weight[reason])[:_REASONS]
    result = []
    for of_run in found:
        charts = []
        for (title, unit), bars in zip(titles.items(), of_run, strict=True):
            layers = [
                Layer(name, [shares.get(name, 0.0) for _, shares in bars], colour)
                for colour, name in enumerate(names)
            ]
            known = {"valid", *names}
            left = [sum(n for name, n in s.items() if name not in known) for _, s in bars]
            layers = [
                layer for layer in (*layers, Layer("other", left, _GREY)) if any(layer.values)
            ]
            if layers:
                svg = bar_chart(title, [x for x, _ in bars], layers, Axis(unit, percent=True))
                legend = [(f"c{layer.colour}", "", layer.name) for layer in layers]
                charts.append(Chart(title, [svg], legend))
        result.append(charts)
    return result


def panels(runs: Sequence[Run]) -> list[Chart]:
    """The charts of metrics.jsonl."""
    charts = []
    for panel in _PANELS:
        keys = panel.compared if len(runs) > 1 and panel.compared else panel.curves
        lines = []
        for colour, run in enumerate(runs):
            for dash, (key, label) in enumerate(_expand(run, keys, panel.curves).items()):
                points = [(r["step"], r[key]) for r in run.metrics if r.get(key) is not None]
                if len(runs) == 1:
                    style = label, dash % COLOURS, dash % DASHES
                else:
                    label = f"{run.name}: {label}" if len(keys) > 1 else run.name
                    style = label, colour, dash
                combine = _EXTREMES.get(key.rpartition("_")[2], fmean)
                lines.append(Line(style[0], thin(points, _POINTS, combine), style[1], style[2]))
        charts += _charts(panel.title, lines, panel.axis, named=len(runs) > 1 or len(lines) > 1)
    return charts


def steps_a_point(runs: Sequence[Run]) -> int:
    """How many steps a point of `panels` stands for at most: their mean, or extreme."""
    return max(math.ceil(len(run.metrics) / _POINTS) for run in runs)


def facts(run: Run) -> list[tuple[str, str]]:
    """What a run was and how far it came, for a heading."""
    steps = run.metrics[-1]["step"] if run.metrics else 0
    seconds = sum(record["seconds"] for record in run.metrics)
    said = [
        ("model", printable(Path(run.settings["model.path"]).name, _NAME)),
        ("steps", f"{steps:,} of {run.settings['run.steps']:,}"),
        ("completions", f"{sum(reasons.total() for reasons in run.reasons.values()):,}"),
        ("time of its steps", f"{seconds / 60:,.1f} min"),
    ]
    skipped = sum(bool(record.get("skipped")) for record in run.metrics)
    return [*said, ("updates that were not finite", f"{skipped}")] if skipped else said


def before_and_after(run: Run) -> Iterator[Table]:
    """The first and the last evaluation of each kind."""
    for same in by_kind(run.evaluations).values():
        ends = [same[0], same[-1]] if len(same) > 1 else [same[0]]
        rows = [
            [label, *(_interval(record[key]) for record in ends)]
            for key, label in _SHARES.items()
            if run.about_json and all(key in record for record in ends)
        ]
        if all("rewards" in record for record in ends):
            rows.append(["mean reward", *(f"{record['reward_mean']:.3f}" for record in ends)])
            for name in ends[-1]["rewards"]:
                means = [f"{record['rewards'].get(name, 0.0):.3f}" for record in ends]
                rows.append([short_name(name), *means])
        for name in ends[-1].get("fields", {}) if run.about_json else ():
            rights = [
                f"{_percent(record['fields'].get(name, 0))}"
                f"\n({_percent(record['fields_if_valid'].get(name, 0))})"
                for record in ends
            ]
            rows.append([f"{printable(name, _NAME)} (of valid)", *rights])
        rows.append(["truncated", *(_percent(record["truncated"]) for record in ends)])
        rows.append(["tokens an answer", *(f"{record['tokens']:.1f}" for record in ends)])
        yield Table(_kind(same[0]), ["", *map(when, ends)], rows)


def settings(runs: Sequence[Run]) -> Table:
    """The configuration of a run; of several what differs."""
    names = [*dict.fromkeys(name for run in runs for name in run.settings)]
    rows = [[name, *(str(run.settings.get(name, "")) for run in runs)] for name in names]
    if len(runs) > 1:
        rows = [row for row in rows if len(set(row[1:])) > 1]
    return Table(
        "Settings that differ" if len(runs) > 1 else "Settings",
        ["", *(run.name for run in runs)],
        [[*map(printable, row)] for row in rows],
    )


def _kind(record: Mapping[str, Any]) -> str:
    """What an evaluation asked."""
    drawn = f"temperature {record['temperature']:g}" if record["temperature"] else "greedy"
    return f"{printable(Path(record['data']).name, _NAME)}, {drawn}, n = {record['n']:,}"


def _bars_of_answers(run: Run) -> list[tuple[str, dict[str, float]]]:
    """The step and the share of each reason, of the decisive evaluations."""
    return [
        (f"{record['step']:,}", _shares(Counter(record["reasons"])))
        for record in _few(run.decisive, _BARS)
    ]


def _bars_of_samples(run: Run) -> list[tuple[str, dict[str, float]]]:
    """The steps and the share of each reason, of all samples."""
    steps, bars = [*run.reasons], []
    size = math.ceil(len(steps) / _BARS) or 1
    for i in range(0, len(steps), size):
        part = steps[i : i + size]
        label = f"{part[0]:,}" if len(part) == 1 else f"{part[0]:,}-{part[-1]:,}"
        bars.append((label, _shares(sum((run.reasons[step] for step in part), Counter[str]()))))
    return bars


def _shares(reasons: Counter[str]) -> dict[str, float]:
    shares: dict[str, float] = defaultdict(float)
    for reason, n in reasons.items():
        shares[printable(reason, _NAME)] += n / reasons.total()
    return shares


def _few(records: Sequence[Any], limit: int = _POINTS) -> list[Any]:
    return [records[i] for i in spread(len(records), limit)]


def _share(run: Run, key: str, colour: int, label: str = "", dash: int = 0) -> Line:
    """A share of the decisive evaluations with its intervals."""
    records = _few([e for e in run.decisive if key in e and run.about_json])
    return Line(
        label or _SHARES[key],
        [(record["step"], record[key]["rate"]) for record in records],
        colour,
        dash,
        [(record[key]["low"], record[key]["high"]) for record in records],
    )


def _sampled(run: Run) -> Line:
    temperature = run.settings["sampling.temperature"]
    having = [record for record in run.metrics if "valid_share" in record]
    points = thin([(record["step"], record["valid_share"]) for record in having], _POINTS)
    return Line(f"training samples at T = {temperature:g}, schema-valid", points, _GREY)


def _rewards(run: Run) -> list[Line]:
    """The mean weighted sum and the mean of each reward, of the decisive evaluations."""
    records = _few([record for record in run.decisive if "rewards" in record])
    names = [*dict.fromkeys(name for record in records for name in record["rewards"])]
    lines = [Line("sum", [(e["step"], e["reward_mean"]) for e in records], 0)]
    for colour, name in enumerate(names[: COLOURS - 1], start=1):
        points = [(e["step"], e["rewards"][name]) for e in records if name in e["rewards"]]
        lines.append(Line(short_name(name), points, colour, colour % DASHES))
    return lines


def _reward_of_each(runs: Sequence[Run]) -> list[Line]:
    sums = [_rewards(run)[0] for run in runs]
    return [
        Line(run.name, of.points, i) for i, (run, of) in enumerate(zip(runs, sums, strict=True))
    ]


def _expand(run: Run, keys: Iterable[str], curves: Mapping[str, str]) -> dict[str, str]:
    """Keys that stand for themselves or, with a dot at the end, for all that begin so."""
    found: dict[str, str] = {}
    for key in keys:
        if key.endswith("."):
            names = dict.fromkeys(name for record in run.metrics for name in record)
            found |= {
                name: printable(name[len(key) :], _NAME) for name in names if name.startswith(key)
            }
        else:
            found[key] = curves[key]
    return found


def _charts(
    title: str,
    lines: Sequence[Line],
    axis: Axis,
    note: str = "",
    *,
    wide: bool = False,
    named: bool = True,
) -> list[Chart]:
    """A chart of those lines that have points, or none; with a legend if they are `named`."""
    lines = [line for line in lines if line.points]
    if not lines:
        return []
    sizes = [(900, 300), (360, 240)] if wide else [(360, 220)]
    svgs = [line_chart(title, lines, axis, width=w, height=h) for w, h in sizes]
    legend = [(f"c{line.colour}", f"d{line.dash}", line.name) for line in lines]
    return [Chart(title, svgs, legend if named else [], note)]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _interval(share: Mapping[str, float]) -> str:
    low, high = 100 * share["low"], 100 * share["high"]
    return f"{_percent(share['rate'])}\n[{low:.1f}, {high:.1f}]"
