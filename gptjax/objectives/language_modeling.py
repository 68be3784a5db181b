"""Next-token cross-entropy, weighted by token."""

import jax
from jaxtyping import Array, Float

from gptjax.model.gpt import GPT
from gptjax.objectives.cross_entropy import Terms, sum_losses

Batch = dict[str, jax.Array]


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

    z_loss, label_smoothing: see `Terms`. balance_loss: the weight of `gptjax.model.experts.balance_loss`.
    logits_chunk: see `sum_losses`.
    """
    hidden, _, balance = model.forward(
        batch["tokens"],
        positions=batch["positions"],
        segment_ids=batch.get("segment_ids"),
        dropout_keys=dropout_keys,
    )
    weights = batch["weights"] / total_weight
    terms = Terms(z_loss, label_smoothing)
    total, metrics = sum_losses(
        model.architecture, terms, hidden, model.table(), batch["targets"], weights, chunk=logits_chunk
    )
    if balance is not None:  # a row counts as much as its tokens
        metrics["balance_loss"] = (balance * weights.sum(1)).sum()
        total = total + balance_loss * metrics["balance_loss"]
    return total, metrics
