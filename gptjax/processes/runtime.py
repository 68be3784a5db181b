"""Settings that must be made before JAX starts: compiler flags, CPU devices, memory, the compilation cache."""

import contextlib
import ctypes
import importlib.util
import math
import os
import re
import socket
import sys
import traceback
from pathlib import Path

import jax
from ml_collections import ConfigDict

from gptjax.config import MESH_AXES
from gptjax.errors import UserError
from gptjax.processes import cluster, distributed

# Flags by hardware: (environment variable, flag, value). Flags that the user has set are kept. Each flag
# states its reason. libtpu needs no flags: it overlaps collectives with computation by itself.
COMPILER_FLAGS = {
    "gpu": (
        # Without it, XLA tries Triton kernels for every matrix product. On an H200, cuBLAS's kernels are as fast, and
        # the step of an 11M model compiles in 12 s instead of 56 s.
        ("XLA_FLAGS", "--xla_gpu_enable_triton_gemm", "false"),
    ),
    "several gpus": (
        # Overlaps the collectives of data and fsdp axes with computation. Off in XLA, on in NVIDIA's JAX images
        # (docs.nvidia.com/jax-toolbox/environment-variables). A single GPU has no collectives.
        ("XLA_FLAGS", "--xla_gpu_enable_latency_hiding_scheduler", "true"),
    ),
}
VIRTUAL_DEVICES = 16  # of the CPU: a mesh may have so many even on fewer cores
BFLOAT16_CAPABILITY = 8.0  # NVIDIA's Ampere; earlier GPUs have no bfloat16 arithmetic


def start(mesh: ConfigDict, *, rows: int, cache_dir: Path, compute_dtype: str = "float32") -> None:
    """Prepares JAX for a command that works on `rows` rows at a time. `cache_dir` holds compiled programs.

    Raises UserError where the devices cannot compute in `compute_dtype`.
    """
    for hardware in _hardware():
        set_compiler_flags(hardware)
    provide_cpu_devices(mesh, rows)
    if sys.platform == "linux" and computes_on_cpu():
        _keep_freed_memory()
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache_dir / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    if compute_dtype == "bfloat16":
        check_bfloat16(jax.local_devices()[0])


def set_compiler_flags(hardware: str) -> None:
    """Adds the flags for this hardware to the environment variables that the compiler reads when it starts."""
    for variable, flag, value in COMPILER_FLAGS.get(hardware, ()):
        given = os.environ.get(variable, "")
        if flag not in given:
            os.environ[variable] = f"{flag}={value} {given}".strip()


def _hardware() -> tuple[str, ...]:
    """The keys of COMPILER_FLAGS for the devices that JAX will find. It is too early to ask JAX itself."""
    plugin = any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
    if not plugin or os.environ.get("JAX_PLATFORMS") == "cpu":
        return ()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = len(list(Path("/dev").glob("nvidia[0-9]*"))) if visible is None else len(visible.split(","))
    return ("gpu", "several gpus") if count * distributed.current().size > 1 else ("gpu",)


def computes_on_cpu() -> bool:
    """Whether JAX will find only the CPU, as far as can be known before it starts."""
    if chosen := jax.config.jax_platforms:  # JAX_PLATFORMS
        return chosen.split(",")[0] == "cpu"
    return not (cluster.has_tpu() or (_hardware() and _sees_gpu()))


def _sees_gpu() -> bool:
    """Whether this machine has a GPU: JAX's plugin for CUDA may be installed where there is none."""
    devices = [*Path("/dev").glob("nvidia[0-9]*"), *Path("/dev").glob("dxg")]  # dxg: Linux within Windows
    return bool(devices) and os.environ.get("CUDA_VISIBLE_DEVICES") != ""


