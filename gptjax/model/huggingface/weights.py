"""Parameters and configs to and from Hugging Face directories, without torch.

`layouts` says which tensor is which parameter, `files` reads and writes the files.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptjax import foreign
from gptjax.errors import UserError
from gptjax.model import gpt
from gptjax.model.architecture import Architecture
from gptjax.model.huggingface import files, layouts
from gptjax.model.huggingface.layouts import LAYER, Layout, TensorMap

MAX_SHARD_BYTES = 5 * 10**9
HEAD = "lm_head.weight"
_WRAPPERS = re.compile(r"^(_orig_mod\.|module\.)+")  # torch.compile and data parallelism put these before a name


def read_config(directory: Path) -> dict[str, Any]:
    """The options of `config.model` that config.json gives. Raises UserError for values that are not supported.

    One warning names all unknown keys.
    """
    path = directory / files.CONFIG
    raw = files.read_json(path)
    layout = layouts.find(raw, str(path))
    without = {option: values[0] for option, values in layouts.NEEDS.items()}  # options that no layout has are off
    options = without | layout.read_config(raw)
    if unknown := foreign.check(layout.schema, raw, path).unknown():
        foreign.warn(
            f"{path}: {', '.join(unknown)[:300]} is unknown and ignored; compare some logits with transformers"
        )
    return options


def read_parameters(directory: Path, architecture: Architecture, *, allow_pickle: bool = False) -> gpt.Params:
    """The parameters of a directory as float32 NumPy arrays; `architecture` is that of its config.

    Raises UserError where all weights are in pickle files, and one UserError that lists the tensors that are missing,
    left over, of another shape, not floats or not finite.
    """
    layout = layouts.find(files.read_json(directory / files.CONFIG), str(directory / files.CONFIG))
    return to_params(layout, architecture, files.open_weights(directory, allow_pickle=allow_pickle))


def write_directory(
    directory: Path,
    architecture: Architecture,
    params: gpt.Params,
    *,
    eot_id: int | None,
    bos_id: int | None = None,
    dtype: str = "float32",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes config.json and safetensors in the layout that has all options of this model.

    Raises UserError that names the options no layout has.
    """
    name, layout = layouts.exportable(architecture)
    directory.mkdir(parents=True, exist_ok=True)
    config = {"architectures": [layout.architectures], "model_type": name, "dtype": dtype}
    config |= {"vocab_size": architecture.vocab_size, "tie_word_embeddings": architecture.tie_embeddings}
    config |= {
        "bos_token_id": eot_id if bos_id is None else bos_id,
        "eos_token_id": eot_id,
        **layout.write_config(architecture),
    }
    files.write_json(directory / files.CONFIG, config)
    weights = to_weights(layout, architecture, params)
    files.write_weights(directory, weights, dtype=dtype, max_shard_bytes=max_shard_bytes)


def to_params(layout: Layout, architecture: Architecture, weights: files.Weights) -> gpt.Params:
    """Parameters of the stacked tree from the tensors of a layout."""
    _, abstract = gpt.abstract_model(architecture)
    plain = [_WRAPPERS.sub("", name) for name in weights]
    wrapper = _wrapper(layout, plain)
    names = {
        name: inner.removeprefix(wrapper).removeprefix(layout.prefix)
        for name, inner in zip(weights, plain, strict=True)
        if not _is_buffer(inner.removeprefix(wrapper))
    }
    weights = {name: weights[theirs] for theirs, name in names.items()}
    if architecture.tie_embeddings:
        _tie(layout, weights)
    tensors = _present(layout, abstract)
    if problems := list(_misfits(architecture, tensors, abstract, weights)):
        raise UserError(f"the {layout.architectures} weights do not fit their config: {listed(problems)}")
    problems = []
    params: gpt.Params = {}
    for tensor in tensors:
        shapes = [lookup(abstract, path).shape for path in tensor.parameters]
        parts = [np.zeros(shape, np.float32) for shape in shapes]
        borders = np.cumsum([shape[-1] for shape in shapes])[:-1]
        for layer in _layers(architecture, tensor):
            name = tensor.name.format(layer=layer)
            array = np.asarray(weights[name].read(), np.float32)
            problems += [_not_finite(name, array)] if not_finite(array) else []
            array = array.T if tensor.transposed else array
            for part, values in zip(parts, np.split(array, borders, axis=-1), strict=True):
                target = part if layer is None else part[layer]
                target[tuple(slice(size) for size in values.shape)] = values  # the padding of the vocabulary stays 0
        for path, part in zip(tensor.parameters, parts, strict=True):
            insert(params, path, part)
    if problems:
        raise UserError(
            f"the {layout.architectures} weights are not numbers: {listed(problems)}; the files are damaged, or the "
            "training that made them diverged"
        )
    return params


def _wrapper(layout: Layout, names: Sequence[str]) -> str:
    """The prefix that a wrapping class added to every name, such as "net."; usually empty."""
    embeddings = layout.tensors[0].name
    found = {name.removesuffix(embeddings).removesuffix(layout.prefix) for name in names if name.endswith(embeddings)}
    prefix = min(found, default="")
    return prefix if len(found) == 1 and all(name.startswith(prefix) for name in names) else ""


