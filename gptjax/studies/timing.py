"""How long the cells of a study took, and what their arms had reached when the fastest of them was done.

Seconds are those of training (waiting for data, steps, the loop between them), without start-up, compilation and
validation, and go on over restarts. They depend on the machine and on what ran beside: they are not part of report.md
and results.csv, which two runs of a study write alike. Cells that are packed share their seconds.
"""

import csv
import dataclasses
import io
import math
import statistics

import numpy as np

from gptjax.studies.cell import Cell
from gptjax.studies.cells import Plan

CLOCK = ("seconds/step", "seconds/data", "seconds/idle")  # of a line of metrics.jsonl: what of its time is training


@dataclasses.dataclass(frozen=True)
class Timed:
    """The clock of a cell.

    Attributes:
      seconds: of its training, until its last line.
      tokens_per_second: the median.
      scores: (seconds, metric) of its validations.
    """

    cell: Cell
    seconds: float
    tokens_per_second: float
    scores: list[tuple[float, float]]

    def score_at(self, seconds: float) -> float:
        """The score after so many seconds, between two validations in proportion; NaN before the first."""
        if not self.scores or seconds < self.scores[0][0]:
            return math.nan
        return float(np.interp(seconds, *zip(*self.scores, strict=True)))


@dataclasses.dataclass(frozen=True)
class ArmTime:
    """Of an arm: the median seconds and speed of its cells, and the mean of their scores at the matched seconds.

    `together`: how many cells were packed into one program, which share its seconds; 1: each ran alone.
    `reached` is NaN where a cell had no validation by then. `share`: of the steps that the arm had done by then.
    """

    arm: str
    seconds: float
    tokens_per_second: float
    reached: float
    share: float
    cells: int
    together: int = 1


def cells(plan: Plan) -> list[Timed]:
    """Of the cells that are done, and whose lines tell the time."""
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
    """The seconds of the fastest arm, its name, and all arms with cells that are done, at that time.

    An arm that is cut short has not come to the end of its schedule: its learning rate has not decayed.
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
