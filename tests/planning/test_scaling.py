"""What a mesh is for: less memory a device. Compiled for CPU devices, nothing is run."""

import jax
import pytest

from gptjax import config as config_lib
from gptjax.planning.compilation import compile_step


def memory(rows: int = 8, context_length: int = 128, remat: str = "full", **axes: int):
    config = config_lib.get_default()
    config.model.update(num_layers=4, num_heads=8, embed_dim=256, context_length=context_length, vocab_size=512)
    config.model.update(scan_unroll=1, remat=remat, attention="xla")
    config.objective.logits_chunk = 32
    config.train.update(num_steps=10, batch_size=rows)
    config.mesh.update({"data": 1} | axes)
    config = config_lib.resolve(config, 512, steps_per_epoch=10.0)
    devices = jax.devices()[: axes.get("fsdp", 1) * axes.get("context", 1) * axes.get("tensor", 1)]
    return compile_step(config, devices, topology="local").memory


@pytest.fixture(scope="module")
def alone():
    return memory()


@pytest.mark.parametrize("fsdp", [2, 8])
def test_state_falls_with_fsdp(alone, fsdp):
    assert memory(fsdp=fsdp).arguments == pytest.approx(alone.arguments / fsdp, rel=0.05)


def test_state_falls_with_tensor(alone):
    assert memory(tensor=4).arguments == pytest.approx(alone.arguments / 4, rel=0.05)


def test_activations_fall_with_context():
    """Long rows, whose activations are most of the temporary memory."""
    whole, split = (memory(rows=1, context_length=8192, context=context).temporaries for context in (1, 4))
    assert split < whole / 2.5
