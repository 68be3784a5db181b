"""The one table that says how every parameter is split over the mesh. Edit it to change the sharding.

A path is that of the parameter tree with slashes, e.g. "blocks/attention/query/kernel". Parameters under "blocks"
have a leading axis of layers. The first pattern that matches counts, and every parameter must match one.
"""

import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

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
    (r"(blocks/)?(.*/)?\w*norm/(scale|bias)", PartitionSpec()),
)

BATCH = PartitionSpec(("data", "fsdp"), "context")  # [batch, length]
ROWS = PartitionSpec(("data", "fsdp"))  # [batch, ...]


def path_string(path: tuple) -> str:
    """ "blocks/mlp/up/kernel" from a key path of jax.tree_util."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def partition_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The spec of the first pattern that matches; an axis that does not divide its dimension is left out.

    Raises KeyError if no pattern matches: a new parameter needs a line in the table.
    """
    for pattern, spec in TABLE:
        if re.fullmatch(pattern, path):
            return PartitionSpec(
                *(a if a and n % mesh.shape[a] == 0 else None for n, a in zip(shape, spec, strict=False))
            )
    raise KeyError(f"no pattern of gptjax.parallel.partition.TABLE matches the parameter {path}")


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
    """Rows over data and fsdp, sequence over context."""
    return {name: NamedSharding(mesh, BATCH) for name in batch}


def to_device(batch: dict[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """The global batch as sharded arrays; each process gives only its own rows."""
    sharding = NamedSharding(mesh, BATCH)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}
