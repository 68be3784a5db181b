"""Compiles for the devices of this machine."""

import jax

from gptjax import config as config_lib
from gptjax.planning.compilation import compile_step
from gptjax.planning.compiler import Compiler
from gptjax.planning.facts import Facts
from gptjax.processes import runtime
from gptjax.training.footprint import device_memory
from gptjax.training.throughput import peak_flops


def open_local(config: config_lib.Config) -> Compiler:
    """The compiler for the devices of this machine. It allocates no memory on them."""
    runtime.provide_cpu_devices(config.mesh, config.train.batch_size // config.train.accumulation)
    devices = jax.devices()
    available = device_memory(devices[0], len(devices))

    def compile_local(changed: config_lib.Config) -> Facts:
        return compile_step(changed, devices, topology="local", available_bytes=available)

    return Compiler(
        compile_local,
        devices=len(devices),
        device_kind=devices[0].device_kind,
        available_bytes=available,
        peak=peak_flops(devices[0], config.model.compute_dtype),
    )
