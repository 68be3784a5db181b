"""The figures of a study as SVG and PDF: loss curves, sensitivity, differences with their intervals.

The same cells give the same bytes. Needs matplotlib: pip install 'gptjax[studies]'.
"""

import dataclasses
import html
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gptjax.files import whole_file, write_whole
from gptjax.reporting import markup
from gptjax.studies import facts, ladder, scaling, statistics
from gptjax.studies.cells import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INSTALL = "pip install 'gptjax[studies]'"
# The colours of Okabe and Ito (2008), which colour-blind readers can tell apart; neighbours differ most. Each pair
# is (light page, dark page).
COLORS = (
    ("#0072b2", "#56b4e9"),
    ("#d55e00", "#ff8c42"),
    ("#009e73", "#2fd6a4"),
    ("#cc79a7", "#e3a3c6"),
    ("#a67c00", "#f0c419"),
    ("#5b5f97", "#a9adf0"),
)
DASHES = ("-", "--", "-.", ":")
MARKERS = "osD^vP"
TEXT, MUTED, GRID = "#1b1f24", "#626b76", "#d9dde2"  # placeholders that a page replaces by its own colours
STYLE = {
    "font.size": 10,
    "font.family": "sans-serif",
    "svg.fonttype": "none",
    "svg.hashsalt": "gptjax",
    "pdf.fonttype": 42,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": TEXT,
    "axes.titlecolor": TEXT,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.color": TEXT,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "figure.constrained_layout.use": True,
}
# CSS of figures, added to that of the page.
CSS = (
    "\nsvg.figure { display: block; width: 100%; height: auto; }\n"
    + ":root { "
    + " ".join(f"--arm-{i}: {light};" for i, (light, _) in enumerate(COLORS))
    + " }\n@media (prefers-color-scheme: dark) { :root { "
    + " ".join(f"--arm-{i}: {dark};" for i, (_, dark) in enumerate(COLORS))
    + " } }\n"
)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A figure: its name, what it shows in a sentence, and its SVG."""

    name: str
    caption: str
    svg: str

    def inline(self) -> str:
        """The SVG as an element of a page, in the colours of the page."""
        text = self.svg[self.svg.index("<svg") :]
        colors = {light: f"var(--arm-{i})" for i, (light, _) in enumerate(COLORS)}
        colors |= {TEXT: "var(--text)", MUTED: "var(--muted)", GRID: "var(--grid)"}
        for color, variable in colors.items():
            text = text.replace(color, variable)
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        text = re.sub(
            r'\b(id="|xlink:href="#|url\(#)', rf"\g<1>{self.name}-", text
        )  # names of several figures of a page
        head, end, rest = text.partition(">")
        width = re.search(r'\swidth="([0-9.]+)pt"', head)[1]
        head = re.sub(r'\s(width|height)="[^"]*"', "", head)
        label = html.escape(self.caption)
        return f'{head} class="figure" style="max-width: {width}pt" role="img" aria-label="{label}"{end}{rest}'


def available() -> bool:
    """Whether matplotlib is installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def write(plan: Plan) -> list[Drawn]:
    """Writes WORKDIR/figures/NAME.svg and .pdf for the finished cells. Writes nothing without matplotlib."""
    if not available():
        return []
    import matplotlib

    found = []
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE, "backend": "agg"}):
        for name, caption, draw in (
            ("loss", "Loss over training: mean over seeds of each arm, and the range from lowest to highest.", _loss),
            (
                "sensitivity",
                "The score against an option: mean and each seed. A ring marks the chosen value; a cross at the "
                "top marks a value at which a seed diverged.",
                _sensitivity,
            ),
            (
                "scaling",
                "Score against training compute: each seed, the fitted law of each arm, and the predictions.",
                _scaling,
            ),
            ("differences", "Differences of paired seeds with their 95 % intervals; | marks the margin.", _differences),
        ):
            if (figure := draw(plan)) is not None:
                found.append(Drawn(name, caption, save(figure, plan.workdir / "figures" / name)))
    return found


