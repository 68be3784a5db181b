"""Devices and how they are arranged: the mesh (data, fsdp, expert, context, tensor)."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh
from ml_collections import ConfigDict

from gptjax.config import MESH_AXES
from gptjax.errors import UserError


def make_mesh(mesh: ConfigDict, devices: list[jax.Device] | None = None, *, members: int = 1) -> Mesh:
    """The mesh of a config over the given devices (default: all). Raises UserError where sizes do not divide.

    If `members` is more than 1, the members of a packed program are split over a separate axis, "member".
    """
    devices = jax.devices() if devices is None else devices
    sizes = ({"member": members} if members > 1 else {}) | {axis: mesh[axis] for axis in MESH_AXES}
    others = math.prod(size for size in sizes.values() if size != -1)
    if sizes["data"] == -1:
        sizes["data"] = len(devices) // others
    total = math.prod(sizes.values())
    if total == 0 or total > len(devices) or len(devices) % total:
        wanted = " x ".join(f"{axis} {mesh.get(axis, size)}" for axis, size in sizes.items())
        raise UserError(
            f"the mesh {wanted} does not fit {len(devices)} {devices[0].platform} device(s); change --config.mesh.* so "
            "that their product divides the number of devices"
        )
    if idle := {device.process_index for device in devices} - {device.process_index for device in devices[:total]}:
        raise UserError(
            f"the mesh has {total} of {len(devices)} devices, and process {min(idle)} has none of them; start fewer "
            "processes, or change --config.mesh.* so that every process has some"
        )
    return Mesh(arrange(devices[:total], sizes), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def arrange(devices: Sequence[Any], sizes: dict[str, int]) -> np.ndarray:
    """The devices in an order in which neighbours in the mesh are neighbours in the network.

    Only the data axis spans TPU slices, which the data-centre network joins: it needs one sum of gradients per step.
    """
    shape = tuple(sizes.values())
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if sizes["data"] % slices:
        raise UserError(
            f"mesh.data is {sizes['data']}, but must be a multiple of the number of slices, {slices}; the other axes "
            f"stay inside a slice of {len(devices) // slices} devices"
        )
    inside = tuple((sizes | {"data": sizes["data"] // slices}).values())
    across = tuple(slices if axis == "data" else 1 for axis in sizes)
    return mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)
