"""The figures of a study, for papers and for its page: WORKDIR/figures/*.svg and *.pdf, drawn with matplotlib.

The same cells give the same bytes. What cannot be drawn yet is left out.
"""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.files import whole_file
from gptjax.reporting.charts import tick_text
from gptjax.studies import report, statistics
from gptjax.studies.cell import Cell
from gptjax.studies.cells import Plan
from gptjax.studies.statistics import Summary
from gptjax.studies.study import Claim

INSTALL = "figures need matplotlib: pip install 'gptjax[studies]'"
UNITS = {"loss": "nats per token", "bits_per_byte": "bits per byte"}
# Okabe and Ito's palette without its yellow, which is too light for a line: told apart with any colour vision.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f5a2a")
DASHES = ("-", "--", "-.", ":")
TEXT, MUTED, GRID, SURFACE = "#1b1f24", "#626b76", "#e6e9ed", "#ffffff"
MARKERS = "os^Dv<>"
MOST_POINTS = 50  # of a curve; of more steps, neighbours are averaged
WARM = 0.1  # the axis of a curve shows what comes after this share of the tokens
STYLE = {
    "svg.fonttype": "path",
    "pdf.fonttype": 42,  # the fonts that journals take
    "font.size": 9,
    "text.parse_math": False,
    "figure.facecolor": SURFACE,
    "axes.facecolor": "none",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": TEXT,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.titlecolor": TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "text.color": TEXT,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": TEXT,
    "ytick.labelcolor": TEXT,
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
    "legend.frameon": False,
}


def available() -> bool:
    """Whether matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def write(plan: Plan) -> dict[str, str]:
    """Draws what can be drawn into WORKDIR/figures. Returns {name: the SVG}. Needs matplotlib."""
    import matplotlib

    drawn = {}
    for name, draw in (("differences", _differences), ("curves", _curves), ("sensitivity", _sensitivity)):
        with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE, "svg.hashsalt": name}):
            if (figure := draw(plan)) is None:
                continue
            for kind, date in (("pdf", "CreationDate"), ("svg", "Date")):
                data = io.BytesIO()
                figure.savefig(data, format=kind, metadata={date: None})
                _store(plan.workdir / "figures" / f"{name}.{kind}", data.getvalue())
            drawn[name] = data.getvalue().decode()
    return drawn


def _store(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(data)


def color(plan: Plan, arm: str) -> str:
    return COLORS[list(plan.arms).index(arm) % len(COLORS)]


def _look(plan: Plan, arm: str) -> dict[str, Any]:
    index = list(plan.arms).index(arm)
    return {"color": color(plan, arm), "linestyle": DASHES[index // len(COLORS) % len(DASHES)]}


def _figure(width: float, height: float, **options: Any) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(squeeze=False, **options).flat)


def _legend(figure: Any) -> None:
    """One legend for all panels; what several of them have is in it once."""
    found = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=min(len(found), 4))


def unit(metric: str) -> str:
    """The metric as an axis names it."""
    name = metric.replace("_", " ")
    return f"validation {name} ({UNITS[metric]})" if metric in UNITS else f"validation {name}"


def curve(cells: Sequence[Cell], split: str, metric: str) -> tuple[np.ndarray, list[Summary]]:
    """Tokens, and the metric over the cells at each step that all of them tell of."""
    told = []
    for cell in cells:
        lines = (line for line in cell.lines(split) if isinstance(line.get(metric), int | float))
        told.append({line["tokens_seen"]: line[metric] for line in lines if math.isfinite(line[metric])})
    shared = sorted(set.intersection(*map(set, told))) if told else []
    sections = np.array_split(np.array(shared), min(len(shared), MOST_POINTS)) if shared else []
    means = [[float(np.mean([one[at] for at in section])) for one in told] for section in sections]
    return np.array([section.mean() for section in sections]), [statistics.summary(values) for values in means]


def _curves(plan: Plan) -> Any:
    """Loss against tokens, on validation and in training: the mean over seeds with its interval.

    Of two seeds thin lines show the smaller and the larger value. Cells that diverged are left out.
    """
    metric = plan.study.metric
    found = {}
    for arm in plan.arms:
        cells = [cell for cell in plan.cells if cell.arm == arm and cell.outcome() == "done"]
        found[arm] = [curve(cells, "validation", metric), curve(cells, "train", "loss")], len(cells)
    if not any(len(tokens) for curves, _ in found.values() for tokens, _ in curves):
        return None
    figure, panels = _figure(8.4, 3.6, ncols=2)
    titles = unit(metric), "training loss (nats per token)"
    for index, (axes, title) in enumerate(zip(panels, titles, strict=True)):
        seen = []
        for arm, (curves, count) in found.items():
            tokens, values = curves[index]
            mean, low, high = (np.array([getattr(v, name) for v in values]) for name in ("mean", "low", "high"))
            marker = MARKERS[list(plan.arms).index(arm) % len(MARKERS)] if 0 < len(tokens) <= 30 else ""
            total = plan.study.seeds
            label = f"{arm}, {count} seeds" if count == total else f"{arm}, {count} of {total} seeds"
            axes.plot(tokens, mean, label=label, marker=marker, **_look(plan, arm))
            if count > 2:
                axes.fill_between(tokens, low, high, color=color(plan, arm), alpha=0.18, linewidth=0)
            elif count == 2:  # whose interval is nine times their distance, and would hide everything
                half = np.array([v.deviation for v in values]) / math.sqrt(2)
                axes.plot(
                    tokens, mean - half, tokens, mean + half, **_look(plan, arm) | {"linewidth": 0.6, "alpha": 0.6}
                )
            seen += list(mean[tokens >= WARM * max(tokens, default=0)])
        _limits(axes, seen)
        axes.set(xlabel="training tokens", ylabel=title)
        _numbers(axes.xaxis)
    _legend(figure)
    return figure


def _limits(axes: Any, values: Sequence[float]) -> None:
    """The axis holds these values; an interval of two seeds, which may be huge, is cut."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    room = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    axes.set_ylim(low - room, high + room)


