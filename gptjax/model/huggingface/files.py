"""The files of a Hugging Face model directory, found on disk or on the hub, read and written without torch."""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gptjax.errors import UserError

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
SHARD = "model-{number:05}-of-{count:05}.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
WRITTEN_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor that is read or computed only when it is needed, so that a model is never in memory twice.

    `dtype` is the type in the file, as safetensors spells it.
    """

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    dtype: str = "F32"


Weights = Mapping[str, Tensor]


def locate(name: str, *, allow_pickle: bool = False) -> Path:
    """The directory of a model. A name on the hub is looked up in the hub's cache, or downloaded.

    Raises UserError where `name` is no directory and the hub's cache and the hub do not give it.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise UserError(f"hf:{name}: there is no such directory")
    from huggingface_hub import snapshot_download

    patterns = [CONFIG, GENERATION_CONFIG, "model*.safetensors", INDEX, *TOKENIZER_FILES]
    patterns += ["adapter_config.json", "adapter_model.safetensors"]
    patterns += ["pytorch_model*.bin", PICKLE_INDEX] if allow_pickle else []
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # no network, unknown name, or no permission
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"hf:{name}: there is no such directory, it is not in the cache of the Hugging Face hub, and the hub did "
            f"not give it ({reason}); where there is a network, `hf download {name}` fetches it"
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{path} is missing; expected a Hugging Face model directory") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ---- Reading -------------------------------------------------------------------------------------------------------


def open_weights(directory: Path, *, allow_pickle: bool = False) -> Weights:
    """The tensors of a directory, from one file or the shards that an index lists; `read` gives float32.

    Pickle files can run code when they are opened. They are read only with `allow_pickle` and where there are no
    other files; torch then reads them as bare tensors (`weights_only`).
    """
    files = _files(directory, WEIGHTS, INDEX)
    missing = [file.name for file in files if not file.exists()]
    if not missing:
        return {name: tensor for file in files for name, tensor in open_safetensors(file).items()}
    pickles = [file for file in _files(directory, PICKLE, PICKLE_INDEX) if file.exists()]
    if not pickles:
        raise UserError(f"{directory}: {', '.join(missing)} is missing; save the model as safetensors")
    if not allow_pickle:
        raise UserError(
            f"{directory} has its weights only in {', '.join(file.name for file in pickles)}: pickle files, which can "
            "run code when they are opened. Save the model as safetensors, or, if you trust where they come from, add "
            "--allow_pickle to `convert` (needs torch)"
        )
    return {name: tensor for file in pickles for name, tensor in _open_pickle(file).items()}


def open_safetensors(file: Path) -> Weights:
    """The tensors of one file. Raises UserError where it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        opened = safe_open(file, framework="np")
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged: {error}") from None

    def reader(name: str) -> Callable[[], np.ndarray]:
        return lambda: np.asarray(opened.get_tensor(name), np.float32)

    return {name: Tensor(tuple(part.get_shape()), reader(name), part.get_dtype()) for name, part in slices.items()}


def _open_pickle(file: Path) -> Weights:
    try:
        import torch
    except ImportError:
        raise UserError(f"{file.name} is read by torch, which is not installed: pip install torch") from None
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the file may hold anything
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{file} holds more than tensors, or is damaged: {reason}") from None
    return {
        name: Tensor(tuple(value.shape), lambda value=value: value.detach().float().numpy())
        for name, value in state.items()
    }


def _files(directory: Path, whole: str, index: str) -> list[Path]:
    if not (directory / index).exists():
        return [directory / whole]
    names = read_json(directory / index).get("weight_map")
    if not isinstance(names, dict):
        raise UserError(f"{directory / index} has no weight_map, which says which file holds a tensor")
    return sorted({directory / name for name in names.values()})


def read_generation_config(directory: Path) -> dict[str, Any]:
    """The settings of generation in generation_config.json, or else config.json, under our names.

    Possible keys: `eos_token_ids` (each ends a text), `temperature`, `top_k`, `top_p`, `min_p`, `repetition_penalty`.
    Settings of sampling are left out where it is switched off (`do_sample`).
    """
    path = directory / GENERATION_CONFIG
    raw = read_json(path if path.exists() else directory / CONFIG)
    ends = raw.get("eos_token_id")
    generation: dict[str, Any] = (
        {"eos_token_ids": ends if isinstance(ends, list) else [ends]} if ends is not None else {}
    )
    if path.exists() and raw.get("do_sample"):
        generation |= {name: raw[name] for name in SAMPLING if raw.get(name) is not None}
    return generation


# ---- Writing -------------------------------------------------------------------------------------------------------


def write_weights(directory: Path, weights: Weights, *, dtype: str = "float32", max_shard_bytes: int) -> None:
    """Writes safetensors: one file, or shards of at most `max_shard_bytes` (more where one tensor is larger) with
    their index."""
    from safetensors.numpy import save_file

    number_type = WRITTEN_DTYPES[dtype]
    sizes = {name: int(np.prod(tensor.shape)) * number_type.itemsize for name, tensor in weights.items()}
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[other] for other in shards[-1]) + size > max_shard_bytes:
            shards.append([])
        shards[-1].append(name)
    index = {}
    for number, names in enumerate(shards, start=1):
        file = WEIGHTS if len(shards) == 1 else SHARD.format(number=number, count=len(shards))
        index |= dict.fromkeys(names, file)
        arrays = {name: np.ascontiguousarray(weights[name].read().astype(number_type)) for name in names}
        save_file(arrays, directory / file, metadata={"format": "pt"})
    if len(shards) > 1:
        write_json(directory / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": index})


def write_generation_config(directory: Path, generation: Mapping[str, Any], *, eot_id: int) -> None:
    """Writes a complete generation_config.json. Unknown settings of sampling get our default, the plain
    distribution, since transformers would otherwise use a top_k of 50."""
    plain = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    sampling = plain | {name: generation[name] for name in SAMPLING if name in generation}
    ends = list(generation.get("eos_token_ids") or [eot_id])
    content = {"bos_token_id": eot_id, "eos_token_id": ends if len(ends) > 1 else ends[0], "pad_token_id": eot_id}
    write_json(directory / GENERATION_CONFIG, content | {"do_sample": True} | sampling)


def parse_size(text: str) -> int:
    """The number of bytes in a text such as "5GB" or "500MB". Raises UserError for other texts."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    size = float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ") if match else 0
    if size < 1:
        raise UserError(f"{text!r} is not a size; expected e.g. 5GB or 500MB")
    return int(size)
