import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.model import gpt
from gptjax.model.architecture import Architecture
from gptjax.objectives import cross_entropy

LENGTH, VOCABULARY = 16, 97
VARIANTS = {
    "rope": {},
    "learned": {
        "positions": "learned",
        "norm": "layernorm",
        "use_bias": True,
        "qk_norm": False,
        "activation": "gelu",
    },
    "none": {"positions": "none", "tie_embeddings": False},
    "ngram": {"ngram_order": 3, "ngram_rows": 64},
    "alibi": {"positions": "alibi"},
    "window": {"sliding_window": 5},
    "llama3": {"rope_scaling": "llama3", "rope_original_length": 6, "qkv_bias": True, "qk_norm": False},
    "post-norm": {"norm_placement": "post"},
    "experts": {"num_experts": 4, "experts_per_token": 2, "activation": "swiglu"},
    "xla": {"attention": "xla", "sliding_window": 5},
    "value embeddings": {"value_embeddings": 2, "num_kv_heads": 1},
    "residual scalars": {"residual_scalars": True},
    "gates": {"attention_gate": True, "norm_placement": "post", "value_embeddings": 1},
}


def forward(architecture: Architecture, params: gpt.Params, tokens, positions=None, segment_ids=None) -> jax.Array:
    tokens = jnp.asarray(tokens, jnp.int32)
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    if segment_ids is not None:
        segment_ids = jnp.asarray(segment_ids)
    return _logits(architecture, params, tokens, jnp.asarray(positions), segment_ids)


@functools.partial(jax.jit, static_argnums=0)
def _logits(architecture, params, tokens, positions, segment_ids):
    model = gpt.bind(architecture, params)
    return model.logits(model.hidden(tokens, positions=positions, segment_ids=segment_ids)[0])


def large_params(architecture: Architecture) -> gpt.Params:
    """Weights ten times larger than at the start, so that attention is far from uniform."""
    params = jax.jit(gpt.initialise, static_argnums=0)(architecture, jax.random.key(0))
    return jax.tree_util.tree_map_with_path(lambda path, a: a if "norm" in str(path) else a * 10, params)


@pytest.fixture(params=VARIANTS)
def architecture(request, tiny_architecture) -> Architecture:
    return dataclasses.replace(tiny_architecture, **VARIANTS[request.param])


@pytest.fixture
def params(architecture) -> gpt.Params:
    return large_params(architecture)


def test_packed_documents_are_as_if_alone(architecture, params):
    """Logits and losses of every token."""
    """DESIGN, property 3: logits and losses of every token."""
    random = np.random.default_rng(0)
    lengths = [[5, 1, 10], [16], [3, 13]]
    documents = [[random.integers(0, VOCABULARY, n + 1) for n in row] for row in lengths]  # inputs and one more target
    packed = {
        "tokens": [np.concatenate([d[:-1] for d in row]) for row in documents],
        "targets": [np.concatenate([d[1:] for d in row]) for row in documents],
        "positions": [np.concatenate([np.arange(len(d) - 1) for d in row]) for row in documents],
        "segments": [np.repeat(np.arange(len(row)) + 1, [len(d) - 1 for d in row]) for row in documents],
    }
    packed = {name: np.stack(rows) for name, rows in packed.items()}
    logits = forward(architecture, params, packed["tokens"], packed["positions"], packed["segments"])
    losses, *_ = cross_entropy.token_losses(logits, jnp.asarray(packed["targets"], jnp.int32))
    for row, texts in enumerate(documents):
        start = 0
        for document in texts:
            end = start + len(document) - 1
            # Alone: padded at the end, which causal attention does not look at.
            padded = np.zeros((1, LENGTH), int)
            padded[0, : end - start] = document[:-1]
            alone = forward(architecture, params, padded)[:, : end - start]
            np.testing.assert_allclose(logits[row, start:end], alone[0], rtol=1e-4, atol=1e-4)
            alone_losses, *_ = cross_entropy.token_losses(alone, jnp.asarray(document[None, 1:], jnp.int32))
            np.testing.assert_allclose(losses[row, start:end], alone_losses[0], rtol=1e-4, atol=1e-4)
            start = end


def test_without_segments_the_documents_of_a_row_do_see_each_other(architecture, params):
    """Guards the test above, which would also pass if attention looked at nothing."""
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (1, LENGTH))
    segments = np.repeat([[1, 2]], 8, axis=1)
    apart, together = (forward(architecture, params, tokens, segment_ids=ids) for ids in (segments, None))
    np.testing.assert_allclose(apart[:, :8], together[:, :8], rtol=1e-4, atol=1e-4)
    assert abs(apart - together)[:, 8:, :VOCABULARY].max() > 0.1


