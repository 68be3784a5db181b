"""Growing batches: the gradients of several steps are gathered for one update."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptjax import config as config_lib
from gptjax import train
from gptjax.errors import UserError
from gptjax.optim.gathering import gathered, update_steps
from gptjax.parallel.mesh import make_mesh
from gptjax.training.program import Program

ROWS, LENGTH, VOCABULARY = 8, 16, 61


@pytest.mark.parametrize(
    ("stages", "ends"),
    [
        ([], "111111111111"),
        ([(0, 3)], "001001001001"),
        ([(4, 2), (8, 4)], "111101010001"),
        ([(3, 2), (4, 3)], "111010010011"),  # what is begun is gathered to its end; the last step is an update
    ],
)
def test_which_steps_end_with_an_update(stages, ends):
    assert "".join(str(int(end)) for end in update_steps(stages, 12)) == ends


def test_an_update_is_that_of_the_mean_gradient():
    gradients = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    weights, ends = np.float32([1, 3, 2, 2, 5]), (0.0, 1.0, 0.0, 0.0, 1.0)
    params = jnp.ones(3)
    plain = optax.adam(0.1)
    state = gathered(plain, 0.0, 1.0).init(params)
    for gradient, weight, updates in zip(gradients, weights, ends, strict=True):
        changes, state = gathered(plain, updates, weight).update(jnp.asarray(gradient), state, params)
        assert bool(jnp.any(changes)) == (updates > 0)
    expected = plain.init(params)
    for part in (slice(0, 2), slice(2, 5)):
        mean = np.average(gradients[part], axis=0, weights=weights[part])
        last, expected = plain.update(jnp.asarray(mean), expected, params)
    np.testing.assert_allclose(changes, last, rtol=1e-6)
    assert state.inner[0].count == 2


def program(*, rows: int, num_steps: int, stages: str, **mesh: int) -> Program:
    config = config_lib.get_default()
    config.model.update(num_layers=1, num_heads=2, embed_dim=16, context_length=LENGTH, vocab_size=VOCABULARY)
    config.optimizer.update(learning_rate=5e-3, epsilon=1e-6)
    config.schedule.update(name="constant", warmup=0, batch_stages=stages)
    config.train.update(batch_size=rows, num_steps=num_steps)
    config.data.isolate_documents = False
    config.mesh.update({"data": 1} | mesh)
    return Program.of(config_lib.resolve(config, VOCABULARY, 1.0), make_mesh(config.mesh))


def trained(run: Program, tokens: np.ndarray) -> dict:
    """The parameters after training on the rows of `tokens` [rows, length + 1] in order; some tokens have no weight."""
    count = np.random.default_rng(1).random((len(tokens), LENGTH)) < np.linspace(0.1, 1, len(tokens))[:, None]
    state, rows = run.initial_state(), run.config.train.batch_size
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (rows, LENGTH))
    for step in range(run.config.train.num_steps):
        part = tokens[step * rows : (step + 1) * rows]
        batch = {"tokens": part[:, :-1], "targets": part[:, 1:], "positions": positions}
        batch["weights"] = count[step * rows : (step + 1) * rows].astype(np.float32)
        state, _ = run.step(state, run.to_device(batch), run.hyper(step))
    return jax.device_get(state.params)


@pytest.mark.parametrize("mesh", [pytest.param({}, marks=pytest.mark.slow), {"fsdp": 2}])
def test_several_batches_are_one_large_batch(mesh):
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (6 * ROWS, LENGTH + 1), dtype=np.int32)
    large = trained(program(rows=2 * ROWS, num_steps=3, stages=""), tokens)
    small = trained(program(rows=ROWS, num_steps=6, stages="0:2", **mesh), tokens)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), small, large)


@pytest.mark.slow
def test_a_run_that_is_continued_in_the_middle_of_an_update(tiny_config, tiny_corpus, tmp_path):
    config = tiny_config
    config.data.update(source=f"text:{tiny_corpus}/*.txt")
    config.model.vocab_size = 0
    config.tokenizer = "byte"
    config.train.update(num_steps=12, checkpoint_every=5, keep_checkpoints=10)
    config.schedule.update(batch_stages="25%:3", warmup=0)
    config.logging.update(every=1, samples=0, tensorboard=False)
    whole, again = tmp_path / "whole", tmp_path / "again"
    train.train(config, whole)
    shutil.copytree(whole, again)
    for path in (again / "checkpoints").iterdir():
        if path.name.isdigit() and int(path.name) > 5:  # of the batches 3, 4 and 5 of an update, two are gathered
            shutil.rmtree(path)
    train.train(config, again)

    def losses(workdir):
        lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
        return {line["step"]: line["loss"] for line in lines if "loss" in line}

    assert len(losses(whole)) == 12
    assert losses(again) == losses(whole)


@pytest.mark.parametrize(
    ("stages", "problem"),
    [
        ("half:2", "schedule.batch_stages has 'half:2', which is not BEGINNING:BATCHES, such as '50%:2,80%:4'"),
        ("50%", "which is not BEGINNING:BATCHES"),
        ("50%:0", "batches are 1 to 65536"),
        ("50%:2,10%:4", r"begins at the steps \[500, 100\]; every stage must begin after the one before it"),
    ],
)
def test_stages_that_are_wrong(stages, problem):
    config = config_lib.get_default()
    config.schedule.batch_stages = stages
    with pytest.raises(UserError, match=problem):
        config_lib.validate(config)


def test_an_optimizer_that_averages_every_step_is_refused():
    config = config_lib.get_default()
    config.schedule.batch_stages = "50%:2"
    config.optimizer.name = "schedule_free_adamw"
    with pytest.raises(UserError, match="schedule_free_adamw averages the parameters of every step; use one"):
        config_lib.validate(config)