def missing_platform(error: BaseException) -> str | None:
    """If JAX did not start because this machine lacks a platform of JAX_PLATFORMS: which one, and what to do."""
    chosen, frames = os.environ.get("JAX_PLATFORMS", ""), traceback.extract_tb(error.__traceback__)
    if not chosen or not frames or not frames[-1].filename.endswith("xla_bridge.py"):
        return None
    named = re.search(r"initialize backend '(\w+)'", str(error))
    platforms = {"gpu": "cuda", "rocm": "cuda"} if "gpu" in chosen else {}
    name = platforms.get(named[1], named[1]) if named else chosen.split(",")[0]
    kinds = {
        "cuda": ("cuda", "an NVIDIA GPU", any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13))),
        "tpu": ("tpu", "a TPU", importlib.util.find_spec("libtpu") is not None),
    }
    if name not in kinds:
        return f"JAX_PLATFORMS={chosen}: {name} is not a platform of JAX; use cpu, cuda or tpu, or unset it"
    extra, device, installed = kinds[name]
    if not installed:
        what = f"JAX for {device} is not installed; pip install 'gptjax[{extra}]', or unset it"
    else:
        what = f"{device} is not found on this machine, or is in use; unset it to use what is there"
    return f"JAX_PLATFORMS={chosen}: {what}"


def check_bfloat16(device: jax.Device) -> None:
    """Raises UserError for a GPU without bfloat16, where XLA would convert every operand and be slower than float32."""
    capability = getattr(device, "compute_capability", None)
    if device.platform == "gpu" and capability and float(capability) < BFLOAT16_CAPABILITY:
        raise UserError(
            f"model.compute_dtype is bfloat16, and {device.device_kind} (compute capability {capability}) has no "
            f"bfloat16 arithmetic, which begins at {BFLOAT16_CAPABILITY}; use --config.model.compute_dtype=float32"
        )


def provide_cpu_devices(mesh: ConfigDict, rows: int) -> None:
    """Before JAX starts: splits the CPU into one virtual device per core, so that a step uses all cores.

    XLA runs the program of one CPU device mostly on one core; on two cores, data parallelism over virtual devices is
    up to twice as fast. The number of devices is that of the mesh where the mesh gives one, else the largest number of
    cores that divides `rows`, the rows of a micro-batch. Several processes share the mesh or the rows, and each has the
    same number of devices. If the mesh needs more than both VIRTUAL_DEVICES and the cores, they are not made, since
    hundreds take minutes to start; `make_mesh` then refuses the mesh. A number chosen by the user (XLA_FLAGS,
    JAX_NUM_CPU_DEVICES) is kept; GPU and TPU back-ends ignore it.
    """
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "") or jax.config.jax_num_cpu_devices > 0:
        return
    group = distributed.current()
    fixed = math.prod(mesh[axis] for axis in MESH_AXES if axis != "data")
    cores = min(len(cores) // sharers for cores, sharers in _cores(group))
    wanted = -(-max(mesh.data, 1) * fixed // group.size) if mesh.data > 0 or fixed > 1 else 0
    if 0 < wanted <= max(cores, VIRTUAL_DEVICES):
        count = wanted
    else:
        count = max((n for n in range(1, cores + 1) if rows % (n * group.size) == 0), default=1)
    with contextlib.suppress(RuntimeError):  # JAX has already started (a notebook, a test): its devices stay
        jax.config.update("jax_num_cpu_devices", count)


def _cores(group: distributed.Group) -> list[tuple[list[int], int]]:
    """For each process: the cores that it may use, and the number of processes that share them."""
    known = hasattr(os, "sched_getaffinity")
    cores = sorted(os.sched_getaffinity(0)) if known else list(range(os.cpu_count() or 1))
    places = group.gather([socket.gethostname(), cores])
    return [(cores, places.count(place)) for place in places for cores in place[1:]]


def _keep_freed_memory() -> None:
    """Makes glibc keep large freed blocks instead of giving them back to the kernel. For training on the CPU only.

    XLA's CPU client allocates a new temporary buffer for every step. Above 32 MiB, glibc maps and unmaps it each time,
    and the page faults take up to a third of a step (4 layers, batch 16 to 24). Other C libraries lack the function or
    ignore it. Only one arena is allowed, since only the first can grow. So this is not used with a GPU: nothing is
    gained there, and the threads that load data would wait for each other.
    """
    mmap_max, trim_threshold, arena_max = -4, -1, -8  # names of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    for parameter, value in ((mmap_max, 0), (trim_threshold, -1), (arena_max, 1)):
        mallopt(parameter, value)
