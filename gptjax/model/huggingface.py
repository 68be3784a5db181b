"""Parameters and configs to and from Hugging Face directories: GPT-2, Llama and Qwen3 layouts, without torch.

One table a layout says which tensor is which parameter; import and export both read it. Only safetensors files are
read: the older pickle files can run code when they are opened.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.config import Config, get_default
from gptjax.errors import UserError
from gptjax.model import gpt
from gptjax.model.architecture import Architecture

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
LAYER = "{layer}"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a layout: its name there, the parameter (or parameters, joined on the last axis) here.

    `transposed`: torch's Linear keeps [out, in] where a kernel is [in, out].
    """

    name: str
    parameters: tuple[str, ...]
    transposed: bool = False


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one family of models is stored."""

    architectures: str
    prefix: str  # of every name but the head's; may be missing in files of the bare model
    tensors: tuple[Tensor, ...]
    read_config: Callable[[dict[str, Any]], dict[str, Any]]
    write_config: Callable[[Architecture], dict[str, Any]]


def read_directory(directory: Path) -> tuple[Config, gpt.Params]:
    """A config whose model section is that of the directory, and its parameters as float32 NumPy arrays.

    Raises UserError for an unsupported architecture, weights in pickle files only, and tensors that are missing,
    left over or of another shape (all of them are listed).
    """
    raw = _read_json(directory / CONFIG)
    layout = _layout(raw, directory)
    config = get_default()
    config.model.update(layout.read_config(raw))
    config.tokenizer = f"hf:{directory}"
    architecture = Architecture.from_config(config.model, config.model.vocab_size)
    return config, to_params(layout, architecture, _open_weights(directory))


def to_params(layout: Layout, architecture: Architecture, weights: dict[str, np.ndarray]) -> gpt.Params:
    """Parameters of the stacked tree from the tensors of a layout."""
    _, abstract = gpt.abstract_model(architecture)
    weights = {_without_prefix(layout, name): value for name, value in weights.items() if not _is_buffer(name)}
    if architecture.tie_embeddings:
        weights.pop("lm_head.weight", None)
    problems, flat, used = [], {}, set()
    for tensor in _present(layout, abstract):
        shapes = [_lookup(abstract, path).shape for path in tensor.parameters]
        layers = range(architecture.num_layers) if LAYER in tensor.name else [None]
        arrays = []
        for layer in layers:
            name = tensor.name.format(layer=layer)
            used.add(name)
            if name not in weights:
                problems.append(f"  {name} is missing")
                continue
            array = np.asarray(weights[name], np.float32)
            array = array.T if tensor.transposed else array
            wanted = _joined_shape(architecture, tensor, shapes)
            if array.shape != wanted:
                problems.append(f"  {name} has shape {array.shape}, expected {wanted}")
            arrays.append(array)
        if not problems:
            joined = np.stack(arrays) if LAYER in tensor.name else arrays[0]
            widths = np.cumsum([shape[-1] for shape in shapes])[:-1]
            for path, part in zip(tensor.parameters, np.split(joined, widths, axis=-1), strict=True):
                flat[path] = _padded(part, path, architecture)
    problems += [f"  {name} is not part of the layout" for name in sorted(set(weights) - used)]
    if problems:
        raise UserError(f"the {layout.architectures} weights do not fit their config:\n" + "\n".join(problems))
    return _unflatten(flat)


def write_directory(directory: Path, architecture: Architecture, params: gpt.Params, *, eot_id: int | None) -> None:
    """Writes config.json and model.safetensors in the layout that has all options of this model.

    Raises UserError naming the options that no layout has.
    """
    from safetensors.numpy import save_file

    name, layout = _exportable(architecture)
    directory.mkdir(parents=True, exist_ok=True)
    config = {"architectures": [layout.architectures], "model_type": name, "dtype": "float32"}
    config |= {"vocab_size": architecture.vocab_size, "tie_word_embeddings": architecture.tie_embeddings}
    config |= {"bos_token_id": eot_id, "eos_token_id": eot_id, **layout.write_config(architecture)}
    weights = to_weights(layout, architecture, params)
    save_file(weights, directory / WEIGHTS, metadata={"format": "pt"})
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    generation = {"bos_token_id": eot_id, "eos_token_id": eot_id}
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def to_weights(layout: Layout, architecture: Architecture, params: gpt.Params) -> dict[str, np.ndarray]:
    """The tensors of a layout from parameters: the inverse of `to_params`."""
    weights = {}
    for tensor in _present(layout, params):
        parts = [np.asarray(_lookup(params, path), np.float32) for path in tensor.parameters]
        parts = [_unpadded(part, path, architecture) for part, path in zip(parts, tensor.parameters, strict=True)]
        joined = np.concatenate(parts, axis=-1)
        name = tensor.name if tensor.name.startswith("lm_head") else layout.prefix + tensor.name
        for layer, array in enumerate(joined) if LAYER in name else [(None, joined)]:
            weights[name.format(layer=layer)] = np.ascontiguousarray(array.T if tensor.transposed else array)
    return weights


# ---- The layouts ---------------------------------------------------------------------------------------------------


def _norm(name: str, path: str) -> tuple[Tensor, ...]:
    return Tensor(f"{name}.weight", (f"{path}/scale",)), Tensor(f"{name}.bias", (f"{path}/bias",))


def _gpt2_linear(name: str, *paths: str) -> tuple[Tensor, ...]:
    """GPT-2's Conv1D keeps [in, out], like a kernel; queries, keys and values are one tensor."""
    kernels, biases = (tuple(f"{path}/{leaf}" for path in paths) for leaf in ("kernel", "bias"))
    return Tensor(f"{name}.weight", kernels), Tensor(f"{name}.bias", biases)


