import contextlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import jax
import pytest

from gptjax.config import get_default
from gptjax.errors import UserError
from gptjax.processes import runtime

COUNT_DEVICES = """
import sys, jax
from gptjax.config import get_default
from gptjax.processes.runtime import provide_cpu_devices
config = get_default()
config.mesh.update(eval(sys.argv[1]))
provide_cpu_devices(config.mesh, int(sys.argv[2]))
print(jax.device_count())
"""


@pytest.mark.parametrize(
    ("sizes", "rows", "flags", "expected"),
    [
        ({"fsdp": 2, "tensor": 2}, 8, "", 4),  # what the mesh needs
        ({"expert": 3, "fsdp": 2}, 6, "", 6),
        ({}, 7 * 11 * 13, "", 1),  # no number of cores under 7 divides the rows
        ({}, 8, "--xla_force_host_platform_device_count=3", 3),  # the user chose
    ],
)
def test_virtual_cpu_devices(sizes, rows, flags, expected):
    cores = len(os.sched_getaffinity(0))
    if cores >= 7 and not sizes and not flags:
        pytest.skip("the rows are divisible by a number of these cores")
    result = subprocess.run(
        [sys.executable, "-c", COUNT_DEVICES, str(sizes), str(rows)],
        env=os.environ | {"XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(result.stdout) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", "--xla_gpu_enable_latency_hiding_scheduler=true"),
        ("--xla_dump_to=d", "--xla_gpu_enable_latency_hiding_scheduler=true --xla_dump_to=d"),
        ("--xla_gpu_enable_latency_hiding_scheduler=false", "--xla_gpu_enable_latency_hiding_scheduler=false"),
    ],
)
def test_compiler_flags_do_not_override_the_user(monkeypatch, given, expected):
    monkeypatch.setenv("XLA_FLAGS", given)
    for _ in range(2):
        runtime.set_compiler_flags("several gpus")
        assert os.environ["XLA_FLAGS"] == expected
    runtime.set_compiler_flags("tpu")
    assert os.environ["XLA_FLAGS"] == expected


@pytest.mark.parametrize(
    ("platform", "capability", "fine"),
    [("gpu", "7.5", False), ("gpu", "8.0", True), ("gpu", "12.0", True), ("cpu", None, True)],
)
def test_a_gpu_without_bfloat16_is_told_before_compiling(platform, capability, fine):
    device = Mock(spec=jax.Device, platform=platform, device_kind="Tesla T4")
    device.compute_capability = capability
    said = r"Tesla T4 \(compute capability 7.5\) has no bfloat16.*compute_dtype=float32"
    with contextlib.nullcontext() if fine else pytest.raises(UserError, match=said):
        runtime.check_bfloat16(device)


@pytest.mark.parametrize(
    ("platforms", "gpu", "tpu", "expected"),
    [
        (None, False, False, True),
        (None, True, False, False),
        (None, False, True, False),
        ("cpu", True, True, True),
        ("cuda,cpu", True, False, False),
        ("tpu", False, True, False),
    ],
)
def test_memory_is_kept_only_where_the_cpu_computes(monkeypatch, platforms, gpu, tpu, expected):
    """A limit of one arena would make the threads that load data for a GPU wait for each other."""
    monkeypatch.setattr(runtime, "_hardware", lambda: ("gpu",) if gpu else ())
    monkeypatch.setattr(runtime, "_sees_gpu", lambda: gpu)
    monkeypatch.setattr(runtime.cluster, "has_tpu", lambda: tpu)
    kept = []
    monkeypatch.setattr(runtime, "_keep_freed_memory", lambda: kept.append(True))
    monkeypatch.setattr(runtime, "set_compiler_flags", lambda hardware: None)
    monkeypatch.setattr(runtime, "provide_cpu_devices", lambda mesh, rows: None)
    with jax_platforms(platforms):
        runtime.start(get_default().mesh, rows=8, cache_dir=Path("unused"))
    assert bool(kept) == (expected and sys.platform == "linux")


@contextlib.contextmanager
def jax_platforms(platforms: str | None):
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", platforms)
    try:
        yield
    finally:
        jax.config.update("jax_platforms", before)


@pytest.mark.parametrize(
    ("platforms", "said"),
    [
        ("nonsense", "JAX_PLATFORMS=nonsense: nonsense is not a platform of JAX; use cpu, cuda or tpu"),
        ("cuda", "JAX_PLATFORMS=cuda: JAX for an NVIDIA GPU is not installed; pip install 'gptjax[cuda]'"),
        ("tpu", "JAX_PLATFORMS=tpu: JAX for a TPU is not installed; pip install 'gptjax[tpu]'"),
    ],
)
def test_a_platform_that_is_not_there(platforms, said):
    installed = any(map(importlib.util.find_spec, ("jax_cuda12_plugin", "jax_cuda13_plugin", "libtpu")))
    if platforms != "nonsense" and installed:
        pytest.skip("it is installed here")
    program = "import sys, jax; from gptjax import cli; sys.exit(cli.run(lambda argv: jax.devices(), []))"
    environment = os.environ | {"JAX_PLATFORMS": platforms}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: {said}") and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("JAX_NUM_CPU_DEVICES", "many", "JAX does not take this value; correct it, or unset it"),
        ("JAX_NUMPY_RANK_PROMOTION", "raise", "gptjax does not run under this rule of JAX (Operands could not be"),
    ],
)
def test_a_variable_of_jax_that_is_to_blame_is_named(variable, value, said):
    program = (
        "import sys; from gptjax import cli\n"
        "def main(argv):\n import jax.numpy as jnp\n jnp.ones((2, 3)) * jnp.ones(3)\n"
        "sys.exit(cli.run(main, []))"
    )
    environment = os.environ | {variable: value}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: {variable}={value}: {said}")
    assert "Traceback" not in done.stderr
