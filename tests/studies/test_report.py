"""What a report says of scores that are known: verdicts with their scale, noise, tuning. Cells end at once here."""

import pytest

from gptjax.studies import noise, report
from gptjax.studies.cells import Plan


def test_a_verdict_carries_its_scale_and_power(tuned_study, ended, tmp_path):
    plan = ended(tuned_study(), tmp_path)
    ((claim, comparison, verdict),) = report.findings(plan)
    assert (claim.text, verdict) == ("muon < adamw", "supported")
    assert comparison.difference.mean == pytest.approx(-0.49)
    first = plan.arms["adamw"]
    words = report.text(plan)
    assert (
        f"**muon < adamw: supported** (at {first.parameters / 1e3:.4g}k parameters, {first.tokens} tokens). The"
        in words
    )
    assert "seeds needed for 80%: 2." in words


def test_an_optimum_at_the_edge_of_its_grid_is_no_verdict(tuned_study, ended, tmp_path):
    plan = ended(tuned_study(1e-6, 1e-5, 1e-4), tmp_path)
    ((_, comparison, verdict),) = report.findings(plan)
    assert verdict == "inconclusive: the optimum of adamw is at the edge of its grid"
    assert comparison.difference.mean == pytest.approx(-1.49)
    words = report.text(plan)
    assert f"**muon < adamw: {verdict}** (at " in words
    assert "Note: the best optimizer.learning_rate of adamw is 0.0001, the largest that was tried." in words


def test_the_tuning_is_in_the_report(tuned_study, ended, tmp_path):
    lines = report.text(ended(tuned_study(), tmp_path)).splitlines()
    assert "| muon | 3 | 1 | 3 | optimizer.learning_rate 0.001 |" in lines
    assert "| muon | optimizer.learning_rate 0.0001 | 3.5200 |  | 1 | 0 |  |" in lines
    assert "| muon | optimizer.learning_rate 0.001 | 2.5200 |  | 1 | 0 | yes |" in lines


def test_the_noise_stands_beside_the_difference(tuned_study, ended, finish, tmp_path):
    plan = ended(tuned_study(), tmp_path)
    assert "Noise: how much a seed does by itself is not measured; see --noise." in report.text(plan)
    for cell, loss in zip(plan.noise_cells(), (3.0, 3.1, 3.2), strict=True):
        finish(cell, loss)
    sigma = plan.measure_noise()
    assert isinstance(sigma, noise.Noise)
    lines = report.text(plan).splitlines()
    assert (
        "| arm | loss | 95 % interval | deviation | minus adamw | 95 % interval | noise sigma | seeds | diverged |"
        in lines
    )
    assert any("-0.4900 | [-0.5148, -0.4652] | 0.1000 | 3 | 0 |" in line for line in lines)
    assert any(
        line.startswith("Noise: one run of adamw deviates by 0.1000 in loss from seed to seed") for line in lines
    )


def test_cells_are_missing(tuned_study, tmp_path):
    ((_, comparison, verdict),) = report.findings(Plan(tuned_study(), tmp_path))
    assert (comparison, verdict) == (None, "cells are missing")
    assert "| muon | 3 | 1 | 3 | not known: cells are missing |" in report.text(Plan(tuned_study(), tmp_path))
