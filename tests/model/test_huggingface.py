"""Import and export of Hugging Face directories, against transformers where it is installed."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gptjax import config as config_lib
from gptjax.errors import UserError
from gptjax.model import gpt, huggingface
from gptjax.model.architecture import Architecture

LLAMA = {"norm": "rmsnorm", "positions": "rope", "activation": "swiglu", "num_kv_heads": 2, "qk_norm": False}
OPTIONS = {
    "gpt2": {
        "norm": "layernorm",
        "positions": "learned",
        "activation": "gelu_tanh",
        "qk_norm": False,
        "use_bias": True,
    },
    "llama": LLAMA | {"tie_embeddings": False},
    "qwen3": LLAMA | {"qk_norm": True, "head_dim": 16},
}


def random_model(**options):
    """An architecture with a padded vocabulary, and parameters in which no two tensors are alike."""
    model = config_lib.get_default().model
    model.update(num_layers=2, num_heads=4, embed_dim=32, context_length=24, vocab_multiple=64, init_std=0.2, **options)
    architecture = Architecture.from_config(model, 97)
    params = gpt.initialise(architecture, jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    noise = [leaf + 0.1 * jax.random.normal(jax.random.key(i), leaf.shape) for i, leaf in enumerate(leaves)]
    return architecture, jax.tree.unflatten(tree, noise)


def logits(architecture, params, tokens):
    graphdef, _ = gpt.abstract_model(architecture)
    model = gpt.bind(graphdef, jax.tree.map(jnp.asarray, params))
    positions = jnp.tile(jnp.arange(tokens.shape[1]), (len(tokens), 1))
    return model.logits(model.hidden(jnp.asarray(tokens), positions=positions)[0])[..., : architecture.vocab_size]


def read_directory(directory, **options):
    model = config_lib.get_default().model
    model.update(huggingface.read_config(directory))
    architecture = Architecture.from_config(model, 0)
    return architecture, huggingface.read_parameters(directory, architecture, **options)


@pytest.fixture
def tokens():
    return np.random.default_rng(0).integers(0, 97, (2, 20))


@pytest.mark.parametrize("layout", OPTIONS)
def test_round_trip_keeps_the_logits(layout, tmp_path, tokens):
    architecture, params = random_model(**OPTIONS[layout])
    huggingface.write_directory(tmp_path, architecture, params, eot_id=96)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == layout
    again, read = read_directory(tmp_path)
    np.testing.assert_array_equal(logits(again, read, tokens), logits(architecture, params, tokens))


@pytest.mark.parametrize("layout", OPTIONS)
def test_logits_and_greedy_tokens_are_those_of_transformers(layout, tmp_path, tokens):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    architecture, params = random_model(**OPTIONS[layout])
    huggingface.write_directory(tmp_path, architecture, params, eot_id=96)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.numpy()
    ours = np.asarray(logits(architecture, params, tokens))
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    np.testing.assert_array_equal(ours.argmax(-1), expected.argmax(-1))


def test_sharded_files_and_the_bare_models_names_are_read(tmp_path, tokens):
    """GPT-2's own files have no `transformer.` prefix and carry the causal masks along."""
    architecture, params = random_model(**OPTIONS["gpt2"])
    huggingface.write_directory(tmp_path, architecture, params, eot_id=None)
    weights = {name.removeprefix("transformer."): w for name, w in load_file(tmp_path / "model.safetensors").items()}
    weights["h.0.attn.bias"] = np.tril(np.ones((1, 1, 24, 24), np.float32))
    (tmp_path / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: weights[name] for name in part}, tmp_path / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    again, read = read_directory(tmp_path)
    np.testing.assert_array_equal(logits(again, read, tokens), logits(architecture, params, tokens))


def test_every_tensor_that_does_not_fit_is_listed(tmp_path):
    architecture, params = random_model(**OPTIONS["llama"])
    huggingface.write_directory(tmp_path, architecture, params, eot_id=None)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    weights["model.norm.weight"] = weights["model.norm.weight"][:5]
    weights["model.layers.0.self_attn.rotary"] = weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UserError) as error:
        read_directory(tmp_path)
    assert "layers.1.mlp.up_proj.weight is missing" in str(error.value)
    assert "norm.weight has shape (5,), expected (32,)" in str(error.value)
    assert "layers.0.self_attn.rotary is not part of the layout" in str(error.value)


def test_pickle_files_are_refused(tmp_path):
    architecture, params = random_model(**OPTIONS["gpt2"])
    huggingface.write_directory(tmp_path, architecture, params, eot_id=None)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"only in pytorch_model\.bin: pickle files, which can run code"):
        read_directory(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported; these are: gpt2, llama, qwen3"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rotary scaling"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
    ],
)
def test_an_unsupported_config_is_named(tmp_path, change, message):
    architecture, params = random_model(**OPTIONS["llama"])
    huggingface.write_directory(tmp_path, architecture, params, eot_id=None)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=message):
        read_directory(tmp_path)


def test_a_model_without_a_layout_names_the_options(tmp_path):
    architecture, params = random_model(activation="squared_relu", ngram_order=3, ngram_rows=8)
    with pytest.raises(UserError, match=r"qwen3 has no ngram_order=3, activation='squared_relu'"):
        huggingface.write_directory(tmp_path, architecture, params, eot_id=None)
