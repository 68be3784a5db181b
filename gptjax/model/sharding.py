"""How activations are split: constraints on the mesh of the program that is being traced.

Without a mesh (one device, a test of a layer) they do nothing.
"""

import math
from functools import partial
from typing import Any

import jax
from jax.sharding import PartitionSpec

from gptjax import parameters
from gptjax.config import ROW_AXES
from gptjax.parameters import Axis

BATCH = ROW_AXES
# [batch, length, embed] inside a branch of a block, where the tensor axis splits heads and the width of the MLP, and
# between branches, where it splits the sequence (Korthikanti et al. 2022, "sequence parallelism"). Each
# sum over the axis becomes a reduce-scatter and a gather, and the activations kept for the backward pass are divided.
INSIDE: tuple[Axis, ...] = (BATCH, "context", None)
BETWEEN: tuple[Axis, ...] = (BATCH, ("context", "tensor"), None)


def axis_size(*names: str) -> int:
    """Devices along the named axes of the current mesh; 1 without a mesh."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape.get(name, 1) for name in names)


def platform() -> str:
    """The platform that the current program is compiled for: cpu, gpu or tpu. The mesh decides where it names one."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    name = device.platform if device is not None else jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else name


def fitting(shape: tuple[int, ...], axes: tuple[Axis, ...]) -> PartitionSpec:
    """The spec without the mesh axes whose size does not divide the dimension of the array."""

    def fits(size: int, axis: Axis) -> bool:
        names = (axis,) if isinstance(axis, str) else axis or ()
        return size % axis_size(*names) == 0

    return PartitionSpec(*(axis if fits(size, axis) else None for size, axis in zip(shape, axes, strict=True)))


def constrain(x: jax.Array, *axes: Axis) -> jax.Array:
    """`x`, with each dimension split over the given axes of the mesh.

    Otherwise XLA chooses, and for large models it replicates activations (6x the memory of a 175B model's step).
    The same constraint holds for the gradient.
    """
    if axis_size(*jax.sharding.get_abstract_mesh().axis_names) == 1:
        return x
    return jax.lax.with_sharding_constraint(x, fitting(x.shape, axes))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather(x: jax.Array, split: tuple[Axis, ...], whole: tuple[Axis, ...]) -> jax.Array:
    """`x`, which is split as `split` says, split as `whole` says; its gradient is split as `split` says.

    Where `whole` has fewer axes, x is gathered, and its gradient is summed and scattered. With `constrain`, every
    device would hold the whole sum of the gradient.
    """
    del split
    return constrain(x, *whole)


def _gather_forward(x, split, whole):
    return gather(x, split, whole), None


def _gather_backward(split, whole, _, gradient):
    del whole
    return (constrain(gradient, *split),)


gather.defvjp(_gather_forward, _gather_backward)


def gather_layer(params: Any) -> Any:
    """The parameters of one block, gathered along fsdp, as the block uses them.

    Otherwise XLA multiplies by the shards and sums activations over the axis, which sends more bytes and needs more
    memory.
    """

    def gathered(path: tuple, leaf: jax.Array) -> jax.Array:
        row = parameters.find(f"blocks/{parameters.path_string(path).removesuffix('/value')}")  # flax adds /value
        if not row.gathered:
            return leaf
        split = row.split[1:]
        return gather(leaf, split, tuple(None if axis == "fsdp" else axis for axis in split))

    return jax.tree_util.tree_map_with_path(gathered, params)
