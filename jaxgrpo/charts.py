"""Charts as SVG: pure functions from series of numbers to markup, and the same lines as a PNG.

Colours are classes that the page's style sheet gives to its themes: `c0` to `c7`, and `c8`, a grey,
for what is left. A line also differs by its dashes, `d0` to `d4`. Every text is escaped.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from xml.etree import ElementTree

COLOURS = 8
DASHES = 5
Point = tuple[float, float]

_TEXT = 11  # font size in units of the view box, which are pixels where the chart has its own width
_CHAR = 6.2  # width of a character of it, about
_TOP, _BOTTOM, _RIGHT = 22, 34, 12  # margins: the unit above, steps below, half a label beside
_MOST_DOTS = 30  # points of a line that are marked
_PNG = (
    "#0072b2",
    "#d55e00",
    "#00855f",
    "#b03f8f",
    "#8a6a00",
    "#5b4bc4",
    "#882255",
    "#3d7f9c",
    "#9a9ea4",
)
_PNG_DASHES = ("solid", (0, (6, 3)), (0, (2, 2)), (0, (8, 2, 2, 2)), (0, (12, 4)))


@dataclass(frozen=True)
class Line:
    """A series.

    Attributes:
      name: for the legend and the tooltips.
      points: x and y, ascending in x.
      colour: number of its colour.
      dash: number of its dashes.
      band: low and high at each point; none if empty.
    """

    name: str
    points: Sequence[Point]
    colour: int = 0
    dash: int = 0
    band: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True)
class Layer:
    """A part of every bar.

    Attributes:
      name: for the legend and the tooltips.
      values: one for each bar.
      colour: number of its colour.
    """

    name: str
    values: Sequence[float]
    colour: int


@dataclass(frozen=True)
class Axis:
    """How values are drawn.

    Attributes:
      unit: what stands above the axis.
      percent: the values are shares of 1.
      whole: such an axis always goes from 0 to 100 %.
      log: logarithmic where all values are positive and the largest is 20 times the smallest.
    """

    unit: str
    percent: bool = False
    whole: bool = False
    log: bool = False

    def value(self, y: float) -> str:
        """A value as a tooltip says it."""
        return f"{y:.1%}".replace("%", " %") if self.percent else f"{y:,.6g}"


def line_chart(
    label: str, lines: Sequence[Line], axis: Axis, *, width: int = 360, height: int = 220
) -> str:
    """Lines over steps, with bands around those that have them.

    Args:
      label: what it is, for those who cannot see it.
      lines: one point at least among them.
      axis: of the values.
      width: units of the view box.
      height: the same.
    """
    values = [y for line in lines for _, y in line.points]
    values += [end for line in lines for ends in line.band for end in ends]
    scale = _Scale(axis, values)
    steps = sorted({x for line in lines for x, _ in line.points})
    svg, left = _frame(label, scale, axis, width, height)
    first, last = steps[0], max(steps[-1], steps[0] + 1)
    bottom = height - _BOTTOM

    def at(x: float) -> float:
        return left + (x - first) / (last - first) * (width - _RIGHT - left)

    def up(y: float) -> float:
        return bottom - scale.share(y) * (bottom - _TOP)

    few = max(2, int((width - left - _RIGHT) / (1.5 * _CHAR * len(f"{last:,.0f}") + 20)))
    for x in (x for x in ticks(first, last, few) if first <= x <= last and x == int(x)):
        _below(svg, at(x), bottom, f"{x:,.0f}", width)
    for line in lines:
        if line.band:
            xs = [x for x, _ in line.points]
            lows, highs = ([*zip(xs, ends, strict=True)] for ends in zip(*line.band, strict=True))
            edge = _path([*highs, *lows[::-1]], at, up)
            _add(svg, "polygon", f"band c{line.colour}", points=edge)
    for line in lines:
        classes = f"line c{line.colour} d{line.dash}"
        _add(svg, "polyline", classes, points=_path(line.points, at, up))
        if len(line.points) <= _MOST_DOTS:
            for x, y in line.points:
                _add(svg, "circle", f"dot c{line.colour}", cx=at(x), cy=up(y), r=2.2)
    # What the pointer is nearest to, over the whole height.
    found = [_readings(line, axis) for line in lines]
    edges = [left, *(at((a + b) / 2) for a, b in pairwise(steps)), width - _RIGHT]
    for x, (start, end) in zip(steps, pairwise(edges), strict=True):
        said = [f"step {x:,.0f}", *(reading[x] for reading in found if x in reading)]
        _hit(svg, start, end, height, said)
    return ElementTree.tostring(svg, encoding="unicode")


def bar_chart(
    label: str,
    xs: Sequence[str],
    layers: Sequence[Layer],
    axis: Axis,
    *,
    width: int = 360,
    height: int = 220,
) -> str:
    """Bars of stacked layers.

    Args:
      label: what it is, for those who cannot see it.
      xs: what stands below each bar; one at least.
      layers: one at least; the first is at the bottom.
      axis: of the values.
      width: units of the view box.
      height: the same.
    """
    totals = [sum(values) for values in zip(*(layer.values for layer in layers), strict=True)]
    scale = _Scale(axis, [0, *totals])
    svg, left = _frame(label, scale, axis, width, height)
    bottom = height - _BOTTOM
    slot = (width - _RIGHT - left) / len(xs)
    gap = min(6.0, 0.2 * slot)
    every = math.ceil(len(xs) * (max(map(len, xs)) + 5) * _CHAR / (width - _RIGHT - left))
    for i, x in enumerate(xs):
        start, y, said = left + i * slot, 0.0, [f"step {x}"]
        for layer in layers:
            value = layer.values[i]
            if value:
                high, low = (bottom - scale.share(end) * (bottom - _TOP) for end in (y + value, y))
                size = {"width": slot - gap, "height": low - high}
                _add(svg, "rect", f"bar c{layer.colour}", x=start + gap / 2, y=high, **size)
                said.insert(1, f"{layer.name}: {axis.value(value)}")
            y += value
        if i % every == 0:
            _below(svg, start + slot / 2, bottom, x, width)
        _hit(svg, start, start + slot, height, said)
    return ElementTree.tostring(svg, encoding="unicode")


def thin(
    points: Sequence[Point], limit: int, combine: Callable[[Iterable[float]], float] = fmean
) -> list[Point]:
    """At most `limit` points, each of as many that follow each other, their values combined."""
    size = math.ceil(len(points) / limit) or 1
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [(fmean(x for x, _ in part), combine(y for _, y in part)) for part in parts]


def spread(n: int, limit: int) -> list[int]:
    """At most `limit` of the numbers below n, evenly, with the first and the last."""
    if n <= limit:
        return list(range(n))
    return [round(i * (n - 1) / (limit - 1)) for i in range(limit)]


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers that reach from `low` or below to `high` or above."""
    rough = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def save_png(path: Path, lines: Sequence[Line], axis: Axis, title: str) -> None:
    """Writes a line chart as a picture, for documents.

    Raises:
      ImportError: matplotlib is not installed.
      OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), dpi=160, layout="constrained")
    axes = figure.subplots()
    scale = 100 if axis.percent else 1
    for line in lines:
        xs, ys = [x for x, _ in line.points], [scale * y for _, y in line.points]
        colour = _PNG[line.colour]
        marker = "o" if len(xs) <= _MOST_DOTS else ""
        # A leading underscore would hide it, dollars would be mathematics.
        name = line.name.replace("$", r"\$")
        name = f" {name}" if name.startswith("_") else name
        axes.plot(
            xs,
            ys,
            marker=marker,
            markersize=3,
            linestyle=_PNG_DASHES[line.dash],
            linewidth=1.5,
            color=colour,
            label=name,
        )
        if line.band:
            low, high = ([scale * ends[i] for ends in line.band] for i in (0, 1))
            axes.fill_between(xs, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set(xlabel="step", ylabel=axis.unit)
    axes.set_title(title.replace("$", r"\$"), fontsize=9)
    if axis.whole:
        axes.set_ylim(0, 102)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


class _Scale:
    """From values to their share of an axis's height, with the ticks on it."""

    def __init__(self, axis: Axis, values: Sequence[float]):
        low, high = min(values), max(values)
        self.log = axis.log and low > 0 and high > 20 * low
        if self.log:
            ends = math.floor(math.log10(low)), math.ceil(math.log10(high))
            every = math.ceil((ends[1] - ends[0]) / 6)
            self.ticks = [10.0**power for power in range(ends[0], ends[1] + every, every)]
        elif axis.whole:
            self.ticks = [i / 5 for i in range(6)]
        else:
            if 0 <= low <= 0.5 * high:  # not where the whole difference is far from 0
                low = 0.0
            if high - low < 1e-9 * max(abs(high), 1e-30):  # one value
                low, high = (low - abs(low) / 2, high + abs(high) / 2) if low else (0.0, 1.0)
            self.ticks = ticks(low, high, 4)
        self._low, self._high = self._position(self.ticks[0]), self._position(self.ticks[-1])

    def _position(self, y: float) -> float:
        return math.log10(y) if self.log else y

    def share(self, y: float) -> float:
        return (self._position(y) - self._low) / (self._high - self._low)

    def labels(self, percent: bool) -> list[str]:
        if self.log:
            return [f"{tick:,.0f}" if tick >= 1 else f"{tick:g}" for tick in self.ticks]
        scale = 100 if percent else 1
        step = scale * (self.ticks[1] - self.ticks[0])
        decimals = max(0, -math.floor(math.log10(step) + 1e-9))
        if decimals > 4 and max(map(abs, self.ticks)) < 0.01:
            return [f"{tick:.2g}" if tick else "0" for tick in self.ticks]
        unit = " %" if percent else ""
        # Adding 0.0 makes a negative zero a plain one.
        return [f"{round(scale * tick, decimals) + 0.0:,.{decimals}f}{unit}" for tick in self.ticks]


