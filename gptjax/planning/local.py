"""Compiles for the devices of this machine."""

import os

import jax

from gptjax import config as config_lib
from gptjax.planning.compilation import compile_step
from gptjax.planning.compiler import Compiler
from gptjax.planning.facts import Facts
from gptjax.processes import runtime
from gptjax.training.throughput import peak_flops


def open_local(config: config_lib.Config) -> Compiler:
    """The compiler of this machine's devices, which take up no memory for it."""
    runtime.provide_cpu_devices(config.mesh, config.train.batch_size // config.train.accumulation)
    devices = jax.devices()
    available = memory_of(devices[0]) // (len(devices) if devices[0].platform == "cpu" else 1)

    def compile_local(changed: config_lib.Config) -> Facts:
        return compile_step(changed, devices, topology="local", available_bytes=available)

    return Compiler(
        compile_local,
        devices=len(devices),
        device_kind=devices[0].device_kind,
        available_bytes=available,
        peak=peak_flops(devices[0], config.model.compute_dtype),
    )


def memory_of(device: jax.Device) -> int:
    """Bytes that JAX may use of a GPU or TPU; the memory of the machine for a CPU."""
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return device.memory_stats()["bytes_limit"]