def _llama_linear(name: str, path: str) -> tuple[Tensor, ...]:
    weight = Tensor(f"{name}.weight", (f"{path}/kernel",), transposed=True)
    return weight, Tensor(f"{name}.bias", (f"{path}/bias",))


ATTENTION, MLP = "blocks/attention", "blocks/mlp"

GPT2_TENSORS = (
    Tensor("wte.weight", ("embedding/embedding",)),
    Tensor("wpe.weight", ("position_embedding/embedding",)),
    *_norm("h.{layer}.ln_1", "blocks/attention_norm"),
    *_gpt2_linear("h.{layer}.attn.c_attn", f"{ATTENTION}/query", f"{ATTENTION}/key", f"{ATTENTION}/value"),
    *_gpt2_linear("h.{layer}.attn.c_proj", f"{ATTENTION}/out"),
    *_norm("h.{layer}.ln_2", "blocks/mlp_norm"),
    *_gpt2_linear("h.{layer}.mlp.c_fc", f"{MLP}/up"),
    *_gpt2_linear("h.{layer}.mlp.c_proj", f"{MLP}/down"),
    *_norm("ln_f", "final_norm"),
    Tensor("lm_head.weight", ("head/kernel",), transposed=True),
)

LLAMA_TENSORS = (
    Tensor("embed_tokens.weight", ("embedding/embedding",)),
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
    Tensor("lm_head.weight", ("head/kernel",), transposed=True),
)

GPT2_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}


def _read_gpt2(raw: dict[str, Any]) -> dict[str, Any]:
    _refuse(raw, scale_attn_by_inverse_layer_idx=False, scale_attn_weights=True)
    return {
        "num_layers": raw["n_layer"],
        "num_heads": raw["n_head"],
        "embed_dim": raw["n_embd"],
        "mlp_dim": raw.get("n_inner") or 4 * raw["n_embd"],
        "context_length": raw["n_positions"],
        "vocab_size": raw["vocab_size"],
        "norm": "layernorm",
        "norm_epsilon": raw.get("layer_norm_epsilon", 1e-5),
        "activation": _choice(raw, "activation_function", "gelu_new", GPT2_ACTIVATIONS),
        "positions": "learned",
        "qk_norm": False,
        "use_bias": True,
        "tie_embeddings": raw.get("tie_word_embeddings", True),
    }


def _write_gpt2(a: Architecture) -> dict[str, Any]:
    activation = next(name for name, ours in GPT2_ACTIVATIONS.items() if ours == a.activation)
    return {
        "n_layer": a.num_layers,
        "n_head": a.num_heads,
        "n_embd": a.embed_dim,
        "n_inner": a.mlp_dim,
        "n_positions": a.context_length,
        "layer_norm_epsilon": a.norm_epsilon,
        "activation_function": activation,
    }


