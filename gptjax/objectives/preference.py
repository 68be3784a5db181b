"""Learning from preferences: better answers become more likely than worse ones, good answers than bad ones.

`objective.preference_loss` names a formula of `preference_losses`. If the formula uses a reference, this is the initial
model of the run, whose log-probabilities are computed once before training (`training.reference`). KTO estimates the
divergence as the mean log-ratio of mismatched answers (`data.pipeline.preferences`) over the global batch.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gptjax.config import Config
from gptjax.errors import UserError
from gptjax.model.gpt import GPT
from gptjax.objectives import preference_losses
from gptjax.objectives.cross_entropy import score_tokens
from gptjax.objectives.objective import Batch, Field, Metrics, Models, Monitor, Rows
from gptjax.objectives.preference_losses import Answers

LOSS = Monitor("loss", lower_is_better=True)
PAIR_OF_TOKENS = Field(("row", "pair", "length"))
REFERENCE = Field(("row", "pair"), "float32")
TEXTS = {
    "tokens": PAIR_OF_TOKENS,
    "targets": PAIR_OF_TOKENS,
    "weights": Field(("row", "pair", "length"), "float32"),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Preference:
    """One loss on pairs, or KTO's on judged answers.

    Attributes:
      name: of the loss.
      logits_chunk: as in `cross_entropy.score_tokens`.
    """

    name: str
    logits_chunk: int
    sizes: Mapping[str, int] = dataclasses.field(default_factory=lambda: {"pair": 2})
    monitor: Monitor = LOSS
    reference: bool = False  # its parameters are not kept: batches hold its log-probabilities

    @property
    def judged(self) -> bool:
        return self.name == "kto"

    @property
    def fields(self) -> dict[str, Field]:
        reference = {} if self.name in preference_losses.WITHOUT_REFERENCE else {"reference": REFERENCE}
        return TEXTS | reference | ({"desirable": Field(("row",), "float32")} if self.judged else {})

    def batches(
        self, data: "gptjax.data.opening.RunData", config: Config, rows: Rows = None
    ) -> "gptjax.data.pipeline.batches.BatchSource":
        return data.preference_batches(config, judged=self.judged, rows=rows)

    def validation(
        self, data: "gptjax.data.opening.RunData", config: Config, rows: Rows = None
    ) -> "gptjax.data.pipeline.batches.BatchSource | None":
        return data.validation_preferences(config, judged=self.judged, rows=rows)

    def referenced(
        self, data: "gptjax.data.opening.RunData", config: Config
    ) -> "list[gptjax.data.pipeline.preferences.Examples]":
        if self.name in preference_losses.WITHOUT_REFERENCE:
            return []
        splits = (data.examples(config, split, judged=self.judged) for split in ("train", "validation", "test"))
        return [examples for split in splits for examples in split.values()]

    def weight(self, batch: Batch) -> Float[Array, ""]:
        """The rows that hold an example."""
        return jnp.maximum(counts(batch).sum(), 1.0)

    def log_probabilities(self, model: GPT, batch: Batch) -> Float[Array, "row pair"]:
        return log_probabilities(model, batch, logits_chunk=self.logits_chunk)

    def whole_batch(self, models: Models, batch: Batch, *, total_weight: Float[Array, ""]) -> Metrics:
        """KTO's estimate of the divergence from the reference, before it is cut off at 0."""
        if not self.judged:
            return {}
        foreign = {name: batch[name][:, 1:] for name in TEXTS}
        ratio = self.log_probabilities(models.policy, foreign) - batch["reference"][:, 1:]
        return {"kl": jax.lax.stop_gradient((ratio[:, 0] * counts(batch)).sum() / total_weight)}

    def loss(
        self,
        models: Models,
        batch: Batch,
        *,
        total_weight: Float[Array, ""],
        hyper: Mapping[str, Array],
        dropout_keys: jax.Array | None = None,
    ) -> tuple[Float[Array, ""], Metrics]:
        """Metrics: means over the rows.

        Of pairs: `loss`, `accuracy` (the better answer has the higher reward), `margin` (by how much), `chosen_reward`,
        `rejected_reward`, and in nats per answer `chosen_log_probability`, `rejected_log_probability`. Of judged
        answers: `loss`, `accuracy` (the sign of the value is right), `margin` (the value), `kl`.
        """
        share = counts(batch) / total_weight
        texts = {name: batch[name][:, :1] if self.judged else batch[name] for name in TEXTS}
        policy, balance = _scored(models.policy, texts, dropout_keys, self.logits_chunk)
        if self.judged:
            kl = jnp.maximum(hyper["kl"], 0.0)
            ratio = policy[:, 0] - batch["reference"][:, 0]
            loss, margin = preference_losses.kto(ratio, batch["desirable"], kl, hyper)
            metrics = {"kl": kl * share}
        else:
            lengths = jnp.maximum(batch["weights"].sum(-1), 1.0)
            answers = Answers(policy, batch.get("reference", jnp.zeros_like(policy)), lengths)
            loss, rewards = preference_losses.OF_PAIRS[self.name](answers, hyper)
            margin = rewards[:, 0] - rewards[:, 1]
            metrics = {
                f"{side}_{what}": values[:, number] * share
                for number, side in enumerate(("chosen", "rejected"))
                for what, values in (("reward", rewards), ("log_probability", policy))
            }
        metrics |= {"loss": loss * share, "accuracy": (margin > 0) * share, "margin": margin * share}
        metrics = {name: values.sum() for name, values in metrics.items()}
        total = metrics["loss"]
        if balance is not None:
            metrics["balance_loss"] = (balance * share).sum()
            total = total + hyper["balance_loss"] * metrics["balance_loss"]
        return total, metrics


def log_probabilities(model: GPT, texts: Batch, *, logits_chunk: int = 0) -> Float[Array, "row pair"]:
    """The log-probability of each answer given its prompt, in nats: the sum over the tokens in the loss."""
    return _scored(model, texts, None, logits_chunk)[0]


def _scored(
    model: GPT, texts: Batch, dropout_keys: jax.Array | None, logits_chunk: int
) -> tuple[Float[Array, "row pair"], Float[Array, "row"] | None]:
    """(log-probability of each answer, load-balancing loss of each row). Both answers of a row share dropout."""
    rows, sides, length = texts["tokens"].shape
    tokens, targets, weights = (texts[name].reshape(rows * sides, length) for name in TEXTS)
    keys = None if dropout_keys is None else jnp.repeat(dropout_keys, sides, axis=0)
    positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    hidden, _, balance = model.forward(tokens, positions=positions, dropout_keys=keys)
    scores = score_tokens(model.architecture, hidden, model.table(), targets, chunk=logits_chunk)
    sums = -jnp.where(weights > 0, scores.nll * weights, 0.0).sum(1)
    return sums.reshape(rows, sides), None if balance is None else balance.reshape(rows, sides).mean(1)


def counts(batch: Batch) -> Float[Array, "row"]:
    """1 for a row that holds an example, 0 for one that pads the batch."""
    return (batch["weights"].sum((1, 2)) > 0).astype(jnp.float32)


def make(config: Config) -> Preference:
    """The objective of a config. Raises UserError for label smoothing with a loss that does not support it."""
    objective = config.objective
    name = objective.preference_loss
    if objective.label_smoothing and name not in preference_losses.SMOOTHED:
        raise UserError(
            f"objective.label_smoothing is {objective.label_smoothing}, and objective.preference_loss={name} has none; "
            f"set it to 0, or use {' or '.join(preference_losses.SMOOTHED)}"
        )
    return Preference(name, objective.logits_chunk)
