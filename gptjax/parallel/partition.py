"""The one table that says how every parameter is split over the mesh. Edit it to change the sharding.

A path is that of the parameter tree with slashes, e.g. "blocks/attention/query/kernel". Parameters under "blocks"
have a leading axis of layers. The first pattern that matches counts, and every parameter must match one.
"""

import math
import re
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gptjax.config import ROW_AXES

TABLE: tuple[tuple[str, PartitionSpec], ...] = (
    (r"embedding/embedding", PartitionSpec("tensor", "fsdp")),
    (r"ngram_embedding/embedding", PartitionSpec(None, "fsdp")),
    (r"position_embedding/embedding", PartitionSpec(None, "fsdp")),
    (r"head/kernel", PartitionSpec("fsdp", "tensor")),
    (r"blocks/attention/(query|key|value)/kernel", PartitionSpec(None, "fsdp", "tensor")),
    (r"blocks/attention/(query|key|value)/bias", PartitionSpec(None, "tensor")),
    (r"blocks/attention/out/kernel", PartitionSpec(None, "tensor", "fsdp")),
    (r"blocks/mlp/(up|gate)/kernel", PartitionSpec(None, "fsdp", "tensor")),
    (r"blocks/mlp/(up|gate)/bias", PartitionSpec(None, "tensor")),
    (r"blocks/mlp/down/kernel", PartitionSpec(None, "tensor", "fsdp")),
    (r"blocks/(attention/out|mlp/down)/bias", PartitionSpec()),
    (r"blocks/(attention/(query|key|value)|mlp/(up|gate))/lora_a", PartitionSpec(None, "fsdp")),
    (r"blocks/(attention/(query|key|value)|mlp/(up|gate))/lora_b", PartitionSpec(None, None, "tensor")),
    (r"blocks/(attention/out|mlp/down)/lora_a", PartitionSpec(None, "tensor")),
    (r"blocks/(attention/out|mlp/down)/lora_b", PartitionSpec(None, None, "fsdp")),
    (r"blocks/mlp/expert_(up|gate)/kernel", PartitionSpec(None, ("expert", "tensor"), "fsdp", None)),
    (r"blocks/mlp/expert_down/kernel", PartitionSpec(None, ("expert", "tensor"), None, "fsdp")),
    (r"blocks/mlp/router/kernel", PartitionSpec()),
    (r"(blocks/)?(.*/)?\w*norm/(scale|bias)", PartitionSpec()),
)

BATCH = PartitionSpec(ROW_AXES, "context")  # [batch, length]
ROWS = PartitionSpec(ROW_AXES)  # [batch, ...]


def path_string(path: tuple) -> str:
    """ "blocks/mlp/up/kernel" from a key path of jax.tree_util."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def partition_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The spec of the first pattern that matches; an axis that does not divide its dimension is left out.

    Raises KeyError if no pattern matches: a new parameter needs a line in the table.
    """
    for pattern, spec in TABLE:
        if re.fullmatch(pattern, path):
            sizes = (_devices(mesh, axes) for axes in spec)
            return PartitionSpec(*(a if n % d == 0 else None for n, d, a in zip(shape, sizes, spec, strict=False)))
    raise KeyError(f"no pattern of gptjax.parallel.partition.TABLE matches the parameter {path}")


def _devices(mesh: Mesh, axes: str | tuple[str, ...] | None) -> int:
    names = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(mesh.shape[name] for name in names)


def row_shards(mesh: Mesh) -> int:
    """Parts that the rows of a batch are split into."""
    return _devices(mesh, ROW_AXES)


def parameter_shardings(params: Any, mesh: Mesh) -> Any:
    """The NamedSharding of every parameter; `params` may be abstract."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, partition_spec(path_string(path), leaf.shape, mesh)), params
    )


def state_shardings(state: Any, params: Any, mesh: Mesh) -> Any:
    """Shardings of a training state: a leaf whose path ends in a parameter's path and that has its shape is
    split like that parameter (moments, averages); everything else is replicated."""
    table = {
        path_string(path): (leaf.shape, partition_spec(path_string(path), leaf.shape, mesh))
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
    }

    def sharding(path, leaf):
        keys = path_string(path).split("/")
        for start in range(len(keys)):
            shape, spec = table.get("/".join(keys[start:]), (None, None))
            if shape == leaf.shape:
                return NamedSharding(mesh, spec)
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(sharding, state)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_shardings(batch: dict[str, Any], mesh: Mesh) -> dict[str, NamedSharding]:
    """Rows over data, fsdp and expert, sequence over context."""
    return {name: NamedSharding(mesh, BATCH) for name in batch}


def process_rows(batch_size: int, mesh: Mesh) -> np.ndarray:
    """The rows of a global batch that lie on devices of this process, ascending.

    Processes that share the devices of a row (a context or tensor axis that spans them) read the same rows.
    """
    indices = NamedSharding(mesh, ROWS).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[rows] for (rows,) in indices]))


def to_device(batch: dict[str, Any], mesh: Mesh, *, batch_size: int | None = None) -> dict[str, jax.Array]:
    """The global batch as sharded arrays.

    Args:
      batch: arrays [rows, length]: in every process the whole batch or, with `batch_size`, its `process_rows`.
      batch_size: rows of the global batch.
    """
    sharding = NamedSharding(mesh, BATCH)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    if batch_size is None:
        return {name: place(value, sharding) for name, value in batch.items()}
    rows = process_rows(batch_size, mesh)

    def part(array: np.ndarray, index: tuple[slice, slice]) -> np.ndarray:
        first, last = np.searchsorted(rows, index[0].indices(batch_size)[:2])
        return array[first:last, index[1]]

    return {
        name: jax.make_array_from_callback((batch_size, *value.shape[1:]), sharding, partial(part, value))
        for name, value in batch.items()
    }


def place(array: Any, sharding: NamedSharding) -> jax.Array:
    """An array that every process has, over the devices of all of them."""
    if jax.process_count() == 1:
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(np.shape(array), sharding, np.asarray(array).__getitem__)
