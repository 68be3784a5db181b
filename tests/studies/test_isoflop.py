"""Sizes at equal training FLOPs: a planted optimum is found, for each way to count parameters."""

import itertools
import json
import math

import numpy as np
import pytest

from gptjax.studies import isoflop
from gptjax.studies.cells import Plan
from gptjax.studies.study import Study
from gptjax.studies.tables import optima as table

WIDTHS, BUDGETS = (16, 32, 64), {"low": 3e9, "high": 1.2e10}


def test_the_lowest_point_of_a_parabola_is_found():
    ratios = np.array([2.0, 5.0, 20.0, 60.0])
    assert isoflop.lowest(ratios, 3 + np.log(ratios / 11) ** 2) == pytest.approx(11)
    assert math.isnan(isoflop.lowest(ratios, 3 + np.log(ratios / 100) ** 2))  # beyond the smallest model
    assert math.isnan(isoflop.lowest(ratios, 3 - np.log(ratios / 11) ** 2))


def test_the_optimum_of_each_budget_by_what_is_counted(small_base, tmp_path):
    small_base.model.tie_embeddings = False
    arms = {f"w{width}_{name}": {"model.embed_dim": width} for name in BUDGETS for width in WIDTHS}
    unmatched = dict.fromkeys(("parameters", "flops_per_token", "tokens"), "equal FLOPs in all")
    study = Study(question="?", base=small_base, arms=arms, seeds=2, isoflop=True, unmatched=unmatched)
    for arm, size in arms.items():
        budget = BUDGETS[arm.rpartition("_")[2]]
        size["train.num_steps"] = isoflop.num_steps(study.config_of(arm, 0), budget)
    plan = Plan(study, tmp_path)
    for name, arm in plan.arms.items():
        assert arm.training_flops == pytest.approx(BUDGETS[name.rpartition("_")[2]], rel=isoflop.TOLERANCE / 3)
    assert isoflop.optima(plan) == []  # cells are missing
    middle = {name: _log_ratio(plan.arms[f"w32_{name}"]) for name in BUDGETS}
    for cell in plan.missing():  # the best ratio of a seed is that of the middle size, or e ** 0.2 less
        away = _log_ratio(plan.arms[cell.arm]) - middle[cell.arm.rpartition("_")[2]] + 0.2 * cell.seed
        cell.workdir.mkdir(parents=True)
        line = {"step": cell.num_steps, "split": "validation", "loss": 3 + away**2}
        (cell.workdir / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    found = isoflop.optima(plan)
    assert [(one.counted, one.sizes) for one in found] == [(counted, 3) for counted in isoflop.COUNTED] * 2
    for one, name in zip(found[::3], BUDGETS, strict=True):
        assert one.flops == pytest.approx(BUDGETS[name], rel=isoflop.TOLERANCE)
        assert math.log(one.mean) == pytest.approx(middle[name] - 0.1)
        assert one.low < one.mean < one.high
    assert all(more.mean > fewer.mean for fewer, more in itertools.pairwise(found[:3]))  # of fewer parameters, more
    assert len(table(plan).rows) == 6


def _log_ratio(arm) -> float:
    return math.log(arm.tokens / arm.parameters)
