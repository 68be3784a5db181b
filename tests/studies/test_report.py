"""The report of known scores: verdicts with their scale, noise, tuning. Cells end at once here."""

import dataclasses
import json
import math

import pytest

from gptjax.studies import noise, report
from gptjax.studies.cells import Plan
from gptjax.studies.statistics import ALPHA, power
from gptjax.studies.study import Grid, Study

RATE = "optimizer.learning_rate"
STEPS = 4


@pytest.fixture
def base(tiny_config, tiny_corpus):
    tiny_config.tokenizer, tiny_config.model.vocab_size = "byte", 0
    tiny_config.data.update(source=f"text:{tiny_corpus}/*.txt", split_by="position", validation_fraction=0.1)
    tiny_config.train.num_steps = STEPS
    return tiny_config


def finish(cell, final: float, *, seconds: float = 1.0) -> None:
    """Writes the files of a run: a loss that falls from 5 to `final`, by a quarter with each step."""
    cell.workdir.mkdir(parents=True, exist_ok=True)
    lines = []
    for step in range(1, STEPS + 1):
        loss = 5 + (final - 5) * step / STEPS
        told = {"step": step, "loss": loss, "tokens_seen": 64 * step, "wall_time_s": 9 + seconds * step}
        told |= {"seconds/compile": 9.0, "seconds/step": seconds * step, "tokens_per_second": 64 / seconds}
        lines += [told | {"split": split, "bits_per_byte": loss / math.log(2)} for split in ("train", "validation")]
    (cell.workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def study(base, rates: tuple[float, ...] = (1e-4, 1e-3, 1e-2)) -> Study:
    arms = {"adamw": {RATE: Grid(*rates)}, "muon": {"optimizer.name": "muon", RATE: Grid(1e-4, 1e-3, 1e-2)}}
    return Study(
        question="Is <muon> better?",
        base=base,
        arms=arms,
        claims=("muon < adamw",),
        seeds=3,
        source="Jordan 2024",
        found="fewer steps",
    )


def ended(one: Study, workdir) -> Plan:
    """The plan of a study whose cells have all ended: muon is better by 0.5; a rate of 1e-3 is the best."""
    for missing in (lambda plan: plan.tuning, lambda plan: plan.cells):
        for cell in missing(Plan(one, workdir)):
            off = abs(math.log10(cell.config.optimizer.learning_rate / 1e-3))
            slow = cell.arm == "muon"
            finish(cell, 3 - 0.5 * slow + off + 0.01 * (cell.seed % 3) * (1 + slow), seconds=1.0 + slow)
    return Plan(one, workdir)


def test_a_verdict_carries_its_scale_and_power(base, tmp_path):
    plan = ended(study(base), tmp_path)
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


def test_an_optimum_at_the_edge_of_its_grid_is_no_verdict(base, tmp_path):
    plan = ended(study(base, rates=(1e-6, 1e-5, 1e-4)), tmp_path)
    ((_, comparison, verdict),) = report.findings(plan)
    assert verdict == "inconclusive: the optimum of adamw is at the edge of its grid"
    assert comparison.difference.mean == pytest.approx(-1.49)
    words = report.text(plan)
    assert f"**muon < adamw: {verdict}** (at " in words
    assert "Note: the best optimizer.learning_rate of adamw is 0.0001, the largest that was tried." in words


def test_the_tuning_is_in_the_report(base, tmp_path):
    lines = report.text(ended(study(base), tmp_path)).splitlines()
    assert "| muon | 3 | 1 | 3 | optimizer.learning_rate 0.001 |" in lines
    assert "| muon | optimizer.learning_rate 0.0001 | 3.5200 |  | 1 | 0 |  |" in lines
    assert "| muon | optimizer.learning_rate 0.001 | 2.5200 |  | 1 | 0 | yes |" in lines


def test_the_noise_stands_beside_the_difference(base, tmp_path):
    plan = ended(study(base), tmp_path)
    assert "Noise: the deviation between seeds is not measured; see --noise." in report.text(plan)
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


def test_cells_are_missing(base, tmp_path):
    ((_, comparison, verdict),) = report.findings(Plan(study(base), tmp_path))
    assert (comparison, verdict) == (None, "cells are missing")
    assert "| muon | 3 | 1 | 3 | unknown: cells are missing |" in report.text(Plan(study(base), tmp_path))


def test_a_claim_that_is_changed_after_cells_ran_is_told(base, tmp_path):
    plan = ended(study(base), tmp_path)
    plan.claim()
    later = dataclasses.replace(study(base), claims=("adamw < muon",))
    for _ in range(2):
        changed = Plan(later, tmp_path)
        changed.claim()
    assert [before["claims"] for before in changed.changes] == [["muon < adamw"]]
    assert "claims, margin and metric were muon < adamw, 0.0, loss" in report.write(changed).read_text()


def test_an_arm_that_diverged_has_no_score_in_another_unit(base, tmp_path):
    """If no cell gives the ratio of nats to bits per byte, ln(vocabulary) is not used as bits per byte."""
    one = dataclasses.replace(study(base), metric="bits_per_byte")
    plan = ended(one, tmp_path)
    cells = [cell for cell in plan.cells if cell.arm == "adamw"]
    for cell in plan.cells:
        (cell.workdir / "metrics.jsonl").unlink()
    for cell in plan.tuning:
        (cell.workdir / "metrics.jsonl").unlink()
        cell.fail("failed: the training loss is nan at step 4")
    for cell in cells:
        cell.fail("failed: the training loss is nan at step 4")
    assert Plan(one, tmp_path).scores("adamw") == []


def test_cells_of_several_versions_of_jax_are_told(base, tmp_path):
    plan = ended(study(base), tmp_path)
    for cell, version in zip(plan.cells, ("0.10.2", "0.12.0", "0.10.2"), strict=False):
        (cell.workdir / "manifest.json").write_text(json.dumps({"packages": {"jax": version}}))
    assert "Cells were run with several versions of JAX, 0.10.2 and 0.12.0: losses" in report.text(plan)
    (plan.cells[1].workdir / "manifest.json").unlink()
    assert "several versions of JAX" not in report.text(plan)


def test_the_power_is_that_of_the_corrected_level(base, tmp_path):
    alone = ended(study(base), tmp_path)
    ((_, one, _),) = report.findings(alone)
    both = dataclasses.replace(study(base), claims=("muon < adamw", "muon < adamw - 0.4"))
    (_, first, _), _ = report.findings(Plan(both, tmp_path))
    assert first.p_supported == one.p_supported
    assert first.power == pytest.approx(power(first.effect, first.difference.deviation, 3, ALPHA / 2))
    assert power(0.1, 0.1, 3, ALPHA / 2) < power(0.1, 0.1, 3)
