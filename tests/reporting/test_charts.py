import itertools
import json
import math
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from gptjax.reporting import charts
from gptjax.reporting.charts import Mark, Series, line_chart, log_ticks, nice_ticks, thin, tick_text

LABELS = {"title": "Loss", "x_label": "step", "y_label": "nats"}


def parse(svg):
    return ElementTree.fromstring(svg)


def lines(svg):
    """The unbroken parts of each drawn series, as lists of (x, y)."""
    paths = [path.get("d") for path in parse(svg).iter("path") if "line" in path.get("class").split()]
    return [
        [[tuple(map(float, point.split())) for point in stretch.split("L")] for stretch in path.split("M")[1:]]
        for path in paths
    ]


def texts(svg):
    return [element.text for element in parse(svg).iter("text")]


def test_points_are_where_the_axes_say():
    svg = line_chart([Series("train", [0, 50, 100], [2.0, 4.0, 3.0])], **LABELS)
    axes = json.loads(parse(svg).get("data-axes"))
    assert (axes["x"]["low"], axes["x"]["high"]) == (0, 100)
    assert (axes["y"]["low"], axes["y"]["high"]) == (2, 4)
    middle = (charts.LEFT + charts.RIGHT) / 2
    assert lines(svg) == [
        [
            [
                (charts.LEFT, charts.BOTTOM),
                (middle, charts.TOP),
                (charts.RIGHT, (charts.TOP + charts.BOTTOM) / 2),
            ]
        ]
    ]


def test_x_ascends_and_every_point_is_inside():
    rng = np.random.default_rng(0)
    x = np.arange(0, 30_000, 10)
    svg = line_chart([Series("a", x, rng.normal(size=3000)), Series("b", x[::300], rng.random(10))], **LABELS)
    for (stretch,) in lines(svg):
        assert all(a[0] < b[0] for a, b in itertools.pairwise(stretch))
        assert all(charts.LEFT <= a <= charts.RIGHT and charts.TOP <= b <= charts.BOTTOM for a, b in stretch)


def test_long_series_keep_their_ends_and_extremes():
    y = np.sin(np.arange(100_000) / 700)
    y[41_234], y[41_235] = 50.0, -50.0
    kept = thin(y)
    assert len(kept) <= charts.MAX_POINTS
    assert (np.diff(kept) > 0).all()
    assert {0, 41_234, 41_235, 99_999} <= set(kept)
    (stretches,) = lines(line_chart([Series("a", np.arange(len(y)), y)], **LABELS))
    assert sum(map(len, stretches)) == len(kept)


@pytest.mark.parametrize("length", [0, 1, 499, 500])
def test_short_series_are_kept_whole(length):
    assert thin(np.zeros(length)).tolist() == list(range(length))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_break_the_line(bad):
    svg = line_chart([Series("a", range(6), [1.0, 2.0, bad, 3.0, 2.0, bad])], **LABELS)
    (stretches,) = lines(svg)
    assert list(map(len, stretches)) == [2, 2]
    assert not re.search("nan|inf", svg, re.IGNORECASE)


def test_a_point_between_gaps_is_still_seen(monkeypatch):
    monkeypatch.setattr(charts, "DOTTED", 0)
    svg = line_chart([Series("a", range(5), [1.0, 2.0, math.nan, 3.0, math.nan])], **LABELS)
    (dots,) = (path.get("d") for path in parse(svg).iter("path") if "dots" in path.get("class"))
    assert dots == f"M{charts.LEFT + 560:.2f} {charts.TOP:.2f}h0"


def test_zero_has_no_logarithm():
    svg = line_chart([Series("a", range(5), [0.1, 0.0, 1.0, -1.0, 10.0])], log_y=True, **LABELS)
    (stretches,) = lines(svg)
    middle = (charts.TOP + charts.BOTTOM) / 2
    assert [y for stretch in stretches for _, y in stretch] == [charts.BOTTOM, middle, charts.TOP]