def save(figure: "Figure", path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    svg, pdf = io.StringIO(), io.BytesIO()
    figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    figure.savefig(pdf, format="pdf", metadata={"CreationDate": None, "Creator": None, "Producer": None})
    text = "\n".join(line.rstrip() for line in svg.getvalue().splitlines()) + "\n"
    write_whole(path.with_suffix(".svg"), text)
    with whole_file(path.with_suffix(".pdf")) as file:
        file.write(pdf.getvalue())
    return text


def new_figure(width: float, height: float, columns: int, rows: int = 1) -> "tuple[Figure, list[Axes]]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    figure.patch.set_alpha(0)
    axes = [*figure.subplots(rows, columns, squeeze=False).flat]
    for one in axes:
        one.patch.set_alpha(0)
    return figure, axes


def _style(index: int) -> dict:
    return {"color": COLORS[index % len(COLORS)][0], "linestyle": DASHES[index // len(COLORS) % len(DASHES)]}


def _short(axis, **options) -> None:
    """Ticks such as 1.5M instead of powers of ten."""
    axis.set_major_formatter(lambda value, _: markup.short(value) if value else "0", **options)


# ---- Loss --------------------------------------------------------------------------------------------------------


def _loss(plan: Plan) -> "Figure | None":
    metric = plan.study.metric
    panels = [("Training", "train", "loss"), ("Validation", "validation", metric)]
    found = [(title, key, facts.curves(plan, split, key)) for title, split, key in panels]
    found = [panel for panel in found if any(len(c.tokens) or c.strays for c in panel[2].values())]
    if not found:
        return None
    figure, axes = new_figure(5.4 * len(found), 3.9, len(found))
    for one, (title, key, curves) in zip(axes, found, strict=True):
        _curves(one, curves)
        one.set(title=title, xlabel="training tokens", ylabel=facts.UNITS.get(key, key))
        _short(one.xaxis)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4))
    return figure


def _curves(axes: "Axes", curves: dict[str, facts.Curve]) -> None:
    tops, lows = [], []
    for index, (arm, curve) in enumerate(curves.items()):
        style = _style(index)
        count = f"{curve.cells} seeds" if curve.cells != 1 else "1 seed"
        label = (
            f"{arm} ({', '.join([count] * bool(curve.cells) + [f'{len(curve.strays)} diverged'] * bool(curve.strays))})"
        )
        if len(curve.tokens):
            marker = "o" if len(curve.tokens) < 30 else ""
            axes.plot(curve.tokens, curve.mean, label=label, marker=marker, markersize=3.5, **style)
            axes.fill_between(curve.tokens, curve.low, curve.high, color=style["color"], alpha=0.18, linewidth=0)
            early = curve.tokens >= 0.1 * curve.tokens[-1]
            tops.append(curve.high[early].max())
            lows.append(curve.low.min())
            label = None
        for tokens, values in curve.strays:
            axes.plot(tokens, values, label=label, color=style["color"], linestyle=(0, (1, 1.5)), linewidth=1)
            label = None
    if tops and max(tops) > min(lows):  # so that the steep beginning and diverged cells do not squeeze the rest
        room = 0.06 * (max(tops) - min(lows))
        axes.set_ylim(min(lows) - room, max(tops) + room)


# ---- Sensitivity -------------------------------------------------------------------------------------------------


def _sensitivity(plan: Plan) -> "Figure | None":
    series = facts.sensitivity(plan)
    options = list(dict.fromkeys(one.option for one in series))
    if not options:
        return None
    columns = min(len(options), 2)
    rows = math.ceil(len(options) / columns)
    figure, axes = new_figure(5.4 * max(columns, 1.3), 3.9 * rows, columns, rows)
    for spare in axes[len(options) :]:
        spare.set_visible(False)
    for one, option in zip(axes, options, strict=False):
        for index, line in enumerate(line for line in series if line.option == option):
            _line(one, line, list(plan.arms).index(line.name) if line.name in plan.arms else index)
        one.set(xlabel=option, ylabel=facts.UNITS.get(plan.study.metric, plan.study.metric))
        if all(line.by_factors for line in series if line.option == option):
            one.set_xscale("log")
            ticks = sorted({value for line in series if line.option == option for value, _ in line.points})
            if len(ticks) <= 8:
                one.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            one.minorticks_off()
        lines = [line for line in series if line.option == option]
        good = [s for line in lines for value, scores in line.points if value not in line.diverged for s in scores]
        if good and any(
            line.diverged for line in lines
        ):  # diverged cells are a cross at the top, so that they do not squeeze the rest
            room = 0.08 * (max(good) - min(good)) or 0.1
            one.set_ylim(min(good) - room, max(good) + room)
        one.legend()
    return figure


def _line(axes: "Axes", series: facts.Series, index: int) -> None:
    style, marker = _style(index), MARKERS[index % len(MARKERS)]
    values = [value for value, _ in series.points]
    means = [float(np.mean(scores)) for _, scores in series.points]
    axes.plot(values, means, label=series.name, marker=marker, markersize=5, **style)
    for value, scores in series.points:
        axes.scatter([value] * len(scores), scores, s=9, color=style["color"], alpha=0.5, linewidth=0)
    for value in series.diverged & set(values):
        place = {"transform": axes.get_xaxis_transform(), "clip_on": False}
        axes.scatter([value], [1.0], s=70, marker="x", color=style["color"], linewidth=2, **place)
    if series.chosen in values:
        best = means[values.index(series.chosen)]
        axes.scatter([series.chosen], [best], s=130, facecolor="none", edgecolor=style["color"], linewidth=1.5)


# ---- Differences -------------------------------------------------------------------------------------------------


def _differences(plan: Plan) -> "Figure | None":
    rows: list[tuple[str, statistics.Summary, Sequence[float], str]] = []
    told = set()
    for claim, comparison, verdict in facts.findings(plan):
        if comparison:
            margins = [comparison.margin, -comparison.margin] if claim.both_ways else [comparison.margin]
            rows.append((claim.text, comparison.difference, margins, verdict.partition(":")[0]))
            told.add((claim.ours, claim.theirs))
    bad = [cell.arm for cell in facts.diverged(plan) if not cell.point]
    for arm in plan.arms:
        scores, base = facts.paired(plan, arm), plan.opponent(arm)
        if arm != base and scores and (arm, base) not in told:
            words = f"{bad.count(arm)} of {len(scores)} diverged" if arm in bad else ""
            rows.append((f"{arm} \N{MINUS SIGN} {base}", statistics.summary(scores), [], words))
    if not rows:
        return None
    figure, (axes,) = new_figure(8.4, 1.3 + 0.42 * len(rows), 1)
    for place, (_, found, margins, verdict) in enumerate(rows):
        if "diverged" in verdict:  # it would squeeze the rest
            axes.annotate(verdict, (1.02, place), xycoords=("axes fraction", "data"), va="center")
            continue
        color = {"supported": COLORS[2][0], "refuted": COLORS[1][0], "inconclusive": MUTED}.get(verdict, COLORS[0][0])
        if not math.isnan(found.low):
            axes.plot([found.low, found.high], [place, place], color=color, linewidth=2, solid_capstyle="butt")
        axes.plot([found.mean], [place], "o" if verdict else "D", color=color, markersize=6)
        axes.plot(margins, [place] * len(margins), "|", color=TEXT, markersize=16, markeredgewidth=1.6)
        words = f"{found.mean:+.4f}  {verdict}".rstrip()
        axes.annotate(words, (1.02, place), xycoords=("axes fraction", "data"), va="center")
    axes.axvline(0, color=MUTED, linewidth=1, linestyle="--")
    axes.set_yticks(range(len(rows)), [label for label, *_ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0, labelcolor=TEXT)
    axes.set_xlabel(f"difference in {facts.UNITS.get(plan.study.metric, plan.study.metric)}, lower is better")
    return figure


# ---- Scaling -----------------------------------------------------------------------------------------------------


def _scaling(plan: Plan) -> "Figure | None":
    laws = {family: one for family in plan.families if plan.rungs and (one := ladder.fitted(plan, family))}
    if not laws:
        return None
    figure, (axes,) = new_figure(8.4, 4.4, 1)
    predicted = ladder.predictions(plan)
    for index, (family, one) in enumerate(laws.items()):
        style = _style(index)
        for compute, scores in zip(one.compute, one.scores.T, strict=True):
            axes.scatter([compute] * len(scores), scores, s=14, color=style["color"], alpha=0.6, linewidth=0)
        line = np.geomspace(one.compute[0], one.compute[-1] * 2, 60)
        axes.plot(line, [one.law.loss(c) for c in line], label=f"{family}: exponent {one.law.exponent:.3f}", **style)
        if one.drawn is not None:
            low, high = np.transpose([scaling.interval(one.drawn.loss(c)) for c in line])
            axes.fill_between(line, low, high, color=style["color"], alpha=0.15, linewidth=0)
        for rung in plan.rungs:
            if told := predicted.get((family, rung)):
                compute = plan.arms[plan.at(family, rung)].training_flops
                ends = [[told.loss - told.low], [told.high - told.loss]] if told.low is not None else None
                look = {"fmt": MARKERS[index % len(MARKERS)], "markerfacecolor": "none", "color": style["color"]}
                axes.errorbar([compute], [told.loss], yerr=ends, capsize=4, markersize=8, **look)
    lows, highs = zip(*((one.scores.min(), one.scores.max()) for one in laws.values()), strict=True)
    room = 0.15 * (max(highs) - min(lows)) or 0.1
    axes.set(xscale="log", xlabel="training FLOPs", ylabel=facts.UNITS.get(plan.study.metric, plan.study.metric))
    axes.set_ylim(min(lows) - room, max(highs) + room)
    axes.legend()
    return figure