def test_logits_do_not_depend_on_later_tokens(architecture, params):
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (2, LENGTH))
    changed = tokens.copy()
    changed[:, 9:] = (changed[:, 9:] + 1) % VOCABULARY
    before, after = forward(architecture, params, tokens), forward(architecture, params, changed)
    np.testing.assert_array_equal(before[:, :9], after[:, :9])
    assert abs(before - after)[:, 9:, :VOCABULARY].max() > 0.1


@pytest.mark.parametrize("positions", ["rope", "learned", "none"])
def test_learned_positions_show_in_a_constant_text_and_rotary_ones_do_not(tiny_architecture, positions):
    """Attention over equal values returns them for any weights; a learned table makes them differ."""
    architecture = dataclasses.replace(tiny_architecture, positions=positions)
    logits = forward(architecture, large_params(architecture), np.full((1, LENGTH), 7))
    spread = np.ptp(np.asarray(logits)[0, :, :VOCABULARY], axis=0).max()
    assert spread > 0.1 if positions == "learned" else spread < 1e-4


def test_one_layer_without_positions_sees_a_bag_of_tokens(architecture):
    architecture = dataclasses.replace(architecture, num_layers=1, scan_unroll=1)
    params = large_params(architecture)
    texts = np.array([[7, 3] + [5] * 14, [3, 7] + [5] * 14])
    first, second = forward(architecture, params, texts)[:, 2:, :VOCABULARY]
    difference = abs(first - second).max()
    assert difference < 1e-5 if architecture.positions == "none" else difference > 1e-3


def test_padding_of_the_vocabulary_is_never_probable(architecture, params):
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (2, LENGTH))
    logits = forward(architecture, params, tokens)
    assert logits.shape == (2, LENGTH, 128) and logits.dtype == jnp.float32
    probabilities = jax.nn.softmax(logits)
    assert probabilities[..., VOCABULARY:].max() == 0
    np.testing.assert_allclose(probabilities[..., :VOCABULARY].sum(-1), 1, rtol=1e-5)


def test_padding_of_the_vocabulary_changes_no_logit(tiny_architecture):
    params = large_params(tiny_architecture)
    tight = dataclasses.replace(tiny_architecture, padded_vocab_size=VOCABULARY)
    table = {"embedding": {"embedding": params["embedding"]["embedding"][:VOCABULARY]}}
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (2, LENGTH))
    np.testing.assert_allclose(
        forward(tiny_architecture, params, tokens)[..., :VOCABULARY],
        forward(tight, params | table, tokens),
        atol=1e-5,
    )


def test_softcap_is_the_tanh_of_gemma(tiny_architecture):
    params = large_params(tiny_architecture)
    capped = dataclasses.replace(tiny_architecture, logit_softcap=1.5)
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (2, LENGTH))
    plain = np.float64(forward(tiny_architecture, params, tokens))[..., :VOCABULARY]
    found = forward(capped, params, tokens)
    assert abs(plain).max() > 1.5
    np.testing.assert_allclose(found[..., :VOCABULARY], 1.5 * np.tanh(plain / 1.5), rtol=1e-4, atol=1e-5)
    assert (found[..., VOCABULARY:] < -1e29).all()


def test_a_tied_head_is_the_embedding_table(tiny_architecture):
    params = large_params(tiny_architecture)
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 16)), jnp.float32)
    expected = np.float64(hidden) @ np.float64(params["embedding"]["embedding"]).T
    found = gpt.bind(tiny_architecture, params).logits(hidden)
    np.testing.assert_allclose(found[..., :VOCABULARY], expected[..., :VOCABULARY], rtol=1e-4, atol=1e-5)


def test_bfloat16_keeps_float32_parameters_and_logits(tiny_architecture):
    """Products in bfloat16 differ by its rounding only."""
    half = dataclasses.replace(tiny_architecture, compute_dtype="bfloat16")
    params = jax.jit(gpt.initialise, static_argnums=0)(half, jax.random.key(0))
    assert {a.dtype for a in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (2, LENGTH))
    found, exact = (forward(a, params, tokens)[..., :VOCABULARY] for a in (half, tiny_architecture))
    assert found.dtype == jnp.float32
    assert 0 < abs(found - exact).max() < 0.02 * abs(exact).max()


def test_initialisation_depends_on_the_key_alone(tiny_architecture):
    first, again, other = (gpt.initialise(tiny_architecture, jax.random.key(seed)) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.array_equal(first["embedding"]["embedding"], other["embedding"]["embedding"])


def test_equal_architectures_share_compiled_programs(tiny_config):
    """Initialisers are new functions each time, so they must not be part of a program's key."""
    first, second = (Architecture.from_config(tiny_config.model, 0) for _ in range(2))
    assert first is not second and gpt.graphdef(first) is gpt.graphdef(second)
