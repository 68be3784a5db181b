"""How families of models are stored by Hugging Face: GPT-2, Llama, Mistral, Qwen2 and Qwen3.

Each layout has one table that says which tensor is which parameter; import, export and LoRA adapters all read it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from gptjax import foreign, json_text
from gptjax.errors import UserError
from gptjax.model.architecture import Architecture
from gptjax.model.huggingface import schemas
from gptjax.model.huggingface.files import CONFIG

LAYER = "{layer}"


@dataclasses.dataclass(frozen=True)
class TensorMap:
    """One tensor of a layout: its name in the file, and our parameter (or parameters, joined on the last axis).

    `transposed`: the file holds [out, in], as torch's Linear does, where our kernel is [in, out].
    """

    name: str
    parameters: tuple[str, ...]
    transposed: bool = False


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one family of models is stored.

    Attributes:
      architectures: the name of the model class in transformers.
      prefix: what the name of every tensor but the head begins with; files of the bare model may lack it.
      tensors: the table.
      schema: what its config.json may hold.
      needs: the values of options that a model must have to be written in this layout.
      read_config: makes model options from a config.json.
      write_config: makes the entries of config.json that give the shape.
    """

    architectures: str
    prefix: str
    tensors: tuple[TensorMap, ...]
    schema: type[schemas.ModelConfig]
    needs: dict[str, tuple[Any, ...]]
    read_config: Callable[[dict[str, Any]], dict[str, Any]]
    write_config: Callable[[Architecture], dict[str, Any]]


def find(raw: Any, place: str) -> Layout:
    """The layout of a config.json, which is checked against its schema. Raises UserError that lists the layouts."""
    kind = foreign.check(_Kind, raw, place).model_type
    if kind not in LAYOUTS:
        raise UserError(
            f"{place}: model_type {(kind or 'null')[:60]!r} is not supported; these are: {', '.join(LAYOUTS)}"
        )
    foreign.check(LAYOUTS[kind].schema, raw, place)
    return LAYOUTS[kind]


class _Kind(foreign.Schema):
    model_type: str | None = None


def exportable(a: Architecture) -> tuple[str, Layout]:
    """(name, layout) that has all options of a model. Raises UserError that names the options no layout has."""
    reasons = []
    for name, layout in LAYOUTS.items():
        wrong = [f"{key}={getattr(a, key)!r}" for key, some in layout.needs.items() if getattr(a, key) not in some]
        if name == "gpt2" and a.head_dim * a.num_heads != a.embed_dim:
            wrong.append(f"head_dim={a.head_dim}")
        if name == "gpt2" and a.num_kv_heads != a.num_heads:
            wrong.append(f"num_kv_heads={a.num_kv_heads}")
        if name == "llama" and a.embed_dim % a.num_heads:  # transformers 5 refuses this in Llama only
            wrong.append(f"embed_dim={a.embed_dim} with num_heads={a.num_heads}")
        if not wrong:
            return name, layout
        reasons.append(f"  {name} has no {', '.join(wrong)}")
    raise UserError("no Hugging Face layout has all options of this model:\n" + "\n".join(reasons))


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
    _refuse_of_all(raw)
    return {
        "num_layers": _entry(raw, "n_layer"),
        "num_heads": _entry(raw, "n_head"),
        "embed_dim": _entry(raw, "n_embd"),
        "mlp_dim": raw.get("n_inner") or 4 * _entry(raw, "n_embd"),
        "context_length": _entry(raw, "n_positions"),
        "vocab_size": _entry(raw, "vocab_size"),
        "norm": "layernorm",
        "norm_epsilon": _or(raw, "layer_norm_epsilon", 1e-5),
        "activation": _choice(raw, "activation_function", "gelu_new", GPT2_ACTIVATIONS),
        "positions": "learned",
        "qk_norm": False,
        "use_bias": True,
        "qkv_bias": False,
        "tie_embeddings": _or(raw, "tie_word_embeddings", True),
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


# What the classes of transformers assume where config.json lacks an entry.
LLAMA_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28, "head_dim": 128},
}


