"""Bytes of the training state on each device, and whether they fit, before anything is compiled."""

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from gptjax.config import ROW_AXES, Config
from gptjax.errors import UserError
from gptjax.parallel import partition
from gptjax.parameters import find, path_string
from gptjax.training.state import TrainState

_BATCHES = 2  # on the host at the same time
LARGE = 2**20  # bytes: a smaller parameter may be on every device


def bytes_per_device(tree: Any) -> int:
    """`tree` has arrays, or shapes with shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def describe(state: TrainState, mesh: Mesh) -> str:
    """ "mesh data 2 x fsdp 4; a device holds 1.2 GiB of parameters and 2.5 GiB of optimizer state"."""
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "1 device"
    parts = {
        "parameters": state.params,
        "optimizer state": state.opt_state,
        "the parameters' average": state.ema_params,
        "the reference": state.reference_params,
    }
    held = [f"{readable(size)} of {name}" for name, tree in parts.items() if (size := bytes_per_device(tree))]
    return f"mesh {axes}; a device holds " + ", ".join(held[:-1]) + f" and {held[-1]}" * bool(held)


def warnings(state: TrainState, mesh: Mesh) -> list[str]:
    """One for each large part of the optimizer's state that is replicated along the fsdp axis."""
    if mesh.shape["fsdp"] == 1:
        return []
    return [
        f"warning: the optimizer's {path_string(path)} {list(leaf.shape)} is replicated on all "
        f"{mesh.shape['fsdp']} devices of mesh.fsdp ({readable(math.prod(leaf.shape) * leaf.dtype.itemsize)})"
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
        if math.prod(leaf.shape) * leaf.dtype.itemsize > LARGE and leaf.sharding.is_fully_replicated
    ]


def check_sharded(params: Any, mesh: Mesh, *, allow_replicated: bool) -> None:
    """Raises UserError for a large parameter that is replicated along the fsdp axis."""
    size = mesh.shape["fsdp"]
    if size == 1 or allow_replicated:
        return
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = path_string(path)
        wanted = find(name).split
        num_bytes = math.prod(leaf.shape) * leaf.dtype.itemsize
        if "fsdp" not in wanted or num_bytes <= LARGE:
            continue
        if "fsdp" not in partition.partition_spec(name, leaf.shape, mesh):
            dimension = leaf.shape[wanted.index("fsdp")]
            raise UserError(
                f"the parameter {name} {list(leaf.shape)} ({readable(num_bytes)}) would be replicated on all "
                f"{size} devices of mesh.fsdp, since its dimension {dimension} is not divisible by {size}. Change "
                "mesh.fsdp or that dimension, or allow it with --config.mesh.allow_replicated=True"
            )


def replicas_fit(params: Any) -> bool:
    """Whether each device of this process can hold all parameters twice, once for what is computed."""
    devices = jax.local_devices()
    memory = device_memory(devices[0], len(devices))
    needed = 2 * sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    return memory is None or needed <= memory


def check_fits(state: TrainState, mesh: Mesh, *, checkpoint: Path | None = None) -> None:
    """Raises UserError where the memory of a device is smaller than what the state alone needs.

    Activations, gradients and temporary arrays come on top: what passes here may still not fit.
    """
    device = next(device for device in mesh.devices.flat if device.process_index == jax.process_index())
    there = device_memory(device, sum(d.process_index == device.process_index for d in mesh.devices.flat))
    needed = bytes_per_device(state)
    if there is None or needed <= there:
        return
    what = "the training state"
    if checkpoint:
        what += f" of {checkpoint}{_saved_on(checkpoint)}"
    raise UserError(
        f"{what} needs {readable(needed)} on each of {mesh.devices.size} device(s), and {device.device_kind} has "
        f"{readable(there)}: use more devices with --config.mesh.fsdp, or a smaller model"
    )


def check_batch(config: Config, mesh: Mesh, rows: int) -> None:
    """Raises UserError where a batch alone needs more than the memory of this host or of a device.

    Args:
      config: only sizes that it gives itself are counted; for activations this is a lower bound.
      rows: rows of the global batch that this process reads.
    """
    model, train = config.model, config.train
    advice = "lower train.batch_size or model.context_length"
    host = _host_memory()
    needed = _BATCHES * rows * model.context_length * 2 * 4  # inputs and targets of 32 bits
    if host is not None and needed > host:
        raise UserError(
            f"the batches of {rows} rows of {model.context_length} tokens need {readable(needed)} of this machine's "
            f"memory, and it has {readable(host)}: {advice}"
        )
    device = next(device for device in mesh.devices.flat if device.process_index == jax.process_index())
    there = device_memory(device, sum(d.process_index == device.process_index for d in mesh.devices.flat))
    width = 2 if model.compute_dtype == "bfloat16" else 4
    sharers = math.prod(mesh.shape[axis] for axis in ROW_AXES)
    cells = train.batch_size // train.accumulation // sharers * model.context_length // mesh.shape["context"]
    # The backward pass needs at least the inputs of all blocks, with any model.remat but "offload".
    kept = 1 if model.remat == "offload" else model.num_layers
    chunk = min(config.objective.logits_chunk or model.context_length, model.context_length)
    logits = cells * chunk // model.context_length * model.vocab_size // mesh.shape["tensor"]
    needed = (cells * model.embed_dim * kept + logits) * width
    if there is not None and needed > there:
        raise UserError(
            f"a micro-batch of {train.batch_size // train.accumulation} rows of {model.context_length} tokens needs "
            f"more than {readable(needed)} on each device for the inputs of {model.num_layers} blocks and the logits, "
            f"and {device.device_kind} has {readable(there)}: raise train.accumulation, or {advice}"
        )
    rows_scored = config.evaluation.batch_size or 2 * train.batch_size
    needed = rows_scored * model.context_length // mesh.devices.size * model.embed_dim * width
    if there is not None and needed > there:
        raise UserError(
            f"an evaluation batch of {rows_scored} rows of {model.context_length} tokens needs more than "
            f"{readable(needed)} on each device, and {device.device_kind} has {readable(there)}: lower "
            "evaluation.batch_size"
        )


def device_memory(device: jax.Device, sharers: int) -> int | None:
    """Bytes that JAX may use on a device; `sharers` virtual devices divide the memory of a CPU. None: not known."""
    if device.platform == "cpu":
        return None if (memory := _host_memory()) is None else memory // sharers
    return (device.memory_stats() or {}).get("bytes_limit")


def _host_memory() -> int | None:
    """Bytes of this machine, or of the container that this process is in."""
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # no container, or "max"
            memory = min(memory, int(Path(limit).read_text(encoding="ascii")))
    return memory


def _saved_on(checkpoint: Path) -> str:
    try:
        count = json.loads((checkpoint.parent.parent / "manifest.json").read_text(encoding="utf-8"))["devices"]["count"]
    except (OSError, ValueError, KeyError):
        return ""
    return f", saved on {count} device(s),"


def readable(num_bytes: float) -> str:
    """ "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.3g} TiB"
