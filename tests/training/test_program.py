"""A run as an object: one compiled program for all hyper-parameters, and several runs in one program."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from gptjax.config import Config
from gptjax.parallel.mesh import make_mesh
from gptjax.training.program import Program

STEPS, NUM_CELLS, ROWS, LENGTH, VOCABULARY = 50, 8, 4, 16, 97


@pytest.fixture
def base(tiny_config) -> Config:
    tiny_config.model.update(dropout=0.1)
    tiny_config.objective.label_smoothing = 0.1
    tiny_config.optimizer.update(epsilon=1e-6)
    tiny_config.train.update(num_steps=STEPS, batch_size=ROWS, ema_decay=0.9)
    tiny_config.mesh.data = 1
    return tiny_config


def cell_of(base: Config, index: int) -> Config:
    """A cell of a study with different values of everything that is an input of the step."""
    cell, rate = base.copy_and_resolve_references(), 1e-3 * (1 + index / 4)
    cell.seed = index  # dropout follows it, too
    cell.optimizer.update(learning_rate=rate, muon_learning_rate=3 * rate, weight_decay=0.1 * index)
    cell.optimizer.update(beta1=0.8 + 0.02 * index, beta2=0.9 + 0.01 * index, clip_norm=0.3 + 0.1 * index)
    cell.objective.update(z_loss=1e-3 * index, label_smoothing=0.02 * (1 + index))
    cell.train.ema_decay = 0.5 + 0.05 * index
    return cell


def batch_of(seed: int, step: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng([seed, step])
    tokens = random.integers(0, VOCABULARY, (ROWS, LENGTH + 1), dtype=np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": (random.random((ROWS, LENGTH)) < 0.7).astype(np.float32),
        "segment_ids": np.ones((ROWS, LENGTH), np.int32),
        "positions": np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)),
    }


def solo(program: Program, config: Config) -> tuple[np.ndarray, list[np.ndarray]]:
    """Losses, last parameters and their average of one cell; the compiled step of `program` may be that of another."""
    own = Program.of(config, program.mesh)
    state, losses = program.initial_state(config.seed), []
    for step in range(STEPS):
        state, metrics = program.step(state, program.to_device(batch_of(config.seed, step)), own.hyper(step))
        losses.append(float(metrics["loss"]))
    return np.array(losses), [np.asarray(leaf) for leaf in jax.tree.leaves((state.params, state.ema_params))]


@pytest.mark.parametrize(
    ("optimizer", "parts", "mesh"),
    [
        pytest.param("adamw", 1, {}, id="one device"),
        pytest.param("muon", 2, {"fsdp": 2}, id="members over 2, fsdp 2", marks=pytest.mark.slow),
        pytest.param("adamw", 4, {"data": 1, "tensor": 2}, id="members over 4, tensor 2", marks=pytest.mark.slow),
    ],
)
def test_packed_members_equal_their_solo_runs(base, optimizer, parts, mesh):
    base.optimizer.name = optimizer
    alone = Program.of(base, make_mesh(base.mesh, jax.devices()[:1]))
    cells = [cell_of(base, index) for index in range(NUM_CELLS)]
    base.mesh.update(mesh)
    devices = jax.devices()[: parts * int(np.prod(list(mesh.values()) or [1]))]
    packed = Program.of(base, make_mesh(base.mesh, devices, members=parts), members=len(cells))
    state = packed.initial_state(*(cell.seed for cell in cells))
    hypers = [Program.of(cell, packed.mesh).hyperparameters for cell in cells]
    losses = []
    with jax.set_mesh(packed.mesh):
        for step in range(STEPS):
            batch = jax.tree.map(lambda *rows: np.stack(rows), *(batch_of(cell.seed, step) for cell in cells))
            hyper = packed.hyper_of_members(hypers, step)
            state, metrics = packed.step(state, packed.to_device(batch), hyper)
            losses.append(np.asarray(metrics["loss"]))
    for index, cell in enumerate(cells):
        expected, params = solo(alone, cell)
        np.testing.assert_allclose(np.array(losses)[:, index], expected, rtol=1e-5, atol=1e-5, err_msg=str(index))
        for leaf, of_solo in zip(jax.tree.leaves((state.params, state.ema_params)), params, strict=True):
            np.testing.assert_allclose(leaf[index], of_solo, rtol=1e-3, atol=1e-4)
    spread = np.array(losses)[-1]
    assert spread.max() - spread.min() > 1e-3, "the cells did not differ"


def test_one_program_serves_all_values(base):
    """Cells with other rates, decays, betas and seeds reuse the compiled program of the first."""
    program = Program.of(base, make_mesh(base.mesh, jax.devices()[:1]))
    state, batch = program.initial_state(), program.to_device(batch_of(0, 0))
    text = program.step.lower(state, batch, program.hyper(0)).as_text()
    for index in range(1, 3):
        other = Program.of(cell_of(base, index), program.mesh)
        assert other.step.lower(state, batch, other.hyper(3)).as_text() == text
    for step in range(3):
        state, _ = program.step(state, program.to_device(batch_of(0, step)), program.hyper(step))
    assert program.step._cache_size() == 1


def test_stacked_states_are_split_like_single_ones(base):
    base.mesh.update(data=1, fsdp=2, tensor=2)
    single = Program.of(base, make_mesh(base.mesh, jax.devices()[:4]))
    stacked = Program.of(base, make_mesh(base.mesh, members=2), members=4)
    assert stacked.mesh.shape["member"] == 2

    def check(one, many):
        assert many.shape == (4, *one.shape)
        assert many.sharding.spec == PartitionSpec("member", *one.sharding.spec)

    jax.tree.map(check, single.target, stacked.target)
    split = [leaf for leaf in jax.tree.leaves(single.target) if not leaf.sharding.is_fully_replicated]
    assert len(split) > 20


def test_norms_of_each_layer(base):
    """They are those of the parameters, gradients and updates, and their squares add up to the global ones."""
    program = Program.of(base, make_mesh(base.mesh, jax.devices()[:1]))
    state, batch, hyper = program.initial_state(), program.to_device(batch_of(0, 0)), program.hyper(0)
    params = {name: np.asarray(leaf) for name, leaf in state.params["blocks"]["mlp"]["up"].items()}
    before = jax.tree.map(np.asarray, state.params)
    after, metrics = program.step_with_norms(state, batch, hyper)
    found = metrics["norms/parameter/blocks/mlp/up/kernel"]
    np.testing.assert_allclose(found, [np.linalg.norm(layer) for layer in params["kernel"]], rtol=1e-5)
    change = np.asarray(after.params["final_norm"]["scale"]) - before["final_norm"]["scale"]
    np.testing.assert_allclose(metrics["norms/update/final_norm/scale"], np.linalg.norm(change), rtol=1e-3)
    for kind in ("parameter", "gradient", "update"):
        squares = sum(float(np.square(v).sum()) for k, v in metrics.items() if k.startswith(f"norms/{kind}/"))
        np.testing.assert_allclose(squares**0.5, metrics[f"{kind}_norm"], rtol=1e-5)


def test_shapes_of_hyper_parameters_need_no_device(base, monkeypatch):
    """A plan compiles for devices that do not exist."""
    program = Program.of(base, make_mesh(base.mesh, jax.devices()[:1]))
    expected = {
        name: (np.shape(value), np.asarray(value).dtype) for name, value in program.hyperparameters.at(0).items()
    }
    fresh = Program.of(base, program.mesh)
    monkeypatch.setattr("gptjax.training.program.Hyperparameters", None)
    assert {name: (a.shape, a.dtype) for name, a in fresh.abstract_hyper.items()} == expected


def test_members_need_a_seed_each_or_one_for_all(base):
    program = Program.of(base, make_mesh(base.mesh, jax.devices()[:1]), members=4)
    with pytest.raises(ValueError, match="2 seeds for 4 members"):
        program.initial_state(1, 2)
    same = program.initial_state(3)
    np.testing.assert_array_equal(*jax.tree.leaves(same.params)[0][:2])


def test_an_average_of_equal_numbers_stays_equal(base):
    """Bitwise, on processors with and without fused multiply-add."""
    base.optimizer.learning_rate = 0.0
    program = Program.of(base, make_mesh(base.mesh, jax.devices()[:1]))
    state = program.initial_state()
    for step in range(5):
        state, _ = program.step(state, program.to_device(batch_of(0, step)), program.hyper(step))
    jax.tree.map(np.testing.assert_array_equal, state.ema_params, state.params)
