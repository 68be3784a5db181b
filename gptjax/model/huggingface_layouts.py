"""How families of models are stored by Hugging Face: GPT-2, Llama and Qwen3.

One table a layout says which tensor is which parameter; import, export and LoRA adapters all read it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from gptjax.errors import UserError
from gptjax.model.architecture import Architecture
from gptjax.model.huggingface_files import CONFIG

LAYER = "{layer}"


@dataclasses.dataclass(frozen=True)
class TensorMap:
    """One tensor of a layout: its name there, the parameter (or parameters, joined on the last axis) here.

    `transposed`: torch's Linear keeps [out, in] where a kernel is [in, out].
    """

    name: str
    parameters: tuple[str, ...]
    transposed: bool = False


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one family of models is stored.

    Attributes:
      architectures: the class of transformers.
      prefix: of every tensor but the head's; may be missing in files of the bare model.
      tensors: the table.
      needs: the values of options that a model must have to be written in this layout.
      read_config: options of the model from a config.json.
      write_config: the entries of a config.json that say the shape.
    """

    architectures: str
    prefix: str
    tensors: tuple[TensorMap, ...]
    needs: dict[str, tuple[Any, ...]]
    read_config: Callable[[dict[str, Any]], dict[str, Any]]
    write_config: Callable[[Architecture], dict[str, Any]]


def find(raw: dict[str, Any], place: str) -> Layout:
    """The layout of a config.json. Raises UserError that names those there are."""
    kind = raw.get("model_type")
    if kind not in LAYOUTS:
        raise UserError(f"{place}: model_type {kind!r} is not supported; these are: {', '.join(LAYOUTS)}")
    return LAYOUTS[kind]


def exportable(a: Architecture) -> tuple[str, Layout]:
    """The layout that has all options of a model, with its name. Raises UserError naming those that no layout has."""
    reasons = []
    for name, layout in LAYOUTS.items():
        wrong = [f"{key}={getattr(a, key)!r}" for key, some in layout.needs.items() if getattr(a, key) not in some]
        if name == "gpt2" and a.head_dim * a.num_heads != a.embed_dim:
            wrong.append(f"head_dim={a.head_dim}")
        if name == "gpt2" and a.num_kv_heads != a.num_heads:
            wrong.append(f"num_kv_heads={a.num_kv_heads}")
        if not wrong:
            return name, layout
        reasons.append(f"  {name} has no {', '.join(wrong)}")
    raise UserError("no Hugging Face layout holds this model:\n" + "\n".join(reasons))


def _norm(name: str, path: str) -> tuple[TensorMap, ...]:
    return TensorMap(f"{name}.weight", (f"{path}/scale",)), TensorMap(f"{name}.bias", (f"{path}/bias",))


def _gpt2_linear(name: str, *paths: str) -> tuple[TensorMap, ...]:
    """GPT-2's Conv1D keeps [in, out], like a kernel; queries, keys and values are one tensor."""
    kernels, biases = (tuple(f"{path}/{leaf}" for path in paths) for leaf in ("kernel", "bias"))
    return TensorMap(f"{name}.weight", kernels), TensorMap(f"{name}.bias", biases)


def _llama_linear(name: str, path: str) -> tuple[TensorMap, ...]:
    weight = TensorMap(f"{name}.weight", (f"{path}/kernel",), transposed=True)
    return weight, TensorMap(f"{name}.bias", (f"{path}/bias",))


ATTENTION, MLP = "blocks/attention", "blocks/mlp"

GPT2_TENSORS = (
    TensorMap("wte.weight", ("embedding/embedding",)),
    TensorMap("wpe.weight", ("position_embedding/embedding",)),
    *_norm("h.{layer}.ln_1", "blocks/attention_norm"),
    *_gpt2_linear("h.{layer}.attn.c_attn", f"{ATTENTION}/query", f"{ATTENTION}/key", f"{ATTENTION}/value"),
    *_gpt2_linear("h.{layer}.attn.c_proj", f"{ATTENTION}/out"),
    *_norm("h.{layer}.ln_2", "blocks/mlp_norm"),
    *_gpt2_linear("h.{layer}.mlp.c_fc", f"{MLP}/up"),
    *_gpt2_linear("h.{layer}.mlp.c_proj", f"{MLP}/down"),
    *_norm("ln_f", "final_norm"),
    TensorMap("lm_head.weight", ("head/kernel",), transposed=True),
)

LLAMA_TENSORS = (
    TensorMap("embed_tokens.weight", ("embedding/embedding",)),
    *_norm("layers.{layer}.input_layernorm", "blocks/attention_norm"),
    *_llama_linear("layers.{layer}.self_attn.q_proj", f"{ATTENTION}/query"),
    *_llama_linear("layers.{layer}.self_attn.k_proj", f"{ATTENTION}/key"),
    *_llama_linear("layers.{layer}.self_attn.v_proj", f"{ATTENTION}/value"),
    *_llama_linear("layers.{layer}.self_attn.o_proj", f"{ATTENTION}/out"),
    *_norm("layers.{layer}.self_attn.q_norm", f"{ATTENTION}/query_norm"),
    *_norm("layers.{layer}.self_attn.k_norm", f"{ATTENTION}/key_norm"),
    *_norm("layers.{layer}.post_attention_layernorm", "blocks/mlp_norm"),
    *_llama_linear("layers.{layer}.mlp.gate_proj", f"{MLP}/gate"),
    *_llama_linear("layers.{layer}.mlp.up_proj", f"{MLP}/up"),
    *_llama_linear("layers.{layer}.mlp.down_proj", f"{MLP}/down"),
    *_norm("norm", "final_norm"),
    TensorMap("lm_head.weight", ("head/kernel",), transposed=True),
)

GPT2_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}


