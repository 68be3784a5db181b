"""Import and export of Hugging Face directories, against transformers where it is installed."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gptjax import config as config_lib
from gptjax.errors import UserError
from gptjax.model import gpt
from gptjax.model.architecture import Architecture
from gptjax.model.huggingface import files, layouts
from gptjax.model.huggingface import weights as huggingface

# Of four frequencies the first is kept, the last divided, and the others are in between; texts are longer than 12.
SCALED = {"rope_scaling": "llama3", "rope_factor": 4.0, "rope_original_length": 12, "rope_theta": 50.0}
SCALED |= {"rope_low_freq_factor": 0.15, "rope_high_freq_factor": 1.5}
LLAMA = {"norm": "rmsnorm", "positions": "rope", "activation": "swiglu", "num_kv_heads": 2, "qk_norm": False}
OPTIONS = {
    "gpt2": {
        "norm": "layernorm",
        "positions": "learned",
        "activation": "gelu_tanh",
        "qk_norm": False,
        "use_bias": True,
    },
    "llama": LLAMA | {"tie_embeddings": False, "rope_theta": 500.0},
    "llama 3.1": LLAMA | SCALED,
    "llama linear": LLAMA | {"rope_scaling": "linear", "rope_factor": 4.0},
    "mistral": LLAMA | {"tie_embeddings": False, "sliding_window": 7, "head_dim": 16},
    "mistral odd": LLAMA | {"num_heads": 6, "head_dim": 16},
    "qwen2": LLAMA | {"qkv_bias": True, "rope_theta": 500.0},
    "qwen2 window": LLAMA | SCALED | {"qkv_bias": True, "head_dim": 16, "sliding_window": 7, "tie_embeddings": False},
    "qwen3": LLAMA | {"qk_norm": True, "head_dim": 16},
    "qwen3 window": LLAMA | {"qk_norm": True, "sliding_window": 7},
}  # the first word is the layout
SCALES = {"rope_factor", "rope_low_freq_factor", "rope_high_freq_factor", "rope_original_length"}

# What a layout has no entry for, because the default is its only value.
DERIVED = {"gpt2": {"rope_theta", "rope_scaling", "num_kv_heads", "head_dim"}}


def random_model(**options):
    """An architecture with a padded vocabulary, and parameters with no two equal tensors."""
    model = config_lib.get_default().model
    model.update(num_layers=2, num_heads=4, embed_dim=32, context_length=24, vocab_multiple=64, init_std=0.2)
    model.update(options)
    architecture = Architecture.from_config(model, 97)
    params = gpt.initialise(architecture, jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    noise = [leaf + 0.1 * jax.random.normal(jax.random.key(i), leaf.shape) for i, leaf in enumerate(leaves)]
    return architecture, jax.tree.unflatten(tree, noise)


def logits(architecture, params, tokens):
    model = gpt.bind(architecture, jax.tree.map(jnp.asarray, params))
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
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == layout.split()[0]
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
    """GPT-2's own files have no `transformer.` prefix and include the causal masks."""
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


