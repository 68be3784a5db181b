import dataclasses
from unittest.mock import Mock

import jax
import pytest

from gptjax.config import MESH_AXES, get_default
from gptjax.errors import UserError
from gptjax.parallel import mesh as mesh_lib
from gptjax.parallel.mesh import make_mesh


def mesh_config(**sizes: int):
    config = get_default().mesh
    config.update(sizes)
    return config


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({}, (8, 1, 1, 1, 1)),
        ({"fsdp": 4}, (2, 4, 1, 1, 1)),
        ({"fsdp": 2, "tensor": 2, "context": 2}, (1, 2, 1, 2, 2)),
        ({"data": 2}, (2, 1, 1, 1, 1)),
        ({"data": 1, "fsdp": 8}, (1, 8, 1, 1, 1)),
        ({"expert": 4}, (2, 1, 4, 1, 1)),
    ],
)
def test_minus_one_takes_all_remaining_devices(sizes, shape):
    mesh = make_mesh(mesh_config(**sizes))
    assert mesh.axis_names == ("data", "fsdp", "expert", "context", "tensor")
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


@dataclasses.dataclass(frozen=True)
class Chip:
    """The attributes of a TPU device that the arrangement reads."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    process_index: int = 0


def two_slices() -> list[Chip]:
    """Two slices of 2 x 2 chips, listed in interleaved order."""
    places = [(x, y, 0) for x in range(2) for y in range(2)]
    return [Chip(2 * i + s, s, place) for i, place in enumerate(places) for s in range(2)]


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 4}, {"data": 2, "expert": 2, "tensor": 2}, {"data": 8}], ids=str)
def test_slices_lie_along_the_data_axis(sizes):
    devices = make_mesh_devices(two_slices(), **sizes)
    per_slice = devices.shape[0] // 2
    for i, part in enumerate((devices[:per_slice], devices[per_slice:])):
        assert {chip.slice_index for chip in part.flat} == {i}


def test_other_axes_do_not_cross_slices():
    with pytest.raises(UserError, match=r"mesh.data is 1, but must be a multiple of the number of slices, 2"):
        make_mesh_devices(two_slices(), data=1, fsdp=8)


def make_mesh_devices(devices, **sizes):
    return mesh_lib.arrange(devices, {axis: sizes.get(axis, 1) for axis in MESH_AXES})


def test_every_process_has_a_part_of_the_mesh():
    devices = [Mock(spec=jax.Device, process_index=i // 4, platform="cpu") for i in range(8)]
    with pytest.raises(UserError, match="4 of 8 devices, and process 1 has none of them"):
        make_mesh(mesh_config(data=4), devices)