def _numbers(axis: Any) -> None:
    axis.set_major_formatter(lambda value, _: tick_text(value))


def _sensitivity(plan: Plan) -> Any:
    """The score against the value of each option that has a grid; of several grids, the best over the others."""
    tried = {arm: plan.sensitivity(arm) for arm in plan.points}
    tried = {arm: [one for one in found if one.scores] for arm, found in tried.items()}
    paths = list(dict.fromkeys(path for found in tried.values() for one in found for path in one.point))
    if not paths:
        return None
    columns = min(len(paths), 2)
    rows = math.ceil(len(paths) / columns)
    figure, panels = _figure(4.2 * columns + 0.6 * (columns == 1), 3.3 * rows + 0.3, ncols=columns, nrows=rows)
    for axes in panels[len(paths) :]:
        axes.remove()
    points = [one for found in tried.values() for one in found]
    top = min(max(float(np.mean(one.scores)) for one in points), max(plan.uniform(arm) for arm in plan.arms))
    for path, axes in zip(paths, panels, strict=False):
        values = list(dict.fromkeys(one.point[path] for found in tried.values() for one in found if path in one.point))
        place = _places(axes, values)
        scores = [float(np.mean(one.scores)) for found in tried.values() for one in found if path in one.point]
        _limits(axes, [*(score for score in scores if score < top), top])
        for arm, found in tried.items():
            best: dict[float, Any] = {}
            for one in sorted((one for one in found if path in one.point), key=lambda one: float(np.mean(one.scores))):
                best.setdefault(place[one.point[path]], one)
            if best:
                _line(plan, axes, arm, dict(sorted(best.items())), top)
        axes.set(xlabel=path, ylabel=unit(plan.study.metric))
    for label, shape, fill, there in (
        ("chosen", "o", "none", any(one.chosen for one in points)),
        ("diverged", "X", "full", any(one.diverged for one in points)),
        ("above the axis", "^", "full", any(np.mean(one.scores) > top and not one.diverged for one in points)),
    ):
        if there:
            style = {"marker": shape, "fillstyle": fill, "markersize": 9 if fill == "none" else 6}
            panels[0].plot([], [], color=MUTED, linestyle="", label=label, **style)
    _legend(figure)
    return figure


