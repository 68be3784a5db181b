"""A study on a ladder of sizes: the rung to run next, predictions made before it runs, and trends with scale.

Compute is training FLOPs for all arms. The effective speed-up of an arm at a rung is C_need / C: the compute that the
baseline would need by its law to reach the arm's loss, over the compute that the arm used.
"""

import dataclasses
import json
import math
from typing import Any

import numpy as np

from gptjax.files import write_whole
from gptjax.studies import scaling
from gptjax.studies.cell import Cell
from gptjax.studies.cells import Plan
from gptjax.studies.scaling import Law

FILE = "predictions.json"
TREND_RUNGS = 3  # needed to tell a trend


@dataclasses.dataclass(frozen=True)
class Fitted:
    """The scaling law of a family of arms, which has one arm per rung.

    Attributes:
      rungs: those whose cells are all finished, none diverged. compute: FLOPs of each. scores: [seeds, rungs].
      drawn: the law of each bootstrap draw; None with one seed, which has no interval.
    """

    family: str
    rungs: list[str]
    compute: np.ndarray
    scores: np.ndarray
    law: Law
    drawn: Law | None


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The mean score of an arm at a rung, predicted from the rungs below before any of its cells ran.

    Attributes:
      low, high: 95 % interval for the mean of the same number of new seeds, if the law holds; None with one seed.
      rungs: the rungs below. cells: the keys of their cells.
    """

    loss: float
    low: float | None
    high: float | None
    floor: float
    pinned: bool
    rungs: tuple[str, ...]
    cells: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class SpeedUp:
    """C_need / C of an arm at a rung, with its interval and draws; `beyond`: C_need is above all rungs."""

    rung: str
    compute: float
    value: float
    drawn: np.ndarray | None
    beyond: bool

    @property
    def interval(self) -> tuple[float, float]:
        return (math.nan, math.nan) if self.drawn is None else scaling.interval(self.drawn)


def due(plan: Plan) -> list[Cell]:
    """The cells that can run now: on a ladder, those of the first unfinished rung."""
    missing = plan.missing()
    for rung in plan.rungs:
        if cells := [cell for cell in missing if cell.arm.endswith(f".{rung}")]:
            return cells
    return missing


def predict(plan: Plan) -> None:
    """Records the predictions for the next rung from the finished rungs, if none of its cells has started."""
    rung = next((cell.arm.rpartition(".")[2] for cell in due(plan)), "") if plan.rungs else ""
    if not rung or any(_begun(cell) for cell in (*plan.tuning, *plan.cells) if cell.arm.endswith(f".{rung}")):
        return
    below = plan.rungs[: plan.rungs.index(rung)]
    found = {family: _prediction(plan, family, rung, below) for family in plan.families}
    if told := {family: dataclasses.asdict(one) for family, one in found.items() if one}:
        stored = _stored(plan) | {rung: told}
        write_whole(plan.workdir / FILE, json.dumps(stored, indent=1) + "\n")


def _begun(cell: Cell) -> bool:
    return bool(cell.outcome()) or (cell.workdir / "metrics.jsonl").exists()


def _prediction(plan: Plan, family: str, rung: str, below: tuple[str, ...]) -> Prediction | None:
    one = fitted(plan, family, below)
    if one is None:
        return None
    compute = plan.arms[plan.at(family, rung)].training_flops
    low = high = None
    if one.drawn is not None:
        # The new rung is a mean over seeds, too; its noise is taken from the last rung.
        last = one.scores[:, -1]
        fresh = scaling.draws(last, stream=1) - last.mean()
        low, high = scaling.interval(one.drawn.loss(compute) + fresh)
    floor = float(one.law.floor)
    pinned = plan.study.loss_floor is not None
    cells = tuple(cell.key for name in one.rungs for cell in plan.cells if cell.arm == plan.at(family, name))
    return Prediction(float(one.law.loss(compute)), low, high, floor, pinned, tuple(one.rungs), cells)


def predictions(plan: Plan) -> dict[tuple[str, str], Prediction]:
    """{(family, rung): prediction} for the cells of this study; other entries of the file are ignored."""
    keys = {cell.key for cell in plan.cells}
    found = {}
    for rung, told in _stored(plan).items():
        for family, numbers in told.items() if isinstance(told, dict) else ():
            try:
                one = Prediction(**numbers | {name: tuple(numbers[name]) for name in ("rungs", "cells")})
            except (TypeError, KeyError):
                continue
            if rung in plan.rungs and family in plan.families and keys >= set(one.cells):
                found[family, rung] = one
    return found


def _stored(plan: Plan) -> dict[str, Any]:
    try:
        stored = json.loads((plan.workdir / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stored if isinstance(stored, dict) else {}


def fitted(plan: Plan, family: str, rungs: tuple[str, ...] | None = None) -> Fitted | None:
    """The law of a family over these rungs, or all; None if too few of them have finished."""
    metric, kept, compute, scores = plan.study.metric, [], [], []
    for rung in plan.rungs if rungs is None else rungs:
        name = plan.at(family, rung)
        cells = [cell for cell in plan.cells if cell.arm == name]
        if cells and all(cell.outcome() == "done" for cell in cells):
            kept.append(rung)
            compute.append(plan.arms[name].training_flops)
            scores.append([cell.score(metric, math.nan) for cell in sorted(cells, key=lambda cell: cell.seed)])
    floor = plan.study.loss_floor
    if len(kept) < scaling.fewest_rungs(floor) or not np.isfinite(scores).all():
        return None
    table, costs = np.array(scores).T, np.array(compute)
    drawn = scaling.fit(costs, scaling.draws(table), floor) if len(table) > 1 else None
    return Fitted(family, kept, costs, table, scaling.fit(costs, table.mean(0), floor), drawn)


def speed_ups(base: Fitted, other: Fitted) -> list[SpeedUp]:
    """The speed-up of an arm over the baseline, at each rung of the arm."""
    found = []
    for rung, compute, scores in zip(other.rungs, other.compute, other.scores.T, strict=True):
        need = float(base.law.compute(scores.mean()))
        drawn = None
        if base.drawn is not None and len(scores) > 1:
            drawn = base.drawn.compute(scaling.draws(scores)) / compute
        found.append(SpeedUp(rung, float(compute), float(need / compute), drawn, bool(need > base.compute.max())))
    return found


def trend(found: list[SpeedUp]) -> tuple[float, float, float] | None:
    """The factor by which the speed-up changes per tenfold compute, with its interval; None if it cannot be told."""
    if len(found) < TREND_RUNGS or any(one.drawn is None for one in found):
        return None
    decades = np.log10([one.compute for one in found])
    decades -= decades.mean()
    values = np.array([one.value for one in found])
    drawn = np.stack([one.drawn for one in found], -1)
    with np.errstate(divide="ignore", invalid="ignore"):
        middle, slopes = (np.log(speed) @ decades / np.square(decades).sum() for speed in (values, drawn))
    if not np.isfinite(middle):
        return None
    # A draw whose speed-up is infinite may be on either side.
    low, _ = scaling.interval(np.where(np.isfinite(slopes), slopes, -np.inf))
    _, high = scaling.interval(np.where(np.isfinite(slopes), slopes, np.inf))
    return float(np.exp(middle)), float(np.exp(low)), float(np.exp(high))


def sentences(plan: Plan) -> list[str]:
    """The laws, predictions beside results, and whether speed-ups change with compute."""
    laws = {family: fitted(plan, family) for family in plan.families}
    found = [_law_in_words(plan, one) for one in laws.values() if one]
    found += _predictions_in_words(plan)
    base = laws[plan.families[0]] if plan.rungs else None
    for family in plan.families[1:] if base else ():
        if laws[family]:
            found.append(_trend_in_words(family, base.family, speed_ups(base, laws[family])))
    return found


def _law_in_words(plan: Plan, one: Fitted) -> str:
    law, pinned = one.law, plan.study.loss_floor is not None
    floors, exponents = ("", "") if one.drawn is None else (_between(one.drawn.floor), _between(one.drawn.exponent))
    floor = f"pinned at {plan.study.loss_floor:g}" if pinned else f"free, fitted as {law.floor:.4f}{floors}"
    off = np.abs(one.scores.mean(0) - [law.loss(compute) for compute in one.compute]).max()
    return (
        f"{one.family}: {plan.study.metric} = {law.floor:.4f} + {law.scale:.4f} (C / {law.unit:.3g} FLOPs)^-"
        f"{law.exponent:.4f}{exponents}, from {', '.join(one.rungs)}; L_inf is {floor}; the largest residual "
        f"of a rung is {off:.4f}."
    )


def _predictions_in_words(plan: Plan) -> list[str]:
    found = []
    for (family, rung), told in predictions(plan).items():
        scores = plan.scores(plan.at(family, rung))
        text = f"{family} at {rung} was predicted from {', '.join(told.rungs)} before it ran: {told.loss:.4f}"
        text += "" if told.low is None else f" [{told.low:.4f}, {told.high:.4f}]"
        if len(scores) == plan.study.seeds:
            mean = float(np.mean(scores))
            text += f". It gave {mean:.4f} ({mean - told.loss:+.4f})"
            text += "" if told.low is None else f", {_where(mean, told.low, told.high)} the interval"
        found.append(text + ".")
    return found


def _where(value: float, low: float, high: float) -> str:
    return "inside" if low <= value <= high else "outside"


def _trend_in_words(family: str, base: str, found: list[SpeedUp]) -> str:
    values = ", ".join(f"{speed.value:.3g} at {speed.rung}" for speed in found)
    text = f"Effective speed-up of {family} over {base}, C_need / C in training FLOPs: {values}."
    if (told := trend(found)) is None:
        return f"{text} Whether it changes with compute cannot be told: that takes {TREND_RUNGS} rungs and two seeds."
    factor, low, high = told
    change = "falls" if high < 1 else "rises" if low > 1 else "neither falls nor rises by more than seeds explain:"
    return f"{text} It {change} by a factor of {factor:.3g} [{low:.3g}, {high:.3g}] for ten times the compute."


def _between(drawn: np.ndarray) -> str:
    low, high = scaling.interval(drawn)
    return f" [{low:.4f}, {high:.4f}]"
