"""The likelihood of a continuation equals that of the full forward pass of its text alone, whatever the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import config as config_lib
from gptjax.data.tokenization.tokenizer import build_tokenizer
from gptjax.evaluation.continuations import ContinuationScorer, Scores, encode_pair
from gptjax.evaluation.multiple_choice import Question, Style, choose
from gptjax.model import gpt
from gptjax.model.architecture import Architecture
from gptjax.parallel.mesh import make_mesh

CONTEXT = 40  # no power of two


@pytest.fixture(scope="module")
def model():
    config = config_lib.get_default()
    config.model.update(num_layers=2, num_heads=2, embed_dim=16, context_length=CONTEXT, vocab_multiple=1, init_std=0.3)
    architecture = Architecture.from_config(config.model, 97)
    return architecture, gpt.initialise(architecture, jax.random.key(0))


@pytest.fixture(scope="module")
def pairs():
    rng = np.random.default_rng(0)
    lengths = [(1, 1), (3, 5), (15, 2), (16, 1), (17, 3), (30, 11), (35, 9), (90, 4), (1, 40), (2, 2)]
    return [tuple(rng.integers(0, 97, size, np.int32) for size in both) for both in lengths]


def scorer(model, batch_size, devices=None):
    mesh = make_mesh(config_lib.get_default().mesh, devices=devices)
    return ContinuationScorer(*model, mesh, batch_size=batch_size)


@pytest.fixture(scope="module")
def log_probabilities(model):
    """The next-token log-probabilities of a text alone; padding after it cannot change them."""

    @jax.jit
    def forward(params, tokens):
        bound = gpt.bind(model[0], params)
        hidden, _ = bound.hidden(tokens, positions=jnp.arange(CONTEXT)[None])
        return jax.nn.log_softmax(bound.logits(hidden)[0])

    return lambda tokens: np.asarray(forward(model[1], np.pad(tokens, (0, CONTEXT - len(tokens)))[None]))[: len(tokens)]


def test_equals_the_forward_pass_alone(model, pairs, log_probabilities):
    context = pairs[0][0]
    best = log_probabilities(context)[-1:].argmax(-1).astype(np.int32)
    pairs = [*pairs, (context, best)]
    scores = scorer(model, 2).score(pairs)
    for i, (context, continuation) in enumerate(pairs):
        tokens = np.concatenate([context, continuation])[-(CONTEXT + 1) :]
        rows = log_probabilities(tokens[:-1])[-len(continuation) :]
        chosen = rows[np.arange(len(continuation)), continuation]
        assert scores.log_likelihood[i] == pytest.approx(chosen.sum(), rel=1e-5)
        assert scores.is_greedy[i] == (rows.argmax(-1) == continuation).all()
    assert scores.is_greedy[-1]
    assert scores.num_tokens.tolist() == [len(continuation) for _, continuation in pairs]
    assert scores.truncated.tolist() == [len(a) + len(b) > CONTEXT + 1 for a, b in pairs]


def test_does_not_depend_on_the_batch_or_the_mesh(model, pairs):
    one = scorer(model, 1, jax.devices()[:1]).score(pairs)
    for batch_size, devices in ((3, jax.devices()[:1]), (16, None)):
        other = scorer(model, batch_size, devices).score(list(reversed(pairs)))
        np.testing.assert_allclose(other.log_likelihood[::-1], one.log_likelihood, rtol=1e-5)


def test_a_continuation_longer_than_the_context(model, log_probabilities):
    tokens = np.random.default_rng(1).integers(0, 97, 60, np.int32)
    expected = 0.0
    for start in (5, 25, 45):  # pieces of 20 tokens, the last one of 15
        window = tokens[: start + 20][-(CONTEXT + 1) :]
        new = len(tokens[start : start + 20])
        rows = log_probabilities(window[:-1])[-new:]
        expected += rows[np.arange(new), window[-new:]].sum()
    scores = scorer(model, 1).score([(tokens[:3], tokens[3:9]), (tokens[:5], tokens[5:])])
    assert scores.log_likelihood[1] == pytest.approx(expected, rel=1e-5)
    assert scores.num_tokens.tolist() == [6, 55] and scores.truncated.tolist() == [False, True]


def test_nothing_to_score(model):
    assert len(scorer(model, 1).score([]).log_likelihood) == 0


def test_white_space_before_a_continuation_belongs_to_it():
    tokenizer = build_tokenizer("byte")
    for context, continuation in (("ab", " cd"), ("ab ", "cd"), ("ab  \n", "c")):
        first, second, alone = encode_pair(tokenizer, context, continuation, tokenizer.begin_ids)
        assert first.tolist() == [tokenizer.eot_id, *b"ab"] and not alone
        assert bytes(second.tolist()).decode() == (context + continuation)[2:]
    first, second, _ = encode_pair(tokenizer, "", " cd")
    assert (first.tolist(), bytes(second.tolist())) == ([tokenizer.eot_id], b" cd")
    assert encode_pair(tokenizer, "ab", " c").context.tolist() == [*b"ab"]  # lm-eval puts nothing before a context


def test_a_choice_that_melts_into_its_question_is_encoded_alone():
    tokenizer = build_tokenizer("bpe:300", ["北京大学在北京。北京大学很大。学在北大。" * 50])
    known = tokenizer.encode("北京").tolist()
    melted, cut = "大学很大", "大学很大。大"  # one token with the question; the same and more after it
    assert len(tokenizer.encode(f"北京{melted}")) == 1 and tokenizer.encode(f"北京{cut}")[0] != known[0]
    for choice in (melted, cut):
        expected = known, tokenizer.encode(choice).tolist(), True
        context, continuation, alone = encode_pair(tokenizer, "北京", choice)
        assert (context.tolist(), continuation.tolist(), alone) == expected
    assert not encode_pair(tokenizer, "北京", " 大学").alone
    outcome = choose(Unscored(), tokenizer, [Question("北京", [melted, " 大"], 0)], Style(delimiter=""))
    assert "choices-encoded-alone:1/2" in outcome.metrics["accuracy"].signature


class Unscored(ContinuationScorer):
    def __init__(self):
        self.context_length = 64

    def score(self, pairs, progress=None):
        count = np.array([len(continuation) for _, continuation in pairs], np.float64)
        return Scores(-count, count, count > 0, np.zeros(len(pairs), np.bool_))
