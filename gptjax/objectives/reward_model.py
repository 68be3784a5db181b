"""A model that scores answers, trained on which of two answers people prefer (Ouyang et al. 2022).

`gptjax.model.reward` defines the reward. Other runs learn from this model with `objective.reward=model:WORKDIR`.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gptjax.config import Config
from gptjax.errors import UserError
from gptjax.model import reward
from gptjax.model.gpt import GPT
from gptjax.objectives.objective import Batch, Field, Metrics, Models, Monitor, Rows
from gptjax.objectives.preference import LOSS, TEXTS, counts


@dataclasses.dataclass(frozen=True, eq=False)
class RewardModel:
    """-log sigmoid(r_better - r_worse), the likelihood of the choices under Bradley and Terry (1952)."""

    sizes: Mapping[str, int] = dataclasses.field(default_factory=lambda: {"pair": 2})
    monitor: Monitor = LOSS
    reference: bool = False

    @property
    def fields(self) -> dict[str, Field]:
        return TEXTS

    def batches(
        self, data: "gptjax.data.opening.RunData", config: Config, rows: Rows = None
    ) -> "gptjax.data.pipeline.batches.BatchSource":
        return data.preference_batches(config, judged=False, rows=rows)

    def validation(
        self, data: "gptjax.data.opening.RunData", config: Config, rows: Rows = None
    ) -> "gptjax.data.pipeline.batches.BatchSource | None":
        return data.validation_preferences(config, judged=False, rows=rows)

    def weight(self, batch: Batch) -> Float[Array, ""]:
        """The pairs."""
        return jnp.maximum(counts(batch).sum(), 1.0)

    def loss(
        self,
        models: Models,
        batch: Batch,
        *,
        total_weight: Float[Array, ""],
        hyper: Mapping[str, Array],
        dropout_keys: jax.Array | None = None,
    ) -> tuple[Float[Array, ""], Metrics]:
        """Metrics, means over pairs: `loss`, `accuracy` (the better answer has the higher reward), `margin` (by how
        much), `chosen_reward`, `rejected_reward`."""
        share = counts(batch) / total_weight
        found, balance = rewards(models.policy, batch, dropout_keys)
        margin = found[:, 0] - found[:, 1]
        metrics = {
            "loss": -jax.nn.log_sigmoid(margin),
            "accuracy": (margin > 0).astype(jnp.float32),
            "margin": margin,
            "chosen_reward": found[:, 0],
            "rejected_reward": found[:, 1],
        }
        metrics = {name: (values * share).sum() for name, values in metrics.items()}
        total = metrics["loss"]
        if balance is not None:
            metrics["balance_loss"] = (balance * share).sum()
            total = total + hyper["balance_loss"] * metrics["balance_loss"]
        return total, metrics


def rewards(
    model: GPT, texts: Batch, dropout_keys: jax.Array | None = None
) -> tuple[Float[Array, "row pair"], Float[Array, "row"] | None]:
    """(reward of each answer of a batch with the fields of `preference.TEXTS`, load-balancing loss of each row).

    Both answers of a row have the same dropout.
    """
    rows, sides, length = texts["tokens"].shape
    tokens, weights = (texts[name].reshape(rows * sides, length) for name in ("tokens", "weights"))
    keys = None if dropout_keys is None else jnp.repeat(dropout_keys, sides, axis=0)
    # The last token of an answer is the target of the last non-zero weight, so it is one column later.
    last = jnp.where(weights > 0, jnp.arange(1, length + 1), 0).max(1)
    found, balance = reward.rewards(model, tokens, last, dropout_keys=keys)
    return found.reshape(rows, sides), None if balance is None else balance.reshape(rows, sides).mean(1)


def make(config: Config) -> RewardModel:
    """The objective of a config. Raises UserError for loss terms that it does not support."""
    for name in ("z_loss", "label_smoothing", "logits_chunk"):
        if value := config.objective[name]:
            raise UserError(
                f"objective.{name} is {value}, which objective.name=reward_model does not support; set it to 0"
            )
    return RewardModel()
