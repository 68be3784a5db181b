"""What a study has found, from the metrics of its cells: report.md, results.csv, figures as SVG and PDF."""

import csv
import io
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptjax.files import write_whole
from gptjax.studies import figures, statistics
from gptjax.studies.cells import Plan
from gptjax.studies.findings import explained, findings
from gptjax.studies.statistics import Summary


def write(plan: Plan) -> Path:
    """Writes the report of what is there, and returns its path. The same cells give the same bytes."""
    write_whole(plan.workdir / "results.csv", _csv(plan))
    drawn = figures.write(plan)
    write_whole(plan.workdir / "report.md", text(plan, drawn))
    return plan.workdir / "report.md"


def text(plan: Plan, drawn: Sequence[figures.Drawn] = ()) -> str:
    """report.md"""
    study, arms = plan.study, plan.arms.values()
    first = plan.arms[study.baseline]
    lines = [f"# {study.question}", ""]
    if study.source:
        lines += [f"Source: {study.source}" + (f" It found: {study.found}" if study.found else ""), ""]
    for claim, comparison, verdict in findings(plan):
        lines += [f"**{claim.text}: {verdict}** {explained(plan, claim, comparison)}".rstrip(), ""]
    lines += [
        f"Scale: {first.parameters:,} parameters, {first.tokens:,} tokens, seeds {_range(study.seed_values())}.",
        "",
    ]
    lines += ["## Results", ""]
    heads = [
        "arm",
        study.metric,
        "95 % interval",
        "deviation",
        "minus " + first.name,
        "95 % interval",
        "seeds",
        "diverged",
    ]
    rows = [_row(plan, arm.name) for arm in arms]
    lines += [*_table(heads, rows), ""]
    for figure in drawn:
        lines += [f"![{figure.caption}](figures/{figure.name}.svg)", ""]
    if not drawn and not figures.available():
        lines += [f"Figures are drawn by matplotlib: `{figures.INSTALL}`, then the same command with `--report`.", ""]
    lines += ["## What differs", ""]
    for arm, differences in plan.differences().items():
        if differences:
            told = ", ".join(f"`{k}` {_value(a)} -> {_value(b)}" for k, (a, b) in differences.items())
            lines.append(f"* **{arm}**: {told}")
    lines += ["", "## Cost", ""]
    heads = ["arm", "parameters", "FLOPs a token", "tokens", "training FLOPs"]
    costs = [
        [a.name, f"{a.parameters:,}", f"{a.flops_per_token:.3g}", f"{a.tokens:,}", f"{a.training_flops:.3g}"]
        for a in arms
    ]
    lines += _table(heads, costs)
    for quantity, reason in study.unmatched.items():
        lines += ["", f"Arms may differ in {quantity.replace('_', ' ')}: {reason}"]
    diverged = [cell for cell in plan.cells if cell.outcome() not in ("", "done")]
    if diverged:
        lines += ["", "## Cells that diverged", "", "Each counts as a model that knows nothing.", ""]
        lines += [f"* {cell.name}: {cell.outcome()}" for cell in diverged]
    return "\n".join(lines) + "\n"


def _row(plan: Plan, arm: str) -> list[str]:
    scores, base = plan.scores(arm), plan.scores(plan.study.baseline)
    own = statistics.summary(scores)
    paired = [a - b for a, b in zip(scores, base, strict=False)] if arm != plan.study.baseline else []
    difference = statistics.summary(paired)
    diverged = sum(cell.outcome() not in ("", "done") for cell in plan.cells if cell.arm == arm)
    return [
        arm,
        _number(own.mean, ".4f"),
        _interval(own, ".4f"),
        _number(own.deviation, ".4f"),
        _number(difference.mean, "+.4f"),
        _interval(difference, "+.4f"),
        str(len(scores)),
        str(diverged),
    ]


def _csv(plan: Plan) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = ["arm", "seed", "outcome", plan.study.metric, "parameters", "tokens", "flops_per_token", "key"]
    writer.writerow(names)
    for cell in sorted(plan.cells, key=lambda cell: (list(plan.arms).index(cell.arm), cell.seed)):
        arm, outcome = plan.arms[cell.arm], cell.outcome()
        score = cell.score(plan.study.metric, plan.uniform(cell.arm)) if outcome else ""
        size = [arm.parameters, arm.tokens, arm.flops_per_token]
        writer.writerow([cell.arm, cell.seed, outcome or "missing", score, *size, cell.key])
    return out.getvalue()


def _table(heads: list[str], rows: list[list[str]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def _number(value: float, form: str) -> str:
    return "" if math.isnan(value) else format(value, form)


def _interval(of: Summary, form: str) -> str:
    return "" if math.isnan(of.low) else f"[{of.low:{form}}, {of.high:{form}}]"


def _value(value: Any) -> str:
    return repr(value) if isinstance(value, str) else str(value)


def _range(values: range) -> str:
    return ", ".join(map(str, itertools.islice(values, 20)))