def _read_llama(raw: dict[str, Any]) -> dict[str, Any]:
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise UserError(f"{CONFIG}: rotary scaling {rope} is not supported; only plain rotary positions are")
    _refuse(raw, attention_bias=False, mlp_bias=False, use_sliding_window=False, pretraining_tp=1)
    heads = raw["num_attention_heads"]
    return {
        "num_layers": raw["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": raw.get("num_key_value_heads") or heads,
        "embed_dim": raw["hidden_size"],
        "head_dim": raw.get("head_dim") or raw["hidden_size"] // heads,
        "mlp_dim": raw["intermediate_size"],
        "context_length": raw["max_position_embeddings"],
        "vocab_size": raw["vocab_size"],
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


LAYOUTS = {
    "gpt2": Layout("GPT2LMHeadModel", "transformer.", GPT2_TENSORS, _read_gpt2, _write_gpt2),
    "llama": Layout("LlamaForCausalLM", "model.", LLAMA_TENSORS, _read_llama, _write_llama),
    "qwen3": Layout("Qwen3ForCausalLM", "model.", LLAMA_TENSORS, _read_llama, _write_llama),
}


# What a model must be to be written in a layout.
NEEDS = {"logit_softcap": (0.0,), "ngram_order": (1,)}
GPT2_NEEDS = NEEDS | {
    "norm": ("layernorm",),
    "positions": ("learned",),
    "activation": tuple(GPT2_ACTIVATIONS.values()),
    "qk_norm": (False,),
    "use_bias": (True,),
}
LLAMA_NEEDS = NEEDS | {
    "norm": ("rmsnorm",),
    "positions": ("rope",),
    "activation": ("swiglu",),
    "use_bias": (False,),
}
EXPORTABLE = {
    "gpt2": GPT2_NEEDS,
    "llama": LLAMA_NEEDS | {"qk_norm": (False,)},
    "qwen3": LLAMA_NEEDS | {"qk_norm": (True,)},
}


def _exportable(architecture: Architecture) -> tuple[str, Layout]:
    reasons = []
    for name, needs in EXPORTABLE.items():
        wrong = [
            f"{key}={getattr(architecture, key)!r}"
            for key, allowed in needs.items()
            if getattr(architecture, key) not in allowed
        ]
        if name == "gpt2" and architecture.head_dim * architecture.num_heads != architecture.embed_dim:
            wrong.append(f"head_dim={architecture.head_dim}")
        if name == "gpt2" and architecture.num_kv_heads != architecture.num_heads:
            wrong.append(f"num_kv_heads={architecture.num_kv_heads}")
        if not wrong:
            return name, LAYOUTS[name]
        reasons.append(f"  {name} has no {', '.join(wrong)}")
    raise UserError("no Hugging Face layout holds this model:\n" + "\n".join(reasons))


# ---- Files ---------------------------------------------------------------------------------------------------------


def _layout(raw: dict[str, Any], directory: Path) -> Layout:
    kind = raw.get("model_type")
    if kind not in LAYOUTS:
        raise UserError(f"{directory / CONFIG}: model_type {kind!r} is not supported; these are: {', '.join(LAYOUTS)}")
    return LAYOUTS[kind]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except OSError:
        raise UserError(f"{path} is missing; expected a Hugging Face model directory") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None


def _open_weights(directory: Path) -> dict[str, np.ndarray]:
    """All tensors of a directory, from one file or the shards that the index lists."""
    files = [directory / WEIGHTS]
    if (directory / INDEX).exists():
        files = sorted({directory / name for name in _read_json(directory / INDEX)["weight_map"].values()})
    missing = [file.name for file in files if not file.exists()]
    if missing:
        pickles = [file.name for file in directory.glob("*.bin")]
        reason = f"it has only {', '.join(pickles)}, pickle files that can run code when opened; " if pickles else ""
        raise UserError(f"{directory}: {', '.join(missing)} is missing; {reason}save the model as safetensors")
    weights = {}
    for file in files:
        weights.update(_read_safetensors(file))
    return weights


def _read_safetensors(file: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors as float32. bfloat16, which NumPy lacks, is read through ml_dtypes."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="flax") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                yield name, np.asarray(tensors.get_tensor(name), np.float32)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged: {error}") from None


# ---- Trees and names -----------------------------------------------------------------------------------------------


def _present(layout: Layout, params: gpt.Params) -> list[Tensor]:
    """The tensors whose parameters this model has (no bias, no separate head, ... otherwise)."""
    return [t for t in layout.tensors if all(_lookup(params, path) is not None for path in t.parameters)]


def _lookup(params: gpt.Params, path: str) -> Any:
    for key in path.split("/"):
        params = params.get(key) if isinstance(params, dict) else None
    return params


def _unflatten(flat: dict[str, np.ndarray]) -> gpt.Params:
    tree: gpt.Params = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[leaf] = value
    return tree


def _without_prefix(layout: Layout, name: str) -> str:
    return name.removeprefix(layout.prefix)


def _is_buffer(name: str) -> bool:
    """Constants that older versions of transformers saved beside the weights."""
    return name.endswith((".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq"))


def _joined_shape(a: Architecture, tensor: Tensor, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    shape = list(shapes[0][1:] if LAYER in tensor.name else shapes[0])
    shape[-1] = sum(s[-1] for s in shapes)
    if (axis := _vocab_axis(tensor.parameters[0])) is not None:
        shape[axis] = a.vocab_size
    return tuple(shape)


def _vocab_axis(path: str) -> int | None:
    return {"embedding/embedding": 0, "head/kernel": 1}.get(path)


def _padded(array: np.ndarray, path: str, a: Architecture) -> np.ndarray:
    if (axis := _vocab_axis(path)) is None:
        return array
    padding = [(0, 0)] * array.ndim
    padding[axis] = (0, a.padded_vocab_size - a.vocab_size)
    return np.pad(array, padding)


def _unpadded(array: np.ndarray, path: str, a: Architecture) -> np.ndarray:
    axis = _vocab_axis(path)
    return array if axis is None else np.take(array, range(a.vocab_size), axis=axis)


def _choice(raw: dict[str, Any], key: str, default: str, known: dict[str, str]) -> str:
    value = raw.get(key, default)
    if value not in known:
        raise UserError(f"{CONFIG}: {key} {value!r} is not supported; these are: {', '.join(known)}")
    return known[value]


def _refuse(raw: dict[str, Any], **expected: Any) -> None:
    for key, value in expected.items():
        if raw.get(key, value) != value:
            raise UserError(f"{CONFIG}: {key}={raw[key]!r} is not supported; only {value!r} is")
