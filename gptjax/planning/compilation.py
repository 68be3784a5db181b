"""Compiles the train step of a config from shapes alone; the devices need not exist."""

import re
import time
from collections.abc import Sequence

import jax
import jax.extend
import jaxlib

from gptjax import config as config_lib
from gptjax.errors import UserError
from gptjax.model import gpt
from gptjax.parallel import mesh as mesh_lib
from gptjax.planning import hlo, traffic
from gptjax.planning.facts import Facts, Memory
from gptjax.planning.flops import program_flops
from gptjax.training import footprint
from gptjax.training.program import Program

SIZES = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
TOO_LARGE = re.compile(
    r"(?:requires?|required|Used|total)[^()\d]*\(?([\d.]+)([KMGT])i?B?\)?[^()\d]*\(?([\d.]+)([KMGT])i?B?\)?"
)


def compile_step(
    config: config_lib.Config, devices: Sequence[jax.Device], *, topology: str, available_bytes: int | None = None
) -> Facts:
    """Compiles one train step over all the devices, and reports its memory, traffic and FLOPs.

    Args:
      config: resolved (`config.resolve`), with a vocabulary. Nothing is read and nothing is allocated.
      devices: from `jax.devices()` or from a topology.
      topology: the name of the devices in the report.
      available_bytes: memory of a device.

    Raises:
      UserError: the mesh does not divide the devices, the heads or the batch, or leaves devices out.
    """
    # 1. Checks that need no compilation. A run may leave devices idle; a plan for a rented slice may not.
    mesh = mesh_lib.make_mesh(config.mesh, list(devices))
    if mesh.size != len(devices):
        axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
        raise UserError(
            f"the mesh {axes} uses {mesh.size} of the {len(devices)} chips of {topology}; set "
            "--config.mesh.data=-1 to use them all, or name a smaller topology"
        )
    # mesh.data=-1 is resolved now, so the rules between the mesh and the batch are checked again.
    config = config.copy_and_resolve_references()
    config.mesh.data = mesh.shape["data"]
    config_lib.validate(config)

    # 2. The program that `train` would run, compiled but never executed.
    program = Program.of(config, mesh)
    footprint.check_sharded(program.abstract_params, mesh, allow_replicated=config.mesh.allow_replicated)
    state, batch = program.target, program.abstract_batch
    memory = needed = memory_bytes = None
    collectives, buffers = [], []
    begin = time.perf_counter()
    with jax.set_mesh(mesh):
        traced = program.step.trace(state, batch, program.abstract_hyper)
        executed_flops = program_flops(traced.jaxpr.jaxpr)
        lowered = traced.lower()
        # A program that is too large is a result, not an error; the message often says how much it needs.
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            temporaries, limit = too_large(str(error))
            needed = temporaries and temporaries + footprint.bytes_per_device((state, batch))
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
            # 3. The optimised text, since only the compiler decides on collectives and buffers.
            text = hlo.Program(compiled.as_text())
            collectives, buffers = traffic.collectives(text), traffic.largest_buffers(text)
            memory_bytes = traffic.memory_bytes(text)
    return Facts(
        topology=topology,
        devices=mesh.size,
        device_kind=devices[0].device_kind,
        platform=devices[0].platform,
        mesh=dict(mesh.shape),
        rows=config.train.batch_size,
        context_length=config.model.context_length,
        accumulation=config.train.accumulation,
        parameters=gpt.parameter_count(program.abstract_params),
        flops_per_token=program.architecture.flops_per_token(),
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


def too_large(message: str) -> tuple[int | None, int | None]:
    """(bytes of temporaries, bytes available) from the compiler's message on a program that is too large, or Nones."""
    match = TOO_LARGE.search(message)
    if not match:
        return None, None
    return tuple(round(float(match[i]) * SIZES[match[i + 1]]) for i in (1, 3))


def _compiler(device: jax.Device) -> str:
    return device.client.platform_version.splitlines()[0]
