"""Training time of the cells of a study, and what its arms had reached when the fastest one finished.

Seconds are training time (waiting for data, steps, the loop between them) without start-up, compilation and
validation, summed over restarts. They depend on the machine and on other programs, so they are not in report.md and
results.csv, which are equal for two runs of a study. Packed cells share their seconds.
"""

import csv
import dataclasses
import io
import math
import statistics

import numpy as np

from gptjax.studies.cell import Cell
from gptjax.studies.cells import Plan

CLOCK = ("seconds/step", "seconds/data", "seconds/idle")  # keys of metrics.jsonl that are training time


@dataclasses.dataclass(frozen=True)
class Timed:
    """The training time of a cell.

    Attributes:
      seconds: of training, up to its last line.
      tokens_per_second: the median.
      scores: (seconds, metric) of its validations.
    """

    cell: Cell
    seconds: float
    tokens_per_second: float
    scores: list[tuple[float, float]]

    def score_at(self, seconds: float) -> float:
        """The score after `seconds` seconds, interpolated between two validations; NaN before the first."""
        if not self.scores or seconds < self.scores[0][0]:
            return math.nan
        return float(np.interp(seconds, *zip(*self.scores, strict=True)))


@dataclasses.dataclass(frozen=True)
class ArmTime:
    """An arm: median seconds and speed of its cells, and their mean score at the equal seconds.

    `together`: how many packed cells share the seconds of a program; 1: each ran alone.
    `reached` is NaN if a cell had no validation by then. `share`: of the steps that the arm had finished by then.
    """

    arm: str
    seconds: float
    tokens_per_second: float
    reached: float
    share: float
    cells: int
    together: int = 1


def cells(plan: Plan) -> list[Timed]:
    """The timing of finished cells whose lines have times."""
    found = [_timed(cell, plan.study.metric) for cell in plan.cells if cell.outcome() == "done"]
    return [one for one in found if one.seconds > 0]


def _timed(cell: Cell, metric: str) -> Timed:
    lines = cell.lines("train") + cell.lines("validation")
    lines = sorted((line for line in lines if _finite(line.get(CLOCK[0]))), key=lambda line: line["step"])
    clock = [sum(line.get(part, 0.0) for part in CLOCK) for line in lines]
    scores = [
        (seconds, line[metric])
        for seconds, line in zip(clock, lines, strict=True)
        if line["split"] == "validation" and _finite(line.get(metric))
    ]
    speeds = [line["tokens_per_second"] for line in lines if _finite(line.get("tokens_per_second"))]
    return Timed(cell, max(clock, default=0.0), statistics.median(speeds) if speeds else math.nan, scores)


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def matched(plan: Plan) -> tuple[float, str, list[ArmTime]]:
    """The seconds of the fastest arm, its name, and all arms with finished cells at that time.

    An arm that is cut short has not reached the end of its schedule: its learning rate has not decayed.
    """
    by_arm: dict[str, list[Timed]] = {}
    for one in cells(plan):
        by_arm.setdefault(one.cell.arm, []).append(one)
    medians = {arm: statistics.median(one.seconds for one in timed) for arm, timed in by_arm.items()}
    if not medians:
        return math.nan, "", []
    fastest = min(medians, key=medians.__getitem__)
    limit = medians[fastest]
    found = []
    for arm in plan.arms:
        if timed := by_arm.get(arm):
            at = math.inf if arm == fastest else limit
            reached = statistics.fmean(one.score_at(at) for one in timed)
            share = 1.0 if arm == fastest else min(limit / medians[arm], 1.0)
            speed = statistics.median(one.tokens_per_second for one in timed)
            together = round(statistics.median(one.cell.together() for one in timed))
            found.append(ArmTime(arm, medians[arm], speed, reached, share, len(timed), together))
    return limit, fastest, found


def table(plan: Plan) -> str:
    """timing.csv"""
    limit, fastest, _ = matched(plan)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = [
        "arm",
        "seed",
        "seconds",
        "tokens_per_second",
        "matched_seconds",
        f"{plan.study.metric}_at_matched_seconds",
    ]
    writer.writerow(names)
    for one in sorted(cells(plan), key=lambda one: (list(plan.arms).index(one.cell.arm), one.cell.seed)):
        reached = one.score_at(math.inf if one.cell.arm == fastest else limit)
        numbers = (one.seconds, one.tokens_per_second, limit, reached)
        writer.writerow([one.cell.arm, one.cell.seed, *("" if math.isnan(n) else f"{n:.6g}" for n in numbers)])
    return out.getvalue()
