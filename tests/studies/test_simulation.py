"""Whole studies, simulated: claims of every form have the promised rates of verdicts.

A study has 5 seeds; the score of an arm is that of the seed, which all arms share, plus noise of its own.
"""

import math

import numpy as np
import pytest
from scipy import stats

from gptjax import config as config_lib
from gptjax.studies.cells import Plan
from gptjax.studies.report import findings
from gptjax.studies.statistics import POWER, compare, power
from gptjax.studies.study import Study

STUDIES, SEEDS, NOISE, MARGIN = 200, 5, 0.01, 0.03
DEVIATION = NOISE * math.sqrt(2)  # of the difference of two arms


class Simulated(Plan):
    """A plan whose cells are all done. `shift`: true score of an arm minus that of the baseline."""

    def __init__(self, study: Study, shift: dict[str, float], random: np.random.Generator):
        of_seed = random.normal(4, 0.05, SEEDS)
        self.study = study
        self._scores = {
            arm: list(map(float, of_seed + shift.get(arm, 0) + random.normal(0, NOISE, SEEDS))) for arm in study.arms
        }

    def scores(self, arm: str) -> list[float]:
        return self._scores[arm]

    def no_verdict(self, claim) -> str:
        return ""


def verdicts(*claims: str, seed: int, **shift: float) -> list[list[str]]:
    """The verdicts of each of the simulated studies."""
    arms = {"base": {}, "arm": {"optimizer.name": "lion"}, "other": {"optimizer.name": "muon"}}
    study = Study("?", config_lib.get_default(), arms, claims=claims, margin=MARGIN, seeds=SEEDS)
    random = np.random.default_rng(seed)
    plans = [Simulated(study, shift, random) for _ in range(STUDIES)]
    return [[verdict for _, _, verdict in findings(plan)] for plan in plans]


def share(verdict: str, *claims: str, seed: int, **shift: float) -> float:
    return float(np.mean([verdict in told for told in verdicts(*claims, seed=seed, **shift)]))


@pytest.mark.parametrize(
    ("claim", "shift"),
    [
        ("arm < base", 0.0),  # not better
        ("arm < base - 0.02", -0.02),  # better by just that much
        ("arm <= base", MARGIN),  # worse by just the margin
        ("arm = base", MARGIN),  # different by just the margin, on either side
        ("arm = base", -MARGIN),
        ("arm = base + 0.02", 0.02),
    ],
)
def test_a_planted_null_is_not_supported(claim, shift):
    assert share("supported", claim, arm=shift, seed=1) <= 0.05


@pytest.mark.parametrize(
    ("claim", "shift", "verdict"),
    [
        ("arm < base", -0.06, "supported"),
        ("arm < base", 0.06, "refuted"),
        ("arm <= base", -0.02, "supported"),
        ("arm <= base", MARGIN + 0.06, "refuted"),
        ("arm = base + 0.06", 0.0, "supported"),
        ("arm = base", MARGIN + 0.06, "refuted"),
        ("arm = base", -MARGIN - 0.06, "refuted"),
    ],
)
def test_a_planted_difference_is_found(claim, shift, verdict):
    assert share(verdict, claim, arm=shift, seed=2) >= 0.95


def test_of_several_null_claims_hardly_any_study_supports_one():
    assert share("supported", "arm < base", "other < base", "arm < other", seed=3) <= 0.05


def test_a_true_claim_beside_null_claims_is_found():
    told = verdicts("arm < base", "other < base", arm=-0.08, seed=4)
    assert np.mean([first == "supported" for first, _ in told]) >= 0.95
    assert np.mean([second == "supported" for _, second in told]) <= 0.05


@pytest.mark.parametrize("effect", [0.01, 0.02, 0.03])
@pytest.mark.parametrize(("claim", "null"), [("arm < base", 0.0), ("arm <= base", MARGIN)])
def test_the_power_is_as_printed(claim, null, effect):
    expected = power(effect, DEVIATION, SEEDS)
    found = np.mean([share("supported", claim, arm=null - effect, seed=10 + i) for i in range(5)])
    assert found == pytest.approx(expected, abs=0.05)


def test_the_power_of_equality_is_at_least_that_of_both_of_its_sides():
    """Both sides must pass, each at half the level (Holm): between the bounds of Bonferroni and of the weaker side."""
    found = np.mean([share("supported", "arm = base + 0.04", seed=20 + i) for i in range(5)])
    level = stats.t.isf(0.025 / 2, SEEDS - 1)
    strict = 1 - stats.nct.cdf(level, SEEDS - 1, 0.04 / DEVIATION * math.sqrt(SEEDS))
    assert 2 * strict - 1 - 0.05 <= found <= power(0.04, DEVIATION, SEEDS) + 0.05


def test_intervals_cover():
    random, inside, count = np.random.default_rng(5), 0, 2000
    for _ in range(count):
        of_seed = random.normal(4, 0.05, SEEDS)
        found = compare(
            of_seed - 0.02 + random.normal(0, NOISE, SEEDS), of_seed + random.normal(0, NOISE, SEEDS)
        ).difference
        inside += found.low <= -0.02 <= found.high
    assert inside / count == pytest.approx(0.95, abs=0.02)


def test_the_seeds_that_are_printed_are_enough():
    needed = compare([0.0, 0.01, 0.02, 0.03], [0.02] * 4, effect=0.02).seeds_needed
    deviation = float(np.std([0.0, 0.01, 0.02, 0.03], ddof=1))
    assert power(0.02, deviation, needed) >= POWER > power(0.02, deviation, needed - 1)