@pytest.mark.parametrize("y", [[], [math.nan, math.inf]])
def test_a_chart_without_data_says_so(y):
    svg = line_chart([Series("a", range(len(y)), y)], **LABELS)
    assert "no data" in texts(svg)
    assert not lines(svg)


def test_one_point_and_a_flat_line_have_axes():
    for y in ([3.0], [3.0, 3.0], [0.0, 0.0]):
        svg = line_chart([Series("a", range(len(y)), y)], **LABELS)
        assert [b for _, b in lines(svg)[0][0]] == [(charts.TOP + charts.BOTTOM) / 2] * len(y)


def test_marks_inside_the_data_are_drawn():
    marks = [Mark(5, "best <1>"), Mark(50, "outside")]
    svg = line_chart([Series("a", [0, 10], [1.0, 2.0])], marks=marks, **LABELS)
    assert "best <1>" in texts(svg)
    assert "outside" not in texts(svg)
    (mark,) = (line for line in parse(svg).iter("line") if line.get("class") == "mark")
    assert float(mark.get("x1")) == (charts.LEFT + charts.RIGHT) / 2


def test_labels_and_legend():
    one, two = Series("train", [0, 1], [1.0, 2.0]), Series('<b> & "c"', [0, 1], [1.0, 2.0])
    assert {"Loss", "step", "nats", "train", '<b> & "c"'} <= set(texts(line_chart([one, two], **LABELS)))
    assert "train" not in texts(line_chart([one], **LABELS))


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="series 'a' has x of shape"):
        line_chart([Series("a", [1, 2], [1.0])], **LABELS)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (2.1, 3.9, [2, 2.5, 3, 3.5, 4]),
        (0, 0.001, [0, 0.0002, 0.0004, 0.0006, 0.0008, 0.001]),
        (-30, 70, [-40, -20, 0, 20, 40, 60, 80]),
        (3, 3, [1.5, 2, 2.5, 3, 3.5, 4, 4.5]),
    ],
)
def test_nice_ticks(low, high, expected):
    assert nice_ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.3, 9, [0.2, 0.5, 1, 2, 5, 10]),
        (1e-3, 1e3, [1e-3, 1e-2, 1e-1, 1, 10, 100, 1000]),
        (10, 10, [10, 20]),
        (2.1, 2.2, [2, 5]),
    ],
)
def test_log_ticks(low, high, expected):
    assert log_ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(20))
def test_ticks_cover_the_data_and_are_few(seed):
    rng = np.random.default_rng(seed)
    low, high = np.sort(10.0 ** rng.uniform(-12, 12, size=2))
    for ticks in (nice_ticks(low, high), log_ticks(low, high)):
        assert ticks[0] <= low * (1 + 1e-9)
        assert ticks[-1] >= high * (1 - 1e-9)
        assert 2 <= len(ticks) <= 10
        assert ticks == sorted(set(ticks))


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1500, "1.5k"), (2e6, "2M"), (3 * 0.1, "0.3"), (2e-4, "0.0002"), (1e-5, "1e-5"), (-20, "-20")],
)
def test_tick_text(value, text):
    assert tick_text(value) == text


def test_an_area_lies_behind_the_lines_and_inside_the_axes():
    area = charts.Area("expected", [0, 50, 100], [0.0, 2.5, 2.5], [9.0, 3.5, 3.5])
    svg = line_chart([Series("train", [0, 100], [2.0, 4.0])], area=area, **LABELS)
    assert "expected" in texts(svg)
    band = next(path for path in parse(svg).iter("path") if path.get("class") == "band" and "L" in path.get("d"))
    assert svg.index(band.get("d")) < svg.index("series line")
    points = [tuple(map(float, point.split())) for point in band.get("d")[1:-1].split("L")]
    middle = (charts.LEFT + charts.RIGHT) / 2
    quarter = (charts.BOTTOM - charts.TOP) / 4  # half a nat of the two that the axis has
    assert points[:2] == [(charts.LEFT, charts.TOP), (middle, charts.TOP + quarter)]
    assert points[-2:] == [(middle, charts.BOTTOM - quarter), (charts.LEFT, charts.BOTTOM)]
