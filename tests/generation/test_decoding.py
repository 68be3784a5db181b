"""Decoding with the cache gives the logits of the full forward pass."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.generation import decoding, sampling
from gptjax.generation.params import SamplingParams
from gptjax.model import gpt

VOCAB = 257
GPT2 = {"norm": "layernorm", "positions": "learned", "activation": "gelu", "use_bias": True, "qk_norm": False}
MODERN = {"norm": "rmsnorm", "positions": "rope", "activation": "swiglu", "qk_norm": True, "num_kv_heads": 2}

EXPERTS = {"num_experts": 4, "experts_per_token": 2}
ALIBI = {"positions": "alibi", "sliding_window": 6, "norm_placement": "post"}


@partial(jax.jit, static_argnums=0)
def full_logits(graphdef, params, tokens):
    """Scores after each token of [batch, length], without a cache."""
    model = gpt.bind(graphdef, params)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return model.logits(model.hidden(tokens, positions=positions)[0])


@pytest.mark.parametrize("options", [GPT2, MODERN, ALIBI, MODERN | EXPERTS], ids=["gpt2", "modern", "alibi", "experts"])
def test_cached_logits_equal_the_full_forward_at_every_position(random_model, options):
    _, graphdef, params = random_model(**options)
    lengths, capacity, new = np.array([1, 5, 13, 16], np.int32), 32, 10
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, VOCAB, n) for n in lengths]
    padded = np.full((4, 16), 7, np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt

    indices = np.arange(4, dtype=np.int32)
    state = decoding.prefill(graphdef, params, padded, lengths, indices, np.uint32(0), capacity=capacity)
    controls = sampling.controls(SamplingParams())
    texts, scores = [list(prompt) for prompt in prompts], [[logits] for logits in np.asarray(state.logits)]
    log_probabilities = [[] for _ in texts]
    for _ in range(new):
        remaining = np.ones(4, np.int32)
        state, tokens, log_probability = decoding.decode(
            graphdef, params, state, controls, remaining, np.int32(-1), np.int32(1)
        )
        for row in range(4):
            texts[row].append(int(tokens[row, 0]))
            scores[row].append(np.asarray(state.logits[row]))
            log_probabilities[row].append(float(log_probability[row, 0]))

    full = full_logits(graphdef, params, np.array([text + [0] * (capacity - len(text)) for text in texts]))
    for row, length in enumerate(lengths):
        expected = np.asarray(full[row, length - 1 : length + new])
        np.testing.assert_allclose(np.stack(scores[row]), expected, atol=1e-5)
        chosen = jax.nn.log_softmax(expected)[np.arange(new), texts[row][length:]]
        np.testing.assert_allclose(log_probabilities[row], chosen, atol=1e-5)


def test_rows_end_one_by_one_and_the_others_go_on(random_model):
    _, graphdef, params = random_model(**MODERN)
    prompts, lengths = np.full((3, 16), 5, np.int32), np.full(3, 4, np.int32)
    state = decoding.prefill(
        graphdef, params, prompts, lengths, np.arange(3, dtype=np.int32), np.uint32(0), capacity=32
    )
    controls = sampling.controls(SamplingParams())
    remaining = np.array([0, 2, 9], np.int32)
    state, tokens, _ = decoding.decode(
        graphdef, params, state, controls, remaining, np.int32(-1), np.int32(decoding.DECODE_STEPS)
    )
    assert [(row != decoding.NO_TOKEN).sum() for row in np.asarray(tokens)] == [0, 2, 9]
    assert list(np.asarray(state.positions)) == [4, 6, 13]
