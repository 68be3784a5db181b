"""An arm with a grid is tuned first, with a counted budget; a best value at the end of a grid gives no verdict."""

import json
import math

import numpy as np
import pytest

from gptjax import ablate
from gptjax.errors import UserError
from gptjax.studies import local
from gptjax.studies.cells import Plan
from gptjax.studies.noise import deviation
from gptjax.studies.study import Grid, Study, ends

RATE, DECAY = "optimizer.learning_rate", "optimizer.weight_decay"


@pytest.fixture
def base(tiny_config, tiny_corpus):
    tiny_config.tokenizer, tiny_config.model.vocab_size = "byte", 0
    tiny_config.data.update(source=f"text:{tiny_corpus}/*.txt", split_by="position", validation_fraction=0.1)
    tiny_config.train.num_steps = 4
    return tiny_config


def study(base, **options) -> Study:
    arms = {"muon": {"optimizer.name": "muon", RATE: Grid(1e-4, 1e-3, 1e-2)}, "adamw": {RATE: Grid(1e-4, 1e-3, 1e-2)}}
    return Study(**{"question": "?", "base": base, "arms": arms, "claims": ("muon < adamw",), "seeds": 2} | options)


@pytest.fixture
def ran(monkeypatch):
    """Cells end at once: the loss is lowest at a rate of 1e-3, grows with weight decay and differs by seed."""
    seen = []

    def run(jobs, **options):
        for (cell,) in jobs:
            seen.append(cell)
            cell.workdir.mkdir(parents=True)
            rate = cell.config.optimizer.learning_rate
            loss = 3 + abs(math.log10(rate / 1e-3)) + 0.01 * (cell.seed % 7) + 0.1 * cell.config.optimizer.weight_decay
            lines = [{"step": 4, "split": "validation", "loss": loss, "bits_per_byte": loss / math.log(2)}]
            (cell.workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    monkeypatch.setattr(local, "run", run)
    monkeypatch.setattr(local, "computes_on_cores", lambda: True)
    return seen


def run(study: Study, workdir) -> Plan:
    ablate.ablate(study, workdir, look=False, report=False, workers=1)
    return Plan(study, workdir)


def test_the_best_point_by_mean_score_runs_with_all_seeds(base, ran, tmp_path, capsys):
    plan = run(study(base, tuning_seeds=2), tmp_path)
    assert "16 cells (2 arms x 2 seeds + 12 of tuning)" in capsys.readouterr().out
    assert len(ran) == len({cell.key for cell in ran}) == 16
    assert {cell.seed for cell in ran[:12]} == {1_000_000, 1_000_001}, "tuning has seeds of its own"
    assert {(cell.seed, cell.config.optimizer.learning_rate) for cell in ran[12:]} == {(0, 1e-3), (1, 1e-3)}
    assert plan.missing() == []
    assert plan.scores("muon") == pytest.approx([3.01, 3.02], abs=1e-9)
    tried = plan.sensitivity("adamw")
    assert [one.point for one in tried] == [{RATE: 1e-4}, {RATE: 1e-3}, {RATE: 1e-2}]
    assert [len(one.scores) for one in tried] == [2, 2, 2]
    assert [sum(one.scores) / 2 for one in tried] == pytest.approx([4.025, 3.025, 4.025])
    assert [one.chosen for one in tried] == [False, True, False]
    assert plan.no_verdict(plan.study.parsed_claims()[0]) == ""
    assert json.loads((tmp_path / "study.json").read_text())["tuning_cells"] == {"muon": 6, "adamw": 6}


def test_a_second_command_runs_nothing(base, ran, tmp_path):
    run(study(base), tmp_path)
    ran.clear()
    run(study(base), tmp_path)
    assert ran == []


def test_a_cell_of_tuning_counts_where_its_seed_is_the_studys(base, ran, tmp_path):
    plan = run(study(base, tuning_seeds=(1,)), tmp_path)
    assert len(ran) == plan.count == 8, "6 of tuning, and seed 0 of both arms"
    assert len(plan.scores("muon")) == 2


def test_an_optimum_at_the_end_of_its_grid_is_censored(base, ran, tmp_path, capsys):
    arms = {"muon": {"optimizer.name": "muon", RATE: Grid(1e-6, 1e-5, 1e-4)}, "adamw": {RATE: Grid(1e-4, 1e-3, 1e-2)}}
    plan = run(study(base, arms=arms), tmp_path)
    assert plan.censored("muon") == ["the best optimizer.learning_rate of muon is 0.0001, the largest that was tried"]
    assert plan.censored("adamw") == []
    (claim,) = plan.study.parsed_claims()
    assert plan.no_verdict(claim) == "the optimum of muon is at the edge of its grid"
    assert "muon < adamw: inconclusive: the optimum of muon is at the edge of its grid" in capsys.readouterr().out
    ablate.ablate(plan.study, tmp_path, look=True, report=False, workers=1)
    assert "widen the grid" in capsys.readouterr().out


def test_the_limit_of_an_option_is_no_edge(base, ran, tmp_path):
    arms = {"decayed": {DECAY: Grid(0.0, 0.1, 0.3)}, "lion": {"optimizer.name": "lion", DECAY: Grid(0.0, 0.2, 0.5)}}
    plan = run(study(base, arms=arms, claims=()), tmp_path)
    assert (plan.arms["lion"].point[DECAY], plan.censored("lion")) == (0.0, [])


def test_all_combinations_of_two_grids_are_tried(base, tmp_path):
    arms = {"a": {RATE: Grid(1e-4, 1e-3, 1e-2), DECAY: Grid(0.0, 0.1)}}
    plan = Plan(study(base, arms=arms, claims=()), tmp_path)
    assert len(plan.tuning) == plan.study.tuning_budget("a") == 6
    assert plan.tuning[0].name == "a(optimizer.learning_rate 0.0001, optimizer.weight_decay 0.0)-seed1000000"
    assert plan.cells == []
    assert plan.count == 8


def test_unequal_budgets_are_refused_unless_the_study_says_why(base, tmp_path):
    arms = {"muon": {"optimizer.name": "muon", RATE: Grid(1e-4, 1e-3, 1e-2)}, "adamw": {}}
    one = study(base, arms=arms)
    with pytest.raises(UserError, match=r"not tuned alike \(tuning cells: muon 3, adamw 0"):
        Plan(one, tmp_path).check_matched()
    one.unmatched = {"tuning": "the baseline is published"}
    Plan(one, tmp_path).check_matched()


def test_points_that_change_the_size_are_refused(base, tmp_path):
    arms = {"a": {"model.num_layers": Grid(1, 2, 3)}}
    with pytest.raises(UserError, match=r"a at model.num_layers 3 has|a at model.num_layers 2 has"):
        Plan(study(base, arms=arms, claims=()), tmp_path).check_matched()


@pytest.mark.parametrize(
    ("path", "values", "found"),
    [
        (RATE, [1e-3, 1e-4, 1e-2], {1e-4: "smallest", 1e-2: "largest"}),
        (DECAY, [0, 0.1, 0.2], {0.2: "largest"}),
        ("schedule.warmup", ["2%", "10%", "5%"], {"2%": "smallest", "10%": "largest"}),
        ("schedule.warmup", ["2%", 10, "5%"], {}),
        ("optimizer.name", ["lion", "muon", "adamw"], {}),
        ("model.qkv_bias", [True, False], {}),
    ],
)
def test_ends(path, values, found):
    assert ends(path, values) == found


@pytest.mark.parametrize(
    ("vary", "seeds"), [("both", [(5, 5), (6, 6)]), ("seed", [(5, 5), (6, 5)]), ("data_seed", [(5, 5), (5, 6)])]
)
def test_what_a_seed_changes(base, tmp_path, vary, seeds):
    plan = Plan(study(base, arms={"a": {}}, claims=(), vary=vary, first_seed=5), tmp_path)
    assert [(cell.config.seed, cell.config.data_seed) for cell in plan.cells] == seeds
    assert [(cell.resolved.seed, cell.resolved.data_seed) for cell in plan.cells] == seeds
    assert len({cell.key for cell in plan.cells}) == 2


def test_the_noise_is_that_of_the_baseline_with_other_seeds(base, ran, tmp_path, capsys):
    one = study(base, seeds=4)
    assert Plan(one, tmp_path).noise() is None
    ablate.ablate(one, tmp_path, noise=True)
    assert {cell.arm for cell in ran} == {"muon"}
    assert [cell.seed for cell in ran] == [1_000_000] * 3 + [2_000_000, 2_000_001, 2_000_002, 2_000_003]
    assert {cell.config.optimizer.learning_rate for cell in ran[3:]} == {1e-3}
    found = Plan(one, tmp_path).noise()
    scores = [3.01 + 0.01 * (seed % 7) for seed in range(2_000_000, 2_000_004)]
    assert found.sigma == pytest.approx(np.std(scores, ddof=1))
    assert (found.n, found.seeds[0], found.metric) == (4, 2_000_000, "loss")
    assert "noise: one run of muon deviates by 0.0" in capsys.readouterr().out
    assert Plan(study(base, seeds=4, metric="bits_per_byte"), tmp_path).noise() is None, "of another metric"


def test_the_interval_of_sigma_covers():
    random, inside = np.random.default_rng(0), 0
    for _ in range(2000):
        _, low, high = deviation(random.normal(4, 0.01, 4))
        inside += low <= 0.01 <= high
    assert inside / 2000 == pytest.approx(0.95, abs=0.02)
