"""Devices and how they are arranged: the mesh (data, fsdp, context, tensor)."""

import math
import os

import jax
import numpy as np
from jax.sharding import AxisType, Mesh
from ml_collections import ConfigDict

from gptjax.errors import UserError

AXES = ("data", "fsdp", "context", "tensor")


def provide_cpu_devices(mesh: ConfigDict, rows: int) -> None:
    """Before JAX starts: splits the CPU into one virtual device a core, so that a step uses all cores.

    XLA runs one CPU device's program mostly on one core; data-parallel over virtual devices is up to twice as
    fast on two. The number is that of the mesh where it is given, else the largest number of cores that divides
    `rows`, the rows of a micro-batch. Nothing happens where the user chose (XLA_FLAGS, JAX_NUM_CPU_DEVICES), and
    GPU and TPU back-ends do not look at it.
    """
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "") or jax.config.jax_num_cpu_devices > 0:
        return
    fixed = mesh.fsdp * mesh.context * mesh.tensor
    if mesh.data > 0 or fixed > 1:
        count = max(mesh.data, 1) * fixed
    else:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        count = max(n for n in range(1, cores + 1) if rows % n == 0)
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # JAX has started (a notebook, a test): its devices are what there is
        pass


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