def _read_gpt2(raw: dict[str, Any]) -> dict[str, Any]:
    _refuse(raw, scale_attn_by_inverse_layer_idx=False, scale_attn_weights=True, add_cross_attention=False)
    _refuse(raw, quantization_config=None)
    return {
        "num_layers": _entry(raw, "n_layer"),
        "num_heads": _entry(raw, "n_head"),
        "embed_dim": _entry(raw, "n_embd"),
        "mlp_dim": raw.get("n_inner") or 4 * _entry(raw, "n_embd"),
        "context_length": _entry(raw, "n_positions"),
        "vocab_size": _entry(raw, "vocab_size"),
        "norm": "layernorm",
        "norm_epsilon": raw.get("layer_norm_epsilon", 1e-5),
        "activation": _choice(raw, "activation_function", "gelu_new", GPT2_ACTIVATIONS),
        "positions": "learned",
        "qk_norm": False,
        "use_bias": True,
        "tie_embeddings": raw.get("tie_word_embeddings", True),
    }


def _write_gpt2(a: Architecture) -> dict[str, Any]:
    return {
        "n_layer": a.num_layers,
        "n_head": a.num_heads,
        "n_embd": a.embed_dim,
        "n_inner": a.mlp_dim,
        "n_positions": a.context_length,
        "layer_norm_epsilon": a.norm_epsilon,
        "activation_function": next(name for name, ours in GPT2_ACTIVATIONS.items() if ours == a.activation),
        "embd_pdrop": a.dropout,
        "resid_pdrop": a.dropout,
        "attn_pdrop": 0.0,
    }


def _read_llama(raw: dict[str, Any]) -> dict[str, Any]:
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise UserError(f"{CONFIG}: rotary scaling {rope} is not supported; only plain rotary positions are")
    for entries in (raw, rope):
        _refuse(entries, partial_rotary_factor=1.0)
    _refuse(raw, attention_bias=False, mlp_bias=False, use_sliding_window=False, quantization_config=None)
    heads = _entry(raw, "num_attention_heads")
    return {
        "num_layers": _entry(raw, "num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": raw.get("num_key_value_heads") or heads,
        "embed_dim": _entry(raw, "hidden_size"),
        "head_dim": raw.get("head_dim") or _entry(raw, "hidden_size") // heads,
        "mlp_dim": _entry(raw, "intermediate_size"),
        "context_length": _entry(raw, "max_position_embeddings"),
        "vocab_size": _entry(raw, "vocab_size"),
        "norm": "rmsnorm",
        "norm_epsilon": raw.get("rms_norm_eps", 1e-6),
        "activation": _choice(raw, "hidden_act", "silu", {"silu": "swiglu"}),
        "positions": "rope",
        "rope_theta": float(rope.get("rope_theta", raw.get("rope_theta", 10000.0))),
        "qk_norm": raw["model_type"] == "qwen3",
        "use_bias": False,
        "tie_embeddings": raw.get("tie_word_embeddings", False),
    }


def _write_llama(a: Architecture) -> dict[str, Any]:
    return {
        "num_hidden_layers": a.num_layers,
        "num_attention_heads": a.num_heads,
        "num_key_value_heads": a.num_kv_heads,
        "hidden_size": a.embed_dim,
        "head_dim": a.head_dim,
        "intermediate_size": a.mlp_dim,
        "max_position_embeddings": a.context_length,
        "rms_norm_eps": a.norm_epsilon,
        "hidden_act": "silu",
        "rope_theta": a.rope_theta,
        "attention_bias": False,
        "mlp_bias": False,
    }


# What a model must be to be written in a layout. Options that only say how to train or to compute are not named.
NEEDS = {
    "logit_softcap": (0.0,),
    "ngram_order": (1,),
    "sliding_window": (0,),
    "norm_placement": ("pre",),
    "num_experts": (0,),
    "lora_rank": (0,),  # adapters are merged first
}
GPT2_NEEDS = NEEDS | {
    "norm": ("layernorm",),
    "positions": ("learned",),
    "activation": tuple(dict.fromkeys(GPT2_ACTIVATIONS.values())),
    "qk_norm": (False,),
    "use_bias": (True,),
}
LLAMA_NEEDS = NEEDS | {
    "norm": ("rmsnorm",),
    "positions": ("rope",),
    "activation": ("swiglu",),
    "use_bias": (False,),
    "qk_norm": (False,),
}
QWEN3_NEEDS = LLAMA_NEEDS | {"qk_norm": (True,)}

LAYOUTS = {
    "gpt2": Layout("GPT2LMHeadModel", "transformer.", GPT2_TENSORS, GPT2_NEEDS, _read_gpt2, _write_gpt2),
    "llama": Layout("LlamaForCausalLM", "model.", LLAMA_TENSORS, LLAMA_NEEDS, _read_llama, _write_llama),
    "qwen3": Layout("Qwen3ForCausalLM", "model.", LLAMA_TENSORS, QWEN3_NEEDS, _read_llama, _write_llama),
}


def _entry(raw: dict[str, Any], key: str) -> Any:
    if key not in raw:
        raise UserError(f"{CONFIG} has no {key}")
    return raw[key]


def _choice(raw: dict[str, Any], key: str, default: str, known: dict[str, str]) -> str:
    value = raw.get(key, default)
    if value not in known:
        raise UserError(f"{CONFIG}: {key} {value!r} is not supported; these are: {', '.join(known)}")
    return known[value]


def _refuse(raw: dict[str, Any], **expected: Any) -> None:
    """Raises UserError where an entry that is there says something else than expected."""
    for key, value in expected.items():
        if raw.get(key, value) not in (value, None):
            raise UserError(f"{CONFIG}: {key}={raw[key]!r} is not supported; only {value!r} is")
