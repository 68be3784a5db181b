"""Verdicts have their nominal error rates, by simulation, and agree with scipy's tests."""

import math

import numpy as np
import pytest
from scipy import stats

from gptjax.studies.statistics import ALPHA, POWER, compare, power, seeds_needed, summary, verdicts

STUDIES, SEEDS = 2000, 5


def studies(effect: float, seed: int, seeds: int = SEEDS, arms: int = 1):
    """Scores of a baseline and of arms that are better by `effect`; a seed has the same effect on all."""
    random = np.random.default_rng(seed)
    for _ in range(STUDIES):
        of_seed = random.normal(4, 0.05, seeds)
        baseline = of_seed + random.normal(0, 0.01, seeds)
        yield baseline, [of_seed - effect + random.normal(0, 0.01, seeds) for _ in range(arms)]


def share(verdict: str, **options) -> float:
    """The share of simulated studies with this verdict in any of their claims."""
    told = (
        verdicts({str(i): compare(arm, baseline) for i, arm in enumerate(arms)}).values()
        for baseline, arms in studies(**options)
    )
    return np.mean([verdict in words for words in told])


def test_a_planted_null_is_not_supported():
    assert share("supported", effect=0, seed=1) < 0.05
    assert share("refuted", effect=0, seed=1) < 0.05


def test_of_many_null_arms_hardly_any_is_supported():
    assert share("supported", effect=0, seed=2, arms=6) < 0.05


def test_a_planted_difference_is_found():
    assert share("supported", effect=0.05, seed=3) > 0.95
    assert share("refuted", effect=-0.05, seed=3) > 0.95


@pytest.mark.parametrize("effect", [0.01, 0.02, 0.03])
def test_the_power_is_as_printed(effect):
    deviation = 0.01 * math.sqrt(2)
    assert share("supported", effect=effect, seed=4) == pytest.approx(power(effect, deviation, SEEDS), abs=0.05)


def test_intervals_cover():
    inside = 0
    for baseline, (arm,) in studies(effect=0.02, seed=5):
        found = compare(arm, baseline).difference
        inside += found.low <= -0.02 <= found.high
    assert inside / STUDIES == pytest.approx(0.95, abs=0.02)


def test_a_comparison_is_the_paired_t_test():
    random = np.random.default_rng(0)
    ours, theirs = random.normal(4, 0.1, 5), random.normal(4.1, 0.1, 5)
    oracle = stats.ttest_rel(ours, theirs, alternative="less")
    found = compare(ours, theirs)
    assert found.p_supported == pytest.approx(oracle.pvalue, rel=1e-9)
    assert found.p_refuted == pytest.approx(stats.ttest_rel(ours, theirs, alternative="greater").pvalue, rel=1e-9)
    interval = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert (found.difference.low, found.difference.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    moved = compare(ours, theirs, margin=0.05)
    assert moved.p_supported == pytest.approx(stats.ttest_1samp(ours - theirs, 0.05, alternative="less").pvalue)


def test_the_seeds_needed_are_the_fewest():
    for effect in (0.5, 1, 2, 10):
        n = seeds_needed(effect, 1.0)
        assert power(effect, 1.0, n) >= POWER
        assert n == 2 or power(effect, 1.0, n - 1) < POWER
    assert seeds_needed(0.001, 1.0) is None
    assert power(1.0, 1.0, 1) == 0


def test_a_verdict_is_where_the_interval_lies():
    near, far = compare([1.0, 1.1, 0.9], [1.05, 1.0, 1.02]), compare([1.0, 1.1, 0.9], [2.0, 2.1, 1.95])
    assert verdicts({"near": near, "far": far}) == {"near": "inconclusive", "far": "supported"}
    assert verdicts({"far": compare([2.0, 2.1, 1.95], [1.0, 1.1, 0.9])}) == {"far": "refuted"}
    assert far.difference.high < 0 < near.difference.high
    assert compare([1.0, 2.0], [1.5, 2.5]).p_supported == 0, "the same difference for every seed"
    assert verdicts({"same": compare([1.0, 2.0], [1.0, 2.0])}) == {"same": "inconclusive"}
    assert verdicts({}) == {}


def test_holm_lets_the_second_pass_where_the_first_did():
    """A p between ALPHA / 2 and ALPHA is enough beside a strong claim, but not beside a weak one."""
    noise = np.array([-1.0, 1.0, -0.5, 0.5, 0.2, -0.2])
    deviation, n = noise.std(ddof=1), len(noise)
    mean = stats.t.isf(0.75 * ALPHA, n - 1) * deviation / math.sqrt(n)
    middling, strong, weak = (compare(noise - shift, np.zeros(n)) for shift in (mean, 10.0, 0.01))
    assert middling.p_supported == pytest.approx(0.75 * ALPHA)
    assert verdicts({"a": middling, "b": strong}) == {"a": "supported", "b": "supported"}
    assert verdicts({"a": middling, "b": weak}) == {"a": "inconclusive", "b": "inconclusive"}


def test_one_value_has_no_interval():
    assert math.isnan(summary([1.0]).high)
    with pytest.raises(ValueError, match="1 pairs"):
        compare([1.0], [2.0])


def test_claims_whose_cells_are_missing_count_in_the_correction():
    """A verdict on a part of the study is not withdrawn when the rest has run."""
    comparison = compare([1.0, 1.1, 1.05, 1.02], [1.2, 1.25, 1.18, 1.3])
    assert ALPHA / 9 < comparison.p_supported < ALPHA
    assert verdicts({"a < b": comparison}) == {"a < b": "supported"}
    assert verdicts({"a < b": comparison}, 9) == {"a < b": "inconclusive"}