def _tie(layout: Layout, weights: dict[str, files.Tensor]) -> None:
    """Where embeddings and head are one tensor, it is stored under either name, or under both."""
    embeddings, head = layout.tensors[0].name, weights.pop(HEAD, None)
    if head is None:
        return
    if embeddings not in weights:
        weights[embeddings] = head
    elif head.shape != weights[embeddings].shape or not np.array_equal(head.read(), weights[embeddings].read()):
        raise UserError(
            f"{HEAD} differs from {embeddings}, and config.json says that they are one (tie_word_embeddings); set "
            "it to false to keep both"
        )


def not_finite(array: np.ndarray) -> bool:
    """Whether an array has NaN or infinite values. The sum is tested first, because it is fast."""
    with np.errstate(over="ignore", invalid="ignore"):
        return not np.isfinite(np.sum(array)) and not np.isfinite(array).all()


def _not_finite(name: str, array: np.ndarray) -> str:
    wrong = int(np.size(array) - np.isfinite(array).sum())
    return f"{name} has {'only' if wrong == np.size(array) else f'{wrong} of {np.size(array)}'} NaN or infinite values"


def listed(problems: list[str], most: int = 10) -> str:
    """Problems in one line, the first of many."""
    more = f"; and {len(problems) - most} more" if len(problems) > most else ""
    return "; ".join(problem[:200] for problem in problems[:most]) + more


def to_weights(layout: Layout, architecture: Architecture, params: gpt.Params) -> dict[str, files.Tensor]:
    """The tensors of a layout from parameters: the inverse of `to_params`."""

    def read(tensor: TensorMap, layer: int | None) -> np.ndarray:
        leaves = [lookup(params, path) for path in tensor.parameters]
        parts = [np.asarray(leaf) if layer is None else np.asarray(leaf)[layer] for leaf in leaves]
        array = np.concatenate(parts, axis=-1)[tuple(map(slice, _shape(architecture, tensor, params)))]
        return array.T if tensor.transposed else array

    weights = {}
    for tensor in _present(layout, params):
        name = tensor.name if tensor.name.startswith("lm_head") else layout.prefix + tensor.name
        shape = _shape(architecture, tensor, params)
        shape = shape[::-1] if tensor.transposed else shape
        for layer in _layers(architecture, tensor):
            weights[name.format(layer=layer)] = files.Tensor(
                shape, lambda tensor=tensor, layer=layer: read(tensor, layer)
            )
    return weights


def _misfits(
    architecture: Architecture, tensors: list[TensorMap], abstract: gpt.Params, weights: files.Weights
) -> Iterator[str]:
    """One line per tensor that is missing, has a wrong shape or type, or is not part of the layout."""
    used = set()
    for tensor in tensors:
        wanted = _shape(architecture, tensor, abstract)
        for layer in _layers(architecture, tensor):
            name = tensor.name.format(layer=layer)
            used.add(name)
            if name not in weights:
                yield f"{name} is missing"
                continue
            found = weights[name].shape[::-1] if tensor.transposed else weights[name].shape
            if found != wanted:
                yield f"{name} has shape {found}, expected {wanted}"
            elif weights[name].dtype not in files.FLOATS:
                yield f"{name} has dtype {weights[name].dtype}, expected one of {', '.join(files.FLOATS)}"
    yield from (f"{name} is not part of the layout" for name in sorted(set(weights) - used))


# ---- Trees and names -----------------------------------------------------------------------------------------------


def lookup(params: gpt.Params, path: str) -> Any:
    """The leaf at "blocks/mlp/up/kernel", or None."""
    for key in path.split("/"):
        params = params.get(key) if isinstance(params, dict) else None
    return params


def insert(params: gpt.Params, path: str, leaf: Any) -> None:
    """Puts a leaf at "blocks/mlp/up/kernel"."""
    *parents, name = path.split("/")
    for key in parents:
        params = params.setdefault(key, {})
    params[name] = leaf


def _present(layout: Layout, params: gpt.Params) -> list[TensorMap]:
    """The tensors whose parameters this model has; it may lack biases, a separate head, and so on."""
    return [t for t in layout.tensors if all(lookup(params, path) is not None for path in t.parameters)]


def _layers(architecture: Architecture, tensor: TensorMap) -> list[int] | list[None]:
    return list(range(architecture.num_layers)) if LAYER in tensor.name else [None]


def _shape(a: Architecture, tensor: TensorMap, params: gpt.Params) -> tuple[int, ...]:
    """The shape of a tensor in one layer, oriented as our kernels [in, out], without the vocabulary's padding."""
    shapes = [lookup(params, path).shape for path in tensor.parameters]
    shape = list(shapes[0][1:] if LAYER in tensor.name else shapes[0])
    shape[-1] = sum(s[-1] for s in shapes)
    axis = {"embedding/embedding": 0, "head/kernel": 1}.get(tensor.parameters[0])
    if axis is not None:
        shape[axis] = a.vocab_size
    return tuple(shape)


def _is_buffer(name: str) -> bool:
    """Constants that older versions of transformers saved beside the weights."""
    return name.endswith((".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq"))
