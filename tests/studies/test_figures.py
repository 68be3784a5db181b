"""Figures show the numbers of the cells; the same cells give the same bytes."""

import sys

import numpy as np
import pytest

from gptjax.studies import facts, report
from gptjax.studies.study import Grid

RATE = "optimizer.learning_rate"
STEPS = 8


def test_a_curve_is_the_mean_of_the_cells_that_did_not_diverge(made):
    plan = made()
    per_step = plan.arms["wild"].tokens / STEPS
    found = facts.curves(plan, "validation", "loss")
    curve = found["at_0.01"]
    np.testing.assert_allclose(curve.tokens, [4 * per_step, 8 * per_step])
    np.testing.assert_allclose([curve.low, curve.mean, curve.high], [[4.25, 4.125], [4.3, 4.175], [4.35, 4.225]])
    assert (curve.cells, curve.strays) == (2, [])
    wild = facts.curves(plan, "train", "loss")["wild"]
    assert (wild.cells, len(wild.tokens), len(wild.strays)) == (0, 0, 2)
    np.testing.assert_allclose(wild.strays[1][1], 9.1 + 1 / np.arange(1, 4))


def test_many_steps_are_averaged(made, monkeypatch):
    monkeypatch.setattr(facts, "MOST_POINTS", 4)
    curve = facts.curves(made(), "train", "loss")["at_0.001"]
    losses = 3.05 + 1 / np.arange(1, 9)
    np.testing.assert_allclose(curve.mean, losses.reshape(4, 2).mean(1))


def test_sensitivity_of_arms_that_differ_in_one_option(made):
    (series,) = facts.sensitivity(made())
    assert (series.option, series.name, series.chosen, series.by_factors) == (RATE, "arms", None, True)
    values, scores = zip(*series.points, strict=True)
    assert values == (1e-4, 1e-3, 1e-2, 1e3)
    np.testing.assert_allclose(scores[:3], np.array([[4.125, 4.225], [3.125, 3.225], [4.125, 4.225]]))


def test_sensitivity_of_grids(made):
    grid = Grid(1e-4, 1e-3, 1e-2)
    plan = made(adamw={RATE: grid}, lion={RATE: grid, "optimizer.name": "lion"})
    series = facts.sensitivity(plan)
    assert [(one.name, one.option, one.chosen) for one in series] == [("adamw", RATE, 1e-3), ("lion", RATE, 1e-3)]
    assert [value for value, _ in series[0].points] == list(grid)


def test_the_same_cells_give_the_same_bytes(made):
    pytest.importorskip("matplotlib")
    written = []
    for name in ("one", "other"):
        plan = made(name)
        report.write(plan)
        written.append({path.name: path.read_bytes() for path in (plan.workdir / "figures").iterdir()})
    assert sorted(written[0]) == sorted(
        f"{n}.{kind}" for n in ("loss", "sensitivity", "differences") for kind in ("svg", "pdf")
    )
    assert written[0] == written[1]
    texts = {name: data.decode() for name, data in written[0].items() if name.endswith(".svg")}
    for words in ("training tokens", "loss (nats per token)", "wild (2 diverged)", "at_0.01 (2 seeds)"):
        assert words in texts["loss.svg"]
    assert RATE in texts["sensitivity.svg"]
    assert "at_0.001 &lt; at_0.0001" in texts["differences.svg"] and "2 of 2 diverged" in texts["differences.svg"]
    assert (made("one").workdir / "report.md").read_text().count("](figures/") == 3


def test_without_matplotlib_the_report_says_what_to_install(made, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    plan = made()
    text = report.write(plan).read_text()
    assert "pip install 'gptjax[studies]'" in text and "](figures/" not in text
    assert not (plan.workdir / "figures").exists()
