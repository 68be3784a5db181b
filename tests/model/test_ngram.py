"""N-gram embeddings: the same with and without a cache, and never from another document."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import config
from gptjax.model import gpt
from gptjax.model.architecture import Architecture
from gptjax.model.cache import empty_cache
from gptjax.model.layers import ngram_rows


@pytest.fixture(scope="module")
def model():
    options = config.get_default().model
    options.update(num_layers=2, num_heads=2, embed_dim=16, context_length=12, vocab_multiple=1)
    options.update(ngram_order=4, ngram_rows=97, init_std=0.5)
    architecture = Architecture.from_config(options, 7)
    return gpt.bind(architecture, gpt.initialise(architecture, jax.random.key(0)))


@pytest.fixture
def tokens():
    return jnp.asarray(np.random.default_rng(0).integers(0, 7, (2, 12)), jnp.int32)


def test_the_row_of_a_bigram_is_the_hash_of_the_pair(model, tokens):
    """By hand, in 32-bit integers. At the start of a document the previous token counts as the id after the last."""
    segment_lengths = 5, 7
    positions = np.concatenate([np.arange(n) for n in segment_lengths])
    architecture = dataclasses.replace(model.architecture, ngram_order=2)
    found = ngram_rows(architecture, tokens, jnp.tile(positions, (2, 1)), None)[..., 0]
    for row, texts in zip(found, np.asarray(tokens), strict=True):
        for place, position in enumerate(positions):
            before = int(texts[place - 1]) if position else 7
            code = ((int(texts[place]) + 1) * 0x9E3779B1 + before) % 2**32
            mixed = (code ^ code >> 15) * 0x85EBCA6B % 2**32
            assert row[place] == (mixed ^ mixed >> 13) % 97


def test_few_pairs_share_a_row():
    """All pairs of 50 tokens in 2^16 rows: as few collisions as for random rows, n (n - 1) / 2 / rows."""
    options = config.get_default().model
    options.update(ngram_order=2, ngram_rows=2**16)
    pairs = jnp.asarray([(i, j) for i in range(50) for j in range(50)], jnp.int32)
    rows = ngram_rows(Architecture.from_config(options, 50), pairs, jnp.tile(jnp.arange(2), (2500, 1)), None)
    distinct = len(np.unique(rows[:, 1, 0]))
    assert abs(2500 - distinct - 2500 * 2499 / 2 / 2**16) < 30


def test_cached_decoding_sees_the_same_ngrams(model, tokens):
    positions = jnp.tile(jnp.arange(12), (2, 1))
    full, _ = model.hidden(tokens, positions=positions)
    cache = empty_cache(model.architecture, 2, 12)
    parts = []
    for start, end in ((0, 5), (5, 6), (6, 7), (7, 12)):
        hidden, cache = model.hidden(tokens[:, start:end], positions=positions[:, start:end], cache=cache)
        parts.append(hidden)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), full, atol=1e-5)


def test_right_padding_is_not_remembered(model, tokens):
    """A row of 3 tokens padded to 5, as prefill does, then decoding at position 3."""
    positions = jnp.tile(jnp.arange(12), (2, 1))
    full, _ = model.hidden(tokens, positions=positions)
    padded = jnp.where(jnp.arange(5) < 3, positions[:, :5], 12)
    prompt = jnp.where(jnp.arange(5) < 3, tokens[:, :5], 0)
    _, cache = model.hidden(prompt, positions=padded, cache=empty_cache(model.architecture, 2, 12))
    hidden, _ = model.hidden(tokens[:, 3:4], positions=positions[:, 3:4], cache=cache)
    np.testing.assert_allclose(hidden, full[:, 3:4], atol=1e-5)


def test_packed_documents_do_not_leak(model, tokens):
    """Two documents of 5 and 7 tokens in a row give what each gives alone."""
    segments = jnp.where(jnp.arange(12) < 5, 1, 2)[None].repeat(2, 0)
    positions = jnp.where(jnp.arange(12) < 5, jnp.arange(12), jnp.arange(12) - 5)[None].repeat(2, 0)
    packed, _ = model.hidden(tokens, positions=positions, segment_ids=segments)
    alone, _ = model.hidden(tokens[:, 5:], positions=positions[:, 5:])
    np.testing.assert_allclose(packed[:, 5:], alone, atol=1e-5)


def test_the_future_is_not_seen(model, tokens):
    positions = jnp.tile(jnp.arange(12), (2, 1))
    before, _ = model.hidden(tokens, positions=positions)
    after, _ = model.hidden(tokens.at[:, 6:].add(1) % 7, positions=positions)
    np.testing.assert_allclose(before[:, :6], after[:, :6], atol=1e-6)
    assert not np.allclose(before[:, 6:], after[:, 6:], atol=1e-2)
