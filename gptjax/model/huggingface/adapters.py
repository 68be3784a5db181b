"""Low-rank adapters in PEFT's format: adapter_config.json and adapter_model.safetensors.

PEFT has one pair of matrices per module of transformers; we have one pair per linear layer. The two agree where a
module is one layer. GPT-2's module c_attn holds three layers. It is written as one pair whose rank is the sum of the
three ranks and whose B is block diagonal (`rank_pattern`). It is read as three pairs that share A.
"""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.errors import UserError
from gptjax.model import gpt, lora
from gptjax.model.architecture import Architecture
from gptjax.model.huggingface import adapter_config, files, layouts
from gptjax.model.huggingface.adapter_config import CONFIG
from gptjax.model.huggingface.layouts import LAYER, Layout, TensorMap
from gptjax.model.huggingface.weights import HEAD, insert, listed, lookup, not_finite

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."


def write_adapter(directory: Path, a: Architecture, params: gpt.Params, *, base: str | None) -> None:
    """Writes the adapters among the parameters; `base` names the model that they belong to.

    Raises UserError for a model without adapters, and for a model that fits no layout.
    """
    if not a.lora_rank:
        raise UserError("the model has no adapters (model.lora_rank is 0); export it whole with --to=hf:DIR")
    _, layout = layouts.exportable(dataclasses.replace(a, lora_rank=0))
    ranks, tensors = {}, {}
    for tensor, parts in _modules(layout, params):
        module = tensor.name.removesuffix(".weight")
        adapted = [lookup(params, f"{part}/lora_a") is not None for part in parts]
        if not any(adapted):
            continue
        ranks[module.partition(f"{LAYER}.")[2]] = a.lora_rank * sum(adapted)
        for layer in range(a.num_layers):
            name = PREFIX + layout.prefix + module.format(layer=layer)
            down, up = _fused(params, parts, layer, a.lora_rank)
            tensors[f"{name}.lora_A.weight"] = np.ascontiguousarray(down.T)
            tensors[f"{name}.lora_B.weight"] = np.ascontiguousarray(up.T)
    other = {module: rank for module, rank in ranks.items() if rank != a.lora_rank}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": a.lora_rank,
        "lora_alpha": a.lora_alpha,
        "lora_dropout": a.lora_dropout,
        "target_modules": sorted(ranks),
        "rank_pattern": {re.escape(module): rank for module, rank in other.items()},
        "alpha_pattern": {re.escape(m): a.lora_alpha * rank / a.lora_rank for m, rank in other.items()},
        "fan_in_fan_out": not any(tensor.transposed for tensor, _ in _modules(layout, params)),
        "inference_mode": True,
        "bias": "none",
        "modules_to_save": None,
    }
    directory.mkdir(parents=True, exist_ok=True)
    files.write_json(directory / CONFIG, config)
    files.write_safetensors(directory / WEIGHTS, tensors)


def read_adapter(directory: Path, a: Architecture, params: gpt.Params) -> tuple[dict[str, Any], gpt.Params]:
    """(options of `config.model`, parameters with adapters). `a` and `params` are those of the base model.

    A layer without an adapter gets zeros. Modules that were trained whole (`modules_to_save`) take the place of the
    base's. Raises UserError for adapters that are not plain LoRA, and one UserError that lists the tensors that do not
    fit.
    """
    # 1. The kind of adapter, before any tensor is read.
    config = adapter_config.read(directory)
    if not (directory / WEIGHTS).exists():
        raise UserError(
            f"{directory / WEIGHTS} is missing; get it again, or where there is a .bin file, save the adapters as "
            "safetensors (PEFT: save_pretrained)"
        )
    # 2. Each module of PEFT becomes one pair per linear layer of ours. All problems are reported together.
    # Tensors are removed from `tensors` when they are found; those that remain belong to no linear layer.
    _, layout = layouts.exportable(a)
    tensors = dict(files.open_safetensors(directory / WEIGHTS))
    found: dict[str, list[tuple[np.ndarray, np.ndarray] | None]] = {}
    problems = []
    for tensor, parts in _modules(layout, params):
        shapes = [lookup(params, f"{part}/kernel").shape for part in parts]
        borders = np.cumsum([shape[-1] for shape in shapes])
        for layer in range(a.num_layers):
            module = layout.prefix + tensor.name.removesuffix(".weight").format(layer=layer)
            pair = [tensors.pop(f"{PREFIX}{module}.lora_{which}.weight", None) for which in "AB"]
            if None in pair:
                problems += [f"{module} has only one of lora_A and lora_B"] if any(pair) else []
                continue
            down, up = (matrix.read().T for matrix in pair)
            if down.ndim != 2 or up.ndim != 2 or not all(matrix.dtype in files.FLOATS for matrix in pair):
                problems.append(f"{module} has adapters that are not matrices of floats")
                continue
            if (down.shape[0], up.shape[1]) != (shapes[0][-2], borders[-1]) or down.shape[1] != up.shape[0]:
                problems.append(
                    f"{module} has {down.shape} and {up.shape}, expected [{shapes[0][-2]}, r] and [r, {borders[-1]}]"
                )
                continue
            if down.shape[1] != config.rank(module):
                problems.append(f"{module} has the rank {down.shape[1]}, and {CONFIG} says {config.rank(module)}")
                continue
            if not_finite(down) or not_finite(up):
                problems.append(f"{module} has NaN or infinite values")
                continue
            # Ranks, and with them the scales, may differ between modules: each scale moves into its B (`up`).
            up = up * np.float32(config.scale(module))
            for part, slice_ in zip(parts, np.split(up, borders[:-1], axis=1), strict=True):
                found.setdefault(part, [None] * a.num_layers)[layer] = down, slice_
    whole = [name.removesuffix(".weight") for name in tensors if ".lora_" not in name]
    if lacking := [m for m in config.modules_to_save or [] if not any(f".{name}".endswith(f".{m}") for name in whole)]:
        raise UserError(
            f"{directory / CONFIG}: modules_to_save={lacking} is not plain LoRA, and {WEIGHTS} has no such tensors; "
            "get the adapters again, or merge them into their base with PEFT (merge_and_unload) and import that"
        )
    params = _with_saved_modules(layout, a, params, tensors, problems)
    problems += [f"{name} does not belong to a linear layer" for name in sorted(tensors)]
    if problems or not found:
        base = f", {config.base_model_name_or_path}" * bool(config.base_model_name_or_path)
        raise UserError(
            f"the adapters in {directory} do not fit the model: {listed(problems or ['no tensors'])}. Open them "
            f"with the base that they were trained on{base}, or merge them into it with PEFT (merge_and_unload)"
        )
    # 3. Layers are stacked, so all get the largest rank; zeros fill up the smaller ones and change nothing.
    rank = max(pair[0].shape[1] for pairs in found.values() for pair in pairs if pair)
    adapters: gpt.Params = {}
    for part, pairs in found.items():
        layers, inputs, outputs = lookup(params, f"{part}/kernel").shape
        down, up = np.zeros((layers, inputs, rank), np.float32), np.zeros((layers, rank, outputs), np.float32)
        for layer, pair in enumerate(pairs):
            if pair:
                down[layer, :, : pair[0].shape[1]], up[layer, : pair[1].shape[0]] = pair
        insert(adapters, f"{part}/lora_a", down)
        insert(adapters, f"{part}/lora_b", up)
    targets = "|".join(sorted(part.removeprefix("blocks/") for part in found))
    dropout = float(config.lora_dropout or 0.0)
    # B already has the scale: lora_alpha = rank gives the factor 1.
    options = {"lora_rank": rank, "lora_alpha": float(rank), "lora_dropout": dropout, "lora_targets": targets}
    return options, lora.join(adapters, params)