def _read_llama(raw: dict[str, Any]) -> dict[str, Any]:
    kind = raw["model_type"]
    raw = LLAMA_DEFAULTS[kind] | raw
    _refuse_of_all(raw)
    _refuse(raw, mlp_bias=False)
    if kind != "qwen2":  # the Qwen2 class does not read this entry
        _refuse(raw, attention_bias=False)
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
        "norm_epsilon": _or(raw, "rms_norm_eps", 1e-6),
        "activation": _choice(raw, "hidden_act", "silu", {"silu": "swiglu"}),
        "positions": "rope",
        **_read_rope(raw),
        "sliding_window": _read_window(raw),
        "qk_norm": kind == "qwen3",
        "use_bias": False,
        "qkv_bias": kind == "qwen2",
        "tie_embeddings": _or(raw, "tie_word_embeddings", False),
    }


def _read_rope(raw: dict[str, Any]) -> dict[str, Any]:
    """The rotary options. transformers 5 has them in `rope_parameters`, version 4 in `rope_scaling`, `rope_theta`."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    for entries in (raw, rope):
        _refuse(entries, partial_rotary_factor=1.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "linear", "llama3") or any(isinstance(value, dict) for value in rope.values()):
        raise UserError(
            f"{CONFIG}: rotary scaling {json_text.show(rope, 200)} is not supported; "
            "these are: default, linear, llama3, one for all layers"
        )
    theta = float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0)
    options = {"rope_theta": theta, "rope_scaling": "none" if kind == "default" else kind}
    if kind != "default":
        options["rope_factor"] = float(_entry(rope, "factor"))
    if kind == "llama3":
        options["rope_low_freq_factor"] = float(_entry(rope, "low_freq_factor"))
        options["rope_high_freq_factor"] = float(_entry(rope, "high_freq_factor"))
        options["rope_original_length"] = int(
            raw.get("original_max_position_embeddings")  # transformers 5 prefers this entry
            or rope.get("original_max_position_embeddings")
            or _entry(raw, "max_position_embeddings")
        )
    return options


def _write_rope(a: Architecture) -> dict[str, Any]:
    """The rotary entries for transformers 5 and for version 4, which does not read `rope_parameters`."""
    scaling: dict[str, Any] = {"rope_type": "default" if a.rope_scaling == "none" else a.rope_scaling}
    if a.rope_scaling != "none":
        scaling["factor"] = a.rope_factor
    if a.rope_scaling == "llama3":
        scaling["low_freq_factor"] = a.rope_low_freq_factor
        scaling["high_freq_factor"] = a.rope_high_freq_factor
        scaling["original_max_position_embeddings"] = a.rope_original_length
    return {
        "rope_theta": a.rope_theta,
        "rope_scaling": None if a.rope_scaling == "none" else scaling,
        "rope_parameters": scaling | {"rope_theta": a.rope_theta},
    }


def _read_window(raw: dict[str, Any]) -> int:
    """The sliding window of all layers; 0 = no window. Raises UserError where only some layers have one."""
    layers, window = _entry(raw, "num_hidden_layers"), raw.get("sliding_window") or 0
    if raw["model_type"] == "llama":
        window = 0
    full = 0 if window else layers
    if raw["model_type"].startswith("qwen"):
        full = min(raw["max_window_layers"] or 0, layers) if window and raw.get("use_sliding_window") else layers
    types = raw.get("layer_types") or ["full_attention"] * full + ["sliding_attention"] * (layers - full)
    if len(types) != layers:
        raise UserError(f"{CONFIG}: layer_types has {len(types)} entries, and num_hidden_layers is {layers}")
    if set(types) not in ({"full_attention"}, {"sliding_attention"}):
        raise UserError(
            f"{CONFIG}: attention that differs between layers ({', '.join(sorted(set(types)))[:100]}: layer_types, or "
            "use_sliding_window with max_window_layers) is not supported; all layers must see everything, or all the "
            "same sliding_window"
        )
    return window if types[0] == "sliding_attention" else 0


def _write_decoder(a: Architecture) -> dict[str, Any]:
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
        **_write_rope(a),
    }


def _write_llama(a: Architecture) -> dict[str, Any]:
    return _write_decoder(a) | {"attention_bias": False, "mlp_bias": False}


def _write_mistral(a: Architecture) -> dict[str, Any]:
    return _write_decoder(a) | {"sliding_window": a.sliding_window or None}


def _write_qwen(a: Architecture) -> dict[str, Any]:
    window = {"use_sliding_window": a.sliding_window > 0, "max_window_layers": 0 if a.sliding_window else a.num_layers}
    return _write_mistral(a) | window


# The options that a model must have to be written in a layout. Options of training or computation do not matter.
NEEDS = {
    "logit_softcap": (0.0,),
    "ngram_order": (1,),
    "value_embeddings": (0,),
    "residual_scalars": (False,),
    "attention_gate": (False,),
    "mup_base_width": (0,),
    "sliding_window": (0,),
    "norm_placement": ("pre",),
    "num_experts": (0,),
    "qkv_bias": (False,),
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
MISTRAL_NEEDS = {option: values for option, values in LLAMA_NEEDS.items() if option != "sliding_window"}
QWEN2_NEEDS = MISTRAL_NEEDS | {"qkv_bias": (True,)}
QWEN3_NEEDS = MISTRAL_NEEDS | {"qk_norm": (True,)}

LAYOUTS = {  # a model is written in the first layout that has all its options; Mistral's without a window is Llama's
    "gpt2": Layout(
        "GPT2LMHeadModel", "transformer.", GPT2_TENSORS, schemas.GPT2Config, GPT2_NEEDS, _read_gpt2, _write_gpt2
    ),
    "llama": Layout(
        "LlamaForCausalLM", "model.", LLAMA_TENSORS, schemas.LlamaConfig, LLAMA_NEEDS, _read_llama, _write_llama
    ),
    "mistral": Layout(
        "MistralForCausalLM", "model.", LLAMA_TENSORS, schemas.LlamaConfig, MISTRAL_NEEDS, _read_llama, _write_mistral
    ),
    "qwen2": Layout(
        "Qwen2ForCausalLM", "model.", LLAMA_TENSORS, schemas.LlamaConfig, QWEN2_NEEDS, _read_llama, _write_qwen
    ),
    "qwen3": Layout(
        "Qwen3ForCausalLM", "model.", LLAMA_TENSORS, schemas.LlamaConfig, QWEN3_NEEDS, _read_llama, _write_qwen
    ),
}


def _entry(raw: dict[str, Any], key: str) -> Any:
    if raw.get(key) is None:
        raise UserError(f"{CONFIG} has no {key}")
    return raw[key]


def _or(raw: dict[str, Any], key: str, default: Any) -> Any:
    """null counts as absent."""
    return default if raw.get(key) is None else raw[key]


def _choice(raw: dict[str, Any], key: str, default: str, known: dict[str, str]) -> str:
    value = _or(raw, key, default)
    if value not in known:
        raise UserError(f"{CONFIG}: {key} {value[:60]!r} is not supported; these are: {', '.join(known)}")
    return known[value]


def _refuse_of_all(raw: dict[str, Any]) -> None:
    _refuse(raw, quantization_config=None, is_encoder_decoder=False, pruned_heads={})


def _refuse(raw: dict[str, Any], **expected: Any) -> None:
    """Raises UserError where an entry is present and its value is not the expected one."""
    for key, value in expected.items():
        if raw.get(key, value) not in (value, None):
            told, only = json_text.show(raw[key]), json_text.show(value)
            raise UserError(f"{CONFIG}: {key} is {told}, which is not supported; only {only} is")
