import json
import math
import re

import jax
import pytest

from gptjax.errors import UserError
from gptjax.model import gpt
from gptjax.model.architecture import Architecture
from gptjax.parallel.mesh import make_mesh
from gptjax.training import footprint
from gptjax.training.program import Program


def state_and_mesh(config, *, make=False, **sizes):
    config.mesh.update(sizes)
    mesh = make_mesh(config.mesh)
    program = Program.of(config, mesh)
    return program.initial_state() if make else program.target, mesh


def test_bytes_are_those_that_devices_hold(tiny_config):
    state, mesh = state_and_mesh(tiny_config, make=True, data=2, fsdp=2, tensor=2)
    device = mesh.devices.flat[0]
    shards = [shard for leaf in jax.tree.leaves(state) for shard in leaf.addressable_shards]
    assert footprint.bytes_per_device(state) == sum(s.data.nbytes for s in shards if s.device == device)


def test_fsdp_divides_what_a_device_holds(tiny_config):
    whole, _ = state_and_mesh(tiny_config, data=8, fsdp=1)
    parts, mesh = state_and_mesh(tiny_config, data=1, fsdp=8)
    assert footprint.bytes_per_device(parts) < 0.2 * footprint.bytes_per_device(whole)
    assert footprint.describe(parts, mesh).startswith("mesh fsdp 8; a device holds ")


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (1023, "0.999 KiB"), (1536, "1.5 KiB"), (2.5 * 2**30, "2.5 GiB"), (2**42, "4 TiB")],
)
def test_sizes_are_readable(num_bytes, text):
    assert footprint.readable(num_bytes) == text


def test_a_large_parameter_that_fsdp_does_not_divide(tiny_config):
    tiny_config.model.update(embed_dim=300, num_heads=2, vocab_size=2000)
    tiny_config.mesh.update(data=1, fsdp=8)
    mesh = make_mesh(tiny_config.mesh)
    _, params = gpt.abstract_model(Architecture.from_config(tiny_config.model, 0))
    with pytest.raises(UserError) as caught:
        footprint.check_sharded(params, mesh, allow_replicated=False)
    message = str(caught.value)
    assert re.search(r"the parameter \S+ \[[\d, ]+\] \([\d.]+ MiB\) would be replicated on all 8 devices", message)
    assert "its dimension 300 is not divisible by 8" in message and "mesh.allow_replicated=True" in message
    footprint.check_sharded(params, mesh, allow_replicated=True)
    tiny_config.model.embed_dim = 304
    _, params = gpt.abstract_model(Architecture.from_config(tiny_config.model, 0))
    footprint.check_sharded(params, mesh, allow_replicated=False)


def test_small_parameters_may_be_whole(tiny_config):
    tiny_config.model.update(embed_dim=18, num_heads=1)
    tiny_config.mesh.update(data=1, fsdp=8)
    _, params = gpt.abstract_model(Architecture.from_config(tiny_config.model, 0))
    footprint.check_sharded(params, make_mesh(tiny_config.mesh), allow_replicated=False)


def test_a_checkpoint_that_fewer_devices_cannot_hold(tiny_config, tmp_path, monkeypatch):
    state, mesh = state_and_mesh(tiny_config, data=1, fsdp=2)
    needed = footprint.bytes_per_device(state)
    monkeypatch.setattr(footprint, "device_memory", lambda device, sharers: needed + 8)
    footprint.check_fits(state, mesh)
    monkeypatch.setattr(footprint, "device_memory", lambda device, sharers: needed - 8)
    (tmp_path / "manifest.json").write_text(json.dumps({"devices": {"count": 64}}))
    checkpoint = tmp_path / "checkpoints" / "20"
    with pytest.raises(UserError) as caught:
        footprint.check_fits(state, mesh, checkpoint=checkpoint)
    assert str(checkpoint) in str(caught.value) and "saved on 64 device(s)" in str(caught.value)
    assert f"{footprint.readable(needed)} on each of 2 device(s)" in str(caught.value)


def test_virtual_devices_share_the_memory_of_the_machine():
    device = jax.devices()[0]
    whole = footprint.device_memory(device, 1)
    assert whole > 2**28 and footprint.device_memory(device, 8) == math.floor(whole / 8)


def test_replicas_need_room_for_what_is_computed(tiny_config, monkeypatch):
    _, params = gpt.abstract_model(Architecture.from_config(tiny_config.model, 0))
    num_bytes = 4 * gpt.parameter_count(params)
    for memory, fits in ((2 * num_bytes, True), (2 * num_bytes - 1, False), (None, True)):
        monkeypatch.setattr(footprint, "device_memory", lambda device, sharers, memory=memory: memory)
        assert footprint.replicas_fit(params) is fits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"evaluation.batch_size": 2**20}, "lower evaluation.batch_size"),
        ({"train.batch_size": 2**20, "evaluation.batch_size": 8}, "lower train.batch_size"),
        ({"model.vocab_size": 2**24, "evaluation.batch_size": 8}, "and the logits"),
        ({"model.vocab_size": 2**24, "evaluation.batch_size": 8, "objective.logits_chunk": 1}, None),
        ({}, None),
    ],
)
def test_what_a_batch_needs_at_least_is_counted_before_it_is_taken(tiny_config, options, message, monkeypatch):
    for path, value in options.items():
        section, _, name = path.partition(".")
        tiny_config[section][name] = value
    mesh = make_mesh(tiny_config.mesh)
    monkeypatch.setattr(footprint, "device_memory", lambda device, sharers: 10**8)
    rows = tiny_config.train.batch_size
    if message is None:
        footprint.check_batch(tiny_config, mesh, rows)
        return
    with pytest.raises(UserError, match=message):
        footprint.check_batch(tiny_config, mesh, rows)
