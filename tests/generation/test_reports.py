"""Log-probabilities and changes of the distribution, compared with NumPy on the full forward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.data.tokenization.tokenizer import build_tokenizer
from gptjax.errors import UserError
from gptjax.generation.engine import Engine, Model
from gptjax.generation.params import SamplingParams
from gptjax.model import gpt

BYTES = build_tokenizer("byte")
PROMPT = np.random.default_rng(4).integers(0, 257, 37).astype(np.int32)


@pytest.fixture(scope="module")
def model(random_model):
    return random_model()


@pytest.fixture(scope="module")
def prepared(model):
    return Model.prepare(*model)


def complete(prepared, prompt, params, draft=None, **options):
    """All events of one request."""
    engine = Engine(prepared, BYTES, slots=2, rounds=4, chunk=16, draft=draft)
    engine.submit(prompt, params, **options)
    events = []
    while engine.busy:
        events += engine.step()
    return events


@pytest.fixture(scope="module")
def log_probabilities(model):
    """Function from a text to log softmax [length, padded vocab] after each of its tokens."""
    architecture, params = model

    @jax.jit
    def forward(text):
        bound = gpt.bind(architecture, params)
        hidden, _ = bound.hidden(text[None], positions=jnp.arange(len(text))[None])
        return jax.nn.log_softmax(bound.logits(hidden)[0])

    def compute(text):
        padded = np.zeros(64, np.int32)
        padded[: len(text)] = text
        return np.asarray(forward(padded))[: len(text)]

    return compute


@pytest.mark.parametrize("with_draft", [False, True])
def test_the_most_probable_tokens_stand_beside_each(prepared, log_probabilities, with_draft):
    draft = prepared if with_draft else None
    events = complete(prepared, PROMPT, SamplingParams(max_new_tokens=10, ignore_eos=True), draft=draft, top=5)
    tokens = [token for event in events for token in event.tokens]
    values = [value for event in events for value in event.log_probabilities]
    tops = [top for event in events for top in event.top]
    assert len(tokens) == len(tops) == 10
    expected = log_probabilities([*PROMPT, *tokens])[len(PROMPT) - 1 : -1]
    found = 0
    for token, value, top, row in zip(tokens, values, tops, expected, strict=True):
        assert [i for i, _ in top] == np.argsort(-row)[:5].tolist()
        np.testing.assert_allclose([v for _, v in top], np.sort(row)[::-1][:5], atol=1e-4)
        if token in dict(top):
            found += 1
            assert dict(top)[token] == value, "the same bits"
    greedy = complete(prepared, PROMPT, SamplingParams(max_new_tokens=10, temperature=0, ignore_eos=True), top=1)
    for event in greedy:
        assert [top[0] for top in event.top] == list(zip(event.tokens, event.log_probabilities, strict=True))


def test_nothing_is_told_unasked(prepared):
    events = complete(prepared, PROMPT, SamplingParams(max_new_tokens=5))
    assert all(event.top == () and event.prompt_scores is None for event in events)


@pytest.mark.parametrize("length", [1, 2, 16, 17, 37, 64])
def test_the_prompt_has_log_probabilities(prepared, log_probabilities, length):
    """In chunks; also if the prompt fills the context, after which one token can still be drawn."""
    prompt = np.random.default_rng(5).integers(0, 257, length).astype(np.int32)
    params = SamplingParams(max_new_tokens=1, temperature=0, ignore_eos=True)
    (event,) = complete(prepared, prompt, params, top=2, score_prompt=True)
    rows = log_probabilities(prompt)
    expected = rows[np.arange(length - 1), prompt[1:]]
    np.testing.assert_allclose(event.prompt_scores.log_probabilities, expected, atol=1e-4)
    assert len(event.prompt_scores.top) == length - 1
    for top, row in zip(event.prompt_scores.top, rows, strict=False):
        assert [i for i, _ in top] == np.argsort(-row)[:2].tolist()
    assert event.tokens == (rows[-1].argmax(),) and event.finish_reason == "length"


def test_generated_tokens_are_penalised_by_openais_formula(prepared, log_probabilities):
    """Greedy: the best of s - presence x (count > 0) - frequency x count, of generated tokens alone."""
    params = SamplingParams(
        max_new_tokens=20, temperature=0, presence_penalty=0.7, frequency_penalty=1.9, ignore_eos=True
    )
    plain = SamplingParams(max_new_tokens=20, temperature=0, ignore_eos=True)
    (tokens, free) = (
        [token for event in complete(prepared, PROMPT, p) for token in event.tokens] for p in (params, plain)
    )
    assert tokens != free
    counts, rows = np.zeros(320), log_probabilities([*PROMPT, *tokens])[len(PROMPT) - 1 :]
    for token, row in zip(tokens, rows, strict=False):
        assert token == np.argmax(row - 0.7 * (counts > 0) - 1.9 * counts)
        counts[token] += 1
    with_draft = complete(prepared, PROMPT, params, draft=prepared)
    assert [token for event in with_draft for token in event.tokens] == tokens


def test_a_bias_bans_and_forces(prepared):
    greedy = {"max_new_tokens": 6, "temperature": 0, "ignore_eos": True}
    forced = complete(prepared, PROMPT, SamplingParams(logit_bias=((65, 100.0),), **greedy))
    assert {token for event in forced for token in event.tokens} == {65}
    first = complete(prepared, PROMPT, SamplingParams(**greedy))[0].tokens[0]
    banned = complete(prepared, PROMPT, SamplingParams(logit_bias=((first, -100.0),), **greedy))
    assert first not in {token for event in banned for token in event.tokens}


@pytest.mark.parametrize(
    ("params", "options", "message"),
    [
        (SamplingParams(logit_bias=((257, 1.0),)), {}, "token id 257, outside 0 to 256"),
        (SamplingParams(logit_bias=tuple((i, 1.0) for i in range(301))), {}, "logit_bias is .* at most 300"),
        (SamplingParams(presence_penalty=2.5), {}, "presence_penalty is 2.5; expected between -2 and 2"),
        (SamplingParams(), {"top": 21}, "top is 21; at most the 20"),
    ],
)
def test_what_cannot_be_told_or_applied_is_refused(prepared, params, options, message):
    with pytest.raises(UserError, match=message):
        Engine(prepared, BYTES, slots=1).submit(PROMPT, params, **options)
