"""The tables of a report, the same in report.md and report.html, and the cells as CSV."""

import csv
import dataclasses
import io
import math

from gptjax.studies import facts, isoflop, ladder, statistics
from gptjax.studies.cells import Plan
from gptjax.studies.noise import Noise
from gptjax.studies.statistics import Summary

LADDER_NOTE = (
    "Intervals say what other seeds would have given if the law holds; whether it holds is tested by the predictions. "
    "A speed-up is beyond if the baseline would need more compute than its largest rung used."
)


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of texts. `heads`: column names; those that end in "#" hold numbers. `notes`: sentences."""

    title: str
    heads: tuple[str, ...]
    rows: list[tuple[str, ...]]
    notes: tuple[str, ...] = ()

    def columns(self) -> dict[str, str]:
        """{heading: CSS class}. Equal headings are made distinct by an invisible mark."""
        found: dict[str, str] = {}
        for head in self.heads:
            name = head.removesuffix("#")
            while name in found:
                name += "\u2060"
            found[name] = "number" if head.endswith("#") else "key"
        return found


def results(plan: Plan) -> Table:
    """The score of each arm, and its difference from the baseline with its interval."""
    metric, noise = plan.study.metric, plan.noise()
    heads = ("arm", f"{metric}#", "95 % interval#", "deviation#", f"minus {plan.families[0]}#", "95 % interval#")
    heads += ("noise sigma#",) * bool(noise) + ("seeds#", "diverged#")
    return Table("Results", heads, [_result(plan, arm, noise) for arm in plan.arms], facts.notes(plan))


def _result(plan: Plan, arm: str, noise: Noise | None) -> tuple[str, ...]:
    scores = plan.scores(arm)
    own = statistics.summary(scores)
    difference = statistics.summary(facts.paired(plan, arm) if arm != plan.opponent(arm) else [])
    failed = sum(cell.outcome() not in ("", "done") for cell in plan.cells if cell.arm == arm)
    return (
        arm,
        number(own.mean, ".4f"),
        _interval(own, ".4f"),
        number(own.deviation, ".4f"),
        number(difference.mean, "+.4f"),
        _interval(difference, "+.4f"),
        *([f"{noise.sigma:.4f}"] if noise else []),
        str(len(scores)),
        str(failed),
    )


def scaling(plan: Plan) -> Table:
    """The rungs of a ladder: the law of their arm, the prediction, and the speed-up over the baseline."""
    heads = ("arm", "rung", "parameters#", "tokens#", "tokens per parameter#", "training FLOPs#")
    heads += (f"{plan.study.metric}#", "the law#", "predicted#", "speed-up#")
    predicted, rows = ladder.predictions(plan), []
    base = ladder.fitted(plan, plan.families[0]) if plan.rungs else None
    for family in plan.families if plan.rungs else ():
        law = ladder.fitted(plan, family)
        faster = {one.rung: one for one in ladder.speed_ups(base, law)} if base and law and law is not base else {}
        for rung in plan.rungs:
            arm = plan.arms[plan.at(family, rung)]
            size = f"{arm.parameters:,}", f"{arm.tokens:,}", f"{arm.tokens / arm.parameters:.3g}"
            mean = number(statistics.summary(plan.scores(arm.name)).mean, ".4f")
            fitted = f"{law.law.loss(arm.training_flops):.4f}" if law else ""
            told = predicted.get((family, rung))
            before = f"{told.loss:.4f}{_ends(told.low, told.high, '.4f')}" if told else ""
            gain = faster.get(rung) if family != plan.families[0] else None
            speed = f"{gain.value:.3g}{_ends(*gain.interval, '.3g')}{' beyond' * gain.beyond}" if gain else ""
            rows.append((family, rung, *size, f"{arm.training_flops:.3g}", mean, fitted, before, speed))
    notes = (*ladder.sentences(plan), LADDER_NOTE) if plan.rungs else ()
    return Table("Scaling", heads, rows, notes)


def optima(plan: Plan) -> Table:
    """Tokens per parameter at the lowest loss of each budget of FLOPs."""
    heads = ("training FLOPs#", "counted", "sizes#", "tokens per parameter at the optimum#", "95 % interval#")
    rows = []
    for one in isoflop.optima(plan) if plan.study.isoflop else ():
        told = number(one.mean, ".3g") or "not between the sizes"
        rows.append((f"{one.flops:.3g}", one.counted, str(one.sizes), told, _ends(one.low, one.high, ".3g").strip()))
    note = "Lowest point of a parabola through loss over log tokens per parameter, by seed; the interval is over seeds."
    return Table("Optimum by compute", heads, rows, (note,))


def _ends(low: float | None, high: float | None, form: str) -> str:
    return "" if low is None or math.isnan(low) else f" [{low:{form}}, {high:{form}}]"


def tuning(plan: Plan) -> Table:
    """The number of cells that tuned each arm, and the chosen point."""
    rows = []
    for name, points in plan.points.items() if plan.tuning else ():
        seeds, chosen = plan.study.tuning_seed_values() if len(points) > 1 else [], plan.chosen(name)
        told = chosen.tuned if chosen else "unknown: cells are missing"
        rows.append((name, str(len(points)), str(len(seeds)), str(plan.study.tuning_budget(name)), told))
    edges = tuple(f"Note: {words}." for name in plan.points for words in plan.censored(name))
    return Table("Tuning", ("arm", "points#", "tuning seeds#", "cells of tuning#", "chosen"), rows, edges)


def sensitivity(plan: Plan) -> Table:
    """The score at every point of the grids."""
    rows = []
    for name in plan.points:
        for tried in plan.sensitivity(name):
            own = statistics.summary(tried.scores)
            point = ", ".join(f"{path} {value}" for path, value in tried.point.items())
            numbers = number(own.mean, ".4f"), number(own.deviation, ".4f"), str(own.count), str(tried.diverged)
            rows.append((name, point, *numbers, "yes" if tried.chosen else ""))
    heads = ("arm", "point", f"{plan.study.metric}#", "deviation#", "seeds#", "diverged#", "chosen")
    return Table("Points that were tried", heads, rows)


def differences(plan: Plan) -> Table:
    """The options in which the arms differ."""
    heads = ("arm", "group", "option", plan.families[0], "the arm")
    note = "All other resolved options are equal."
    if plan.rungs:
        note += f" Each arm is compared with {plan.families[0]} at its rung, and that with its own first rung."
    return Table("What differs", heads, facts.grouped(plan), (note,))


def parameter_groups(plan: Plan) -> Table:
    """Update, decay and initial values of the parameters of the arms."""
    heads = ("arm", "updated by", "weight decay", "initial values", "parameters#")
    return Table("Parameter groups", heads, facts.parameter_groups(plan))


def cost(plan: Plan) -> Table:
    """Size and FLOPs of the arms."""
    rows = [
        (a.name, f"{a.parameters:,}", f"{a.flops_per_token:.3g}", f"{a.tokens:,}", f"{a.training_flops:.3g}")
        for a in plan.arms.values()
    ]
    told = plan.study.unmatched.items()
    notes = tuple(f"Arms may differ in {quantity.replace('_', ' ')}: {reason}" for quantity, reason in told)
    return Table("Cost", ("arm", "parameters#", "FLOPs per token#", "tokens#", "training FLOPs#"), rows, notes)


def setting(plan: Plan) -> Table:
    return Table("Setting", ("what", "value"), facts.setting(plan))


def diverged(plan: Plan) -> Table:
    rows = [(cell.name, cell.outcome()) for cell in facts.diverged(plan)]
    return Table("Cells that diverged", ("cell", "why"), rows, ("Each gets the score of a uniform model.",))


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
