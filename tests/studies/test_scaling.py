"""Laws of loss against compute: planted constants are found, intervals cover, rungs are predicted before they run."""

import dataclasses
import json
import math

import numpy as np
import pytest
from scipy import optimize

from gptjax import ablate
from gptjax.errors import UserError
from gptjax.studies import ladder, local, report, scaling
from gptjax.studies.cells import Plan
from gptjax.studies.study import Grid, Study
from gptjax.studies.tables import scaling as scaling_table

COMPUTE = np.array([1.0, 4.0, 16.0, 64.0]) * 1e12
FLOOR, SCALE, EXPONENT = 1.5, 2.0, 0.15
RATE, WIDTH = "optimizer.learning_rate", "model.embed_dim"


def planted(compute, faster: float = 1.0):
    """The loss at a compute; a `faster` arm reaches it with that many times less compute."""
    return FLOOR + SCALE * (np.asarray(compute) * faster / 1e12) ** -EXPONENT


# ---- The fit -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("floor", [None, FLOOR])
def test_planted_constants_are_found(floor):
    law = scaling.fit(COMPUTE, planted(COMPUTE), floor)
    assert law.floor == pytest.approx(FLOOR, abs=1e-5)
    assert law.exponent == pytest.approx(EXPONENT, abs=1e-6)
    assert law.loss(256e12) == pytest.approx(planted(256e12), abs=1e-6)
    assert law.compute(planted(30e12)) == pytest.approx(30e12, rel=1e-5)


@pytest.mark.parametrize("floor", [None, 0.0])
def test_the_least_squares_are_those_of_scipy(floor):
    losses = planted(COMPUTE) + np.array([0.02, -0.01, 0.01, -0.005])
    law = scaling.fit(COMPUTE, losses, floor)
    start = (law.scale + 0.1, law.exponent * 1.2) + ((law.floor - 0.2,) if floor is None else ())
    curve = lambda c, scale, exponent, floor=0.0: floor + scale * (c / law.unit) ** -exponent  # noqa: E731
    (scale, exponent, *rest), _ = optimize.curve_fit(curve, COMPUTE, losses, start, xtol=1e-12, ftol=1e-12)
    assert (law.scale, law.exponent) == (pytest.approx(scale, rel=1e-5), pytest.approx(exponent, rel=1e-5))
    assert law.floor == pytest.approx(rest[0] if rest else 0.0, abs=1e-5)


def test_a_floor_is_never_below_zero_nor_a_law_rising():
    straight = scaling.fit(COMPUTE, 4 - 0.5 * np.log10(COMPUTE / 1e12))
    assert straight.floor == 0
    rising = scaling.fit(COMPUTE, np.array([1.0, 1.1, 1.2, 1.3]))
    assert (rising.scale, rising.floor) == (0, pytest.approx(1.15))
    assert list(map(float, (rising.compute(1.0), rising.compute(1.2)))) == [math.inf, 0]


def test_too_few_rungs_are_no_law():
    with pytest.raises(ValueError, match="at least 3"):
        scaling.fit(COMPUTE[:2], planted(COMPUTE[:2]))
    assert scaling.fit(COMPUTE[:2], planted(COMPUTE[:2]), FLOOR).exponent == pytest.approx(EXPONENT, abs=1e-6)


def test_many_rows_are_fitted_as_each_alone():
    rows = planted(COMPUTE) + np.random.default_rng(0).normal(0, 0.02, (5, 4))
    together = scaling.fit(COMPUTE, rows)
    for index, row in enumerate(rows):
        alone = scaling.fit(COMPUTE, row)
        assert (alone.floor, alone.exponent) == (together.floor[index], together.exponent[index])


def test_draws_have_the_covariance_of_the_mean_with_students_tails():
    scores = np.random.default_rng(1).normal([1.0, 2.0], [0.1, 0.3], (30, 2))
    scores[:, 1] += scores[:, 0]
    drawn = scaling.draws(scores)
    wanted = np.cov(scores.T) / 30 * 29 / 27  # the covariance of Student's distribution with 29 degrees of freedom
    assert np.cov(drawn.T) == pytest.approx(wanted, rel=0.25)
    low, high = scaling.interval(drawn[:, 0])
    half = 2.045 * scores[:, 0].std(ddof=1) / math.sqrt(30)
    assert (high - low) / 2 == pytest.approx(half, rel=0.12)
    with pytest.raises(ValueError, match="one seed"):
        scaling.draws(scores[:1])


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("seeds", "floor"), [(3, None), *(pytest.param(*case, marks=SLOW) for case in ((2, None), (3, FLOOR), (5, None)))]
)
def test_intervals_cover_what_is_planted(seeds, floor):
    """Of 40 ladders each interval misses at most a tenth; the nominal coverage is 95 %."""
    random, hits = np.random.default_rng(seeds), []
    for _ in range(40):
        law = scaling.fit(COMPUTE, scaling.draws(random.normal(planted(COMPUTE), 0.01, (seeds, len(COMPUTE)))), floor)
        truths = (law.floor, FLOOR), (law.exponent, EXPONENT), (law.loss(256e12), planted(256e12))
        truths += ((law.compute(planted(100e12)), 100e12),)
        intervals = [(*scaling.interval(drawn), truth) for drawn, truth in truths]
        hits.append([low <= truth <= high for low, high, truth in intervals])
    assert (np.mean(hits, axis=0) >= 0.9).all()


