"""Next-token cross-entropy on windows of text, every token of which counts."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gptjax.config import Config
from gptjax.objectives.cross_entropy import Terms, sum_losses
from gptjax.objectives.objective import Batch, Field, Metrics, Models, Monitor, Rows

TOKEN = Field(("row", "length"))
LOSS = Monitor("loss", lower_is_better=True)
WEIGHT = Field(("row", "length"), "float32")


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModeling:
    """Cross-entropy of the next token, weighted by token.

    Attributes:
      isolate_documents: tokens attend only to their own document of a row.
      smooths: label smoothing is on.
      logits_chunk: see `sum_losses`.
      dialogues: dialogues are packed whole, and only the assistant's turns count in the loss.
    """

    isolate_documents: bool
    smooths: bool
    logits_chunk: int
    dialogues: bool = False
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    monitor: Monitor = LOSS
    reference: bool = False

    @property
    def fields(self) -> dict[str, Field]:
        fields = {"tokens": TOKEN, "targets": TOKEN, "weights": WEIGHT, "positions": TOKEN}
        return fields | ({"segment_ids": TOKEN} if self.isolate_documents else {})

    def batches(
        self, data: "gptjax.data.opening.RunData", config: Config, rows: Rows = None
    ) -> "gptjax.data.pipeline.batches.BatchSource":
        return data.batches(config, rows=rows, dialogues=self.dialogues)

    def validation(self, data: "gptjax.data.opening.RunData", config: Config, rows: Rows = None) -> None:
        """None: evaluation computes this loss on the whole validation split anyway."""

    def weight(self, batch: Batch) -> Float[Array, ""]:
        return jnp.maximum(batch["weights"].sum(), 1.0)

    def loss(
        self,
        models: Models,
        batch: Batch,
        *,
        total_weight: Float[Array, ""],
        hyper: Mapping[str, Array],
        dropout_keys: jax.Array | None = None,
    ) -> tuple[Float[Array, ""], Metrics]:
        """Metrics: `loss` (cross-entropy alone), `accuracy`, and with experts `balance_loss` (1 = balanced).

        hyper: `z_loss` and `label_smoothing` as in `Terms`, `balance_loss` the weight of `experts.balance_loss`.
        """
        model = models.policy
        hidden, _, balance = model.forward(
            batch["tokens"],
            positions=batch["positions"],
            segment_ids=batch.get("segment_ids"),
            dropout_keys=dropout_keys,
        )
        weights = batch["weights"] / total_weight
        terms = Terms(hyper["z_loss"], hyper["label_smoothing"] if self.smooths else None)
        total, metrics = sum_losses(
            model.architecture, terms, hidden, model.table(), batch["targets"], weights, chunk=self.logits_chunk
        )
        if balance is not None:  # a row counts as much as its tokens
            metrics["balance_loss"] = (balance * weights.sum(1)).sum()
            total = total + hyper["balance_loss"] * metrics["balance_loss"]
        return total, metrics


def make(config: Config, *, dialogues: bool = False) -> LanguageModeling:
    """The objective of a config."""
    objective = config.objective
    return LanguageModeling(
        config.data.isolate_documents, objective.label_smoothing > 0, objective.logits_chunk, dialogues
    )
