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
from gptjax.model.huggingface import files, layouts
from gptjax.model.huggingface.layouts import LAYER, Layout, TensorMap
from gptjax.model.huggingface.weights import insert, lookup

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# Settings that change the mathematics of an adapter; all of them must be off.
PLAIN = {
    "bias": "none",
    "use_dora": False,
    "lora_bias": False,
    "modules_to_save": None,
    "target_parameters": None,
    "trainable_token_indices": None,
}


def write_adapter(directory: Path, a: Architecture, params: gpt.Params, *, base: str | None) -> None:
    """Writes the adapters among the parameters; `base` names the model that they belong to.

    Raises UserError for a model without adapters, and for a model that no layout holds.
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
        **PLAIN,
    }
    from safetensors.numpy import save_file

    directory.mkdir(parents=True, exist_ok=True)
    files.write_json(directory / CONFIG, config)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def read_adapter(directory: Path, a: Architecture, params: gpt.Params) -> tuple[dict[str, Any], gpt.Params]:
    """(options of `config.model`, parameters with adapters). `a` and `params` are those of the base model.

    A layer without an adapter gets zeros. Raises UserError for adapters that are not plain LoRA, and one UserError
    that lists all tensors that do not fit.
    """
    # 1. The kind of adapter, before any tensor is read.
    raw = files.read_json(directory / CONFIG)
    wrong = [f"{key}={raw[key]!r}" for key, plain in PLAIN.items() if raw.get(key, plain) not in (plain, None, [], {})]
    if raw.get("peft_type") != "LORA" or wrong:
        raise UserError(
            f"{directory / CONFIG}: {raw.get('peft_type')} with {', '.join(wrong) or 'no more'} is not plain LoRA"
        )
    # 2. Each module of PEFT becomes one pair per linear layer of ours. Problems are collected, to be told all at once.
    # Tensors are taken out of `tensors` as they are found: what is left in the end belongs to no linear layer.
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
                problems += [f"  {module} has one of lora_A and lora_B"] if any(pair) else []
                continue
            down, up = (matrix.read().T for matrix in pair)
            if (down.shape[0], up.shape[1]) != (shapes[0][-2], borders[-1]) or down.shape[1] != up.shape[0]:
                problems.append(
                    f"  {module} has {down.shape} and {up.shape}, expected [{shapes[0][-2]}, r] and [r, {borders[-1]}]"
                )
                continue
            # Ranks, and with them the scales, may differ between modules: each scale moves into its B (`up`).
            up = up * _scale(raw, module, down.shape[1])
            for part, slice_ in zip(parts, np.split(up, borders[:-1], axis=1), strict=True):
                found.setdefault(part, [None] * a.num_layers)[layer] = down, slice_
    problems += [f"  {name} does not belong to a linear layer" for name in sorted(tensors)]
    if problems or not found:
        raise UserError(
            f"the adapters in {directory} do not fit the model:\n" + "\n".join(problems or ["  there are none"])
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
    dropout = float(raw.get("lora_dropout") or 0.0)
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


def _scale(raw: dict[str, Any], module: str, rank: int) -> float:
    """alpha / r of a module, or alpha / sqrt(r) (rank-stabilised); patterns are matched as in PEFT."""
    alpha = raw.get("lora_alpha", 8)
    for pattern, value in (raw.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return alpha / (rank**0.5 if raw.get("use_rslora") else rank)
