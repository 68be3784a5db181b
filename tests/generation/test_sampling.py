import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.errors import UserError
from gptjax.generation import sampling
from gptjax.generation.params import SamplingParams

VOCAB = 50


@pytest.fixture
def logits():
    return jnp.asarray(np.random.default_rng(0).normal(0, 3, (6, VOCAB)), jnp.float32)


def softmax(x):
    e = np.exp(np.asarray(x, np.float64) - np.max(x))
    return e / e.sum()


def kept(logits):
    return [set(np.flatnonzero(np.isfinite(row))) for row in np.asarray(logits)]


def test_the_highest_is_the_first_of_equal_ones():
    scores = np.random.default_rng(0).integers(0, 4, (50, 9)).astype(np.float32)
    np.testing.assert_array_equal(sampling.highest(jnp.asarray(scores)), scores.argmax(-1))


@pytest.mark.parametrize("k", [1, 7, VOCAB - 1, VOCAB, 10 * VOCAB])
def test_top_k_keeps_the_k_highest(logits, k):
    assert kept(sampling.top_k(logits, np.array([k]))) == [set(np.argsort(-row)[:k]) for row in logits]


def test_top_k_keeps_ties_with_the_kth():
    assert kept(sampling.top_k(jnp.array([[1.0, 3.0, 2.0, 2.0, -1.0]]), np.array([2]))) == [{1, 2, 3}]


@pytest.mark.parametrize("p", [1e-6, 0.3, 0.9, 0.999])
def test_top_p_keeps_the_smallest_set_with_that_probability(logits, p):
    for row, nucleus in zip(logits, kept(sampling.top_p(logits, np.array([p]))), strict=True):
        order, count = np.argsort(-row), 1
        while softmax(row)[order[:count]].sum() < p:
            count += 1
        assert nucleus == set(order[:count])


@pytest.mark.parametrize("p", [0.01, 0.2, 1.0])
def test_min_p_is_relative_to_the_most_probable(logits, p):
    expected = [set(np.flatnonzero(softmax(row) >= p * softmax(row).max() * (1 - 1e-6))) for row in logits]
    assert kept(sampling.min_p(logits, np.array([p]))) == expected


def test_filters_that_are_off_change_nothing(logits):
    for filtered in (
        sampling.top_k(logits, np.array([0])),
        sampling.top_p(logits, np.array([1.0])),
        sampling.min_p(logits, np.array([0.0])),
    ):
        np.testing.assert_array_equal(filtered, logits)


def test_repetition_penalty_divides_positive_and_multiplies_negative_scores():
    logits = jnp.array([[2.0, -2.0, 2.0, -2.0]])
    seen = jnp.array([[True, True, False, False]])
    np.testing.assert_allclose(sampling.repetition_penalty(logits, seen, np.array([4.0])), [[0.5, -8.0, 2.0, -2.0]])


def draw(logits, params, count, seen=None):
    """`count` draws from one row of logits, int [count], and their log-probabilities."""
    rows = jnp.tile(jnp.asarray(logits), (count, 1))
    seen = jnp.zeros(rows.shape, bool) if seen is None else jnp.tile(seen, (count, 1))
    keys = jax.random.split(jax.random.key(0), count)
    return map(np.asarray, jax.jit(sampling.sample)(rows, seen, sampling.controls([params]), keys))


def test_draws_follow_the_processed_distribution(logits):
    """All processors together, in the order of transformers, against NumPy."""
    row, seen = logits[0], np.arange(VOCAB) % 3 == 0
    params = SamplingParams(temperature=1.7, top_k=20, top_p=0.9, min_p=0.05, repetition_penalty=1.3)

    scores = np.where(seen, np.where(row > 0, row / 1.3, row * 1.3), row) / 1.7
    scores[scores < np.sort(scores)[-20]] = -np.inf
    order = np.argsort(-scores)
    cumulative = np.cumsum(softmax(scores)[order])
    scores[order[np.searchsorted(cumulative, 0.9) + 1 :]] = -np.inf
    scores[softmax(scores) < 0.05 * softmax(scores).max()] = -np.inf
    expected = softmax(scores)
    assert 2 < (expected > 0).sum() < 20

    count = 20_000
    tokens, _ = draw(row, params, count, seen)
    frequencies = np.bincount(tokens, minlength=VOCAB) / count
    assert set(np.flatnonzero(frequencies)) == set(np.flatnonzero(expected))
    errors = np.abs(frequencies - expected)
    assert (errors <= 4.5 * np.sqrt(expected * (1 - expected) / count)).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_log_probabilities_are_those_of_the_unmodified_distribution(logits, temperature):
    params = SamplingParams(temperature=temperature, top_k=3, repetition_penalty=1.5)
    tokens, log_probabilities = draw(logits[1], params, 50, np.ones(VOCAB, bool))
    np.testing.assert_allclose(log_probabilities, np.log(softmax(logits[1]))[tokens], rtol=1e-4)


def test_temperature_zero_takes_the_best_after_the_penalty(logits):
    best, second = np.argsort(-logits[0])[:2]
    assert logits[0][second] > 0
    for penalty, expected in ((1.0, best), (1e6, second)):
        params = SamplingParams(temperature=0.0, repetition_penalty=penalty)
        tokens, _ = draw(logits[0], params, 3, np.arange(VOCAB) == best)
        assert set(tokens) == {expected}


def test_rows_with_settings_of_their_own_draw_what_they_would_draw_alone(logits):
    rows = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.7),
        SamplingParams(top_k=3),
        SamplingParams(top_p=0.6, temperature=2.0),
        SamplingParams(min_p=0.2),
        SamplingParams(temperature=0.0, repetition_penalty=1e6),
    ]
    seen, keys = logits > 0, jax.random.split(jax.random.key(1), len(rows))
    together = sampling.sample(logits, seen, sampling.controls(rows), keys)
    for i, params in enumerate(rows):
        alone = sampling.sample(logits[i : i + 1], seen[i : i + 1], sampling.controls([params]), keys[i : i + 1])
        assert [x[i] for x in together] == [x[0] for x in alone]


def test_validate_lists_every_problem():
    SamplingParams().validate()
    wrong = SamplingParams(
        max_new_tokens=0,
        temperature=float("nan"),
        top_k=-1,
        top_p=0.0,
        min_p=2.0,
        repetition_penalty=0.0,
        presence_penalty=3.0,
        frequency_penalty=-3.0,
        logit_bias=((0, 1000.0),),
        stop=("",),
        seed=-1,
    )
    with pytest.raises(UserError) as error:
        wrong.validate()
    assert "temperature is nan" in str(error.value)
    for field in dataclasses.fields(SamplingParams):
        assert field.name in str(error.value) or field.name == "ignore_eos"
