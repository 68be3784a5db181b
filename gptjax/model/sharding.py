"""Where activations live: constraints on the mesh of the program that is being traced.

Without a mesh (one device, a test of a layer) they do nothing.
"""

import math

import jax
from jax.sharding import PartitionSpec

BATCH = ("data", "fsdp")  # axes that rows are split over
Axis = str | tuple[str, ...] | None


def axis_size(*names: str) -> int:
    """Devices along the named axes of the current mesh; 1 without a mesh."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape.get(name, 1) for name in names)


def platform() -> str:
    """What the current program is compiled for: cpu, gpu or tpu; of the mesh where it says."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    name = device.platform if device is not None else jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else name


def fitting(shape: tuple[int, ...], axes: tuple[Axis, ...]) -> PartitionSpec:
    """The spec without the axes that do not divide their dimension."""

    def fits(size: int, axis: Axis) -> bool:
        names = (axis,) if isinstance(axis, str) else axis or ()
        return size % axis_size(*names) == 0

    return PartitionSpec(*(axis if fits(size, axis) else None for size, axis in zip(shape, axes, strict=True)))


def constrain(x: jax.Array, *axes: Axis) -> jax.Array:
    """`x`, with each dimension split over the given axes of the mesh.

    XLA would otherwise choose, and for large models it chooses to replicate activations (6x the memory of a
    175B model's step). The same constraint holds for the gradient.
    """
    if axis_size(*jax.sharding.get_abstract_mesh().axis_names) == 1:
        return x
    return jax.lax.with_sharding_constraint(x, fitting(x.shape, axes))
