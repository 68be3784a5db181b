import numpy as np
import pytest

from gptjax.data.pipeline.randomness import shuffled_epochs, uniform


def test_draws_are_uniform_and_unrelated():
    places = np.arange(100_000)
    draws = uniform(7, np.zeros_like(places), places)
    assert draws.min() >= 0 and draws.max() < 1
    histogram = np.bincount((draws * 20).astype(int), minlength=20)
    assert ((histogram - 5000) ** 2 / 5000).sum() < 43.8  # chi-squared with 19 degrees of freedom, p = 0.001
    others = [uniform(8, np.zeros_like(places), places), uniform(7, np.ones_like(places), places)]
    others += [uniform(6, np.ones_like(places), places), draws[::-1]]
    for other in others:
        assert abs(np.corrcoef(draws, other)[0, 1]) < 0.015
    assert abs(np.corrcoef(draws[1:], draws[:-1])[0, 1]) < 0.015


@pytest.mark.parametrize("size", [1, 2, 7, 4096, 4097])
def test_every_epoch_is_a_permutation_of_its_own(size):
    epochs, numbers = shuffled_epochs(np.arange(3 * size), size, seed=5)
    np.testing.assert_array_equal(epochs, np.repeat(np.arange(3), size))
    orders = numbers.reshape(3, size)
    np.testing.assert_array_equal(np.sort(orders, axis=1), np.tile(np.arange(size), (3, 1)))
    if size > 4:
        assert len({order.tobytes() for order in orders}) == 3
        assert (shuffled_epochs(np.arange(size), size, seed=6)[1] != orders[0]).any()


@pytest.mark.parametrize("size", [3, 5000])
def test_rows_can_be_asked_for_in_any_order(size):
    rows = np.arange(20_000, 20_100)
    some = np.array([57, 3, 99, 3])
    whole, part = shuffled_epochs(rows, size, seed=1), shuffled_epochs(rows[some], size, seed=1)
    for found, expected in zip(part, whole, strict=True):
        np.testing.assert_array_equal(found, expected[some])


def test_short_orders_are_equally_probable():
    orders = shuffled_epochs(np.arange(3 * 6000), 3, seed=0)[1].reshape(6000, 3)
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 6
    assert ((counts - 1000) ** 2 / 1000).sum() < 20.5  # chi-squared with 5 degrees of freedom, p = 0.001