def _frame(
    label: str, scale: _Scale, axis: Axis, width: int, height: int
) -> tuple[ElementTree.Element, float]:
    """A chart without its data, and where on the left its area begins."""
    svg = ElementTree.Element("svg", {"viewBox": f"0 0 {width} {height}", "role": "img"})
    svg.set("aria-label", label)
    labels = scale.labels(axis.percent)
    left = 10 + _CHAR * max(map(len, labels))
    bottom = height - _BOTTOM
    _text(svg, 0, 11, axis.unit + (" (log)" if scale.log else ""), "start")
    _text(svg, width - _RIGHT, height - 4, "step", "end")
    for tick, text in zip(scale.ticks, labels, strict=True):
        y = bottom - scale.share(tick) * (bottom - _TOP)
        _add(svg, "line", "grid", x1=left, x2=width - _RIGHT, y1=y, y2=y)
        _text(svg, left - 5, y + 0.35 * _TEXT, text, "end")
    return svg, left


def _add(
    parent: ElementTree.Element, tag: str, classes: str, **attributes: float | str
) -> ElementTree.Element:
    shown = {
        name: value if isinstance(value, str) else f"{value:.1f}".removesuffix(".0")
        for name, value in attributes.items()
    }
    return ElementTree.SubElement(parent, tag, {"class": classes, **shown})


