"""Compiles the train step of a config for devices that need not be there, from shapes alone."""

import math
import re
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import jaxlib
from jax.sharding import Mesh, NamedSharding

from gptjax import config as config_lib
from gptjax.errors import UserError
from gptjax.model import gpt
from gptjax.model.architecture import Architecture
from gptjax.optim.optimizers import make_optimizer
from gptjax.parallel import mesh as mesh_lib
from gptjax.parallel import partition
from gptjax.planning import traffic
from gptjax.planning.facts import Facts, Memory
from gptjax.planning.flops import program_flops
from gptjax.planning.hlo import Program
from gptjax.training import footprint
from gptjax.training.state import abstract_state
from gptjax.training.step import make_train_step

SIZES = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
TOO_LARGE = re.compile(
    r"(?:requires?|required|Used|total)[^()\d]*\(?([\d.]+)([KMGT])i?B?\)?[^()\d]*\(?([\d.]+)([KMGT])i?B?\)?"
)


def compile_step(
    config: config_lib.Config, devices: Sequence[jax.Device], *, topology: str, available_bytes: int | None = None
) -> Facts:
    """Compiles one train step over all the devices, and says what is in it.

    Args:
      config: resolved (`config.resolve`), with a vocabulary. Nothing is read and nothing is allocated.
      devices: of `jax.devices()` or of a topology.
      topology: what the devices are called in the report.
      available_bytes: memory of a device.

    Raises:
      UserError: the mesh does not divide the devices, the heads or the batch, or leaves devices out.
    """
    mesh = mesh_lib.make_mesh(config.mesh, list(devices))
    if mesh.size != len(devices):
        axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
        raise UserError(
            f"the mesh {axes} uses {mesh.size} of the {len(devices)} chips of {topology}; set "
            "--config.mesh.data=-1 to use them all, or name a smaller topology"
        )
    config = config.copy_and_resolve_references()
    config.mesh.data = mesh.shape["data"]
    config_lib.validate(config)

    architecture = Architecture.from_config(config.model, config.model.vocab_size)
    graphdef, params = gpt.abstract_model(architecture)
    footprint.check_sharded(params, mesh, allow_replicated=config.mesh.allow_replicated)
    optimizer, schedule = make_optimizer(
        config.optimizer,
        config.schedule,
        num_steps=config.train.num_steps,
        warmup=config.schedule.warmup,
        decay=config.schedule.decay,
    )
    state = abstract_state(architecture, optimizer, mesh, ema=config.train.ema_decay > 0)
    step = make_train_step(config, graphdef, optimizer, schedule, mesh, state)
    batch = abstract_batch(config, mesh)
    memory = needed = memory_bytes = None
    collectives, buffers = [], []
    begin = time.perf_counter()
    with jax.set_mesh(mesh):
        traced = step.trace(state, batch)
        executed_flops = program_flops(traced.jaxpr.jaxpr)
        lowered = traced.lower()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            temporaries, limit = too_large(str(error))
            needed = temporaries and temporaries + bytes_per_device((state, batch))
            available_bytes = limit or available_bytes
        else:
            analysis = compiled.memory_analysis()
            memory = Memory(
                arguments=analysis.argument_size_in_bytes,
                outputs=analysis.output_size_in_bytes,
                temporaries=analysis.temp_size_in_bytes,
                aliased=analysis.alias_size_in_bytes,
                generated_code=analysis.generated_code_size_in_bytes,
                host=analysis.host_temp_size_in_bytes + analysis.host_argument_size_in_bytes,
            )
            program = Program(compiled.as_text())
            collectives, buffers = traffic.collectives(program), traffic.largest_buffers(program)
            memory_bytes = traffic.memory_bytes(program)
    return Facts(
        topology=topology,
        devices=mesh.size,
        device_kind=devices[0].device_kind,
        platform=devices[0].platform,
        mesh=dict(mesh.shape),
        rows=config.train.batch_size,
        context_length=config.model.context_length,
        accumulation=config.train.accumulation,
        parameters=gpt.parameter_count(params),
        flops_per_token=architecture.flops_per_token(),
        executed_flops=executed_flops,
        compute_dtype=config.model.compute_dtype,
        memory=memory,
        needed_bytes=needed,
        available_bytes=available_bytes,
        memory_bytes=memory_bytes,
        collectives=tuple(collectives),
        buffers=tuple(buffers),
        compile_seconds=time.perf_counter() - begin,
        versions={"jax": jax.__version__, "jaxlib": jaxlib.__version__, "compiler": _compiler(devices[0])},
    )


def abstract_batch(config: config_lib.Config, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The batch that data.pipeline makes, as shapes."""
    shape = (config.train.batch_size, config.model.context_length)
    sharding = NamedSharding(mesh, partition.BATCH)
    names = ["tokens", "targets", "weights", "positions"]
    if config.data.isolate_documents:
        names.append("segment_ids")
    return {
        name: jax.ShapeDtypeStruct(shape, jnp.float32 if name == "weights" else jnp.int32, sharding=sharding)
        for name in names
    }


def bytes_per_device(arrays: Any) -> int:
    """Bytes on one device of a tree of abstract arrays with shardings."""
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(arrays))


def too_large(message: str) -> tuple[int | None, int | None]:
    """(bytes of temporaries, bytes there are) in the compiler's message of a program too large, if it says so."""
    match = TOO_LARGE.search(message)
    if not match:
        return None, None
    return tuple(round(float(match[i]) * SIZES[match[i + 1]]) for i in (1, 3))


def _compiler(device: jax.Device) -> str:
    return device.client.platform_version.splitlines()[0]
