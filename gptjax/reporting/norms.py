"""Norms of parameters, gradients and updates by layer, as a section of the report."""

import math
import statistics
from typing import Any

from gptjax.reporting import charts, markup
from gptjax.reporting.charts import Series

Line = dict[str, Any]
KINDS = ("parameter", "gradient", "update")


def section(lines: list[Line]) -> str:
    """A chart of update norms relative to parameter norms, and all norms of the last step that has them."""
    lines = [line for line in lines if any(key.startswith("norms/") for key in line)]
    if not lines:
        return ""
    steps, shares = [], []
    for line in lines:
        ratios = sorted(ratio for _, _, ratio in _rows(line) if ratio > 0)
        if ratios:
            steps.append(line["step"])
            shares.append((ratios[-1], statistics.median(ratios), ratios[0]))
    names = ("the largest", "the median", "the smallest")
    series = [Series(name, steps, values) for name, values in zip(names, zip(*shares, strict=True), strict=False)]
    chart = charts.line_chart(
        series,
        title="Update / parameter, by layer",
        x_label="step",
        y_label="ratio of norms, log scale",
        log_y=True,
    )
    columns = {"path": "code", **dict.fromkeys(KINDS, "number"), "update / parameter": "number"}
    rows = [
        (path, *(markup.significant(norm) for norm in norms), f"{ratio:.2e}" if math.isfinite(ratio) else "")
        for path, norms, ratio in _rows(lines[-1])
    ]
    return (
        f'<h2>Norms by layer</h2>\n<div class="charts"><div class="panel">{chart}</div></div>\n'
        f"<details><summary>Step {lines[-1]['step']:,}</summary>"
        f'<div class="panel">{markup.table(columns, rows)}</div></details>'
    )


def _rows(line: Line) -> list[tuple[str, tuple[float, ...], float]]:
    """(path, norms by kind, update / parameter) for each parameter in a line of metrics.jsonl."""
    paths = dict.fromkeys(key.split("/", 2)[2] for key in line if key.startswith("norms/") and key.count("/") > 1)
    rows = []
    for path in paths:
        norms = tuple(markup.as_number(line.get(f"norms/{kind}/{path}")) for kind in KINDS)
        rows.append((path, norms, norms[2] / norms[0] if norms[0] else math.nan))
    return rows
