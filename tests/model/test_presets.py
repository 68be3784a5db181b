"""Presets have the published numbers of parameters, the shapes of transformers' own, and can be exported."""

import subprocess
import sys

import pytest

from gptjax import config as config_lib
from gptjax.model import gpt, presets
from gptjax.model.architecture import Architecture
from gptjax.model.huggingface import layouts
from gptjax.model.huggingface import weights as huggingface

MODEL_TYPES = {
    "gpt2": "gpt2",
    "llama": "llama",
    "llama2": "llama",
    "llama3": "llama",
    "llama3.2": "llama",
    "mistral": "mistral",
    "qwen2.5": "qwen2",
    "qwen3": "qwen3",
}


def architecture(name: str) -> Architecture:
    model = config_lib.get_default().model
    model.update(presets.get(name), vocab_multiple=1)
    return Architecture.from_config(model, 1000)


def test_every_preset_has_a_published_count():
    assert presets.PRESETS.keys() == presets.PUBLISHED_PARAMETERS.keys()


@pytest.mark.parametrize("name", presets.PRESETS)
def test_the_number_of_parameters_is_the_published_one(name):
    assert gpt.parameter_count(gpt.abstract_model(architecture(name))[1]) == presets.PUBLISHED_PARAMETERS[name]


@pytest.mark.parametrize("name", presets.PRESETS)
def test_transformers_makes_the_same_shapes(name):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    a = architecture(name)
    kind, layout = layouts.exportable(a)
    assert kind == MODEL_TYPES[name.partition("-")[0]]
    options = layout.write_config(a) | {"vocab_size": a.vocab_size, "tie_word_embeddings": a.tie_embeddings}
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **options))
    assert sum(p.numel() for p in model.parameters()) == presets.PUBLISHED_PARAMETERS[name]


PUBLISHED = {  # what the config.json of the hub says of the computation
    # Qwen/Qwen2.5-0.5B
    "qwen2.5-0.5b": """
        {"model_type": "qwen2", "hidden_act": "silu", "hidden_size": 896, "intermediate_size": 4864,
        "max_position_embeddings": 32768, "max_window_layers": 24, "num_attention_heads": 14, "num_hidden_layers": 24,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
        "tie_word_embeddings": true, "use_mrope": false, "use_sliding_window": false, "vocab_size": 151936}""",
    # meta-llama/Llama-3.2-1B
    "llama3.2-1b": """
        {"model_type": "llama", "attention_bias": false, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
        "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": false, "num_attention_heads": 32,
        "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "rope_theta": 500000.0, "tie_word_embeddings": true, "vocab_size": 128256}""",
    # mistralai/Mistral-7B-v0.1
    "mistral-7b": """
        {"model_type": "mistral", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
        "tie_word_embeddings": false, "vocab_size": 32000}""",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_read_as_the_preset(name, tmp_path):
    (tmp_path / "config.json").write_text(PUBLISHED[name])
    model = config_lib.get_default().model
    model.update(huggingface.read_config(tmp_path), vocab_multiple=1)
    assert Architecture.from_config(model, 0) == architecture(name)


@pytest.mark.parametrize("depth", [1, 4, 12])
def test_the_modern_preset_is_in_the_layout_of_qwen3(depth):
    a = architecture(f"modern-d{depth}")
    assert layouts.exportable(a)[0] == "qwen3"
    assert (a.embed_dim, a.num_heads, a.head_dim) == (64 * depth, depth, 64)


@pytest.mark.parametrize("name", ["gpt2", "modern-d0", "modern-dx", ""])
def test_an_unknown_name_lists_the_presets(name):
    with pytest.raises(ValueError, match=r"unknown preset .*gpt2-124m, .*modern-dDEPTH"):
        presets.get(name)


def test_presets_set_every_option_of_the_architecture():
    """A preset overrides all options that the config had before."""
    changed = config_lib.get_default().model
    changed.update(logit_softcap=30.0, ngram_order=3, sliding_window=8, norm_placement="post", head_dim=7)
    changed.update(qkv_bias=True, rope_scaling="linear", rope_factor=2.0, rope_low_freq_factor=2.0)
    changed.update(rope_high_freq_factor=8.0, rope_original_length=64)
    for name in [*presets.PRESETS, "modern-d4"]:
        default = config_lib.get_default().model
        default.update(presets.get(name))
        changed.update(presets.get(name))
        assert changed == default


def test_a_config_file_with_a_preset_does_not_import_jax():
    code = "import sys; from gptjax import config; from gptjax.model import presets; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
