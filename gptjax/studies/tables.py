"""The tables of a report, the same in report.md and report.html, and the cells as CSV."""

import csv
import dataclasses
import io
import math

import numpy as np

from gptjax.studies import findings, statistics
from gptjax.studies.cells import Plan
from gptjax.studies.statistics import Summary


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of texts. `heads`: the names of its columns; those that end in "#" hold numbers. `notes`: sentences."""

    title: str
    heads: tuple[str, ...]
    rows: list[tuple[str, ...]]
    notes: tuple[str, ...] = ()

    def columns(self) -> dict[str, str]:
        """{heading: class} for a page. A heading that is there twice differs by an invisible mark."""
        found: dict[str, str] = {}
        for head in self.heads:
            name = head.removesuffix("#")
            while name in found:
                name += "\u2060"
            found[name] = "number" if head.endswith("#") else "key"
        return found


def results(plan: Plan) -> Table:
    """The score of each arm at matched steps, and its difference from the baseline."""
    first, metric = plan.arms[plan.study.baseline], plan.study.metric
    heads = ("arm", f"{metric}#", "95 % interval#", "deviation#", f"minus {first.name}#", "95 % interval#")
    rows = [_result(plan, arm) for arm in plan.arms]
    notes = ()
    if noise := plan.noise():
        notes = (
            f"Noise: sigma {noise.sigma:.4f} in {noise.metric} from seed to seed, of {noise.n} runs of {noise.arm}; "
            f"the difference of two runs that share no seed deviates by {noise.of_difference:.4f}.",
        )
    return Table("Results", (*heads, "seeds#", "diverged#"), rows, notes)


def _result(plan: Plan, arm: str) -> tuple[str, ...]:
    scores = plan.scores(arm)
    own = statistics.summary(scores)
    difference = statistics.summary(findings.paired(plan, arm) if arm != plan.study.baseline else [])
    diverged = sum(cell.outcome() not in ("", "done") for cell in plan.cells if cell.arm == arm)
    return (
        arm,
        number(own.mean, ".4f"),
        _interval(own, ".4f"),
        number(own.deviation, ".4f"),
        number(difference.mean, "+.4f"),
        _interval(difference, "+.4f"),
        str(len(scores)),
        str(diverged),
    )


def sensitivity(plan: Plan) -> Table:
    """The score at each value of a numeric option that was tried."""
    rows = [
        (
            series.option,
            series.name,
            f"{value:g}{' (chosen)' if value == series.chosen else ''}",
            number(float(np.mean(scores)), ".4f"),
            str(len(scores)),
        )
        for series in findings.sensitivity(plan)
        for value, scores in series.points
    ]
    edges = tuple(f"Warning: {sentence}." for arm in plan.points for sentence in plan.censored(arm))
    return Table("Sensitivity", ("option", "arm", "value#", f"{plan.study.metric}#", "seeds#"), rows, edges)


def differences(plan: Plan) -> Table:
    """What the arms differ in."""
    heads = ("arm", "group", "option", plan.study.baseline, "the arm")
    note = "All else is equal: the resolved options were compared."
    return Table("What differs", heads, findings.grouped(plan), (note,))


def parameter_groups(plan: Plan) -> Table:
    """How the parameters of the arms are updated and begin."""
    heads = ("arm", "updated by", "weight decay", "initial values", "parameters#")
    return Table("Parameter groups", heads, findings.parameter_groups(plan))


def cost(plan: Plan) -> Table:
    """Size and arithmetic."""
    rows = [
        (a.name, f"{a.parameters:,}", f"{a.flops_per_token:.3g}", f"{a.tokens:,}", f"{a.training_flops:.3g}")
        for a in plan.arms.values()
    ]
    told = plan.study.unmatched.items()
    notes = tuple(f"Arms may differ in {quantity.replace('_', ' ')}: {reason}" for quantity, reason in told)
    return Table("Cost", ("arm", "parameters#", "FLOPs a token#", "tokens#", "training FLOPs#"), rows, notes)


def setting(plan: Plan) -> Table:
    return Table("Setting", ("what", "value"), findings.setting(plan))


def diverged(plan: Plan) -> Table:
    rows = [(cell.name, cell.outcome()) for cell in findings.diverged(plan)]
    return Table("Cells that diverged", ("cell", "why"), rows, ("Each counts as a model that knows nothing.",))


def of_cells(plan: Plan) -> str:
    """results.csv"""
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


def number(value: float, form: str) -> str:
    """ "" for NaN."""
    return "" if math.isnan(value) else format(value, form)


def _interval(of: Summary, form: str) -> str:
    return "" if math.isnan(of.low) else f"[{of.low:{form}}, {of.high:{form}}]"
