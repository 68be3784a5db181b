"""Presets have the published numbers of parameters, the shapes of transformers' own, and can be exported."""

import subprocess
import sys

import pytest

from gptjax import config as config_lib
from gptjax.model import gpt, presets
from gptjax.model import huggingface_layouts as layouts
from gptjax.model.architecture import Architecture

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
    """A config that had other options before becomes the preset."""
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
