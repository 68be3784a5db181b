import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.model import gpt
from gptjax.objectives.language_modeling import LanguageModeling
from gptjax.objectives.objective import Batch, Models

ROWS, LENGTH, VOCABULARY = 4, 16, 97


@pytest.fixture
def model_of(tiny_architecture):
    """(params, function from parameters to a model), whose weights are large: the losses of tokens differ."""
    params = jax.tree.map(lambda a: a * 5, gpt.initialise(tiny_architecture, jax.random.key(0)))
    return params, lambda params: gpt.bind(tiny_architecture, params)


@pytest.fixture
def batch() -> Batch:
    random = np.random.default_rng(0)
    weights = random.random((ROWS, LENGTH)) * (random.random((ROWS, LENGTH)) < 0.7)
    weights[1] = 0
    return {
        "tokens": jnp.asarray(random.integers(0, VOCABULARY, (ROWS, LENGTH)), jnp.int32),
        "targets": jnp.asarray(random.integers(0, VOCABULARY, (ROWS, LENGTH)), jnp.int32),
        "weights": jnp.asarray(weights, jnp.float32),
        "positions": jnp.tile(jnp.arange(LENGTH), (ROWS, 1)),
    }


def loss_of(model: gpt.GPT, batch: Batch, total: jax.Array, *, z_loss: float = 0.0, label_smoothing: float = 0.0):
    """(loss, metrics) of language modelling."""
    objective = LanguageModeling(isolate_documents=False, smooths=label_smoothing > 0, logits_chunk=0)
    hyper = {"z_loss": jnp.float32(z_loss), "label_smoothing": jnp.float32(label_smoothing)}
    return objective.loss(Models(model), batch, total_weight=total, hyper=hyper)


def logits_of(model: gpt.GPT, batch: Batch) -> np.ndarray:
    """The scores of the real tokens of the vocabulary, in float64."""
    hidden, _ = model.hidden(batch["tokens"], positions=batch["positions"])
    return np.float64(model.logits(hidden))[..., :VOCABULARY]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.mark.parametrize(("z_loss", "label_smoothing"), [(0.0, 0.0), (1e-2, 0.0), (0.0, 0.2), (1e-2, 0.2)])
def test_the_objective_is_the_weighted_sum_of_its_published_terms(model_of, batch, z_loss, label_smoothing):
    params, bind = model_of
    total = jnp.float32(batch["weights"].sum())
    found, metrics = loss_of(bind(params), batch, total, z_loss=z_loss, label_smoothing=label_smoothing)
    logits = logits_of(bind(params), batch)
    log_probabilities = log_softmax(logits)
    cross_entropy = -np.take_along_axis(log_probabilities, np.asarray(batch["targets"])[..., None], -1)[..., 0]
    log_partition = np.log(np.exp(logits).sum(-1))
    smoothed = (1 - label_smoothing) * cross_entropy - label_smoothing * log_probabilities.mean(-1)
    weights = np.float64(batch["weights"]) / np.float64(batch["weights"]).sum()
    np.testing.assert_allclose(found, ((smoothed + z_loss * log_partition**2) * weights).sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], (cross_entropy * weights).sum(), rtol=1e-5)
    correct = logits.argmax(-1) == np.asarray(batch["targets"])
    np.testing.assert_allclose(metrics["accuracy"], (correct * weights).sum(), rtol=1e-5, atol=1e-7)


def test_z_loss_pulls_the_log_partition_to_zero(model_of, batch):
    """Its gradient alone is that of z * log_partition^2: along it, the log-partition shrinks."""
    params, bind = model_of
    total = jnp.float32(batch["weights"].sum())

    def penalty(params):
        both, metrics = loss_of(bind(params), batch, total, z_loss=1.0)
        return both - metrics["loss"]

    before, gradient = jax.jit(jax.value_and_grad(penalty))(params)
    after = penalty(jax.tree.map(lambda p, g: p - 1e-4 * g, params, gradient))
    assert after < before


def test_micro_batches_of_different_weight_add_up(model_of, batch):
    """Losses, metrics and gradients of parts, divided by the whole's weight, sum to those of the whole."""
    params, bind = model_of
    total = jnp.float32(batch["weights"].sum())

    @jax.jit
    def value_and_gradient(part):
        def loss(params):
            return loss_of(bind(params), part, total, label_smoothing=0.1)

        return jax.value_and_grad(loss, has_aux=True)(params)

    whole = value_and_gradient(batch)
    parts = [value_and_gradient(jax.tree.map(lambda a, r=row: a[r : r + 1], batch)) for row in range(ROWS)]
    total_of_parts = jax.tree.map(lambda *values: sum(values), *parts)
    # Gradients are up to 2. What rounding leaves depends on the processor: up to 1.4e-4 without fused multiplication
    # and addition. Weights that were wrong would be off by far more.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=5e-4, atol=5e-4), total_of_parts, whole)


def test_tokens_without_weight_do_not_matter(model_of, batch):
    params, bind = model_of
    total = jnp.float32(batch["weights"].sum())
    targets = jnp.where(batch["weights"] > 0, batch["targets"], 0)
    found, _ = loss_of(bind(params), batch, total)
    changed, _ = loss_of(bind(params), batch | {"targets": targets}, total)
    assert float(found) == float(changed)
