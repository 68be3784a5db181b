"""Next-token cross-entropy, weighted by token."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gptjax.model import sharding
from gptjax.model.gpt import GPT

Batch = dict[str, jax.Array]


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
    # A masked sum, not a gather: it fuses with the other sums over the vocabulary, also where that is split.
    chosen = jnp.where(jnp.arange(logits.shape[-1]) == targets[..., None], logits, 0.0).sum(-1)
    # The maximum, not argmax, which takes as long as all the other sums over the vocabulary together.
    return log_partition - chosen, log_partition, chosen == top


@jax.custom_vjp
def _log_partition(
    logits: Float[Array, "batch length vocab"], top: Float[Array, "batch length"]
) -> Float[Array, "batch length"]:
    """log sum exp of the scores, the highest of which are known. Its gradient, the softmax, is computed from the
    scores; that of `jax.nn.logsumexp` from exponentials that the forward pass has to keep."""
    return top + jnp.log(jnp.exp(logits - top[..., None]).sum(-1))


def _log_partition_forward(logits, top):
    log_partition = _log_partition(logits, top)
    return log_partition, (logits, log_partition)


def _log_partition_backward(residuals, gradient):
    logits, log_partition = residuals
    return gradient[..., None] * jnp.exp(logits - log_partition[..., None]), jnp.zeros_like(gradient)


_log_partition.defvjp(_log_partition_forward, _log_partition_backward)


def score_tokens(
    model: GPT,
    hidden: Float[Array, "batch length embed"],
    targets: Int[Array, "batch length"],
    *,
    chunk: int = 0,
) -> TokenScores:
    """Scores of every token from final hidden states.

    With a chunk, only the logits of that many tokens of a row exist at a time; the backward pass computes them
    again. On a vocabulary of 50,000, whole logits are most of the memory of a small model's step.
    """
    shards = sharding.axis_size("context", "tensor")
    shards = shards if hidden.shape[1] % shards == 0 else sharding.axis_size("context")
    local = hidden.shape[1] // shards
    parts = next(n for n in range(1, local + 1) if local % n == 0 and (not chunk or local // n * shards <= chunk))
    if parts == 1:
        return _score(model, hidden, targets)

    def split(x: jax.Array) -> jax.Array:
        """[batch, length, ...] -> [parts, batch, length / parts, ...], such that every device keeps what it has."""
        x = x.reshape(x.shape[0], shards, parts, local // parts, *x.shape[2:])
        x = jnp.moveaxis(x, 2, 0).reshape(parts, x.shape[0], -1, *x.shape[4:])
        return sharding.constrain(x, None, *sharding.BETWEEN[:2], *[None] * (x.ndim - 3))

    def join(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x.reshape(parts, -1, shards, local // parts), 0, 2)
        return x.reshape(targets.shape)

    def body(_, piece):
        return None, _score(model, *piece)

    _, scores = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), None, (split(hidden), split(targets)))
    return jax.tree.map(join, scores)


def _score(model: GPT, hidden: Float[Array, "batch length embed"], targets: Int[Array, "batch length"]) -> TokenScores:
    logits = model.logits(hidden)
    nll, log_partition, correct = token_losses(logits, targets)
    mean_logit = logits[..., : model.architecture.vocab_size].mean(-1)
    return TokenScores(nll, log_partition, mean_logit, correct)


def loss(
    model: GPT,
    batch: Batch,
    *,
    total_weight: Float[Array, ""],
    dropout_keys: jax.Array | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    balance_loss: float = 0.0,
    logits_chunk: int = 0,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """(loss to differentiate, metrics): sums over this micro-batch divided by the weight of the whole batch.

    Because the divisor is that of the global batch, losses and gradients of micro-batches add up to exactly those
    of the batch, whatever the number of real tokens in each. Metrics: `loss` (cross-entropy alone), `accuracy`
    and, of a mixture of experts, `balance_loss` (1 = balanced); they add up in the same way.

    z_loss adds z * log_partition^2 (Chowdhery et al. 2022). label_smoothing takes (1 - s) of the target and
    spreads s evenly over the vocabulary (Szegedy et al. 2016). balance_loss is the weight of
    `gptjax.model.experts.balance_loss`. logits_chunk: see `score_tokens`.
    """
    hidden, _, balance = model.forward(
        batch["tokens"],
        positions=batch["positions"],
        segment_ids=batch.get("segment_ids"),
        dropout_keys=dropout_keys,
    )
    scores = score_tokens(model, hidden, batch["targets"], chunk=logits_chunk)
    objective = scores.nll
    if label_smoothing:
        uniform = scores.log_partition - scores.mean_logit
        objective = (1 - label_smoothing) * scores.nll + label_smoothing * uniform
    if z_loss:
        objective = objective + z_loss * jnp.square(scores.log_partition)
    weights = batch["weights"] / total_weight
    metrics = {"loss": (scores.nll * weights).sum(), "accuracy": (scores.correct * weights).sum()}
    total = (objective * weights).sum()
    if balance is not None:  # a row counts as much as its tokens
        metrics["balance_loss"] = (balance * weights.sum(1)).sum()
        total = total + balance_loss * metrics["balance_loss"]
    return total, metrics
