"""Line charts as SVG text for an HTML page, without a library.

Colours are CSS variables, so that the page chooses light or dark. The page must contain `CSS`; with `SCRIPT` it also
shows the values under the pointer. Charts are complete without the script.
"""

import dataclasses
import html
import itertools
import json
import math
from collections.abc import Callable, Sequence

import numpy as np

MAX_POINTS = 500  # per series; the width of a chart cannot show more
DOTTED = 60  # series with fewer points show each point as a dot

WIDTH, HEIGHT = 640, 320
LEFT, RIGHT, TOP, BOTTOM = 64, 624, 56, 272  # edges of the plot area, in the same units

CSS = """
.chart { display: block; width: 100%; height: auto; overflow: visible; font-size: 12px; }
.chart text { fill: var(--muted); }
.chart .title { fill: var(--text); font-size: 14px; font-weight: 600; }
.chart .grid { stroke: var(--grid); }
.chart .axis, .chart .cursor { stroke: var(--muted); }
.chart .mark { stroke: var(--muted); stroke-dasharray: 3 3; }
.chart .halo { paint-order: stroke; stroke: var(--surface); stroke-width: 4px; stroke-linejoin: round; }
.chart .band { fill: var(--series-1); opacity: 0.18; stroke: none; }
.chart .series { fill: none; stroke-width: 1.75; stroke-linecap: round; stroke-linejoin: round; }
.chart .dots { stroke-width: 6; }
.chart .series-0 { stroke: var(--series-0); } .chart .series-1 { stroke: var(--series-1); }
.chart .series-2 { stroke: var(--series-2); } .chart .series-3 { stroke: var(--series-3); }
"""

# The script reads the points from the drawn paths, so that the page has every number only once.
SCRIPT = """
for (const chart of document.querySelectorAll("svg.chart[data-axes]")) {
  const axes = JSON.parse(chart.dataset.axes), box = chart.viewBox.baseVal;
  const cursor = chart.querySelector(".cursor"), readout = chart.querySelector(".readout");
  const value = (axis, pixel) => {
    const at = axis.low + (axis.high - axis.low) * (pixel - axis.from) / (axis.to - axis.from);
    return (axis.log ? 10 ** at : at).toLocaleString("en", {maximumSignificantDigits: 4});
  };
  const series = [...chart.querySelectorAll("path.line")].map(path => ({
    name: path.dataset.name,
    points: [...path.getAttribute("d").matchAll(/[ML]([-.0-9]+) ([-.0-9]+)/g)].map(m => [+m[1], +m[2]]),
  }));
  chart.addEventListener("pointermove", event => {
    const x = (event.clientX - chart.getBoundingClientRect().left) * box.width / chart.clientWidth;
    const near = series.filter(s => s.points.length).map(s => ({
      name: s.name,
      point: s.points.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a),
    }));
    if (!near.length) return;
    const at = near.reduce((a, b) => Math.abs(b.point[0] - x) < Math.abs(a.point[0] - x) ? b : a).point[0];
    const here = near.filter(n => Math.abs(n.point[0] - at) < 5);
    cursor.setAttribute("x1", at); cursor.setAttribute("x2", at); cursor.removeAttribute("visibility");
    readout.textContent = value(axes.x, at) + ":  " +
      here.map(n => (series.length > 1 ? n.name + " " : "") + value(axes.y, n.point[1])).join(",  ");
  });
  chart.addEventListener("pointerleave", () => {
    cursor.setAttribute("visibility", "hidden"); readout.textContent = "";
  });
}
"""


@dataclasses.dataclass(frozen=True)
class Series:
    """A line: `x` ascending, `y` of the same length. A y that is NaN or infinite leaves a gap."""

    name: str
    x: Sequence[float] | np.ndarray
    y: Sequence[float] | np.ndarray


@dataclasses.dataclass(frozen=True)
class Area:
    """The area between `low` and `high`, finite and of the same length as `x`; drawn behind the lines."""

    name: str
    x: Sequence[float] | np.ndarray
    low: Sequence[float] | np.ndarray
    high: Sequence[float] | np.ndarray


@dataclasses.dataclass(frozen=True)
class Mark:
    """A dashed vertical line at `x` with a label."""

    x: float
    label: str


