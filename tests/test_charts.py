"""Charts: what is drawn stands where its value is, and every text is escaped."""

import random
from xml.etree import ElementTree

import pytest

from jaxgrpo.charts import Axis, Layer, Line, bar_chart, line_chart, spread, thin, ticks

HOSTILE = "</title><script>alert(1)</script>&\"'"


def rows(svg):
    """The height of each grid line, by its label."""
    svg = ElementTree.fromstring(svg)
    heights = [float(line.get("y1")) for line in svg.iter("line")]
    labels = [t.text for t in svg.iter("text") if t.get("class") == "end" and t.text != "step"]
    return dict(zip(labels, heights, strict=True))


def coordinates(svg, tag):
    return [
        [tuple(map(float, point.split(","))) for point in element.get("points").split()]
        for element in ElementTree.fromstring(svg).iter(tag)
    ]


def said(svg):
    return [title.text for title in ElementTree.fromstring(svg).iter("title")]


def test_points_stand_where_their_values_are():
    line = Line("kl", [(0, 0.0), (5, 30.0), (10, 20.0)], band=[(0, 10), (20, 40), (10, 30)])
    svg = line_chart("x", [line], Axis("nats"))
    grid = rows(svg)
    assert list(grid) == ["0", "10", "20", "30", "40"]
    (((x0, y0), (x1, y1), (x2, y2)),) = coordinates(svg, "polyline")
    assert (y0, y1, y2) == pytest.approx((grid["0"], grid["30"], grid["20"]), abs=0.11)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)
    (band,) = coordinates(svg, "polygon")
    expected = [grid[label] for label in ("10", "40", "30", "10", "20", "0")]
    assert [y for _, y in band] == pytest.approx(expected, abs=0.11)
    assert said(svg)[1] == "step 5\nkl: 30 [20, 40]"


def test_logarithmic_where_values_are_far_apart():
    svg = line_chart("x", [Line("a", [(1, 1.0), (2, 1000.0)])], Axis("s", log=True))
    grid = rows(svg)
    assert list(grid) == ["1", "10", "100", "1,000"]
    heights = list(grid.values())
    assert heights[0] - heights[1] == pytest.approx(heights[2] - heights[3], abs=0.11)
    near = line_chart("x", [Line("a", [(1, 1.0), (2, 3.0)])], Axis("s", log=True))
    assert "10" not in rows(near)


@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 1e-14, 1e12, 1.0000002])
def test_one_value_at_one_step_is_a_chart(value):
    labels = list(rows(line_chart("x", [Line("a", [(7, value)])], Axis("u", log=True))))
    assert len(labels) == len(set(labels)) >= 2


def test_labels_tell_close_values_apart():
    line = Line("ratio", [(1, 0.999998), (2, 1.0000031)])
    labels = list(rows(line_chart("x", [line], Axis("ratio"))))
    assert len(set(labels)) == len(labels) >= 3
    assert float(labels[0]) <= 0.999998 < 1.0000031 <= float(labels[-1])


def test_bars_are_stacked():
    layers = [Layer("a", [0.25, 0.0], 0), Layer("b", [0.5, 0.25], 1)]
    svg = bar_chart("x", ["1", "2"], layers, Axis("share", percent=True))
    grid = rows(svg)
    bars = [
        [float(rect.get(key)) for key in ("x", "y", "height")] + [rect.get("class")]
        for rect in ElementTree.fromstring(svg).iter("rect")
        if rect.get("class") != "hit"
    ]
    (x0, y0, h0, c0), (x1, y1, h1, c1), (x2, y2, h2, c2) = bars
    assert (c0, c1, c2) == ("bar c0", "bar c1", "bar c1")
    assert x0 == x1 < x2
    zero, top = grid["0 %"], grid["80 %"]
    assert (zero - top) / 0.8 == pytest.approx(h0 / 0.25, rel=0.02)
    assert h1 == pytest.approx(2 * h0, abs=0.21)
    assert h2 == pytest.approx(h0, abs=0.11)
    assert (y0 + h0, y1 + h1, y2 + h2) == pytest.approx((zero, y0, zero), abs=0.21)
    assert said(svg) == ["step 1\nb: 50.0 %\na: 25.0 %", "step 2\nb: 25.0 %"]


def test_texts_are_escaped():
    line = line_chart(HOSTILE, [Line(HOSTILE, [(0, 1.0)])], Axis(HOSTILE))
    bars = bar_chart(HOSTILE, [HOSTILE], [Layer(HOSTILE, [1.0], 0)], Axis(HOSTILE))
    for svg in (line, bars):
        assert "<script" not in svg
        assert HOSTILE in ElementTree.fromstring(svg).get("aria-label")
        assert HOSTILE in said(svg)[0]


def test_ticks_are_round_and_reach_over_the_values():
    draw = random.Random()
    for _ in range(200):
        low = draw.uniform(-1, 1) * 10 ** draw.uniform(-6, 6)
        high = low + 10 ** draw.uniform(-3, 3) * abs(low)
        found = ticks(low, high, 4)
        slack = 1e-6 * (high - low)
        assert found[0] <= low + slack
        assert found[-1] >= high - slack
        assert 2 <= len(found) <= 7
        step = f"{found[1] - found[0]:.3e}"
        assert step[:5] in {"1.000", "2.000", "5.000"}


def test_thinned_curves_keep_their_mean_and_their_extremes():
    n = random.randrange(500, 2000)
    points = [(i, random.random()) for i in range(n)]
    assert thin(points[:100], 100) == points[:100]
    means, highs = thin(points, 100), thin(points, 100, max)
    assert 50 < len(means) <= 100
    size = -(-n // 100)
    assert means[1][1] == pytest.approx(sum(y for _, y in points[size : 2 * size]) / size)
    assert max(highs, key=lambda point: point[1])[1] == max(y for _, y in points)


def test_what_is_spread_has_its_ends():
    for n in (0, 1, 5, 6, 7, 100):
        chosen = spread(n, 6)
        assert len(chosen) == len(set(chosen)) == min(n, 6)
        assert chosen == sorted(chosen)
        assert chosen[:1] + chosen[-1:] == ([0, n - 1] if n else [])