# ---- The ladder of a study ---------------------------------------------------------------------------------------


@pytest.fixture
def base(tiny_config, tiny_corpus):
    tiny_config.tokenizer, tiny_config.model.vocab_size = "byte", 0
    tiny_config.data.update(source=f"text:{tiny_corpus}/*.txt", split_by="position", validation_fraction=0.1)
    return tiny_config


def study(base, **options) -> Study:
    rungs = {f"d{k}": {"train.num_steps": 4 * 4**k, WIDTH: 16 * (k + 1)} for k in range(4)}
    arms = {"adamw": {}, "muon": {"optimizer.name": "muon"}}
    told = {"question": "?", "base": base, "arms": arms, "claims": ("muon < adamw",), "seeds": 3, "ladder": rungs}
    return Study(**told | options)


@pytest.fixture
def ran(monkeypatch):
    """Cells end at once, on a law of their own arm: muon is faster by three, and by less the larger the rung."""
    seen = []

    def run(jobs, **options):
        for (cell,) in jobs:
            seen.append(cell)
            cell.workdir.mkdir(parents=True)
            steps, width = cell.config.train.num_steps, cell.config.model.embed_dim
            compute = 1e9 * steps * width**2
            faster = 3 * (steps / 4) ** -0.2 if cell.config.optimizer.name == "muon" else 1.0
            loss = planted(compute, faster) + 0.001 * (cell.seed % 3)
            line = {"step": steps, "split": "validation", "loss": float(loss), "bits_per_byte": float(loss)}
            (cell.workdir / "metrics.jsonl").write_text(json.dumps(line) + "\n")

    monkeypatch.setattr(local, "run", run)
    monkeypatch.setattr(local, "computes_on_cores", lambda: True)
    return seen


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ladder": {"a": {}, "b": {"train.num_steps": 9}}}, "a law needs at least 3, or two and a loss_floor"),
        ({"ladder": {"a.b": {}, "c": {}, "d": {}}}, "no name of a rung"),
        ({"ladder": {"a": {RATE: Grid(1, 2)}, "c": {}, "d": {}}}, "has a grid"),
        ({"ladder": {"a": {"optimizer.name": "lion"}, "c": {}, "d": {}}}, "both set optimizer.name"),
        ({"ladder": {"a": {"train.step": 1}, "c": {}, "d": {}}}, "train.step is not an option"),
        ({"loss_floor": -1.0}, "loss_floor must be"),
    ],
)
def test_ladders_that_are_none(base, change, message):
    with pytest.raises(UserError, match=message):
        study(base, **change).check()


def test_rungs_that_do_not_rise_are_refused(base, tmp_path):
    rungs = {name: {"train.num_steps": steps} for name, steps in (("a", 8), ("b", 4), ("c", 16))}
    with pytest.raises(UserError, match="each rung must cost more than the one before"):
        Plan(study(base, ladder=rungs), tmp_path)


def test_every_arm_runs_at_every_rung_against_the_baseline_there(base, tmp_path):
    plan = Plan(study(base, claims=("muon <= adamw + 0.01",)), tmp_path)
    plan.check_matched()
    assert list(plan.arms) == [f"{arm}.d{k}" for k in range(4) for arm in ("adamw", "muon")]
    assert plan.study.claims == tuple(f"muon.d{k} <= adamw.d{k} + 0.01" for k in range(4))
    assert plan.opponent("muon.d2") == plan.opponent("adamw.d2") == "adamw.d2"
    assert plan.differences()["muon.d3"] == {"optimizer.name": ["adamw", "muon"]}


