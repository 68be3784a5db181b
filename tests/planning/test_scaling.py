"""The purpose of a mesh: less memory per device. Compiled for CPU devices; nothing is run."""

import math

import jax
import pytest

from gptjax import config as config_lib
from gptjax.planning.compilation import compile_step


def memory(rows: int = 8, context_length: int = 128, remat: str = "full", num_experts: int = 0, **axes: int):
    config = config_lib.get_default()
    config.model.num_experts = num_experts
    config.model.update(num_layers=4, num_heads=8, embed_dim=256, context_length=context_length, vocab_size=512)
    config.model.update(scan_unroll=1, remat=remat, attention="xla")
    config.objective.logits_chunk = 32
    config.train.update(num_steps=10, batch_size=rows)
    config.mesh.update({"data": 1} | axes)
    config = config_lib.resolve(config, 512, steps_per_epoch=10.0)
    devices = jax.devices()[: math.prod(axes.values())]
    return compile_step(config, devices, topology="local").memory


@pytest.fixture(scope="module")
def alone():
    return memory()


@pytest.mark.parametrize("fsdp", [pytest.param(2, marks=pytest.mark.slow), 8])
def test_state_falls_with_fsdp(alone, fsdp):
    assert memory(fsdp=fsdp).arguments == pytest.approx(alone.arguments / fsdp, rel=0.05)


def test_state_falls_with_tensor(alone):
    assert memory(tensor=4).arguments == pytest.approx(alone.arguments / 4, rel=0.05)


@pytest.mark.slow
def test_state_of_experts_falls_with_expert():
    """A device holds neither other devices' experts nor their moments; everything else is unchanged."""
    whole, split, all_axes = (
        memory(num_experts=8, **axes).arguments
        for axes in ({"data": 8}, {"data": 2, "expert": 4}, {"fsdp": 2, "expert": 2, "tensor": 2})
    )
    experts = 3 * 4 * 4 * 8 * 2 * 256 * 1024  # float32 parameters and two moments: layers, experts, up and down
    assert whole - split == experts * 3 / 4
    assert all_axes == pytest.approx(experts / 8 + (whole - experts) / 4, rel=0.01)


def test_activations_fall_with_context():
    """With long rows, whose activations are most of the temporary memory."""
    whole, split = (memory(rows=1, context_length=8192, context=context).temporaries for context in (1, 4))
    assert split < whole / 2.5
