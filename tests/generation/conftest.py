from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import config as config_lib
from gptjax.generation import sampling
from gptjax.generation.params import SamplingParams
from gptjax.model import gpt
from gptjax.model.architecture import Architecture


@pytest.fixture(scope="session")
def random_model() -> Callable:
    """Makes (architecture, params) of a small model of 257 tokens, every parameter of it random.

    Drawn with NumPy: to compile the model's own initialisation takes longer than the tests.
    """

    def make(**options):
        config = config_lib.get_default()
        config.model.update(num_layers=2, num_heads=4, embed_dim=32, context_length=64, scan_unroll=1)
        config.model.update(**options)
        architecture = Architecture.from_config(config.model, 257)
        abstract = gpt.abstract_params(architecture)
        rng = np.random.default_rng(0)
        params = jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(leaf.dtype), abstract)
        return architecture, jax.device_put(params)

    return make


@pytest.fixture(scope="session")
def check() -> Callable:
    return check_against_the_full_forward_pass


def check_against_the_full_forward_pass(
    model, prompt, params: SamplingParams, index: int, tokens, log_probabilities
) -> None:
    """Every token equals the draw from the full logits of the text before it, with the key of its position.

    No cache, no batch, no buckets.
    """
    architecture, parameters = model
    text = np.concatenate([prompt, tokens]).astype(np.int32)
    padded = np.zeros(architecture.context_length, np.int32)
    padded[: len(text)] = text
    seen = np.zeros((len(padded), architecture.padded_vocab_size), bool)
    for position in range(1, len(text)):
        seen[position:, text[position - 1]] = True
    rows = sampling.controls([params] * len(padded))
    drawn, scores = _draw(architecture, parameters, padded, seen, rows, np.uint32(params.seed), np.int32(index))
    own = slice(len(prompt), len(text))
    np.testing.assert_array_equal(drawn[own], tokens)
    np.testing.assert_allclose(scores[own], log_probabilities, atol=2e-4)


@partial(jax.jit, static_argnums=0)
def _draw(architecture, params, text, seen, controls, seed, index):
    """For each position, the token drawn there given all before, and its log-probability."""
    positions = jnp.arange(len(text))
    model = gpt.bind(architecture, params)
    logits = model.logits(model.hidden(text[None], positions=positions[None])[0])[0]
    key = jax.random.fold_in(jax.random.key(seed), index)
    keys = jax.vmap(partial(jax.random.fold_in, key))(positions)
    return sampling.sample(jnp.roll(logits, 1, axis=0), seen, controls, keys)
