"""The formulas against numbers computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.objectives.policy_gradient import advantages, divergence, surrogate


def test_advantages_by_hand():
    rewards = np.array([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 4.0]])
    centered, signal = advantages(rewards, "centered")
    np.testing.assert_allclose(centered, [[0.5, -0.5, -0.5, 0.5], [-1, -1, -1, 3]])
    assert signal.all()
    normalized, _ = advantages(rewards, "normalized")
    # sample deviations: sqrt(4 x 0.25 / 3) = 1 / sqrt 3, and sqrt(12 / 3) = 2
    root = 3**0.5
    np.testing.assert_allclose(normalized, [[root / 2, -root / 2, -root / 2, root / 2], [-0.5, -0.5, -0.5, 1.5]])


@pytest.mark.parametrize("kind", ["normalized", "centered"])
def test_equal_rewards_and_failed_ones_give_no_signal(kind):
    rounded = 0.1 + 0.2
    rewards = np.array([[0.7] * 4, [rounded, 0.3, rounded, 0.3], [1e6, 1e6 + 1e-9, 1e6, 1e6], [1, np.nan, 0, 1]])
    values, signal = advantages(rewards, kind)
    assert not signal.any()
    np.testing.assert_array_equal(values, 0)


def test_small_differences_count_as_much_as_large_ones():
    small, signal = advantages(np.array([[0.0, 1e-3]]), "normalized")
    large, _ = advantages(np.array([[0.0, 1e3]]), "normalized")
    assert signal.all()
    np.testing.assert_allclose(small, large)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.0, 2.0, -2.0, False),
        (1.1, 2.0, -2.2, False),
        (1.5, 2.0, -2.56, True),  # 1.28 x 2: the upper bound is 0.28
        (0.5, 2.0, -1.0, False),  # the minimum is what is not clipped
        (0.5, -2.0, 1.6, True),  # 0.8 x 2
        (1.5, -2.0, 3.0, False),
    ],
)
def test_the_clipped_surrogate_by_hand(ratio, advantage, loss, clipped):
    def total(log_ratio):
        return surrogate(jnp.full((1, 1), log_ratio), jnp.array([advantage]), 0.2, 0.28).loss.sum()

    found = surrogate(jnp.full((1, 1), np.log(ratio)), jnp.array([advantage]), 0.2, 0.28)
    np.testing.assert_allclose(found.loss, [[loss]], rtol=1e-6)
    assert bool(found.clipped[0, 0]) is clipped
    gradient = jax.grad(total)(jnp.log(ratio))
    np.testing.assert_allclose(gradient, 0.0 if clipped else -ratio * advantage, rtol=1e-6)


def test_the_divergence_is_an_unbiased_estimate_of_kl():
    policy, reference = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.5, 0.3])
    each = np.asarray(divergence(jnp.log(policy)[None], jnp.log(reference)[None]))[0]
    np.testing.assert_allclose(each[0], 0.4 - np.log(0.4) - 1, rtol=1e-6)
    assert (each > 0).all()
    np.testing.assert_allclose((policy * each).sum(), (policy * np.log(policy / reference)).sum(), rtol=1e-6)
    assert divergence(jnp.zeros((1, 1)), jnp.zeros((1, 1)))[0, 0] == 0
