import json
import math

import numpy as np
import pytest

from gptjax.evaluation import confidence
from gptjax.evaluation.confidence import Estimate, ratio_interval


def test_equal_units_have_an_interval_of_no_width():
    assert ratio_interval([6.0, 3.0, 9.0], [2, 1, 3]) == (3.0, 3.0)


def test_two_units_by_hand():
    # Samples: AA (1/4) gives 1, AB and BA (1/2) give (1 + 9) / (1 + 3), BB (1/4) gives 3.
    low, high = ratio_interval([1.0, 9.0], [1.0, 3.0], samples=4000)
    assert (low, high) == (1.0, 3.0)
    assert ratio_interval([1.0, 9.0], [1.0, 3.0], samples=4000, level=0.4) == (2.5, 2.5)


def test_equals_the_normal_interval_of_a_mean_for_many_units():
    values = np.random.default_rng(1).normal(5.0, 2.0, size=4000)
    low, high = ratio_interval(values, np.ones_like(values), samples=4000)
    margin = 1.96 * values.std() / math.sqrt(len(values))
    assert low == pytest.approx(values.mean() - margin, abs=0.1 * margin)
    assert high == pytest.approx(values.mean() + margin, abs=0.1 * margin)


def test_covers_the_truth_as_often_as_it_says():
    """Coverage, for documents of random length whose loss per token depends on the length; the true ratio is known."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 100, size=(500, 100))
    rates = 2.0 + lengths / 100 + rng.normal(0, 0.5, size=lengths.shape)
    support = np.arange(1, 100)
    truth = (support * (2.0 + support / 100)).sum() / support.sum()
    intervals = [
        ratio_interval(rate * length, length, samples=400, seed=i)
        for i, (rate, length) in enumerate(zip(rates, lengths, strict=True))
    ]
    covered = np.mean([low <= truth <= high for low, high in intervals])
    assert 0.92 < covered < 0.975


def test_seed_decides_the_interval_and_chunks_do_not(monkeypatch):
    rng = np.random.default_rng(0)
    numerators, denominators = rng.random(50), rng.random(50) + 0.5
    first = ratio_interval(numerators, denominators, seed=3)
    assert ratio_interval(numerators, denominators, seed=3) == first
    assert ratio_interval(numerators, denominators, seed=4) != first
    monkeypatch.setattr(confidence, "_CHUNK_ELEMENTS", 120)
    assert ratio_interval(numerators, denominators, seed=3) == first


@pytest.mark.parametrize("transform", [math.exp, lambda x: -x])
def test_transform_is_applied_to_the_bounds(transform):
    rng = np.random.default_rng(0)
    numerators, denominators = rng.random(50), rng.random(50) + 0.5
    low, high = ratio_interval(numerators, denominators)
    assert ratio_interval(numerators, denominators, transform=transform) == tuple(
        sorted((transform(low), transform(high)))
    )


def test_units_without_weight_are_part_of_the_sample():
    # A quarter of the samples draws the empty unit alone and has no ratio; the others give 1 / 2 or 6 / 2.
    assert ratio_interval([1.0, 5.0], [2.0, 0.0], samples=4000) == (0.5, 3.0)


def test_one_unit_has_no_interval():
    assert all(math.isnan(bound) for bound in ratio_interval([7.0], [2.0]))


def test_json_is_strict():
    estimate = Estimate(math.inf, [math.nan, 2.0], 3, "s")
    text = json.dumps(estimate.to_json(), allow_nan=False)
    assert json.loads(text) == {"value": None, "ci95": [None, 2.0], "n": 3, "signature": "s"}


@pytest.mark.parametrize(
    ("numerators", "denominators", "message"),
    [
        ([1.0], [1.0, 2.0], r"equal vectors, not \(1,\) and \(2,\)"),
        ([], [], "none of 0 units"),
        ([0.0, 0.0], [0, 0], "none of 2 units"),
        ([1.0, 1.0], [1, -1], "unit 1 has the negative weight -1"),
    ],
)
def test_impossible_units_are_named(numerators, denominators, message):
    with pytest.raises(ValueError, match=message):
        ratio_interval(numerators, denominators)
