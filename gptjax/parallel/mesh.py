"""Devices and how they are arranged: the mesh (data, fsdp, context, tensor)."""

import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh
from ml_collections import ConfigDict

from gptjax.errors import UserError

AXES = ("data", "fsdp", "context", "tensor")


def make_mesh(mesh: ConfigDict, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh of a config over the given devices (default: all). Raises UserError where sizes do not divide."""
    devices = jax.devices() if devices is None else devices
    sizes = {axis: mesh[axis] for axis in AXES}
    others = math.prod(size for size in sizes.values() if size != -1)
    if sizes["data"] == -1:
        sizes["data"] = len(devices) // others
    total = math.prod(sizes.values())
    if total == 0 or total > len(devices) or len(devices) % total:
        wanted = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
        raise UserError(
            f"the mesh {wanted} does not fit {len(devices)} {devices[0].platform} device(s); change mesh.* so that "
            "their product divides the number of devices"
        )
    used = np.array(devices[:total]).reshape(tuple(sizes.values()))
    return Mesh(used, AXES, axis_types=(AxisType.Auto,) * len(AXES))