def test_a_rung_is_predicted_before_it_runs(base, ran, tmp_path, monkeypatch):
    seen = []
    write = ladder.write_whole
    monkeypatch.setattr(ladder, "write_whole", lambda *told: (seen.append({cell.arm for cell in ran}), write(*told)))
    ablate.ablate(study(base), tmp_path, workers=1)
    assert seen == [{f"{arm}.d{k}" for k in range(3) for arm in ("adamw", "muon")}], "once, of the last rung"
    plan = Plan(study(base), tmp_path)
    told = ladder.predictions(plan)
    assert sorted(told) == [("adamw", "d3"), ("muon", "d3")]
    one = told["adamw", "d3"]
    assert (one.rungs, one.pinned, len(one.cells)) == (("d0", "d1", "d2"), False, 9)
    before = ladder.fitted(plan, "adamw", ("d0", "d1", "d2"))
    compute = plan.arms["adamw.d3"].training_flops
    assert one.loss == pytest.approx(float(before.law.loss(compute)), abs=1e-12)
    assert one.low < one.loss < one.high
    words = report.text(plan)
    mean = np.mean(plan.scores("adamw.d3"))
    assert f"adamw at d3 was predicted from d0, d1, d2 before it ran: {one.loss:.4f} [" in words
    assert f"It gave {mean:.4f} ({mean - one.loss:+.4f})" in words
    assert "muon.d3 < adamw.d3: supported" in words
    # What has run is not predicted afterwards, whatever happens to the file.
    (tmp_path / ladder.FILE).unlink()
    ladder.predict(plan)
    assert not (tmp_path / ladder.FILE).exists()


@pytest.mark.slow
def test_the_speed_up_and_its_trend(base, ran, tmp_path):
    """The planted law uses another compute than the study's FLOPs: the law of the baseline decides."""
    ablate.ablate(study(base), tmp_path, workers=1)
    plan = Plan(study(base), tmp_path)
    base_law, other = (ladder.fitted(plan, family) for family in plan.families)
    found = ladder.speed_ups(base_law, other)
    assert [one.rung for one in found] == ["d0", "d1", "d2", "d3"]
    for one in found:
        assert base_law.law.loss(one.value * one.compute) == pytest.approx(np.mean(plan.scores(f"muon.{one.rung}")))
        low, high = one.interval
        assert low <= one.value <= high
    factor, low, high = ladder.trend(found)
    assert low <= factor <= high < 1
    words = report.text(plan)
    assert "Effective speed-up of muon over adamw, C_need / C in training FLOPs: " in words
    assert " It falls by a factor of " in words
    assert "L_inf is free, fitted as" in words
    assert len(scaling_table(plan).rows) == 8
    assert (tmp_path / "figures" / "scaling.svg").exists()


@pytest.mark.slow
def test_a_pinned_floor_is_said_and_needs_one_rung_less(base, ran, tmp_path):
    one = study(base, loss_floor=1.0)
    one = dataclasses.replace(one, ladder=dict(list(one.ladder.items())[:3]))
    ablate.ablate(one, tmp_path, workers=1)
    plan = Plan(one, tmp_path)
    assert sorted(ladder.predictions(plan)) == [("adamw", "d2"), ("muon", "d2")]
    assert "L_inf is pinned at 1;" in report.text(plan)


@pytest.mark.slow
def test_one_seed_has_no_interval(base, ran, tmp_path):
    one = study(base, seeds=1, claims=())
    ablate.ablate(one, tmp_path, workers=1)
    plan = Plan(one, tmp_path)
    told = ladder.predictions(plan)["muon", "d3"]
    assert (told.low, told.high) == (None, None)
    assert "Whether it changes with compute cannot be told" in report.text(plan)


@pytest.mark.slow
def test_what_diverged_is_on_no_law(base, ran, tmp_path):
    ablate.ablate(study(base), tmp_path, workers=1)
    plan = Plan(study(base), tmp_path)
    cell = next(cell for cell in plan.cells if cell.arm == "muon.d1")
    (cell.workdir / "metrics.jsonl").unlink()
    cell.fail("failed: the training loss is nan at step 4")
    plan = Plan(study(base), tmp_path)
    assert ladder.fitted(plan, "muon").rungs == ["d0", "d2", "d3"]
    assert [one.rung for one in ladder.speed_ups(*(ladder.fitted(plan, family) for family in plan.families))] == [
        *("d0", "d2", "d3")
    ]


@pytest.mark.slow
def test_a_ladder_from_the_command_to_the_report(base, tmp_path, capsys):
    rungs = {f"d{k}": {"train.num_steps": 10 * 3**k} for k in range(3)}
    one = dataclasses.replace(study(base), arms={"adamw": {RATE: 3e-3}}, claims=(), seeds=2, ladder=rungs)
    one = dataclasses.replace(one, loss_floor=0.0)
    ablate.ablate(one, tmp_path, workers=2)
    words = capsys.readouterr().out
    assert "adamw at d2 was predicted from d0, d1 before it ran" in words
    assert "It gave" in words
    before = (tmp_path / "report.md").read_bytes()
    ablate.ablate(one, tmp_path, workers=2)
    assert (tmp_path / "report.md").read_bytes() == before
