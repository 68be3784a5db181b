"""The whole model against the formulas in NumPy, in float64, every parameter random."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import config
from gptjax.model import gpt
from gptjax.model.architecture import Architecture

VARIANTS = {
    "pre-norm": {},
    "post-norm": {"norm_placement": "post"},
    "residual scalars": {"residual_scalars": True},
    "value embeddings": {"value_embeddings": True},
    "head gates": {"head_gates": True},
    "all": {"residual_scalars": True, "value_embeddings": True, "head_gates": True},
    "all, post-norm": {
        "norm_placement": "post",
        "residual_scalars": True,
        "value_embeddings": True,
        "head_gates": True,
    },
}
LENGTH, VOCABULARY, EPSILON = 7, 11, 1e-2


def by_hand(a: Architecture, params, tokens: np.ndarray) -> np.ndarray:
    """Final hidden states of one text [length, embed]."""

    def rms(x, scale=1.0):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON) * scale

    def heads(x):  # [heads, length, head_dim]
        return x.reshape(len(x), -1, a.head_dim).swapaxes(0, 1)

    def attend(block, x):
        q, k, v = (heads(x @ block["attention"][name]["kernel"]) for name in ("query", "key", "value"))
        if a.value_embeddings:
            scale = block["attention"]["value_scale"][:, None, None]
            v = v + scale * heads(params["value_embedding"]["embedding"][tokens])
        k, v = (np.repeat(y, a.num_heads // a.num_kv_heads, axis=0) for y in (k, v))
        scores = np.where(np.tri(LENGTH, dtype=bool), q @ k.swapaxes(1, 2) / np.sqrt(a.head_dim), -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = weights / weights.sum(-1, keepdims=True) @ v
        if a.head_gates:
            mixed = mixed / (1 + np.exp(-(x @ block["attention"]["head_gate"]["kernel"]).T[:, :, None]))
        return mixed.swapaxes(0, 1).reshape(LENGTH, -1) @ block["attention"]["out"]["kernel"]

    def mlp(block, x):
        return np.maximum(x @ block["mlp"]["up"]["kernel"], 0) @ block["mlp"]["down"]["kernel"]

    x = params["embedding"]["embedding"][tokens]
    start = rms(x)
    for layer in range(a.num_layers):
        block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["blocks"])
        if a.residual_scalars:
            x = block["residual_scale"] * x + block["embedding_scale"] * start
        for branch, scale in ((attend, block["attention_norm"]["scale"]), (mlp, block["mlp_norm"]["scale"])):
            if a.norm_placement == "post":
                x = rms(x + branch(block, x), scale)
            else:
                x = x + branch(block, rms(x, scale))
    return rms(x, params["final_norm"]["scale"]) if a.norm_placement == "pre" else x


def model_of(**options) -> tuple[Architecture, gpt.Params]:
    model = config.get_default().model
    model.update(num_layers=3, num_heads=4, num_kv_heads=2, embed_dim=12, head_dim=6, mlp_dim=16, vocab_multiple=1)
    model.update(context_length=LENGTH, positions="none", qk_norm=False, activation="relu", norm_epsilon=EPSILON)
    model.update(**options)
    architecture = Architecture.from_config(model, VOCABULARY)
    random = np.random.default_rng(0)
    return architecture, jax.tree.map(
        lambda leaf: jnp.asarray(random.normal(0, 0.5, leaf.shape), jnp.float32), gpt.abstract_params(architecture)
    )


def hidden(architecture: Architecture, params, tokens: np.ndarray) -> jax.Array:
    model = gpt.bind(architecture, params)
    return model.hidden(jnp.asarray(tokens[None], jnp.int32), positions=jnp.arange(len(tokens))[None])[0][0]


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_the_forward_pass(options):
    architecture, params = model_of(**options)
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, LENGTH)
    expected = by_hand(architecture, jax.tree.map(np.float64, params), tokens)
    np.testing.assert_allclose(hidden(architecture, params, tokens), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("option", "parameters"),
    [("residual_scalars", 2 * 3), ("value_embeddings", VOCABULARY * 2 * 6 + 3 * 2), ("head_gates", 3 * 12 * 4)],
)
def test_an_option_leaves_the_initial_values_of_the_others(option, parameters):
    """So that two arms of a study that share a seed start alike; and it has this many parameters of its own."""
    without, with_it = (
        dict(jax.tree.leaves_with_path(gpt.initialise(model_of(**{option: value})[0], jax.random.key(0))))
        for value in (False, True)
    )
    for path, value in without.items():
        np.testing.assert_array_equal(value, with_it[path])
    assert sum(leaf.size for path, leaf in with_it.items() if path not in without) == parameters


def test_residual_scalars_change_nothing_at_first():
    """The same function and the same values as without; the first gradient reaches the scalars."""
    (plain, _), (scaled, _) = model_of(), model_of(residual_scalars=True)
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, LENGTH)
    before, after = (gpt.initialise(a, jax.random.key(0)) for a in (plain, scaled))
    np.testing.assert_array_equal(hidden(plain, before, tokens), hidden(scaled, after, tokens))
    weights = np.random.default_rng(2).normal(size=(LENGTH, 12))
    gradient = jax.grad(lambda params: (hidden(scaled, params, tokens) * weights).sum())(after)
    assert (gradient["blocks"]["embedding_scale"] != 0).all() and (gradient["blocks"]["residual_scale"] != 0).all()
