import jax
import pytest

from gptjax.config import get_default
from gptjax.errors import UserError
from gptjax.parallel.mesh import make_mesh


def mesh_config(**sizes: int):
    config = get_default().mesh
    config.update(sizes)
    return config


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({}, (8, 1, 1, 1)),
        ({"fsdp": 4}, (2, 4, 1, 1)),
        ({"fsdp": 2, "tensor": 2, "context": 2}, (1, 2, 2, 2)),
        ({"data": 2}, (2, 1, 1, 1)),
        ({"data": 1, "fsdp": 8}, (1, 8, 1, 1)),
    ],
)
def test_minus_one_takes_all_remaining_devices(sizes, shape):
    mesh = make_mesh(mesh_config(**sizes))
    assert mesh.axis_names == ("data", "fsdp", "context", "tensor")
    assert mesh.devices.shape == shape
    assert len(set(mesh.devices.flat)) == mesh.devices.size


@pytest.mark.parametrize("sizes", [{"fsdp": 16}, {"data": 3}, {"data": 8, "tensor": 2}, {"fsdp": 3}])
def test_a_mesh_that_does_not_fit_is_told_with_its_sizes(sizes):
    with pytest.raises(UserError) as caught:
        make_mesh(mesh_config(**sizes))
    message = str(caught.value)
    assert "8 cpu device(s)" in message and "mesh.*" in message
    for axis, size in sizes.items():
        assert f"{axis} {size}" in message


def test_only_the_given_devices_are_used():
    devices = jax.devices()[4:6]
    assert list(make_mesh(mesh_config(), devices).devices.flat) == devices