@dataclasses.dataclass(frozen=True)
class _Axis:
    """Maps [low, high] to pixels; on a logarithmic axis, `low` and `high` are exponents of ten."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def pixels(self, values: Sequence[float] | np.ndarray) -> np.ndarray:
        values = np.log10(values) if self.log else np.asarray(values, np.float64)
        return self.start + (values - self.low) / (self.high - self.low) * (self.end - self.start)

    def to_json(self) -> dict[str, float | bool]:
        return {"low": self.low, "high": self.high, "from": self.start, "to": self.end, "log": self.log}


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_y: bool = False,
    marks: Sequence[Mark] = (),
    area: Area | None = None,
) -> str:
    """An <svg> element of 640 x 320 units for use inside an HTML page.

    Series are thinned to MAX_POINTS points. With `log_y`, values of zero and below leave gaps. The series
    decide the axes: marks outside are left out, and areas are clipped. A chart without data says so. Raises ValueError
    where x and y differ in length.
    """
    runs = [_Runs.of(one, log_y) for one in series]
    body = [f'<text class="title" x="0" y="16">{html.escape(title)}</text>']
    drawn = [run for run in runs if len(run.x)]
    axes = ""
    if drawn:
        x_axis = _x_axis(drawn)
        y_axis, y_ticks = _y_axis(drawn, log_y)
        axes = f" data-axes='{json.dumps({'x': x_axis.to_json(), 'y': y_axis.to_json()})}'"
        body += _grid(x_axis, y_axis, y_ticks, x_label, y_label)
        body += [_area(area, x_axis, y_axis)] if area else []
        body += _legend([one.name for one in series], area) if len(series) > 1 or area else []
        body += [_path(run, index, x_axis, y_axis) for index, run in enumerate(runs) if len(run.x)]
        body += [_mark(mark, x_axis) for mark in marks if x_axis.low <= mark.x <= x_axis.high]
        body.append(f'<line class="cursor" visibility="hidden" y1="{TOP}" y2="{BOTTOM}"/>')
        body.append(f'<text class="readout" x="{RIGHT}" y="16" text-anchor="end"></text>')
    else:
        body.append(f'<text x="{WIDTH / 2}" y="{HEIGHT / 2}" text-anchor="middle">no data</text>')
    box = f'viewBox="0 0 {WIDTH} {HEIGHT}"'
    start = f'<svg class="chart" {box} role="img" aria-label="{html.escape(title)}"{axes}>'
    return "\n".join([start, *body, "</svg>"])


@dataclasses.dataclass(frozen=True)
class _Runs:
    """The drawable points of a series; `run` counts the gaps before a point."""

    name: str
    x: np.ndarray
    y: np.ndarray
    run: np.ndarray

    @classmethod
    def of(cls, series: Series, log_y: bool) -> "_Runs":
        x, y = np.asarray(series.x, np.float64), np.asarray(series.y, np.float64)
        if x.shape != y.shape or x.ndim != 1:
            raise ValueError(f"series {series.name!r} has x of shape {x.shape} and y of shape {y.shape}")
        drawable = np.isfinite(x) & np.isfinite(y) & ((y > 0) | (not log_y))
        run = np.cumsum(~drawable)
        kept = np.flatnonzero(drawable)
        kept = kept[thin(y[kept])]
        return cls(series.name, x[kept], y[kept], run[kept])


def thin(y: np.ndarray, limit: int = MAX_POINTS) -> np.ndarray:
    """Ascending indices of at most `limit` points of y: both ends, and the extremes of sections of equal length."""
    if len(y) <= limit:
        return np.arange(len(y))
    edges = np.linspace(0, len(y), (limit - 2) // 2 + 1).astype(int)
    extremes = [
        start + pick(y[start:end]) for start, end in itertools.pairwise(edges) for pick in (np.argmin, np.argmax)
    ]
    return np.unique([0, *extremes, len(y) - 1])


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` multiples of 1, 2 or 5 times a power of ten that cover [low, high]."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((power * factor for factor in (1, 2, 5, 10)), key=lambda candidate: abs(candidate - rough))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten that cover [low, high], both positive; if there are few, also 2 and 5 times each."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    if first == last:
        first, last = first - 1, last + 1
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    every = max(1, round((last - first) / 6))
    ticks = [factor * 10.0**power for power in range(first, last + every, every) for factor in factors]
    start = max((i for i, tick in enumerate(ticks) if tick <= low * (1 + 1e-9)), default=0)
    end = min((i for i, tick in enumerate(ticks) if tick >= high * (1 - 1e-9)), default=len(ticks) - 1)
    return ticks[start : max(end, start + 1) + 1]


def tick_text(value: float) -> str:
    """A short label: 1.5M, 20k, 0.05, 0.0002, 1e-5."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * (1 - 1e-9):
            return f"{value / size:.6g}{suffix}"
    return f"{value:.6g}".replace("e-0", "e-")


