import os
import subprocess
import sys

import pytest

COUNT_DEVICES = """
import sys, jax
from gptjax.config import get_default
from gptjax.parallel.runtime import provide_cpu_devices
config = get_default()
config.mesh.update(eval(sys.argv[1]))
provide_cpu_devices(config.mesh, int(sys.argv[2]))
print(jax.device_count())
"""


@pytest.mark.parametrize(
    ("sizes", "rows", "flags", "expected"),
    [
        ({"fsdp": 2, "tensor": 2}, 8, "", 4),  # what the mesh needs
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
