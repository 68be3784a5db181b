"""Next-token cross-entropy, weighted by token."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gptjax.model.gpt import GPT

Batch = dict[str, jax.Array]


def token_losses(
    logits: Float[Array, "batch length vocab"], targets: Int[Array, "batch length"]
) -> tuple[Float[Array, "batch length"], Float[Array, "batch length"]]:
    """(cross-entropy in nats, log-partition) of every token, in float32."""
    log_partition = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return log_partition - chosen, log_partition


def loss(
    model: GPT,
    batch: Batch,
    *,
    total_weight: Float[Array, ""],
    dropout_keys: jax.Array | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """(loss to differentiate, metrics): sums over this micro-batch divided by the weight of the whole batch.

    Because the divisor is that of the global batch, losses and gradients of micro-batches add up to exactly those
    of the batch, whatever the number of real tokens in each. Metrics: `loss` (cross-entropy alone) and
    `accuracy`; they add up in the same way.

    z_loss adds z * log_partition^2 (Chowdhery et al. 2022). label_smoothing takes (1 - s) of the target and
    spreads s evenly over the vocabulary (Szegedy et al. 2016).
    """
    hidden, _ = model.hidden(
        batch["tokens"],
        positions=batch["positions"],
        segment_ids=batch.get("segment_ids"),
        dropout_keys=dropout_keys,
    )
    logits = model.logits(hidden)
    cross_entropy, log_partition = token_losses(logits, batch["targets"])
    objective = cross_entropy
    if label_smoothing:
        vocab_size = model.architecture.vocab_size
        uniform = log_partition - logits[..., :vocab_size].mean(-1)
        objective = (1 - label_smoothing) * cross_entropy + label_smoothing * uniform
    if z_loss:
        objective = objective + z_loss * jnp.square(log_partition)
    weights = batch["weights"] / total_weight
    correct = logits.argmax(-1) == batch["targets"]
    metrics = {"loss": (cross_entropy * weights).sum(), "accuracy": (correct * weights).sum()}
    return (objective * weights).sum(), metrics
