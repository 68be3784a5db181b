"""Figures have the same bytes for the same cells, name their axes with units, and show what is known."""

import re

import numpy as np
import pytest

from gptjax.studies import figures
from gptjax.studies.cells import Plan
from gptjax.studies.study import Grid


def texts(svg: str) -> list[str]:
    """What a figure says: matplotlib puts each text beside its outlines."""
    return re.findall(r"<!-- (.*?) -->", svg, re.DOTALL)


def test_figures_of_a_study(tuned_study, ended, tmp_path):
    plan = ended(tuned_study(), tmp_path)
    drawn = figures.write(plan)
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert names == {f"{name}.{kind}" for name in ("differences", "curves", "sensitivity") for kind in ("svg", "pdf")}
    for axis in ("training tokens", "validation loss (nats per token)", "adamw, 3 seeds", "muon, 3 seeds"):
        assert axis in texts(drawn["curves"])
    assert "training loss (nats per token)" in texts(drawn["curves"])
    for axis in ("optimizer.learning_rate", "0.0001", "0.001", "0.01", "chosen", "validation loss (nats per token)"):
        assert axis in texts(drawn["sensitivity"]), "a logarithmic axis has its powers of ten"
    told = texts(drawn["differences"])
    assert "muon &lt; adamw" in told
    minus = "\N{MINUS SIGN}"
    assert {f"{minus}0.4900 [{minus}0.5148, {minus}0.4652]", "supported"} <= set(told)
    before = {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()}
    figures.write(Plan(plan.study, tmp_path))
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()}


def test_what_is_not_known_is_not_drawn(tuned_study, finish, tmp_path):
    plan = Plan(tuned_study(), tmp_path)
    assert figures.write(plan) == {}
    assert not (tmp_path / "figures").exists()
    finish(plan.tuning[0], 3.0)
    assert figures.write(plan).keys() == {"sensitivity"}


def test_options_without_order_and_cells_that_diverged(tuned_study, ended, tmp_path):
    one = tuned_study()
    one.arms["adamw"]["optimizer.weight_decay"] = Grid(0.0, 0.01, 0.5)
    plan = ended(one, tmp_path)
    (plan.tuning[0].workdir / "metrics.jsonl").unlink()
    plan.tuning[0].fail("the training loss is nan")
    told = texts(figures.write(Plan(one, tmp_path))["sensitivity"])
    assert "diverged" in told
    assert {"optimizer.weight_decay", "0", "0.5"} <= set(told)


def test_a_curve_is_the_mean_over_seeds_at_the_steps_that_all_have(tuned_study, ended, tmp_path):
    plan = ended(tuned_study(), tmp_path)
    tokens, values = figures.curve([cell for cell in plan.cells if cell.arm == "muon"], "validation", "loss")
    np.testing.assert_array_equal(tokens, [64, 128, 192, 256])
    last = np.array([2.5, 2.52, 2.54])
    assert values[-1].mean == pytest.approx(2.52)
    assert values[-1].deviation == pytest.approx(last.std(ddof=1))
    assert values[0].mean == pytest.approx(np.mean(5 + (last - 5) / 4))
    assert figures.curve([], "train", "loss")[1] == []