def _modules(layout: Layout, params: gpt.Params) -> Iterator[tuple[TensorMap, list[str]]]:
    """The kernels of blocks in the layout, each with the paths of the linear layers that it holds."""
    for tensor in layout.tensors:
        parts = [path.removesuffix("/kernel") for path in tensor.parameters if path.endswith("/kernel")]
        if LAYER in tensor.name and parts and all(lookup(params, f"{part}/kernel") is not None for part in parts):
            yield tensor, parts


def _fused(params: gpt.Params, parts: list[str], layer: int, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """A [in, sum of ranks] and block-diagonal B [sum of ranks, sum of out] for the layers of one module."""
    widths = [lookup(params, f"{part}/kernel").shape[-1] for part in parts]
    downs, ups, start = [], [], 0
    for part, width in zip(parts, widths, strict=True):
        down = lookup(params, f"{part}/lora_a")
        if down is not None:
            up = np.zeros((rank, sum(widths)), np.float32)
            up[:, start : start + width] = lookup(params, f"{part}/lora_b")[layer]
            downs.append(np.asarray(down)[layer])
            ups.append(up)
        start += width
    return np.concatenate(downs, axis=1), np.concatenate(ups, axis=0)


def _with_saved_modules(
    layout: Layout, a: Architecture, params: gpt.Params, tensors: dict[str, files.Tensor], problems: list[str]
) -> gpt.Params:
    """The parameters with the tensors of `modules_to_save` in place of the base's; `tensors` loses them."""
    saved = {}
    for tensor in layout.tensors:
        name = tensor.name if tensor.name == HEAD else layout.prefix + tensor.name
        leaf = lookup(params, tensor.parameters[0])
        if LAYER in name or leaf is None or (found := tensors.pop(f"{PREFIX}{name}", None)) is None:
            continue
        if a.tie_embeddings and tensor.parameters[0] == "embedding/embedding":
            problems.append(f"{name} is in modules_to_save, but embeddings and head of the base are one tensor")
            continue
        array = found.read().T if tensor.transposed else found.read()
        axis = {"embedding/embedding": 0, "head/kernel": 1}.get(tensor.parameters[0])
        wanted = tuple(a.vocab_size if i == axis else size for i, size in enumerate(leaf.shape))
        if array.shape != wanted or not_finite(array):
            problems.append(f"{name} has shape {array.shape}, expected {wanted}, or NaN values")
            continue
        whole = np.zeros(leaf.shape, np.float32)
        whole[tuple(map(slice, wanted))] = array
        saved[tensor.parameters[0]] = whole
    return _replaced(params, saved) if saved else params


def _replaced(params: gpt.Params, leaves: dict[str, np.ndarray], prefix: str = "") -> gpt.Params:
    return {
        name: _replaced(value, leaves, f"{prefix}{name}/")
        if isinstance(value, dict)
        else leaves.get(f"{prefix}{name}", value)
        for name, value in params.items()
    }
