import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.model.architecture import Architecture
from gptjax.objectives import cross_entropy
from gptjax.objectives.cross_entropy import Pieces, Terms


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_token_losses_are_negative_log_probabilities():
    random = np.random.default_rng(0)
    logits, targets = random.normal(size=(2, 5, 11)) * 30, random.integers(0, 11, (2, 5))
    losses, log_partition, _ = cross_entropy.token_losses(jnp.float32(logits), jnp.int32(targets))
    expected = -np.take_along_axis(log_softmax(logits), targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(log_partition, (logits - log_softmax(logits))[..., 0], rtol=1e-5)


def test_the_gradient_of_a_token_loss_is_softmax_minus_one_hot():
    random = np.random.default_rng(0)
    logits, targets = random.normal(size=(2, 5, 11)) * 10, random.integers(0, 11, (2, 5))
    of_loss, of_partition = random.normal(size=(2, 2, 5))

    def weighted(logits):
        losses, log_partition, _ = cross_entropy.token_losses(logits, jnp.int32(targets))
        return (losses * of_loss + log_partition * of_partition).sum()

    softmax, one_hot = np.exp(log_softmax(logits)), np.eye(11)[targets]
    expected = of_loss[..., None] * (softmax - one_hot) + of_partition[..., None] * softmax
    np.testing.assert_allclose(jax.grad(weighted)(jnp.float32(logits)), expected, rtol=1e-4, atol=1e-5)


def test_huge_scores_give_finite_losses():
    logits = jnp.array([[[1e4, -1e4, 0.0], [-1e30, -1e30, 5.0]]])
    losses, *_ = cross_entropy.token_losses(logits, jnp.array([[0, 2]]))
    np.testing.assert_allclose(losses, 0, atol=1e-6)


@pytest.fixture(params=["float32", "bfloat16"])
def inputs(request, tiny_config):
    """(architecture, hidden, table, targets, weights) of two rows of 16 tokens; 97 tokens padded to 128."""
    tiny_config.model.update(logit_softcap=20.0, compute_dtype=request.param)
    a = Architecture.from_config(tiny_config.model, 0)
    random = np.random.default_rng(0)
    hidden = jnp.asarray(random.normal(size=(2, 16, a.embed_dim)), a.compute_dtype)
    table = jnp.asarray(random.normal(size=(a.embed_dim, a.padded_vocab_size)), a.compute_dtype)
    targets = jnp.asarray(random.integers(0, 97, (2, 16)), jnp.int32)
    weights = jnp.asarray(random.integers(0, 2, (2, 16)) / 20, jnp.float32)
    return a, hidden, table, targets, weights


@pytest.mark.parametrize("terms", [Terms(), Terms(z_loss=1e-2, label_smoothing=0.2)], ids=["plain", "with terms"])
def test_pieces_give_the_sums_and_gradients_of_the_whole(inputs, terms):
    a, hidden, table, targets, weights = inputs

    def loss(hidden, table, chunk):
        total, metrics = cross_entropy.sum_losses(a, terms, hidden, table, targets, weights, chunk=chunk)
        return 3 * total, metrics

    whole = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(hidden, table, 0)
    tolerance = 1e-5 if hidden.dtype == jnp.float32 else 2e-2
    for chunk in (1, 4, 8):
        found = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(hidden, table, chunk)
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(whole), strict=True):
            assert x.dtype == y.dtype
            np.testing.assert_allclose(np.float32(x), np.float32(y), rtol=tolerance, atol=tolerance / 10)
        np.testing.assert_allclose(loss(hidden, table, chunk)[0], whole[0][0], rtol=1e-6)


def test_scores_in_pieces_are_those_of_the_whole(inputs):
    a, hidden, table, targets, _ = inputs
    whole = cross_entropy.score_tokens(a, hidden, table, targets)
    for x, y in zip(cross_entropy.score_tokens(a, hidden, table, targets, chunk=4), whole, strict=True):
        np.testing.assert_allclose(np.float32(x), np.float32(y), rtol=1e-5, atol=1e-6)


def test_a_step_in_pieces_multiplies_as_often_as_a_whole_one_and_never_holds_the_logits(inputs):
    a, hidden, table, targets, weights = inputs

    def loss(chunk):
        def total(hidden, table):
            return cross_entropy.sum_losses(a, Terms(), hidden, table, targets, weights, chunk=chunk)[0]

        return total

    logits = f"f32[2,16,{a.padded_vocab_size}]"
    for chunk, held in ((0, True), (4, False)):
        gradients = jax.grad(loss(chunk), argnums=(0, 1))
        assert str(jax.make_jaxpr(gradients)(hidden, table)).count("dot_general") == 3  # scores, and two gradients
        assert (logits in jax.jit(gradients).lower(hidden, table).compile().as_text()) == held
    assert str(jax.make_jaxpr(loss(4))(hidden, table)).count("dot_general") == 1


@pytest.mark.parametrize(("length", "chunk", "count"), [(16, 0, 1), (16, 16, 1), (16, 5, 4), (12, 4, 3), (7, 2, 7)])
def test_pieces_of_a_row(length, chunk, count):
    pieces = Pieces.of(length, chunk)
    assert pieces.count == count
    x = jnp.arange(2 * length * 3).reshape(2, length, 3)
    assert (pieces.join(pieces.split(x)) == x).all()