def _x_axis(drawn: Sequence[_Runs]) -> _Axis:
    low, high = min(run.x[0] for run in drawn), max(run.x[-1] for run in drawn)
    if low == high:
        low, high = low - 0.5, high + 0.5
    return _Axis(float(low), float(high), LEFT, RIGHT)


def _y_axis(drawn: Sequence[_Runs], log: bool) -> tuple[_Axis, list[float]]:
    low, high = float(min(run.y.min() for run in drawn)), float(max(run.y.max() for run in drawn))
    ticks = log_ticks(low, high) if log else nice_ticks(low, high)
    scale: Callable[[float], float] = math.log10 if log else float
    return _Axis(scale(ticks[0]), scale(ticks[-1]), BOTTOM, TOP, log), ticks


def _grid(x_axis: _Axis, y_axis: _Axis, y_ticks: list[float], x_label: str, y_label: str) -> list[str]:
    parts = []
    for tick, y in zip(y_ticks, y_axis.pixels(y_ticks), strict=True):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick_text(tick)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{RIGHT}" y1="{BOTTOM}" y2="{BOTTOM}"/>')
    x_ticks = [tick for tick in nice_ticks(x_axis.low, x_axis.high) if x_axis.low <= tick <= x_axis.high]
    for tick, x in zip(x_ticks, x_axis.pixels(x_ticks), strict=True):
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{BOTTOM}" y2="{BOTTOM + 4}"/>')
        parts.append(f'<text x="{x:.1f}" y="{BOTTOM + 18}" text-anchor="middle">{tick_text(tick)}</text>')
    middle = (LEFT + RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{BOTTOM + 40}" text-anchor="middle">{html.escape(x_label)}</text>')
    parts.append(f'<text x="0" y="38">{html.escape(y_label)}</text>')
    return parts


def _legend(names: Sequence[str], area: Area | None) -> list[str]:
    """The legend: one row, right-aligned above the plot area."""
    parts, x = [], float(RIGHT)
    if area:
        x -= 6.5 * len(area.name)
        parts.append(f'<text x="{x:.1f}" y="38">{html.escape(area.name)}</text>')
        parts.append(f'<path class="band" d="M{x - 24:.1f} 28h16v12h-16Z"/>')
        x -= 40
    for index, name in reversed(list(enumerate(names))):
        text_width = 6.5 * len(name)
        x -= text_width
        parts.append(f'<text x="{x:.1f}" y="38">{html.escape(name)}</text>')
        parts.append(f'<path class="series {_color(index)}" d="M{x - 24:.1f} 34h16"/>')
        x -= 40
    return parts


def _area(area: Area, x_axis: _Axis, y_axis: _Axis) -> str:
    x = np.clip(x_axis.pixels(area.x), LEFT, RIGHT)
    low, high = (np.clip(y_axis.pixels(edge), TOP, BOTTOM) for edge in (area.low, area.high))
    corners = [*zip(x, high, strict=True), *zip(x[::-1], low[::-1], strict=True)]
    return f'<path class="band" d="M{"L".join(f"{a:.1f} {b:.1f}" for a, b in corners)}Z"/>'


def _path(run: _Runs, index: int, x_axis: _Axis, y_axis: _Axis) -> str:
    """The line, broken at gaps, with dots if there are few points. A single point between gaps is a dot, too."""
    x, y = x_axis.pixels(run.x), y_axis.pixels(run.y)
    begins = np.diff(run.run, prepend=-1) > 0
    lines = [f"{'M' if begin else 'L'}{a:.2f} {b:.2f}" for a, b, begin in zip(x, y, begins, strict=True)]
    lone = begins & np.append(begins[1:], True)
    dots = [f"M{a:.2f} {b:.2f}h0" for a, b in zip(x[lone], y[lone], strict=True)]
    if len(x) < DOTTED:
        dots = [f"M{a:.2f} {b:.2f}h0" for a, b in zip(x, y, strict=True)]
    name = html.escape(run.name)
    path = f'<path class="series line {_color(index)}" data-name="{name}" d="{"".join(lines)}"/>'
    return path + (f'<path class="series dots {_color(index)}" d="{"".join(dots)}"/>' if dots else "")


def _mark(mark: Mark, x_axis: _Axis) -> str:
    (x,) = x_axis.pixels([mark.x])
    anchor, offset = ("start", 6) if x < (LEFT + RIGHT) / 2 else ("end", -6)
    return (
        f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{BOTTOM}"/>'
        f'<text class="halo" x="{x + offset:.1f}" y="{TOP + 14}" text-anchor="{anchor}">'
        f"{html.escape(mark.label)}</text>"
    )


def _color(index: int) -> str:
    return f"series-{index % 4}"
