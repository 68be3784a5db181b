import math

import numpy as np
import pytest
from ml_collections import ConfigDict

from gptjax.optim.schedules import make_schedule

PEAK, STEPS, WARMUP, DECAY, FINAL = 0.5, 100, 10, 30, 0.1


def schedule(name, **changes):
    options = {
        "name": name,
        "warmup": WARMUP,
        "decay": DECAY,
        "final_fraction": FINAL,
        "cycles": 3,
        "decay_shape": "linear",
    }
    return make_schedule(ConfigDict(options | changes), peak=PEAK, num_steps=STEPS)


def rates(name, steps=range(STEPS + 1), **changes) -> np.ndarray:
    function = schedule(name, **changes)
    return np.array([float(function(step)) for step in steps])


@pytest.mark.parametrize("name", ["cosine", "cosine_restarts", "linear", "wsd", "rsqrt", "constant"])
def test_warmup_rises_linearly_from_a_first_rate_that_is_not_zero(name):
    np.testing.assert_allclose(rates(name, range(WARMUP)), PEAK * np.arange(1, WARMUP + 1) / WARMUP, rtol=1e-6)
    assert float(schedule(name)(WARMUP)) == pytest.approx(PEAK)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "rsqrt", "constant"])
def test_without_warmup_the_peak_comes_first(name):
    assert float(schedule(name, warmup=0)(0)) == pytest.approx(PEAK)


@pytest.mark.parametrize(
    ("name", "step", "expected"),
    [
        ("cosine", 55, PEAK * (FINAL + (1 - FINAL) * 0.5)),  # half way
        ("cosine", 40, PEAK * (FINAL + (1 - FINAL) * 0.5 * (1 + math.cos(math.pi / 3)))),  # a third
        ("cosine", 100, PEAK * FINAL),
        ("cosine_restarts", 25, PEAK * (1 + FINAL) / 2),  # half of the first of three
        ("cosine_restarts", 40, PEAK),  # the second begins
        ("cosine_restarts", 85, PEAK * (1 + FINAL) / 2),
        ("cosine_restarts", 100, PEAK * FINAL),
        ("linear", 55, PEAK * (1 + FINAL) / 2),
        ("linear", 100, PEAK * FINAL),
        ("wsd", 70, PEAK),  # the last stable step
        ("wsd", 85, PEAK * (1 + FINAL) / 2),
        ("wsd", 100, PEAK * FINAL),
        ("rsqrt", 40, PEAK / 2),  # four times the warm-up
        ("rsqrt", 90, PEAK / 3),
        ("constant", 100, PEAK),
    ],
)
def test_values_by_hand(name, step, expected):
    assert float(schedule(name)(step)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
def test_beyond_the_end_the_rate_stays(name):
    assert float(schedule(name)(10 * STEPS)) == pytest.approx(float(schedule(name)(STEPS)), rel=1e-6)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "rsqrt", "constant"])
def test_after_warmup_the_rate_never_rises(name):
    after = rates(name, range(WARMUP, 2 * STEPS))
    assert (np.diff(after) <= 1e-7).all() and (after > 0).all()


def test_wsd_is_flat_and_then_straight():
    values = rates("wsd")
    np.testing.assert_allclose(values[WARMUP : STEPS - DECAY + 1], PEAK, rtol=1e-6)
    np.testing.assert_allclose(np.diff(values[STEPS - DECAY :]), -PEAK * (1 - FINAL) / DECAY, rtol=1e-3)


def test_wsd_with_a_decay_of_shape_sqrt_is_that_of_its_paper():
    """Haegele et al. 2024, equation 2: from N - N_decay on, 1 - sqrt((n - (N - N_decay)) / N_decay)."""
    values = rates("wsd", decay_shape="sqrt", final_fraction=0.0)
    begin = STEPS - DECAY
    np.testing.assert_allclose(values[WARMUP : begin + 1], PEAK, rtol=1e-6)
    expected = [PEAK * (1 - math.sqrt((n - begin) / DECAY)) for n in range(begin, STEPS + 1)]
    np.testing.assert_allclose(values[begin:], expected, rtol=1e-6, atol=1e-8)
    with_rest = rates("wsd", range(begin, 2 * STEPS), decay_shape="sqrt")
    np.testing.assert_allclose(
        with_rest[: DECAY + 1], PEAK * FINAL + (1 - FINAL) * np.array(expected), rtol=1e-6, atol=1e-8
    )
    np.testing.assert_allclose(with_rest[DECAY:], PEAK * FINAL, rtol=1e-6)


@pytest.mark.parametrize("decay", [90, 500])
def test_wsd_with_a_decay_as_long_as_the_run_is_linear(decay):
    np.testing.assert_allclose(rates("wsd", decay=decay), rates("linear"), rtol=1e-6)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("warmup", [STEPS, STEPS + 20])
def test_a_warmup_as_long_as_the_run_only_rises(name, warmup):
    values = rates(name, range(STEPS), warmup=warmup)
    np.testing.assert_allclose(values, PEAK * np.arange(1, STEPS + 1) / warmup, rtol=1e-6)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="'cosinus'"):
        schedule("cosinus")
