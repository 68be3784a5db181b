import jax
import numpy as np
import pytest

from gptjax.config import get_default
from gptjax.model import gpt
from gptjax.model.architecture import Architecture

GPT2 = {
    "norm": "layernorm",
    "positions": "learned",
    "activation": "gelu_tanh",
    "use_bias": True,
    "qk_norm": False,
}
GPT2_124M = dict(num_layers=12, num_heads=12, embed_dim=768, context_length=1024, **GPT2)


def architecture_of(tokens: int, **model) -> Architecture:
    config = get_default()
    config.model.update(model)
    return Architecture.from_config(config.model, tokens)


def count(architecture: Architecture) -> int:
    return gpt.parameter_count(gpt.abstract_model(architecture)[1])


@pytest.mark.parametrize(
    ("name", "layers", "heads", "width", "parameters"),
    [
        ("gpt2", 12, 12, 768, 124_439_808),
        ("gpt2-medium", 24, 16, 1024, 354_823_168),
        ("gpt2-large", 36, 20, 1280, 774_030_080),
        ("gpt2-xl", 48, 25, 1600, 1_557_611_200),
    ],
)
def test_gpt2_has_the_published_number_of_parameters(name, layers, heads, width, parameters):
    shape = dict(num_layers=layers, num_heads=heads, embed_dim=width, context_length=1024, **GPT2)
    assert count(architecture_of(50257, vocab_multiple=1, **shape)) == parameters
    padding = (50304 - 50257) * width  # to a multiple of 64
    assert count(architecture_of(50257, **shape)) == parameters + padding


def test_a_llama_shaped_model_has_the_parameters_of_its_formula():
    layers, width, heads, kv_heads, mlp, vocabulary = 3, 64, 8, 2, 192, 128
    architecture = architecture_of(
        vocabulary,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        embed_dim=width,
        activation="swiglu",
        tie_embeddings=False,
        qk_norm=False,
    )
    assert architecture.mlp_dim == mlp  # 8/3 x 64 = 170.7, to a multiple of 64
    attention = 2 * width * width + 2 * width * (width // heads * kv_heads)
    expected = layers * (attention + 3 * width * mlp + 2 * width) + 2 * vocabulary * width + width
    assert count(architecture) == expected


def test_sizes_left_at_zero_are_filled_in():
    architecture = architecture_of(100, num_layers=3, num_heads=4, embed_dim=64)
    assert (architecture.num_kv_heads, architecture.head_dim, architecture.mlp_dim) == (4, 16, 256)
    assert (architecture.vocab_size, architecture.padded_vocab_size, architecture.scan_unroll) == (
        100,
        128,
        3,
    )
    assert architecture_of(100, vocab_size=256).vocab_size == 256


def test_head_dim_is_free_of_the_width():
    architecture = architecture_of(64, num_layers=1, num_heads=3, embed_dim=20, head_dim=8)
    _, params = gpt.abstract_model(architecture)
    assert params["blocks"]["attention"]["query"]["kernel"].shape == (1, 20, 24)
    assert params["blocks"]["attention"]["out"]["kernel"].shape == (1, 24, 20)


def test_flops_of_gpt2_are_six_a_parameter_and_half_of_full_attention():
    """PaLM's 6N + 12 L H Q T with the causal half; N without the position table, norms and biases."""
    found = architecture_of(50257, **GPT2_124M).flops_per_token()
    matrices = 12 * 12 * 768**2 + 50257 * 768
    assert found == 6 * matrices + 6 * 12 * 768 * 1024
    assert found == pytest.approx(6 * 124_439_808, rel=0.08)


def test_flops_grow_with_context_and_shrink_with_grouped_keys():
    full, grouped = architecture_of(64, num_heads=4), architecture_of(64, num_heads=4, num_kv_heads=1)
    assert full.flops_per_token() - grouped.flops_per_token() == 6 * 4 * (2 * 128 * 96)
    longer = full.flops_per_token(512) - full.flops_per_token(256)
    assert longer == 6 * 4 * 128 * 256


def test_compiled_flops_agree_with_the_formula():
    """The forward pass of an unrolled model, counted by XLA, which computes the full attention square."""
    architecture = architecture_of(256, num_layers=2, num_heads=2, embed_dim=64, context_length=64)
    params = gpt.abstract_params(architecture)
    tokens = jax.ShapeDtypeStruct((4, 64), np.int32)

    def forward(params, tokens, positions):
        model = gpt.bind(architecture, params)
        return model.logits(model.hidden(tokens, positions=positions)[0])

    counted = jax.jit(forward).lower(params, tokens, tokens).cost_analysis()["flops"] / (4 * 64)
    expected = (architecture.flops_per_token() + 6 * 2 * 64 * 64) / 3  # a third is forward; the other half of attention
    assert counted == pytest.approx(expected, rel=0.1)


def test_initial_weights_have_the_stated_deviation():
    layers, architecture = 3, architecture_of(512, num_layers=3, num_heads=4, embed_dim=128, init_std=0.05)
    params = jax.jit(gpt.initialise, static_argnums=0)(architecture, jax.random.key(0))
    blocks = params["blocks"]
    for kernel in (
        params["embedding"]["embedding"],
        blocks["attention"]["query"]["kernel"],
        blocks["mlp"]["up"]["kernel"],
    ):
        assert kernel.std() == pytest.approx(0.05, rel=0.02)
    for kernel in (blocks["attention"]["out"]["kernel"], blocks["mlp"]["down"]["kernel"]):
        assert kernel.std() == pytest.approx(0.05 / np.sqrt(2 * layers), rel=0.02)
    first, second = blocks["mlp"]["up"]["kernel"][:2]
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.05, "layers start alike"


def test_equal_architectures_are_equal_keys():
    assert hash(architecture_of(64)) == hash(architecture_of(64))
    assert architecture_of(64) == architecture_of(64) != architecture_of(65)
