"""Cross-entropy from final hidden states, with all logits at once or in chunks of each row."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from gptjax.model import head, sharding
from gptjax.model.architecture import Architecture
from gptjax.model.head import Hidden, Table

Targets = Int[Array, "batch length"]
Weights = Float[Array, "batch length"]


class Terms(NamedTuple):
    """What changes the cross-entropy of a token: float32 scalars, which may be traced.

    Attributes:
      z_loss: adds z * log_partition^2 (Chowdhery et al. 2022).
      label_smoothing: takes (1 - s) of the target and spreads s evenly over the vocabulary (Szegedy et al. 2016). None:
        off, at no cost.
    """

    z_loss: Float[Array, ""] | float = 0.0
    label_smoothing: Float[Array, ""] | float | None = None


Sums = tuple[Float[Array, ""], dict[str, Float[Array, ""]]]


class TokenScores(NamedTuple):
    """What the logits of each position say about its target, in float32 and nats."""

    nll: Float[Array, "batch length"]
    log_partition: Float[Array, "batch length"]
    mean_logit: Float[Array, "batch length"]
    correct: Bool[Array, "batch length"]


def token_losses(
    logits: Float[Array, "batch length vocab"], targets: Int[Array, "batch length"]
) -> tuple[Float[Array, "batch length"], Float[Array, "batch length"], Bool[Array, "batch length"]]:
    """(cross-entropy in nats, log-partition, whether no other token scores higher) of every token, in float32."""
    top = jax.lax.stop_gradient(logits.max(-1))
    log_partition = _log_partition(logits, top)
    # A masked sum, not a gather: it fuses with the other sums over the vocabulary, even if that is split over devices.
    chosen = jnp.where(jnp.arange(logits.shape[-1]) == targets[..., None], logits, 0.0).sum(-1)
    # The maximum, not argmax, which takes as long as all the other sums over the vocabulary together.
    return log_partition - chosen, log_partition, chosen == top


@jax.custom_vjp
def _log_partition(
    logits: Float[Array, "batch length vocab"], top: Float[Array, "batch length"]
) -> Float[Array, "batch length"]:
    """logsumexp of the scores, given the highest score of each row. The backward pass computes the softmax from the
    scores again, so that the forward pass keeps no exponentials, as that of `jax.nn.logsumexp` does."""
    return top + jnp.log(jnp.exp(logits - top[..., None]).sum(-1))


def _log_partition_forward(logits, top):
    log_partition = _log_partition(logits, top)
    return log_partition, (logits, log_partition)


def _log_partition_backward(residuals, gradient):
    logits, log_partition = residuals
    return gradient[..., None] * jnp.exp(logits - log_partition[..., None]), jnp.zeros_like(gradient)


_log_partition.defvjp(_log_partition_forward, _log_partition_backward)


def score_tokens(a: Architecture, hidden: Hidden, table: Table, targets: Targets, *, chunk: int = 0) -> TokenScores:
    """Scores of every token. With a chunk, only the logits of that many tokens of a row exist at a time."""
    pieces = Pieces.of(hidden.shape[1], chunk)
    if pieces.count == 1:
        return _score(a, hidden, table, targets)

    def body(_, piece):
        tokens, targets = piece
        return None, _score(a, tokens, table, targets)

    _, scores = jax.lax.scan(body, None, (pieces.split(hidden), pieces.split(targets)))
    return jax.tree.map(pieces.join, scores)


def sum_losses(
    a: Architecture, terms: Terms, hidden: Hidden, table: Table, targets: Targets, weights: Weights, *, chunk: int = 0
) -> Sums:
    """(sum of weight x loss over tokens, {"loss": that of cross-entropy alone, "accuracy": that of correct tokens}).

    With a chunk, only the logits of that many tokens of a row exist at a time: on a vocabulary of 50,000, whole logits
    are most of the memory of a small model's step. The forward pass also computes their gradient, so that nothing is
    computed twice. `weights` and `terms` are constants and get no gradient.
    """
    pieces = Pieces.of(hidden.shape[1], chunk)
    if pieces.count == 1:
        return _sums(a, terms, hidden, table, targets, weights)
    return _sums_in_pieces(a, pieces, terms, hidden, table, targets, weights)


def _score(a: Architecture, hidden: Hidden, table: Table, targets: Targets) -> TokenScores:
    logits = head.scores(a, hidden, table)
    nll, log_partition, correct = token_losses(logits, targets)
    return TokenScores(nll, log_partition, logits[..., : a.vocab_size].mean(-1), correct)


def _sums(a: Architecture, terms: Terms, hidden: Hidden, table: Table, targets: Targets, weights: Weights) -> Sums:
    scores = _score(a, hidden, table, targets)
    objective = scores.nll
    if terms.label_smoothing is not None:
        uniform = scores.log_partition - scores.mean_logit
        objective = (1 - terms.label_smoothing) * scores.nll + terms.label_smoothing * uniform
    objective = objective + terms.z_loss * jnp.square(scores.log_partition)
    metrics = {"loss": (scores.nll * weights).sum(), "accuracy": (scores.correct * weights).sum()}
    return (objective * weights).sum(), metrics


class Pieces(NamedTuple):
    """Rows in `count` pieces. If rows are split over `shards` devices, each device keeps its part of every row."""

    count: int
    shards: int

    @classmethod
    def of(cls, length: int, chunk: int) -> "Pieces":
        """The fewest pieces of at most `chunk` tokens (0: one piece)."""
        shards = sharding.axis_size("context", "tensor")
        shards = shards if length % shards == 0 else sharding.axis_size("context")
        local = length // shards
        fits = (n for n in range(1, local + 1) if local % n == 0 and (not chunk or local // n * shards <= chunk))
        return cls(next(fits, local), shards)

    def split(self, x: Array) -> Array:
        """[batch, length, ...] -> [count, batch, length / count, ...]."""
        x = x.reshape(x.shape[0], self.shards, self.count, -1, *x.shape[2:])
        x = jnp.moveaxis(x, 2, 0).reshape(self.count, x.shape[0], -1, *x.shape[4:])
        return sharding.constrain(x, None, *sharding.BETWEEN[:2], *[None] * (x.ndim - 3))

    def join(self, x: Array) -> Array:
        """The inverse of `split`."""
        x = x.reshape(self.count, x.shape[1], self.shards, -1, *x.shape[3:])
        return jnp.moveaxis(x, 0, 2).reshape(x.shape[1], -1, *x.shape[4:])


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sums_in_pieces(
    a: Architecture, pieces: Pieces, terms: Terms, hidden: Hidden, table: Table, targets: Targets, weights: Weights
) -> Sums:
    def add(sums, piece):
        hidden, targets, weights = piece
        return jax.tree.map(jnp.add, sums, _sums(a, terms, hidden, table, targets, weights)), None

    return jax.lax.scan(add, _zero(), jax.tree.map(pieces.split, (hidden, targets, weights)))[0]


def _forward(a, pieces, terms, hidden, table, targets, weights):
    """The sums, and the gradients of the first one."""

    def add(carry, piece):
        sums, table_gradient = carry
        hidden, targets, weights = piece
        total, pull, metrics = jax.vjp(
            lambda hidden, table: _sums(a, terms, hidden, table, targets, weights), hidden, table, has_aux=True
        )
        hidden_gradient, more = pull(jnp.ones_like(total))
        table_gradient = sharding.constrain(table_gradient + more.astype(jnp.float32), *head.TABLE)
        return (jax.tree.map(jnp.add, sums, (total, metrics)), table_gradient), hidden_gradient

    zero = _zero(), sharding.constrain(jnp.zeros(table.shape, jnp.float32), *head.TABLE)
    split = jax.tree.map(pieces.split, (hidden, targets, weights))
    (sums, table_gradient), hidden_gradient = jax.lax.scan(add, zero, split)
    hidden_gradient = sharding.constrain(pieces.join(hidden_gradient), *sharding.BETWEEN)
    return sums, (terms, hidden_gradient, table_gradient.astype(table.dtype), targets, weights)


def _backward(a, pieces, residuals, gradient):
    terms, hidden_gradient, table_gradient, targets, weights = residuals
    scale, _ = gradient  # metrics are not differentiated
    scaled = (scale.astype(x.dtype) * x for x in (hidden_gradient, table_gradient))
    no_terms = jax.tree.map(jnp.zeros_like, terms)
    return no_terms, *scaled, np.zeros(targets.shape, jax.dtypes.float0), jnp.zeros_like(weights)


_sums_in_pieces.defvjp(_forward, _backward)


def _zero() -> Sums:
    return jnp.zeros(()), {"loss": jnp.zeros(()), "accuracy": jnp.zeros(())}
