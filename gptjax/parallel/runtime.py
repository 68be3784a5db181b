"""What is decided before JAX starts: CPU devices, memory, compiled programs kept on disk."""

import contextlib
import ctypes
import os
import sys
from pathlib import Path

import jax
from ml_collections import ConfigDict


def start(mesh: ConfigDict, *, rows: int, cache_dir: Path) -> None:
    """Prepares JAX for a command that works on `rows` rows at a time. `cache_dir` holds compiled programs."""
    provide_cpu_devices(mesh, rows)
    if sys.platform == "linux":
        _keep_freed_memory()
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache_dir / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


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
    with contextlib.suppress(RuntimeError):  # JAX has started (a notebook, a test): its devices are what there is
        jax.config.update("jax_num_cpu_devices", count)


def _keep_freed_memory() -> None:
    """Makes glibc keep large freed blocks instead of giving them back to the kernel.

    XLA's CPU client allocates its temporary buffer anew for every step. Above 32 MiB glibc maps and unmaps it each
    time, and the page faults take up to a third of a step (4 layers, batch 16 to 24). Other C libraries lack the
    function or ignore it.
    """
    mmap_max, trim_threshold, arena_max = (
        -4,
        -1,
        -8,
    )  # names of malloc.h; one arena, since only the first can grow
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    for parameter, value in ((mmap_max, 0), (trim_threshold, -1), (arena_max, 1)):
        mallopt(parameter, value)
