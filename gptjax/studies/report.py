"""What a study has found, from the metrics of its cells: report.md and results.csv."""

import csv
import io
import itertools
import math
from pathlib import Path
from typing import Any

from gptjax.files import write_whole
from gptjax.reporting.markup import short
from gptjax.studies import statistics
from gptjax.studies.cells import Plan
from gptjax.studies.noise import Noise
from gptjax.studies.statistics import Comparison, Summary
from gptjax.studies.study import Claim

Table = tuple[list[str], list[list[str]]]  # heads, rows
DIVERGED = "Each counts as a model that knows nothing."


def findings(plan: Plan) -> list[tuple[Claim, Comparison | None, str]]:
    """Each claim with its comparison and verdict; no comparison where cells are missing.

    A verdict is "supported", "refuted", "inconclusive", or "inconclusive: " and why no scores could give another.
    """
    claims = plan.study.parsed_claims()
    compared: dict[str, Comparison] = {}
    for claim in claims:
        for key, ours, theirs in _directions(claim):
            one, other = plan.scores(ours), plan.scores(theirs)
            if len(one) == len(other) == plan.study.seeds:
                compared[key] = statistics.compare(one, other, margin=claim.margin)
    words = statistics.verdicts(compared)
    found = []
    for claim in claims:
        keys = [key for key, *_ in _directions(claim)]
        if reason := plan.no_verdict(claim):
            found.append((claim, compared.get(keys[0]), f"inconclusive: {reason}"))
            continue
        if any(key not in compared for key in keys):
            found.append((claim, None, "cells are missing"))
            continue
        told = {words[key] for key in keys}
        verdict = "refuted" if "refuted" in told else "supported" if told == {"supported"} else "inconclusive"
        found.append((claim, compared[keys[0]], verdict))
    return found


def _directions(claim: Claim) -> list[tuple[str, str, str]]:
    there = (claim.text, claim.ours, claim.theirs)
    return [there, (claim.text + " (the other way)", claim.theirs, claim.ours)] if claim.both_ways else [there]


def write(plan: Plan) -> Path:
    """Writes the report of what is there, and returns its path. The same cells give the same bytes."""
    write_whole(plan.workdir / "results.csv", _csv(plan))
    write_whole(plan.workdir / "report.md", text(plan))
    return plan.workdir / "report.md"


def text(plan: Plan) -> str:
    """report.md"""
    study, arms = plan.study, plan.arms.values()
    lines = [f"# {study.question}", ""]
    if study.source:
        lines += [f"Source: {study.source.rstrip('.')}." + (f" It found: {study.found}" if study.found else ""), ""]
    lines += [line for finding in findings(plan) for line in (verdict_in_words(plan, *finding, bold="**"), "")]
    lines += [f"Scale: {plan.scale()}, seeds {_range(study.seed_values())}.", ""]
    lines += ["## Results", "", *_table(*results(plan)), "", noise_in_words(plan), ""]
    lines += [*_tuning(plan), "## What differs", ""]
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
    lines += [line for sentence in unmatched(plan) for line in ("", sentence)]
    if failed := diverged(plan):
        lines += ["", "## Cells that diverged", "", DIVERGED, "", *(f"* {name}: {reason}" for name, reason in failed)]
    return "\n".join(lines) + "\n"


def verdict_in_words(plan: Plan, claim: Claim, comparison: Comparison | None, verdict: str, *, bold: str = "") -> str:
    """A claim with its verdict, the size at which it holds, and the numbers behind it."""
    first = plan.arms[plan.study.baseline]
    scale = f"at {short(first.parameters)} parameters, {short(first.tokens)} tokens"
    return f"{bold}{claim.text}: {verdict}{bold} ({scale}). {explained(comparison, plan.study.metric)}".rstrip()


def noise_in_words(plan: Plan) -> str:
    noise = plan.noise()
    return (
        f"N{noise.in_words()[1:]}." if noise else "Noise: how much a seed does by itself is not measured; see --noise."
    )


