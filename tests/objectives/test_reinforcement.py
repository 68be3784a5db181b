"""The reinforcement loss: compared with torch, over micro-batches and meshes, and what it leaves out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import Config
from gptjax.model import gpt
from gptjax.model.architecture import Architecture
from gptjax.objectives.objective import Models
from gptjax.objectives.policy_gradient import PolicyScores
from gptjax.objectives.reinforcement import Reinforcement
from gptjax.parallel.mesh import make_mesh
from gptjax.training.program import Program

ROWS, LENGTH, VOCABULARY = 8, 16, 97
MEANS = ("token", "sequence", "constant")


@pytest.fixture
def config(tiny_config) -> Config:
    tiny_config.objective.update(name="reinforcement", group_size=4, max_new_tokens=8, clip_low=0.1, clip_high=0.15)
    tiny_config.optimizer.update(clip_norm=0.0)
    tiny_config.model.num_layers = 1
    tiny_config.mesh.data = 1
    return tiny_config


def batch(*, old: bool, seed: int = 0) -> dict[str, np.ndarray]:
    """Answers of 1 to 8 tokens; the last row has no loss."""
    random = np.random.default_rng(seed)
    text = random.integers(0, VOCABULARY, (ROWS, LENGTH + 1)).astype(np.int32)
    begins, lengths = random.integers(2, 7, ROWS), random.integers(1, 9, ROWS)
    places = np.arange(LENGTH)
    weights = ((places >= begins[:, None]) & (places < (begins + lengths)[:, None])).astype(np.float32)
    weights[-1] = 0
    guess = (-np.log(VOCABULARY) + 0.4 * random.standard_normal((ROWS, LENGTH))).astype(np.float32)
    made = {
        "tokens": text[:, :-1],
        "targets": text[:, 1:],
        "weights": weights,
        "positions": np.tile(places.astype(np.int32), (ROWS, 1)),
        "advantages": random.standard_normal(ROWS).astype(np.float32),
        "token_share": np.full(ROWS, 1 / weights.sum(), np.float32),
        "sampler": guess,
    }
    return made | ({"old": guess} if old else {})


class Trainer:
    """A compiled step that starts from the same state for any batch. The reference: initial parameters times 1.3."""

    def __init__(self, config: Config):
        devices = np.prod([config.mesh[axis] for axis in ("data", "fsdp", "context", "tensor")])
        self.program = Program.of(config, make_mesh(config.mesh, jax.devices()[:devices]))

    def __call__(self, made: dict[str, np.ndarray]):
        """(metrics of a step, parameters after it)."""
        state = self.program.initial_state()
        if state.reference_params is not None:
            state = state.replace(reference_params=jax.tree.map(lambda leaf: leaf * 1.3, state.reference_params))
        with jax.set_mesh(self.program.mesh):
            state, metrics = self.program.step(state, self.program.to_device(made), self.program.hyper(3))
        return {name: float(value) for name, value in metrics.items()}, jax.device_get(state.params)


def metrics_of(config: Config, made: dict[str, np.ndarray]) -> dict[str, float]:
    """The loss and its metrics alone. The reference has the initial parameters times 1.3."""
    program = Program.of(config, make_mesh(config.mesh, jax.devices()[:1]))
    objective, hyper = program.objective, program.hyper(0)

    @jax.jit
    def evaluated(params, batch):
        policy, reference = (
            gpt.bind(program.architecture, jax.tree.map(lambda x, f=f: x * f, params)) for f in (1, 1.3)
        )
        models = Models(policy, reference if objective.reference else None)
        return objective.loss(models, batch, total_weight=objective.weight(batch), hyper=hyper)

    loss, metrics = evaluated(beginning(config), {name: jnp.asarray(value) for name, value in made.items()})
    assert loss == metrics["loss"]
    return {name: float(value) for name, value in metrics.items()}


def beginning(config: Config) -> gpt.Params:
    random = np.random.default_rng(0)
    abstract = gpt.abstract_params(Architecture.from_config(config.model, 0))
    return jax.tree.map(lambda leaf: jnp.asarray(random.normal(0, 0.05, leaf.shape), leaf.dtype), abstract)


def log_probabilities(config: Config, made, factor: float) -> np.ndarray:
    """By the model with its initial parameters times a factor."""
    params = jax.tree.map(lambda leaf: leaf * factor, beginning(config))
    model = gpt.bind(Architecture.from_config(config.model, 0), params)
    tokens, positions = (jnp.asarray(made[name]) for name in ("tokens", "positions"))
    hidden, _ = model.hidden(tokens, positions=positions)
    scores = np.asarray(jax.nn.log_softmax(model.logits(hidden)), np.float64)
    return np.take_along_axis(scores, made["targets"][..., None], axis=-1)[..., 0]


@pytest.mark.parametrize(("mean", "kl_weight"), [("token", 0.0), ("token", 0.7), ("sequence", 0.7), ("constant", 0.7)])
def test_the_loss_is_that_of_numpy(config, mean, kl_weight):
    config.objective.update(loss_mean=mean, kl_weight=kl_weight, num_iterations=2)
    made = batch(old=True)
    metrics = metrics_of(config, made)
    new, reference = log_probabilities(config, made, 1.0), log_probabilities(config, made, 1.3)
    ratio, advantage = np.exp(new - made["old"]), made["advantages"][:, None].astype(np.float64)
    loss = -np.minimum(ratio * advantage, np.clip(ratio, 0.9, 1.15) * advantage)
    kl = np.exp(reference - new) - (reference - new) - 1
    clipped = np.where(advantage > 0, ratio > 1.15, ratio < 0.9)
    weights = made["weights"].astype(np.float64)
    of_token = {
        "token": weights / weights.sum(),
        "sequence": weights / np.maximum(weights.sum(1, keepdims=True), 1) / (ROWS - 1),
        "constant": weights / (8 * (ROWS - 1)),
    }[mean]
    np.testing.assert_allclose(metrics["loss"], ((loss + kl_weight * kl) * of_token).sum(), rtol=1e-5)
    mean_of = weights / weights.sum()
    np.testing.assert_allclose(metrics["clip_fraction"], (clipped * mean_of).sum(), rtol=1e-5)
    assert 0.1 < metrics["clip_fraction"] < 0.9
    if kl_weight:
        np.testing.assert_allclose(metrics["kl"], (kl * mean_of).sum(), rtol=1e-4)
    else:
        assert "kl" not in metrics
    # Here the old log-probabilities are those of the sampler.
    assert metrics["sampler_difference"] == 0


class OfTable(Reinforcement):
    """The objective for a model whose logits are a table, float32 [rows, length, vocabulary]."""

    def scores(self, model, batch, dropout_keys=None):
        log_probabilities = jax.nn.log_softmax(model)
        chosen = jnp.take_along_axis(log_probabilities, batch["targets"][..., None], axis=-1)[..., 0]
        return PolicyScores(chosen, jnp.zeros_like(chosen))


@pytest.mark.parametrize("mean", MEANS)
def test_loss_and_gradient_are_those_of_torch(config, mean):
    torch = pytest.importorskip("torch")
    random = np.random.default_rng(1)
    logits = random.standard_normal((ROWS, LENGTH, VOCABULARY)).astype(np.float32)
    made = batch(old=True)
    now = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), made["targets"][..., None], axis=-1)[..., 0]
    made["old"] = (now + 0.15 * random.standard_normal(now.shape)).astype(np.float32)
    ours = OfTable(mean, max_new_tokens=8, num_iterations=2, logits_chunk=0, reference=False, group_size=4)
    given = {name: jnp.asarray(value) for name, value in made.items()}

    def total(table):
        hyper = {"clip_low": jnp.float32(0.1), "clip_high": jnp.float32(0.15)}
        return ours.loss(Models(table), given, total_weight=ours.weight(given), hyper=hyper)[0]

    loss, gradient = jax.value_and_grad(total)(jnp.asarray(logits))

    table = torch.tensor(logits, requires_grad=True)
    theirs = {name: torch.tensor(value) for name, value in made.items()}
    new = torch.log_softmax(table, -1).gather(-1, theirs["targets"].long()[..., None])[..., 0]
    ratio, advantage, mask = torch.exp(new - theirs["old"]), theirs["advantages"][:, None], theirs["weights"]
    each = -torch.min(ratio * advantage, torch.clamp(ratio, 0.9, 1.15) * advantage) * mask
    expected = {
        "token": each.sum() / mask.sum(),
        "sequence": (each.sum(1) / mask.sum(1).clamp(min=1)).sum() / (ROWS - 1),
        "constant": each.sum() / ((ROWS - 1) * 8),
    }[mean]
    expected.backward()
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(gradient), table.grad.norm().item(), rtol=1e-5)
    np.testing.assert_allclose(gradient, table.grad.numpy(), atol=1e-7)


@pytest.fixture(scope="module")
def alone() -> dict:
    """The result with one device and one micro-batch, by `loss_mean`."""
    return {}


@pytest.mark.parametrize(
    ("changes", "mean"),
    [
        pytest.param({"accumulation": 4}, "token", marks=pytest.mark.slow),
        ({"accumulation": 2, "data": 2}, "sequence"),
        pytest.param({"context": 2, "tensor": 2}, "sequence", marks=pytest.mark.slow),
        ({"logits_chunk": 4}, "token"),
    ],
    ids=str,
)
def test_micro_batches_meshes_and_pieces_change_nothing(config, alone, changes, mean):
    config.objective.update(loss_mean=mean, kl_weight=0.3)
    made = batch(old=False)
    if mean not in alone:
        alone[mean] = Trainer(config)(made)
    expected, params = alone[mean]
    for name, value in changes.items():
        section = next(s for s in (config.train, config.mesh, config.objective) if name in s)
        section[name] = value
    found, moved = Trainer(config)(made)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-5, atol=1e-6, err_msg=name)
    # Adam's first update has the size of the rate, whatever the gradient: compared where that is not a rounding error.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), moved, params)


def test_without_old_ones_the_ratio_is_1(config):
    made = batch(old=False)
    metrics = metrics_of(config, made)
    weights = made["weights"]
    np.testing.assert_allclose(metrics["loss"], -(weights.sum(1) * made["advantages"]).sum() / weights.sum(), rtol=1e-5)
    assert metrics["clip_fraction"] == 0
    new = log_probabilities(config, made, 1.0)
    np.testing.assert_allclose(
        metrics["sampler_difference"], (abs(new - made["sampler"]) * weights).sum() / weights.sum(), rtol=1e-4
    )
    assert metrics["entropy"] == pytest.approx(np.log(VOCABULARY), rel=0.05)


@pytest.mark.parametrize("mean", MEANS)
def test_rows_that_bear_no_loss_are_in_no_numerator_and_no_divisor(config, mean):
    config.objective.loss_mean = mean
    trainer, made = Trainer(config), batch(old=False)
    expected, _ = trainer(made)
    made["tokens"][-1], made["targets"][-1], made["advantages"][-1] = 5, 7, 1e6
    found, _ = trainer(made)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-6, err_msg=name)
    made["weights"][:] = 0
    nothing, _ = trainer(made)
    assert nothing["loss"] == 0 == nothing["gradient_norm"]
