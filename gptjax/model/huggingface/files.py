"""The files of a Hugging Face model directory, found on disk or on the hub, read and written without torch."""

import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gptjax import foreign, json_text
from gptjax.buckets import copied, is_url
from gptjax.errors import RunError, UserError
from gptjax.files import about, regular, words
from gptjax.model.huggingface import schemas

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
SHARD = "model-{number:05}-of-{count:05}.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
NANOGPT = "ckpt.pt"
PICKLE_PATTERNS = ("pytorch_model*.bin", PICKLE_INDEX)
PATTERNS = (  # the files that are read, of models and of adapters
    CONFIG,
    GENERATION_CONFIG,
    "*.safetensors",
    INDEX,
    *TOKENIZER_FILES,
    "adapter_config.json",
    *PICKLE_PATTERNS,
)
WRITTEN_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
GPT2_END = 50256
_NANOGPT = (
    "a checkpoint of nanoGPT, whose own format is not read; load it with nanoGPT, save the model with transformers "
    "(save_pretrained), and import that"
)
_OTHER_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".ckpt", ".npz"}
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
    """The directory of a model. A name on the hub is looked up in the hub's cache, or downloaded; a URL is copied.

    Raises UserError where `name` is neither a directory nor found in the hub's cache or on the hub.
    """
    if is_url(name):
        return copied(name, [p for p in PATTERNS if allow_pickle or p not in PICKLE_PATTERNS])
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            return path
    except (OSError, RuntimeError, ValueError):  # ~nobody, a NUL, a name of 5000 letters
        raise UserError(f"hf:{name[:4096]}: there is no such directory") from None
    if path.exists():
        of_nanogpt = f"; {_NANOGPT}" if path.name == NANOGPT else ""
        raise UserError(f"hf:{name} is a file; name the directory of a model{of_nanogpt}")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise UserError(f"hf:{name[:4096]}: there is no such directory")
    from huggingface_hub import snapshot_download

    patterns = [pattern for pattern in PATTERNS if allow_pickle or pattern not in PICKLE_PATTERNS]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # no network, unknown name, or no permission
        reason = re.sub(r"\[Errno -?\d+\] ", "", str(error).strip().partition("\n")[0])[:200]
        raise UserError(
            f"hf:{name}: there is no such directory, it is not in the cache of the Hugging Face hub, and could not be "
            f"downloaded ({reason}); with a network, `hf download {name}` fetches it"
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError where the file is missing or holds no object."""
    if not (path.exists() or path.is_symlink()):
        raise UserError(f"{path} is missing; expected a Hugging Face model directory")
    content = json_text.read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {json_text.show(content)}, but must be an object: {{...}}")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    with about(path):
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
        return _joined(files, open_safetensors)
    pickles = _files(directory, PICKLE, PICKLE_INDEX)
    missing_pickles = [file.name for file in pickles if not file.exists()]
    if len(missing_pickles) == len(pickles):
        raise UserError(_missing(directory, len(files), missing))
    if missing_pickles:
        raise UserError(_missing(directory, len(pickles), missing_pickles))
    if not allow_pickle:
        raise UserError(
            f"{directory} has its weights only in {_names(pickles)}: pickle files, which can "
            "run code when they are opened. Save the model as safetensors, or, if you trust where they come from, add "
            "--allow_pickle to `convert` (needs torch)"
        )
    return _joined(pickles, _open_pickle)


def _missing(directory: Path, count: int, missing: list[str]) -> str:
    """The error for missing files of weights."""
    if count > 1:
        names = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        there = count - len(missing)
        return (
            f"{directory}: the download is not complete: {there} of {count} files of weights are there; {names} missing"
        )
    if (directory / NANOGPT).exists():
        return f"{directory / NANOGPT} is {_NANOGPT}"
    found = sorted(file.name for file in directory.iterdir() if file.suffix in _OTHER_WEIGHTS)
    there = f"; there is {', '.join(found[:3])[:200]}, which is not read under this name" if found else ""
    return f"{directory}: {missing[0]} is missing{there}; save the model as safetensors (transformers: save_pretrained)"


def _names(files: list[Path]) -> str:
    return ", ".join(file.name for file in files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")


def _joined(files: list[Path], opener: Callable[[Path], Weights]) -> Weights:
    """The tensors of all files. Raises UserError where two have a tensor of the same name."""
    weights: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in opener(file).items():
            if name in weights:
                raise UserError(f"{file} has the tensor {name[:100]!r} that another file of the model has too")
            weights[name] = tensor
    return weights


def open_safetensors(file: Path) -> Weights:
    """The tensors of one file. Raises UserError where it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        opened = safe_open(regular(file), framework="np")
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
        shapes = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except SafetensorError as error:
        json_text.refuse_pointer(file)
        raise UserError(
            f"{file} is damaged or cut, or no safetensors file ({str(error)[:200]}); get it again"
        ) from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {words(error)}") from None

    def reader(name: str) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            try:
                with np.errstate(over="ignore"):
                    return np.asarray(opened.get_tensor(name), np.float32)
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file} is damaged: {name[:100]!r} cannot be read: {str(error)[:200]}") from None

        return read

    return {name: Tensor(shape, reader(name), dtype) for name, (shape, dtype) in shapes.items()}