def unmatched(plan: Plan) -> list[str]:
    """Sentences on what arms may differ in."""
    return [f"Arms may differ in {name.replace('_', ' ')}: {why}" for name, why in plan.study.unmatched.items()]


def diverged(plan: Plan) -> list[tuple[str, str]]:
    """Names of the cells that diverged, those of tuning too, with how."""
    cells = {cell.key: cell for cell in (*plan.cells, *plan.tuning)}.values()
    return [(cell.name, cell.outcome()) for cell in cells if cell.outcome() not in ("", "done")]


def budgets(plan: Plan) -> Table:
    """How many cells chose the point of each arm, and which it is."""
    heads = ["arm", "points", "tuning seeds", "cells of tuning", "chosen"]
    rows = []
    for name, points in plan.points.items():
        seeds, chosen = plan.study.tuning_seed_values() if len(points) > 1 else [], plan.chosen(name)
        told = chosen.tuned if chosen else "not known: cells are missing"
        rows.append([name, str(len(points)), str(len(seeds)), str(plan.study.tuning_budget(name)), told])
    return heads, rows


def sensitivity(plan: Plan) -> Table:
    """The score of every point of the grids."""
    rows = []
    for name in plan.points:
        for tried in plan.sensitivity(name):
            own = statistics.summary(tried.scores)
            point = ", ".join(f"{path} {value}" for path, value in tried.point.items())
            numbers = [_number(own.mean, ".4f"), _number(own.deviation, ".4f"), str(own.count), str(tried.diverged)]
            rows.append([name, point, *numbers, "yes" if tried.chosen else ""])
    return ["arm", "point", plan.study.metric, "deviation", "seeds", "diverged", "chosen"], rows


def _tuning(plan: Plan) -> list[str]:
    if not plan.tuning:
        return []
    lines = ["## Tuning", "", *_table(*budgets(plan)), "", *_table(*sensitivity(plan)), ""]
    return lines + [line for name in plan.points for words in plan.censored(name) for line in (f"Note: {words}.", "")]


def results(plan: Plan) -> Table:
    """The score of every arm, and its difference from the baseline beside what a seed does by itself."""
    metric, base, noise = plan.study.metric, plan.study.baseline, plan.noise()
    heads = ["arm", metric, "95 % interval", "deviation", f"minus {base}", "95 % interval"]
    heads += ["noise sigma"] * bool(noise) + ["seeds", "diverged"]
    return heads, [_row(plan, name, noise) for name in plan.arms]


def explained(comparison: Comparison | None, metric: str) -> str:
    if comparison is None:
        return ""
    found = comparison.difference
    text = (
        f"The difference in {metric} is {found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}] with the margin "
        f"{comparison.margin:g}, {found.count} seeds, p = {comparison.p_supported:.2g}."
    )
    if not math.isnan(comparison.effect_size):
        needed = comparison.seeds_needed or f"more than {statistics.MAX_SEEDS}"
        text += (
            f" Effect size {comparison.effect_size:+.1f}; power {comparison.power:.0%} for a difference of this size; "
            f"seeds needed for {statistics.POWER:.0%}: {needed}."
        )
    return text


def _row(plan: Plan, arm: str, noise: Noise | None) -> list[str]:
    scores, base = plan.scores(arm), plan.scores(plan.study.baseline)
    own = statistics.summary(scores)
    paired = [a - b for a, b in zip(scores, base, strict=False)] if arm != plan.study.baseline else []
    difference = statistics.summary(paired)
    failed = sum(cell.outcome() not in ("", "done") for cell in plan.cells if cell.arm == arm)
    return [
        arm,
        _number(own.mean, ".4f"),
        _interval(own, ".4f"),
        _number(own.deviation, ".4f"),
        _number(difference.mean, "+.4f"),
        _interval(difference, "+.4f"),
        *([f"{noise.sigma:.4f}"] if noise else []),
        str(len(scores)),
        str(failed),
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
