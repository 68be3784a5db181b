"""Every token of a split is scored exactly once, whatever the batch size, the stride and the packing."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax import config as config_lib
from gptjax.data.building.build import build_store
from gptjax.data.sources.opening import open_source
from gptjax.errors import UserError
from gptjax.evaluation import likelihood
from gptjax.evaluation.likelihood import Scorer, plan_windows, unigram_nll
from gptjax.model import gpt
from gptjax.model.architecture import Architecture
from gptjax.parallel.mesh import make_mesh

CONTEXT = 16


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Ragged documents: shorter than the context, longer than three of them, one that is almost empty."""
    directory = tmp_path_factory.mktemp("corpus")
    lengths = [5, 1, 16, 15, 17, 60, 3, 33, 8, 47]
    rng = np.random.default_rng(0)
    lines = ['{"text": "' + "".join(rng.choice(list("abcdefgh "), n)).replace(" ", "x") + '"}' for n in lengths]
    (directory / "documents.jsonl").write_text("\n".join(lines))
    source = open_source(f"jsonl:{directory}/documents.jsonl")
    return build_store(
        source,
        directory / "store",
        tokenizer="byte",
        split_by="position",
        validation_fraction=0.2,
        test_fraction=0.0,
    )


@pytest.fixture(scope="module")
def model():
    config = config_lib.get_default()
    config.model.update(num_layers=2, num_heads=2, embed_dim=16, context_length=CONTEXT, vocab_multiple=1, init_std=0.3)
    architecture = Architecture.from_config(config.model, 257)
    return architecture, gpt.initialise(architecture, jax.random.key(0))


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(config_lib.get_default().mesh)


def score(model, mesh, split, *, batch_size=8, **options):
    architecture, params = model
    scorer = Scorer(architecture, mesh, batch_size=batch_size)
    return scorer.score(params, split, eot_id=256, **options)


def by_hand(model, split, stride):
    """Nats of each document: one window at a time, alone in its row, with the whole forward pass."""
    architecture, params = model
    bound = gpt.bind(architecture, params)
    totals = []
    ends = np.append(split.document_starts[1:], split.num_tokens)
    for start, end in zip(split.document_starts, ends, strict=True):
        tokens = np.append(split.read(int(start), int(end - start)), 256)
        total, scored = 0.0, 0
        for begin in range(0, len(tokens) - 1, stride):
            window = tokens[begin : begin + CONTEXT + 1]
            inputs = window[None, :-1]
            hidden, _ = bound.hidden(jnp.asarray(inputs), positions=jnp.arange(inputs.shape[1])[None])
            log_probabilities = jax.nn.log_softmax(bound.logits(hidden)[0])
            for offset in range(len(window) - 1):
                if begin + offset >= scored:
                    total -= float(log_probabilities[offset, window[offset + 1]])
                    scored = begin + offset + 1
            if begin + CONTEXT >= len(tokens) - 1:
                break
        totals.append(total)
    return np.array(totals)


@pytest.mark.parametrize("stride", [pytest.param(CONTEXT, marks=pytest.mark.slow), 5])
def test_packed_rows_equal_documents_alone(model, mesh, store, stride):
    split = store.split("train")
    result = score(model, mesh, split, stride=stride)
    documents = np.bincount(result.document, result.nll)
    np.testing.assert_allclose(documents, by_hand(model, split, stride), rtol=1e-5)
    assert result.tokens.sum() == split.num_tokens  # n tokens and an end for each document, a start for each


def test_perplexity_does_not_depend_on_batch_size(model, mesh, store):
    losses = [score(model, mesh, store.split("train"), batch_size=size).loss for size in (8, 16, 64)]
    np.testing.assert_allclose(losses, losses[0], rtol=1e-6)


def test_shorter_stride_gives_more_context_and_is_still_exact(model, mesh, store):
    split = store.split("train")
    full, strided = score(model, mesh, split), score(model, mesh, split, stride=4)
    assert full.tokens.sum() == strided.tokens.sum()
    assert full.loss != strided.loss


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(1, 70), min_size=1, max_size=12), st.integers(1, 16))
def test_windows_score_every_prediction_once(lengths, stride):
    starts = np.cumsum([0, *lengths[:-1]])
    windows = plan_windows(starts, sum(lengths), CONTEXT, stride)
    scored = np.zeros(sum(lengths), int)
    for start, length, skip in zip(windows.start, windows.length, windows.skip, strict=True):
        assert 0 <= skip < length <= CONTEXT
        scored[start + skip : start + length] += 1
    assert (scored == 1).all()
    assert (windows.start >= starts[windows.document]).all()


def test_estimates_agree_with_their_definitions(model, mesh, store):
    split = store.split("train")
    result = score(model, mesh, split)
    estimates = result.estimates("data:x")
    assert estimates["perplexity"].value == pytest.approx(math.exp(estimates["nll"].value))
    bits = result.nll.sum() / math.log(2) / split.document_bytes.sum()
    assert estimates["bits_per_byte"].value == pytest.approx(bits)
    low, high = estimates["nll"].ci95
    assert low < estimates["nll"].value < high
    assert "stride:16" in estimates["nll"].signature and "data:x" in estimates["nll"].signature


def test_many_documents_are_resampled_in_runs(model, mesh, store, monkeypatch):
    split = store.split("train")
    result, words = score(model, mesh, split), np.arange(split.num_documents) + 1
    monkeypatch.setattr(likelihood, "MIN_DOCUMENTS", 3)
    single = result.estimates("data:x", words=words)
    monkeypatch.setattr(likelihood, "MAX_UNITS", -(-len(words) // 3))
    runs = result.estimates("data:x", words=words)
    for name, metric in runs.items():
        assert metric.value == pytest.approx(single[name].value)
        firsts = range(0, len(words), 3)
        expected = [single[name].sums[first : first + 3].sum(axis=0) for first in firsts]
        np.testing.assert_allclose(metric.sums, expected)
        assert metric.ids == [f"data:x|3-documents:{first}" for first in firsts]
    assert single["word_perplexity"].value == pytest.approx(
        math.exp((result.nll.sum() - result.end_nll.sum()) / words.sum())
    )


def test_max_tokens_scores_a_prefix(model, mesh, store):
    split = store.split("train")
    result = score(model, mesh, split, max_tokens=40)
    assert result.tokens.sum() == 40
    assert result.num_bytes.sum() < split.document_bytes.sum()


def test_a_stride_beyond_the_context_is_refused(model, mesh, store):
    with pytest.raises(UserError, match="stride 17"):
        score(model, mesh, store.split("train"), stride=17)


def test_unigram_by_hand(store):
    train, validation = store.split("train"), store.split("validation")
    counts = np.bincount(train.read(0, train.num_tokens), minlength=257) + 1
    expected = -np.log(counts / counts.sum())[validation.read(0, validation.num_tokens)].mean()
    assert unigram_nll(train, validation, 257) == pytest.approx(expected)