def _line(plan: Plan, axes: Any, arm: str, best: Mapping[float, Any], top: float) -> None:
    """One arm: its mean scores with intervals over the tuning seeds. A cross diverged, an arrow is above the axis."""
    look, marker = _look(plan, arm), MARKERS[list(plan.arms).index(arm) % len(MARKERS)]
    found = [statistics.summary(one.scores) for one in best.values()]
    heights = [min(one.mean, top) for one in found]
    axes.plot(list(best), heights, **look)
    axes.plot([], [], label=arm, marker=marker, **look)
    for x, y, one, tried in zip(best, heights, found, best.values(), strict=True):
        shape = "X" if tried.diverged else 6 if one.mean > top else marker
        axes.plot([x], [y], marker=shape, color=look["color"], markersize=6 if shape in ("X", 6) else 4)
        if math.isfinite(one.low) and one.mean <= top:
            axes.plot([x, x], [one.low, one.high], color=look["color"], linewidth=1)
        if tried.chosen:
            axes.plot([x], [y], marker="o", markersize=11, fillstyle="none", color=look["color"])


def _places(axes: Any, values: Sequence[Any]) -> dict[Any, float]:
    """Where the values of an option lie on its axis: numbers by size or by factors, others side by side."""
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    wide = numbers and max(values) >= 10 * abs(min(values, key=abs))
    if not numbers or (wide and min(values) <= 0):
        ordered = sorted(values) if numbers else list(values)
        axes.set_xticks(range(len(ordered)), [tick_text(v) if numbers else str(v) for v in ordered])
        return {value: float(index) for index, value in enumerate(ordered)}
    if wide:
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(lambda value, _: "")
    _numbers(axes.xaxis)
    return {value: float(value) for value in values}


def _differences(plan: Plan) -> Any:
    """Differences between arms with their intervals and the margins of the claims: below 0, the first is better."""
    base, rows = plan.study.baseline, []
    found = report.findings(plan)
    claimed = {(claim.ours, claim.theirs) for claim, comparison, _ in found if comparison}
    for arm in plan.arms:
        if arm != base and (arm, base) not in claimed:
            pairs = zip(plan.scores(arm), plan.scores(base), strict=False)
            rows.append((f"{arm} \N{MINUS SIGN} {base}", statistics.summary([a - b for a, b in pairs]), None, ""))
    for claim, comparison, verdict in found:
        if comparison:
            rows.append((claim.text, comparison.difference, claim, verdict.partition(":")[0]))
    rows = [row for row in rows if row[1].count]
    if not rows:
        return None
    figure, (axes,) = _figure(8.4, 0.42 * len(rows) + 1.6)
    axes.axvline(0, color=MUTED, linewidth=1)
    if noise := plan.noise():
        label = f"one run of {base} against another: \N{PLUS-MINUS SIGN}{noise.of_difference:.3g} (noise)"
        axes.axvspan(-noise.of_difference, noise.of_difference, color=MUTED, alpha=0.15, linewidth=0, label=label)
    for y, (_, found_here, claim, _) in enumerate(rows):
        interval = math.isfinite(found_here.low)
        error = [[found_here.mean - found_here.low], [found_here.high - found_here.mean]] if interval else None
        label = "mean and 95 % interval" if y == 0 else None
        axes.errorbar([found_here.mean], [y], xerr=error, fmt="o", color=COLORS[0], capsize=3, label=label)
        for x in _margins(claim):
            style = {"marker": "|", "markersize": 14, "markeredgewidth": 2, "color": COLORS[1], "linestyle": ""}
            axes.plot([x], [y], label="margin of the claim", **style)
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"difference in {unit(plan.study.metric)}; below 0 the first arm is better")
    beside = axes.secondary_yaxis("right")
    beside.set_yticks(range(len(rows)), [_told(one, verdict) for _, one, _, verdict in rows])
    beside.tick_params(length=0)
    beside.spines["right"].set_visible(False)
    _legend(figure)
    return figure


def _margins(claim: Claim | None) -> list[float]:
    return [] if claim is None else [-claim.margin, claim.margin] if claim.both_ways else [claim.margin]


def _told(found: Summary, verdict: str) -> str:
    interval = f" [{found.low:+.4f}, {found.high:+.4f}]" if math.isfinite(found.low) else ""
    return f"{found.mean:+.4f}{interval}".replace("-", "\N{MINUS SIGN}") + f"\n{verdict}" * bool(verdict)
