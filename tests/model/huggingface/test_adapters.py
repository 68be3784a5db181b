"""Adapters in PEFT's format, against the peft package where it is installed."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gptjax import config as config_lib
from gptjax.errors import UserError
from gptjax.model import gpt, lora
from gptjax.model.architecture import Architecture
from gptjax.model.huggingface import adapters
from gptjax.model.huggingface import weights as huggingface

LLAMA = {"norm": "rmsnorm", "positions": "rope", "activation": "swiglu", "num_kv_heads": 2, "tie_embeddings": False}
OPTIONS = {
    "gpt2": {
        "norm": "layernorm",
        "positions": "learned",
        "activation": "gelu_tanh",
        "qk_norm": False,
        "use_bias": True,
    },
    "llama": LLAMA | {"qk_norm": False},
    "qwen2": LLAMA | {"qk_norm": False, "qkv_bias": True},
    "qwen3": LLAMA | {"qk_norm": True, "head_dim": 16},
}
TARGETS = ("attention/(query|value)", ".*", "attention/out|mlp/(up|down)")


def adapted_model(layout, targets):
    """(architecture, parameters) with adapters and biases that are not zero."""
    model = config_lib.get_default().model
    model.update(num_layers=2, num_heads=4, embed_dim=32, context_length=24, init_std=0.2, **OPTIONS[layout])
    model.update(lora_rank=3, lora_alpha=6.0, lora_targets=targets)
    a = Architecture.from_config(model, 97)
    params = gpt.initialise(a, jax.random.key(0))

    def moved(path, leaf):
        name = path[-1].key
        noise = 0.2 if name.startswith("lora_") or name == "bias" else 0.0
        return leaf + noise * jax.random.normal(jax.random.key(leaf.size), leaf.shape)

    return a, jax.tree_util.tree_map_with_path(moved, params)


def base(a, params, directory):
    """The model without its adapters, written for transformers; (architecture, parameters)."""
    plain = dataclasses.replace(a, lora_rank=0)
    frozen = lora.split(params)[1] if a.lora_rank else params
    huggingface.write_directory(directory, plain, frozen, eot_id=96)
    return plain, frozen


def logits(a, params, tokens):
    model = gpt.bind(a, jax.tree.map(jnp.asarray, params))
    positions = jnp.tile(jnp.arange(tokens.shape[1]), (len(tokens), 1))
    return np.asarray(model.logits(model.hidden(jnp.asarray(tokens), positions=positions)[0])[..., : a.vocab_size])


def with_options(a, options):
    return dataclasses.replace(a, **options)


@pytest.fixture
def tokens():
    return np.random.default_rng(0).integers(0, 97, (2, 20))


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("layout", OPTIONS)
def test_peft_computes_the_same(layout, targets, tmp_path, tokens):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    a, params = adapted_model(layout, targets)
    base(a, params, tmp_path / "base")
    adapters.write_adapter(tmp_path / "adapter", a, params, base="base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    before = logits(dataclasses.replace(a, lora_rank=0), lora.split(params)[1], tokens)
    expected = logits(a, params, tokens)
    assert np.abs(expected - before).max() > 0.1
    model = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    with torch.no_grad():
        np.testing.assert_allclose(model(torch.tensor(tokens)).logits.numpy(), expected, atol=1e-4)
        merged = model.merge_and_unload()
        np.testing.assert_allclose(merged(torch.tensor(tokens)).logits.numpy(), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "rank_pattern": {"c_fc": 2}, "fan_in_fan_out": True}),
        ("llama", {"target_modules": ["q_proj", "v_proj"], "use_rslora": True}),
        ("qwen3", {"target_modules": "all-linear", "alpha_pattern": {"o_proj": 3}, "layers_to_transform": None}),
        ("qwen2", {"target_modules": ["q_proj", "k_proj", "up_proj"]}),
        ("qwen3", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
        ("llama", {"target_modules": r".*\.(q|v)_proj", "rank_pattern": {r"layers\.1\..*q_proj": 2}}),
        ("gpt2", {"target_modules": ["c_fc"], "exclude_modules": ["c_proj"], "fan_in_fan_out": False}),
    ],
)
def test_adapters_of_peft_come_in(layout, options, tmp_path, tokens):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    plain, params = base(*adapted_model(layout, "attention/query"), tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(model, config).eval()
    with torch.no_grad():  # what was trained whole
        for name, value in model.named_parameters():
            if "modules_to_save" in name:
                value += 0.1 * torch.randn(value.shape)
    model.save_pretrained(tmp_path / "adapter")
    options, adapted = adapters.read_adapter(tmp_path / "adapter", plain, params)
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.numpy()
    assert np.abs(expected - logits(plain, params, tokens)).max() > 1e-2
    np.testing.assert_allclose(logits(with_options(plain, options), adapted, tokens), expected, atol=1e-4)


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("layout", OPTIONS)
def test_round_trip(layout, targets, tmp_path, tokens):
    a, params = adapted_model(layout, targets)
    adapters.write_adapter(tmp_path, a, params, base=None)
    plain = dataclasses.replace(a, lora_rank=0)
    options, again = adapters.read_adapter(tmp_path, plain, lora.split(params)[1])
    read = with_options(plain, options)
    _, abstract = gpt.abstract_model(read)
    assert jax.tree.structure(abstract) == jax.tree.structure(again)
    np.testing.assert_allclose(logits(read, again, tokens), logits(a, params, tokens), atol=1e-4)


def test_adapters_that_do_not_fit_are_listed(tmp_path):
    a, params = adapted_model("llama", "attention/query")
    adapters.write_adapter(tmp_path, a, params, base="some/base")
    tensors = load_file(tmp_path / adapters.WEIGHTS)
    name = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    del tensors[name.format(0, "B")]
    tensors[name.format(1, "A")] = tensors[name.format(1, "A")][:, :7]
    tensors["base_model.model.lm_head.lora_A.weight"] = tensors[name.format(0, "A")]
    save_file(tensors, tmp_path / adapters.WEIGHTS)
    with pytest.raises(UserError) as caught:
        adapters.read_adapter(tmp_path, dataclasses.replace(a, lora_rank=0), lora.split(params)[1])
    message = str(caught.value)
    assert "model.layers.0.self_attn.q_proj has only one of lora_A and lora_B" in message
    assert "model.layers.1.self_attn.q_proj has (7, 3) and (3, 32), expected [32, r] and [r, 32]" in message
    assert "base_model.model.lm_head.lora_A.weight does not belong to a linear layer" in message
    assert message.endswith("trained on, some/base, or merge them into it with PEFT (merge_and_unload)")


def test_what_is_missing_of_adapters_is_told_with_what_to_do(tmp_path):
    a, params = adapted_model("llama", "attention/query")
    adapters.write_adapter(tmp_path, a, params, base=None)
    for name, what in (
        (adapters.WEIGHTS, r"get it again, or .* safetensors \(PEFT: save_pretrained\)"),
        (adapters.CONFIG, "name the directory that PEFT's save_pretrained has written"),
    ):
        (tmp_path / name).unlink()
        with pytest.raises(UserError, match=f"{name} is missing; {what}"):
            adapters.read_adapter(tmp_path, dataclasses.replace(a, lora_rank=0), lora.split(params)[1])


@pytest.mark.parametrize(
    "change",
    [
        {"peft_type": "IA3"},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        *({"init_lora_weights": name} for name in ("pissa", "pissa_niter_4", "olora", "loftq", "corda", "lora_ga")),
        {"bias": "all"},
        {"lora_bias": True},
        {"trainable_token_indices": [1]},
        {"target_parameters": ["x"]},
        {"layer_replication": [[0, 2]]},
        {"megatron_config": {"a": 1}},
        {"alora_invocation_tokens": [1]},
        {"a_field_of_next_year": 3},
    ],
    ids=str,
)
def test_other_kinds_of_adapters_are_refused(change, tmp_path):
    a, params = adapted_model("llama", "attention/query")
    adapters.write_adapter(tmp_path, a, params, base=None)
    config = json.loads((tmp_path / adapters.CONFIG).read_text())
    (tmp_path / adapters.CONFIG).write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=f"{next(iter(change))}.* is not plain LoRA"):
        adapters.read_adapter(tmp_path, dataclasses.replace(a, lora_rank=0), lora.split(params)[1])


def test_a_model_without_adapters_has_none_to_write(tmp_path):
    a, params = adapted_model("llama", "attention/query")
    with pytest.raises(UserError, match="the model has no adapters"):
        adapters.write_adapter(tmp_path, dataclasses.replace(a, lora_rank=0), params, base=None)
