"""Shardings of parameters, training states and batches on a mesh, from what `gptjax.parameters` says of each path."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gptjax.config import ROW_AXES
from gptjax.parameters import find, path_string

# The mesh axes over which the axes of a batch's fields are split; other axes are not split.
FIELD_AXES = {"row": ROW_AXES, "length": "context"}


def field_spec(axes: Sequence[str]) -> PartitionSpec:
    """The split of a batch's field with these axes, such as ("row", "length") or ("row", "pair", "length")."""
    return PartitionSpec(*map(FIELD_AXES.get, axes))


BATCH = field_spec(["row", "length"])
ROWS = field_spec(["row"])


def partition_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The split of a parameter. A mesh axis that does not divide the dimension is left out.

    Raises KeyError for a parameter that the table does not have.
    """
    split = find(path).split
    sizes = (_devices(mesh, axes) for axes in split)
    return PartitionSpec(*(a if n % d == 0 else None for n, d, a in zip(shape, sizes, split, strict=False)))


def _devices(mesh: Mesh, axes: str | tuple[str, ...] | None) -> int:
    names = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(mesh.shape[name] for name in names)


def row_shards(mesh: Mesh) -> int:
    """The number of parts into which the rows of a batch are split."""
    return _devices(mesh, ROW_AXES)


def parameter_shardings(params: Any, mesh: Mesh) -> Any:
    """The NamedSharding of every parameter; `params` may be abstract."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, partition_spec(path_string(path), leaf.shape, mesh)), params
    )


def state_shardings(state: Any, params: Any, mesh: Mesh, *, members: int = 0) -> Any:
    """Shardings of a training state. A leaf whose path ends in the path of a parameter is split by the row of that
    parameter, as far as its shape allows (moments, averages, factors); everything else is replicated.

    If `members` states are stacked, each leaf has one more axis in front, which is split over the member axis of the
    mesh; `params` are those of one member.
    """
    parameters = {path_string(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]}
    stacked = () if not members else ("member",) if "member" in mesh.shape else (None,)

    def sharding(path, leaf):
        keys = path_string(path).split("/")
        ends = ("/".join(keys[start:]) for start in range(len(keys)))
        owner = next((end for end in ends if end in parameters), None)
        spec = PartitionSpec() if owner is None else partition_spec(owner, leaf.shape[len(stacked) :], mesh)
        return NamedSharding(mesh, PartitionSpec(*stacked, *spec))

    return jax.tree_util.tree_map_with_path(sharding, state)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def process_rows(batch_size: int, mesh: Mesh) -> np.ndarray:
    """The indices of the rows of a global batch that are on devices of this process, ascending.

    Processes that share the devices of a row (a context or tensor axis that spans them) read the same rows.
    """
    indices = NamedSharding(mesh, ROWS).addressable_devices_indices_map((batch_size,)).values()
    here = np.zeros(batch_size, bool)
    for (rows,) in indices:
        here[rows] = True
    return np.flatnonzero(here)


def to_device(
    batch: dict[str, Any],
    mesh: Mesh,
    *,
    batch_size: int | None = None,
    specs: Mapping[str, PartitionSpec] | None = None,
) -> dict[str, jax.Array]:
    """The global batch as sharded arrays.

    Args:
      batch: arrays [rows, ...]. Every process gives the whole batch or, with `batch_size`, its `process_rows`.
      batch_size: rows of the global batch.
      specs: how each field is split; default: [rows, length].
    """
    shardings = {name: NamedSharding(mesh, specs[name] if specs else BATCH) for name in batch}
    if jax.process_count() == 1:
        return jax.device_put(batch, shardings)
    if batch_size is None:
        return {name: place(value, shardings[name]) for name, value in batch.items()}
    rows = process_rows(batch_size, mesh)

    def part(array: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
        first, last = np.searchsorted(rows, index[0].indices(batch_size)[:2])
        return array[(slice(first, last), *index[1:])]

    return {
        name: jax.make_array_from_callback((batch_size, *value.shape[1:]), shardings[name], partial(part, value))
        for name, value in batch.items()
    }


def place(array: Any, sharding: NamedSharding) -> jax.Array:
    """Puts an array that every process holds on the devices of all processes."""
    if jax.process_count() == 1:
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(np.shape(array), sharding, np.asarray(array).__getitem__)
