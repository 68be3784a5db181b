import pytest

from gptjax.errors import UserError
from gptjax.planning import chips
from gptjax.training.throughput import datasheet_flops


def test_every_listed_slice_is_one():
    for chip in chips.TPUS.values():
        for shape in chip.shapes:
            topology = chips.parse_topology(f"{chip.name}:{shape}")
            assert topology.chip is chip
            assert str(topology) == f"{chip.name}:{shape}"


def test_chips_of_a_slice():
    assert chips.parse_topology("v5p:8x8x8").num_chips == 512
    assert chips.parse_topology("v5p:4x8x12").num_chips == 384  # not listed, but made of whole hosts
    assert chips.parse_topology("v5e:16x16*3").num_chips == 768


@pytest.mark.parametrize("text", ["v9:2x2", "v5e", "4x4", "", "v5e:4x4*", "v5e:٣x٣", "v5e:9999999x1", "x" * 10_000])
def test_a_topology_that_does_not_exist_is_answered_with_those_that_do(text):
    with pytest.raises(
        UserError, match=r"choose from v4:.*v5e:\{1x1,.*4x4,.*v5p:\{2x2x1,.*v6e:\{1x1,.*local$"
    ) as caught:
        chips.parse_topology(text)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("text", ["v5e:3x3", "v5e:32x32", "v5e:4x4x4", "v5e:0x0", "v5e:999999x999999"])
def test_a_slice_that_does_not_exist_is_answered_with_those_of_the_chip(text):
    with pytest.raises(UserError, match=r"v5e has no such slice; choose from v5e:1x1, v5e:2x2, .*v5e:16x16$"):
        chips.parse_topology(text)


@pytest.mark.parametrize("text", ["v5e:4x4*0", "v5e:4x4*257"])
def test_slices_without_limit_are_refused(text):
    with pytest.raises(UserError, match="a run can join 1 to 256"):
        chips.parse_topology(text)


def test_the_kinds_that_jax_names_are_found():
    kinds = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e"}
    assert {kind: chips.find(kind).name for kind in kinds} == kinds
    assert chips.find("NVIDIA H200").name == "H200"
    assert chips.find("cpu") is None


def test_every_chip_has_a_peak():
    for chip in (*chips.TPUS.values(), *chips.GPUS):
        assert datasheet_flops(chip.device_kind, "bfloat16") > 1e14
        assert chip.memory_rate > chip.link_rate > 1e11
