import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gptjax.config import OPTIONS
from gptjax.model import gpt
from gptjax.model.activations import ACTIVATIONS
from gptjax.model.layers import MLP, norm

X = np.linspace(-6, 6, 241)
ERF = np.vectorize(math.erf)
BY_HAND = {
    "gelu": X * 0.5 * (1 + ERF(X / np.sqrt(2))),
    "gelu_tanh": 0.5 * X * (1 + np.tanh(np.sqrt(2 / np.pi) * (X + 0.044715 * X**3))),
    "relu": np.maximum(X, 0),
    "squared_relu": np.maximum(X, 0) ** 2,
    "swiglu": X / (1 + np.exp(-X)),
}


@pytest.mark.parametrize("name", OPTIONS["model"]["activation"].choices)
def test_activations_by_hand(name):
    np.testing.assert_allclose(ACTIVATIONS[name](jnp.float32(X)), BY_HAND[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", OPTIONS["model"]["norm"].choices)
@pytest.mark.parametrize("use_bias", [False, True])
def test_norms_by_hand(tiny_architecture, kind, use_bias):
    architecture = dataclasses.replace(tiny_architecture, norm=kind, use_bias=use_bias, norm_epsilon=1e-2)
    layer = norm(architecture, 16, nnx.Rngs(0))
    random = np.random.default_rng(0)
    scale, bias, x = random.normal(size=16), random.normal(size=16), random.normal(2.0, 0.3, size=(2, 3, 16))
    layer.scale[...] = jnp.float32(scale)
    if kind == "layernorm":
        expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-2) * scale
    else:
        expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-2) * scale
    if kind == "layernorm" and use_bias:
        layer.bias[...] = jnp.float32(bias)
        expected = expected + bias
    np.testing.assert_allclose(layer(jnp.float32(x)), expected, rtol=1e-4, atol=1e-5)


def test_layer_norm_is_exact_far_from_zero(tiny_architecture):
    """The variance as E[x^2] - E[x]^2 loses digits when the mean is large; a mean of 20 deviations is fine."""
    layer = norm(dataclasses.replace(tiny_architecture, norm="layernorm"), 16, nnx.Rngs(0))
    x = np.random.default_rng(0).normal(20, 1, size=(4, 16))
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(layer(jnp.float32(x)), expected, rtol=1e-2, atol=1e-3)


def test_biases_of_queries_keys_and_values_alone(tiny_architecture):
    _, params = gpt.abstract_model(dataclasses.replace(tiny_architecture, qkv_bias=True))
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(params)]
    assert {path for path in paths if path.endswith("bias")} == {
        f"blocks/attention/{layer}/bias" for layer in ("query", "key", "value")
    }


def test_swiglu_gates_one_projection_with_the_other(tiny_architecture):
    architecture = dataclasses.replace(tiny_architecture, activation="swiglu", mlp_dim=24)
    mlp = MLP(architecture, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(2, 3, 16)) * 10
    gate, up, down = (np.float64(layer.kernel[...]) for layer in (mlp.gate, mlp.up, mlp.down))
    gated = x @ gate
    expected = (gated / (1 + np.exp(-gated)) * (x @ up)) @ down
    np.testing.assert_allclose(mlp(jnp.float32(x))[0], expected, rtol=1e-3, atol=1e-5)
