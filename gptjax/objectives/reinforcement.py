"""Reinforcement learning with verifiable rewards (GRPO): the model's own answers, weighted by their advantage.

A row of a batch is a question and its answer. Answers are written and rewarded before the step
(`training/rollouts.py`). The loss starts at 0 and says little: look at `reward`.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gptjax.config import Config
from gptjax.model.gpt import GPT
from gptjax.objectives import policy_gradient
from gptjax.objectives.language_modeling import TOKEN, WEIGHT
from gptjax.objectives.objective import Batch, Field, Metrics, Models, Monitor, Rows
from gptjax.objectives.policy_gradient import PolicyScores

REWARD = Monitor("reward", lower_is_better=False)
PER_ROW = Field(("row",), "float32")


@dataclasses.dataclass(frozen=True, eq=False)
class Reinforcement:
    """The clipped surrogate of GRPO, per token.

    A batch has, with R rows and T at most the context length:
      tokens, targets, positions: int32 [R, T], a question and its answer from column 0, then 0.
      weights: float32 [R, T], 1 where the target is a token of an answer in the loss.
      advantages: float32 [R].
      token_share: float32 [R], 1 / the number of weights that are 1 in the global batch, for means over tokens.
      sampler: float32 [R, T], log-probability of the target when it was sampled.
      old: the same under the training form of the model; only if one batch is used for several updates.

    Attributes:
      mean: "token", "sequence" or "constant": what the loss is divided by.
      max_new_tokens: of an answer.
      num_iterations: updates with the same answers. With 1, the old policy is the current one, and the ratio is 1.
      logits_chunk: see `policy_gradient.score`.
      reference: whether the loss includes the divergence from the initial model.
    """

    mean: str
    max_new_tokens: int
    num_iterations: int
    logits_chunk: int
    reference: bool
    group_size: int
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    monitor: Monitor = REWARD

    @property
    def fields(self) -> dict[str, Field]:
        fields = {"tokens": TOKEN, "targets": TOKEN, "weights": WEIGHT, "positions": TOKEN, "sampler": WEIGHT}
        fields |= {"advantages": PER_ROW, "token_share": PER_ROW}
        return fields | ({"old": WEIGHT} if self.num_iterations > 1 else {})

    def batches(
        self, data: "gptjax.data.opening.RunData", config: Config, rows: Rows = None
    ) -> "gptjax.data.pipeline.prompts.PromptBatches":
        """The questions of each step; `training.rollouts` makes batches from them."""
        return data.prompts(config)

    def validation(self, data: "gptjax.data.opening.RunData", config: Config, rows: Rows = None) -> None:
        """None: the reward of answers to held-out questions is measured by `evaluation.answering`."""

    def weight(self, batch: Batch) -> Float[Array, ""]:
        """The number of tokens or answers in the loss, or that of answers x max_new_tokens."""
        weights = batch["weights"]
        total = weights.sum() if self.mean == "token" else weights.any(1).sum().astype(jnp.float32)
        return jnp.maximum(total, 1.0) * (self.max_new_tokens if self.mean == "constant" else 1.0)

    def loss(
        self,
        models: Models,
        batch: Batch,
        *,
        total_weight: Float[Array, ""],
        hyper: Mapping[str, Array],
        dropout_keys: jax.Array | None = None,
    ) -> tuple[Float[Array, ""], Metrics]:
        """Metrics, means over the tokens of answers, in nats: `entropy`; `kl` from the reference, if there is one;
        `clip_fraction`; `sampler_difference`, |log-probability - that of the sampler|."""
        scores = self.scores(models.policy, batch, dropout_keys)
        old = batch.get("old", jax.lax.stop_gradient(scores.log_probability))
        log_ratio = jnp.where(batch["weights"] > 0, scores.log_probability - old, 0.0)
        token = policy_gradient.surrogate(log_ratio, batch["advantages"], hyper["clip_low"], hyper["clip_high"])
        values, losses = {"clip_fraction": token.clipped, "entropy": scores.entropy}, token.loss
        values["sampler_difference"] = jnp.abs(old - batch["sampler"])
        if models.reference is not None:
            reference = jax.lax.stop_gradient(self.scores(models.reference, batch).log_probability)
            log_probability = jnp.where(batch["weights"] > 0, scores.log_probability, reference)
            values["kl"] = policy_gradient.divergence(log_probability, reference)
            losses = losses + hyper["kl_weight"] * values["kl"]
        weights = batch["weights"] / total_weight
        if self.mean == "sequence":
            weights = weights / jnp.maximum(batch["weights"].sum(1, keepdims=True), 1.0)
        total = (losses * weights).sum()
        share = batch["weights"] * batch["token_share"][:, None]
        return total, {"loss": total} | {name: (value * share).sum() for name, value in values.items()}

    def scores(self, model: GPT, batch: Batch, dropout_keys: jax.Array | None = None) -> PolicyScores:
        """Log-probability and entropy at each target of a batch."""
        hidden, _ = model.hidden(batch["tokens"], positions=batch["positions"], dropout_keys=dropout_keys)
        return policy_gradient.score(
            model.architecture, hidden, model.table(), batch["targets"], chunk=self.logits_chunk
        )


def make(config: Config) -> Reinforcement:
    """The objective of a config."""
    objective = config.objective
    return Reinforcement(
        mean=objective.loss_mean,
        max_new_tokens=objective.max_new_tokens,
        num_iterations=objective.num_iterations,
        logits_chunk=objective.logits_chunk,
        reference=objective.kl_weight > 0,
        group_size=objective.group_size,
    )
