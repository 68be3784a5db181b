import itertools
import re

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from gptjax.config import get_default
from gptjax.model import gpt
from gptjax.model.architecture import Architecture
from gptjax.parallel import partition
from gptjax.parallel.mesh import make_mesh
from gptjax.parameters import TABLE, find, path_string
from gptjax.training.program import Program


def mesh_of(**sizes: int) -> Mesh:
    config = get_default().mesh
    config.update(sizes)
    return make_mesh(config)


def architecture_of(**model) -> Architecture:
    config = get_default()
    config.model.update(num_layers=2, num_heads=4, embed_dim=16, context_length=16, vocab_size=64)
    config.model.update(model)
    return Architecture.from_config(config.model, 0)


def program_of(optimizer: str, mesh: Mesh, *, ema: bool = False, **model) -> Program:
    config = get_default()
    config.model.update(num_layers=2, num_heads=4, embed_dim=16, context_length=16, vocab_size=64)
    config.model.update(model)
    config.optimizer.name = optimizer
    config.train.ema_decay = 0.9 * ema
    return Program.of(config, mesh)


def by_path(tree) -> dict[str, object]:
    return {path_string(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


OPTIONS = {  # the first values make the fewest parameters, the last ones the most
    "norm": ["rmsnorm", "layernorm"],
    "activation": ["gelu", "swiglu"],
    "positions": ["none", "rope", "learned"],
    "ngram_order": [1, 3],
    "qk_norm": [False, True],
    "use_bias": [False, True],
    "tie_embeddings": [True, False],
    "num_experts": [0, 2],
    "lora_rank": [0, 3],
    "value_embeddings": [0, 1],
    "residual_scalars": [False, True],
    "attention_gate": [False, True],
}


def test_every_parameter_of_every_architecture_is_in_the_table():
    mesh = mesh_of(data=1, fsdp=2, tensor=2)
    used = set()
    for base, (option, values) in itertools.product((0, -1), OPTIONS.items()):
        others = {name: choices[base] for name, choices in OPTIONS.items()}
        _, params = gpt.abstract_model(architecture_of(lora_targets=".*", **others | {option: values[-1 - base]}))
        for path, leaf in by_path(params).items():
            partition.partition_spec(path, leaf.shape, mesh)
            used.add(find(path))
    assert used == set(TABLE), "a row that matches nothing"


def test_matrices_are_split_over_both_axes_and_layers_over_none():
    mesh = mesh_of(data=1, fsdp=2, tensor=2)
    _, params = gpt.abstract_model(architecture_of(use_bias=True, tie_embeddings=False))
    shardings = by_path(partition.parameter_shardings(params, mesh))
    for path, leaf in by_path(params).items():
        if path.endswith("kernel") or path == "embedding/embedding":
            shard = shardings[path].shard_shape(leaf.shape)
            assert np.prod(shard) == leaf.size // 4, path
            assert not path.startswith("blocks") or shard[0] == leaf.shape[0], path


@pytest.mark.parametrize(
    "path", ["blocks/mlp/lookup/kernel", "embedding", "my_head/kernel", "blocks/attention/query/lora"]
)
def test_an_unknown_parameter_is_refused_by_name(path):
    with pytest.raises(KeyError, match=path):
        partition.partition_spec(path, (2, 4, 4), mesh_of(data=1, fsdp=2))


def test_experts_are_split_over_their_axes_and_all_else_is_whole_along_expert():
    sizes = {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2}
    mesh, without = mesh_of(**sizes), mesh_of(**sizes | {"expert": 1})
    _, params = gpt.abstract_model(architecture_of(num_experts=4, activation="swiglu"))
    specs = {path: partition.partition_spec(path, leaf.shape, mesh) for path, leaf in by_path(params).items()}
    experts = {path for path in specs if "/expert_" in path}
    assert experts == {f"blocks/mlp/expert_{name}/kernel" for name in ("up", "gate", "down")}
    for path, leaf in by_path(params).items():
        if path in experts:
            shard = jax.NamedSharding(mesh, specs[path]).shard_shape(leaf.shape)
            assert shard[:2] == (2, 1) and np.prod(shard) == leaf.size // 8, path
        else:
            assert specs[path] == partition.partition_spec(path, leaf.shape, without), path
            assert "expert" not in str(specs[path]), path


def test_an_axis_that_does_not_divide_is_left_out():
    mesh = mesh_of(data=1, fsdp=2, tensor=4)
    assert partition.partition_spec("embedding/embedding", (97, 16), mesh) == PartitionSpec(None, "fsdp")
    assert partition.partition_spec("blocks/mlp/up/kernel", (2, 15, 64), mesh) == PartitionSpec(None, None, "tensor")
    assert partition.partition_spec("blocks/mlp/up/kernel", (2, 15, 63), mesh) == PartitionSpec(None, None, None)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_moments_and_averages_are_split_like_their_parameters(optimizer):
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    program = program_of(optimizer, mesh, ema=True, use_bias=True)
    state, params = program.target, program.abstract_params
    shardings = {path: leaf.sharding for path, leaf in by_path(state).items()}
    expected = by_path(partition.parameter_shardings(params, mesh))
    owners = {path: [] for path in expected}
    for path, leaf in by_path(state).items():
        parameter = next((p for p in expected if path.endswith(f"/{p}")), None)
        if parameter is None:
            assert leaf.size <= 3 and shardings[path].spec == PartitionSpec(), path  # counters and coefficients
        else:
            assert shardings[path] == expected[parameter], path
            owners[parameter].append(path)
    for parameter, paths in owners.items():
        muon = optimizer == "muon" and re.fullmatch("blocks/.*/kernel", parameter)
        assert len(paths) == (3 if muon else 4), paths  # params, ema_params, and one moment of Muon or two of AdamW


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_first_state_does_not_depend_on_the_mesh(optimizer):
    states = [
        program_of(optimizer, mesh, ema=True, tie_embeddings=False).initial_state(3)
        for mesh in (mesh_of(data=1), mesh_of(fsdp=2, context=2, tensor=2))
    ]
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_memory_of_a_device_falls_with_fsdp():
    """Bytes of parameters and moments on one device: nearly 1 / fsdp of the whole."""

    def bytes_on_first_device(fsdp: int) -> int:
        state = program_of("adamw", mesh_of(data=1, fsdp=fsdp)).initial_state()
        return sum(a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(state))

    whole = bytes_on_first_device(1)
    for fsdp in (2, 8):
        assert 1 / fsdp <= bytes_on_first_device(fsdp) / whole < 1 / fsdp + 0.05


def test_the_abstract_state_describes_the_first_state():
    """A checkpoint is restored with the shapes, types and shardings that were saved."""
    program = program_of("muon", mesh_of(data=2, fsdp=4), ema=True)
    abstract, state = program.target, program.initial_state()

    def check(described, array):
        assert (described.shape, described.dtype) == (array.shape, array.dtype)
        assert described.sharding.is_equivalent_to(array.sharding, array.ndim)

    jax.tree.map(check, abstract, state)


def test_a_batch_is_split_over_rows_and_sequence():
    tokens = np.arange(8 * 16).reshape(8, 16)
    for sizes in ({"data": 2, "fsdp": 2, "context": 2}, {"fsdp": 2, "expert": 2, "context": 2}):
        mesh = mesh_of(**sizes)
        array = partition.to_device({"tokens": tokens}, mesh)["tokens"]
        np.testing.assert_array_equal(array, tokens)
        assert {shard.data.shape for shard in array.addressable_shards} == {(2, 8)}
        assert partition.row_shards(mesh) == 4