def _text(parent: ElementTree.Element, x: float, y: float, text: str, anchor: str) -> None:
    _add(parent, "text", anchor, x=x, y=y).text = text


def _below(parent: ElementTree.Element, x: float, bottom: float, text: str, width: float) -> None:
    """A label below the axis, centred unless it would leave the chart."""
    _text(parent, min(x, width - _CHAR * len(text) / 2), bottom + 15, text, "middle")


def _hit(
    svg: ElementTree.Element, start: float, end: float, height: int, said: Sequence[str]
) -> None:
    """A strip that shows what it says while the pointer is on it."""
    size = {"width": end - start, "height": height - _BOTTOM - _TOP}
    strip = _add(svg, "rect", "hit", x=start, y=_TOP, **size)
    ElementTree.SubElement(strip, "title").text = "\n".join(said)


def _readings(line: Line, axis: Axis) -> dict[float, str]:
    """What a tooltip says of a line, at each of its x."""
    said = {x: f"{line.name}: {axis.value(y)}" for x, y in line.points}
    for (x, _), ends in zip(line.points, line.band, strict=False):
        low, high = map(axis.value, ends)
        said[x] += f" [{low}, {high}]"
    return said


def _path(
    points: Sequence[Point], at: Callable[[float], float], up: Callable[[float], float]
) -> str:
    return " ".join(f"{at(x):.1f},{up(y):.1f}" for x, y in points)