def _open_pickle(file: Path) -> Weights:
    try:
        import torch
    except ImportError:
        raise UserError(f"{file.name} is read by torch, which is not installed: pip install torch") from None
    try:
        state = torch.load(regular(file), map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise ValueError("it is not a table of names and tensors")
    except UserError:
        raise
    except Exception as error:  # the file may hold anything
        reason = str(error).strip().partition("\n")[0][:200]
        raise UserError(f"{file} holds more than tensors, or is damaged: {reason}") from None
    return {
        str(name): Tensor(tuple(value.shape), lambda value=value: value.detach().float().numpy(), _dtype(value))
        for name, value in state.items()
    }


def _dtype(tensor: Any) -> str:
    """The type of a torch tensor, as safetensors spells it."""
    names = {"torch.float32": "F32", "torch.float64": "F64", "torch.float16": "F16", "torch.bfloat16": "BF16"}
    return names.get(str(tensor.dtype), str(tensor.dtype).removeprefix("torch."))


def _files(directory: Path, whole: str, index: str) -> list[Path]:
    path = directory / index
    if not (path.exists() or path.is_symlink()):
        return [directory / whole]
    names = set(foreign.read(schemas.Index, path).weight_map.values())
    if outside := sorted(name for name in names if Path(name).name != name):
        raise UserError(f"{path}: {json_text.show(outside[0])} is not the name of a file beside it")
    return [directory / name for name in sorted(names)]


def read_generation_config(directory: Path, vocab_size: int | None = None) -> dict[str, Any]:
    """The settings of generation in generation_config.json, or else config.json, under our names.

    Possible keys: `eos_token_ids` (each ends a text), `repetition_penalty`, and `temperature`, `top_k`, `top_p`,
    `min_p`, which are left out where sampling is switched off.

    Args:
      vocab_size: of the model. Larger ids are refused; GPT-2's id, which transformers writes as the default of that
        class, is dropped with a warning.
    """
    path = directory / GENERATION_CONFIG
    has_own = path.exists() or path.is_symlink()
    path = path if has_own else directory / CONFIG
    raw = foreign.check(schemas.GenerationConfig, read_json(path), path)
    ends = raw.eos_token_id if isinstance(raw.eos_token_id, list) else [raw.eos_token_id]
    ends = [end for end in ends if end is not None]
    if vocab_size is not None and (outside := [end for end in ends if end >= vocab_size]):
        if outside != [GPT2_END]:
            raise UserError(f"{path}: eos_token_id is {outside[0]}, and the model has only {vocab_size} tokens")
        foreign.warn(f"{path}: eos_token_id {GPT2_END} is GPT-2's and no token of this model; it is left out")
        ends = [end for end in ends if end < vocab_size]
    generation: dict[str, Any] = {"eos_token_ids": ends} if ends else {}
    if not has_own:
        return generation
    others = {"repetition_penalty": raw.repetition_penalty}
    if raw.do_sample:
        others |= {name: getattr(raw, name) for name in SAMPLING}
        others["temperature"] = 1.0 if raw.temperature is None else raw.temperature
    extra = raw.model_extra or {}
    if unknown := [name for name in raw.unknown() if extra[name] not in (0, 1, False, "", [], {})]:
        foreign.warn(
            f"{path}: {', '.join(unknown)[:300]} is unknown and ignored; texts may differ from those of transformers"
        )
    return generation | {name: value for name, value in others.items() if value is not None}


# ---- Writing -------------------------------------------------------------------------------------------------------


def write_weights(directory: Path, weights: Weights, *, dtype: str = "float32", max_shard_bytes: int) -> None:
    """Writes safetensors: one file, or shards of at most `max_shard_bytes` (more where one tensor is larger) with
    their index."""
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
        write_safetensors(directory / file, arrays)
    if len(shards) > 1:
        write_json(directory / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": index})


def write_safetensors(file: Path, arrays: dict[str, np.ndarray]) -> None:
    """Raises OSError with the path where the disk refuses, RunError for what else the library raises."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        with about(file):
            save_file(arrays, file, metadata={"format": "pt"})
    except SafetensorError as error:
        if number := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(file)) from None
        raise RunError(f"{file} could not be written: {str(error)[:200]}") from None


def write_generation_config(directory: Path, generation: Mapping[str, Any], *, eot_id: int) -> None:
    """Writes a complete generation_config.json. Sampling settings that are not given are written as those of the plain
    distribution, since transformers would otherwise use a top_k of 50. A model published without sampling stays
    without."""
    plain = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    if "begin_token_ids" in generation and "temperature" not in generation:  # imported, without sampling
        plain = {}
    sampling = plain | {name: generation[name] for name in SAMPLING if name in generation}
    ends = list(generation.get("eos_token_ids") or [eot_id])
    begin = next(iter(generation.get("begin_token_ids") or [eot_id]))
    content = {"bos_token_id": begin, "eos_token_id": ends if len(ends) > 1 else ends[0], "pad_token_id": eot_id}
    write_json(directory / GENERATION_CONFIG, content | {"do_sample": bool(plain)} | sampling)


def parse_size(text: str) -> int:
    """The number of bytes in a text such as "5GB" or "500MB". Raises UserError for other texts."""
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    size = float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ") if match else 0
    if size < 1:
        raise UserError(f"{text[:60]!r} is not a size; expected e.g. 5GB or 500MB")
    return int(size)
