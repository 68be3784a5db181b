"""Memory of scoring depends on the tokens in a batch, not on the shape of its rows; sums go to their owners."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import config as config_lib
from gptjax.evaluation.token_scorer import TokenScorer, empty_batch, put
from gptjax.model import gpt
from gptjax.model.architecture import Architecture
from gptjax.parallel.mesh import make_mesh

CONTEXT, VOCABULARY = 256, 16384


def architecture(**options) -> Architecture:
    config = config_lib.get_default()
    config.model.update(num_layers=1, num_heads=2, embed_dim=16, context_length=CONTEXT, vocab_multiple=1)
    config.model.update(**options)
    return Architecture.from_config(config.model, VOCABULARY)


def temporary_bytes(scorer: TokenScorer, rows: int, length: int) -> int:
    batch, _ = empty_batch(rows, length)
    params = gpt.abstract_params(architecture())
    return scorer.program.lower(params, batch).compile().memory_analysis().temp_size_in_bytes


def test_rows_of_any_length_need_the_same_memory():
    scorer = TokenScorer(architecture(), make_mesh(config_lib.get_default().mesh, jax.devices()[:1]))
    tokens = 8 * scorer.max_rows
    full, *others = (temporary_bytes(scorer, tokens // length, length) for length in (CONTEXT, 64, 16))
    assert full < 3 * scorer.max_rows * VOCABULARY * 4, "the logits of a part of the batch, and what is made of them"
    assert max(others) < 1.1 * full


def test_a_batch_has_no_more_rows_than_logits_fit():
    scorer = TokenScorer(architecture(), make_mesh(config_lib.get_default().mesh))
    assert [scorer.rows(wanted, 16) for wanted in (0, 9)] == [8, 16]
    assert scorer.rows(10**9, 16) <= scorer.max_rows


@pytest.mark.parametrize("length", [16, 128, 1024])
def test_the_peak_is_known_beforehand_and_does_not_follow_the_vocabulary(length):
    """A small model with GPT-2's vocabulary and context, and any batch size."""
    options = dict(num_layers=2, num_heads=4, embed_dim=64, context_length=1024)
    config = config_lib.get_default()
    config.model.update(vocab_multiple=1, **options)
    model = Architecture.from_config(config.model, 50257)
    scorer = TokenScorer(model, make_mesh(config_lib.get_default().mesh, jax.devices()[:1]))
    rows = scorer.rows(10**6, length)
    batch, _ = empty_batch(rows, length)
    needed = scorer.program.lower(gpt.abstract_params(model), batch).compile().memory_analysis().temp_size_in_bytes
    assert needed < 1.3 * scorer.peak_bytes(rows, length) < 1.3 * (1 << 30)


@pytest.mark.parametrize("shape", [(8, 24), (16, 12)])
def test_sums_go_to_their_owners(monkeypatch, shape):
    """Sums are right in chunks of a few tokens, and over several batches."""
    monkeypatch.setattr("gptjax.evaluation.token_scorer.LOGITS_TOKENS", 4)
    small = architecture(context_length=24, init_std=0.3)
    params = gpt.initialise(small, jax.random.key(0))
    scorer = TokenScorer(small, make_mesh(config_lib.get_default().mesh))
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, VOCABULARY, 11, np.int32) for _ in range(3)]
    progress = []

    def batches():
        for number, text in enumerate(texts):
            batch, owners = empty_batch(*shape)
            put(batch, number, 1, text, segment=2)
            owners[number, 3:11] = number
            yield batch, owners

    nll, correct, tokens = scorer.sums(params, batches(), 3, lambda *done: progress.append(done))
    assert progress == [(1, 3), (2, 3), (3, 3)] and tokens.tolist() == [8, 8, 8]
    for number, text in enumerate(texts):
        model = gpt.bind(small, params)
        logits = model.logits(model.hidden(jnp.array(text[None, :-1]), positions=jnp.arange(10)[None])[0])[0]
        expected = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), text[1:, None], axis=1)[2:10]
        assert nll[number] == pytest.approx(expected.sum(), rel=1e-5)
        assert correct[number] == (np.asarray(logits).argmax(-1) == text[1:])[2:10].sum()