def read_changed(directory, **changes):
    """The options of a config.json with changed entries; None removes one."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return huggingface.read_config(directory)


def test_rotary_scaling_is_read_in_the_words_of_each_time(tmp_path):
    architecture, params = random_model(**OPTIONS["llama 3.1"])
    huggingface.write_directory(tmp_path, architecture, params, eot_id=None)
    written = json.loads((tmp_path / "config.json").read_text())
    expected = huggingface.read_config(tmp_path)
    assert expected.items() >= SCALED.items()
    assert read_changed(tmp_path, rope_scaling=None, rope_theta=None) == expected  # transformers 5
    four = {"rope_parameters": None, "rope_theta": 50.0, "rope_scaling": written["rope_scaling"]}
    assert read_changed(tmp_path, **four) == expected
    four["rope_scaling"]["type"] = four["rope_scaling"].pop("rope_type")
    assert read_changed(tmp_path, **four) == expected
    del four["rope_scaling"]["original_max_position_embeddings"]
    assert read_changed(tmp_path, **four) == expected | {"rope_original_length": 24}  # max_position_embeddings


@pytest.mark.parametrize(
    ("options", "changes", "window"),
    [
        ("qwen2", {"use_sliding_window": False, "sliding_window": 9}, 0),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}, 0),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0}, 9),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 9, "layer_types": ["sliding_attention"] * 2}, 9),
        ("mistral", {"sliding_window": 9}, 9),
        ("mistral", {"sliding_window": None}, 4096),
        ("llama", {"sliding_window": 9}, 0),
    ],
)
def test_the_window_is_that_of_transformers(options, changes, window, tmp_path):
    architecture, params = random_model(**OPTIONS[options])
    huggingface.write_directory(tmp_path, architecture, params, eot_id=None)
    assert read_changed(tmp_path, **changes)["sliding_window"] == window
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    slides = options == "mistral" or "sliding_attention" in (getattr(theirs, "layer_types", None) or [])
    assert window == (theirs.sliding_window if slides else 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported; these are: gpt2, llama, mistral, qwen2, qwen3"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rotary scaling .*yarn.* these are: default, linear, llama3"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rotary scaling .*dynamic"),
        ({"rope_scaling": {"type": "linear"}}, "config.json has no factor"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor is 0.5, which is not supported",
        ),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "one for all layers"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "attention that differs between layers"),
        ({"layer_types": ["chunked_attention"] * 2}, "attention that differs between layers .chunked_attention"),
        ({"model_type": "qwen3", "use_sliding_window": True, "max_window_layers": 1}, "with max_window_layers"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"attention_bias": True}, "attention_bias is true, which is not supported"),
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
    for option, value in {"value_embeddings": 1, "residual_scalars": True, "attention_gate": True}.items():
        architecture, params = random_model(**OPTIONS["llama"] | {option: value})
        with pytest.raises(UserError, match=f"llama has no {option}={value}\n"):
            huggingface.write_directory(tmp_path / option, architecture, params, eot_id=None)


@pytest.mark.parametrize("layout", OPTIONS)
def test_shards_of_bfloat16_are_written_and_read_as_transformers_does(layout, tmp_path, tokens):
    architecture, params = random_model(**OPTIONS[layout])
    rounded = jax.tree.map(lambda a: np.asarray(jnp.asarray(a, jnp.bfloat16), np.float32), params)
    huggingface.write_directory(
        tmp_path, architecture, params, eot_id=96, dtype="bfloat16", max_shard_bytes=files.parse_size("10KB")
    )
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2 and shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    again, read = read_directory(tmp_path)
    expected = logits(architecture, rounded, tokens)
    np.testing.assert_array_equal(logits(again, read, tokens), expected)
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert model.dtype == torch.bfloat16
    with torch.no_grad():
        np.testing.assert_allclose(model.float()(torch.tensor(tokens)).logits.numpy(), expected, atol=1e-4)


def test_half_precision_is_read_exactly(tmp_path):
    architecture, params = random_model(**OPTIONS["llama"])
    huggingface.write_directory(tmp_path, architecture, params, eot_id=None)
    weights = load_file(tmp_path / "model.safetensors")
    halves = {name: value.astype(np.float16) for name, value in weights.items()}
    save_file(halves, tmp_path / "model.safetensors")
    _, read = read_directory(tmp_path)
    scale = halves["model.norm.weight"].astype(np.float32)
    np.testing.assert_array_equal(read["final_norm"]["scale"], scale)


def test_quantised_weights_are_refused(tmp_path):
    architecture, params = random_model(**OPTIONS["llama"])
    huggingface.write_directory(tmp_path, architecture, params, eot_id=None)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].astype(np.int8)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"norm\.weight has dtype I8, expected one of F64, F32, F16, BF16"):
        read_directory(tmp_path)


def test_pickle_files_are_read_where_they_are_asked_for(tmp_path, tokens):
    torch = pytest.importorskip("torch")
    architecture, params = random_model(**OPTIONS["gpt2"])
    huggingface.write_directory(tmp_path, architecture, params, eot_id=None)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save({name: torch.tensor(value) for name, value in weights.items()}, tmp_path / "pytorch_model.bin")
    again, read = read_directory(tmp_path, allow_pickle=True)
    np.testing.assert_array_equal(logits(again, read, tokens), logits(architecture, params, tokens))
    torch.save({"model": architecture}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="holds more than tensors, or is damaged"):
        read_directory(tmp_path, allow_pickle=True)


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({"eos_token_id": 5}, None, {"eos_token_ids": [5]}),
        ({"eos_token_id": 5}, {"eos_token_id": [7, 8]}, {"eos_token_ids": [7, 8]}),
        ({}, {"do_sample": True, "temperature": 0.6, "top_k": 20}, {"temperature": 0.6, "top_k": 20}),
        ({}, {"do_sample": False, "temperature": 0.6}, {}),
    ],
)
def test_generation_config_is_read(tmp_path, config, generation, expected):
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert files.read_generation_config(tmp_path) == expected


def test_generation_config_is_written_whole(tmp_path):
    files.write_generation_config(tmp_path, {"eos_token_ids": [7, 8], "temperature": 0.6}, eot_id=7)
    (tmp_path / "config.json").write_text("{}")
    written = json.loads((tmp_path / "generation_config.json").read_text())
    assert written.keys() == {
        *("bos_token_id", "eos_token_id", "pad_token_id", "do_sample"),
        *("temperature", "top_k", "top_p", "repetition_penalty"),
    }
    assert files.read_generation_config(tmp_path)["eos_token_ids"] == [7, 8]


def test_every_option_of_a_model_is_in_each_layout_or_needed_to_be_off(tmp_path):
    """A new option of the architecture changes what a model computes, unless it is listed here."""
    others = config_lib.affecting("training", "course", "computation")
    of_the_run = {"padded_vocab_size", *(path.removeprefix("model.") for path in others)}
    fields = {field.name for field in dataclasses.fields(Architecture)}
    for name, options in OPTIONS.items():
        layout = layouts.LAYOUTS[name.split()[0]]
        architecture, params = random_model(**options)
        huggingface.write_directory(tmp_path / name, architecture, params, eot_id=None)
        read = huggingface.read_config(tmp_path / name).keys()
        scales = set() if architecture.rope_scaling == "llama3" else SCALES
        of_what_is_off = {"ngram_rows", "experts_per_token"} | scales
        of_the_layout = read | layout.needs.keys() | of_what_is_off | DERIVED.get(name, set())
        assert fields == fields & (of_the_run | of_the_layout)


@pytest.mark.parametrize("text", ["", "GB", "5 apples", "0MB"])
def test_a_size_that_is_none(text):
    with pytest.raises(UserError, match="is not a size"):
        files.parse_size(text)
