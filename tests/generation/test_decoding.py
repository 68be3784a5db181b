"""The compiled programs by themselves; their output is tested in test_engine.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.generation import decoding, sampling
from gptjax.generation.params import SamplingParams
from gptjax.model import gpt

FOREVER = np.int32(decoding.ROUNDS)


@pytest.fixture(scope="module")
def model(random_model):
    return random_model()


def begin(model, lengths, capacity=32):
    """Architectures, parameters and a state with a prompt of each length."""
    architecture, params = model
    slots, params = len(lengths), decoding.prepare(params, architecture=architecture)
    state = decoding.new_state(architectures=(architecture,), slots=slots, capacity=capacity)
    prompts = decoding.Prompts(
        tokens=np.full((slots, 16), 5, np.int32),
        lengths=np.array(lengths, np.int32),
        slots=np.arange(slots, dtype=np.int32),
        seeds=np.zeros(slots, np.uint32),
        indices=np.arange(slots, dtype=np.int32),
        controls=sampling.controls([SamplingParams()] * slots),
        biases=sampling.bias([SamplingParams()] * slots),
        end_ids=np.full((slots, decoding.MAX_END_IDS), decoding.NO_TOKEN, np.int32),
    )
    return (architecture,), (params,), decoding.insert((architecture,), (params,), state, prompts)[0]


def test_slots_end_one_by_one_and_the_others_go_on(model):
    remaining = np.array([0, 2, 9], np.int32)
    state, written = decoding.decode(*begin(model, [4, 4, 4]), remaining, FOREVER, np.False_)
    assert [(row != decoding.NO_TOKEN).sum() for row in np.asarray(written.drawn.tokens)] == [0, 2, 9]
    assert list(np.asarray(state.positions)) == [4, 6, 13]
    assert list(np.asarray(written.rounds)) == [0, 2, 9]


def test_the_loop_is_left_when_one_ends_and_others_wait(model):
    remaining = np.array([0, 3, 9], np.int32)
    _, written = decoding.decode(*begin(model, [4, 4, 4]), remaining, FOREVER, np.True_)
    assert list(np.asarray(written.rounds)) == [0, 3, 3]


def test_caches_are_updated_where_they_lie(model):
    """Beside its arguments, the program needs less memory than one of the caches of its two layers."""
    arguments = (*begin(model, [4, 4], capacity=4096), np.array([9, 9], np.int32), FOREVER, np.False_)
    state = arguments[2]
    memory = decoding.decode.lower(*arguments).compile().memory_analysis()
    assert memory.temp_size_in_bytes < state.caches[0].keys[0].nbytes


def test_a_layer_is_traced_once(random_model):
    """Start-up time is mostly tracing and lowering, so a deep model's program must hardly be longer."""

    def products(layers):
        arguments = (*begin(random_model(num_layers=layers), [4]), np.array([9], np.int32), FOREVER, np.False_)
        return decoding.decode.lower(*arguments).as_text().count("dot_general")

    assert products(2) == products(5) < 20


@pytest.mark.parametrize("options", [{}, {"num_experts": 4, "activation": "swiglu"}], ids=["dense", "experts"])
def test_prepared_parameters_compute_the_same_in_bfloat16(random_model, options):
    architecture, params = random_model(compute_dtype="bfloat16", **options)
    prepared = decoding.prepare(params, architecture=architecture)
    assert prepared["blocks"][1]["attention"]["query"]["kernel"].dtype == jnp.bfloat16
    assert prepared["final_norm"]["scale"].dtype == jnp.float32
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 257, (2, 8)), jnp.int32)
    positions = jnp.tile(jnp.arange(8), (2, 1))

    @jax.jit
    def logits(params, layers):
        bound = gpt.bind(architecture, params)
        hidden, _ = bound.hidden(tokens, positions=positions, new_cache=True, layers=layers)
        return bound.logits(hidden)

    layers = prepared["blocks"]
    np.testing.assert_array_equal(logits(params, None), logits({**prepared, "blocks": layers[0]}, layers))
