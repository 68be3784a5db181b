"""Learning from a teacher's next-token distribution and the text's own next token (Hinton et al. 2015).

loss = (1 - w) cross-entropy + w t^2 KL(teacher || student), both distributions at temperature t; t^2 keeps the
gradients of both terms in proportion. KL is over the teacher's top_k tokens and one more for the rest of its mass.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gptjax.config import Config
from gptjax.errors import UserError
from gptjax.model import head
from gptjax.objectives import teacher
from gptjax.objectives.cross_entropy import token_losses
from gptjax.objectives.language_modeling import LanguageModeling
from gptjax.objectives.objective import Batch, Field, Metrics, Models, Monitor, Rows

OF_TEACHER = ("row", "length", "candidate")


@dataclasses.dataclass(frozen=True, eq=False)
class Distillation:
    """The loss of language modelling, of text or of dialogues, mixed with the divergence from a teacher.

    Attributes:
      text: the objective without a teacher: its loss and its batches.
      top_k: how many of the teacher's most probable tokens are compared one by one.
      temperature: of both distributions.
    """

    text: LanguageModeling
    top_k: int
    temperature: float
    monitor: Monitor = dataclasses.field(default_factory=lambda: Monitor("loss", lower_is_better=True))
    reference: bool = False

    @property
    def sizes(self) -> Mapping[str, int]:
        return {"candidate": self.top_k}

    @property
    def fields(self) -> dict[str, Field]:
        scores = Field(OF_TEACHER, "float32")
        return self.text.fields | {"teacher_tokens": Field(OF_TEACHER), "teacher_log_probabilities": scores}

    def batches(
        self, data: "gptjax.data.opening.RunData", config: Config, rows: Rows = None
    ) -> "gptjax.data.pipeline.batches.BatchSource":
        architecture, params = teacher.load(config, data.tokenizer)
        if self.top_k > architecture.vocab_size:
            raise UserError(
                f"objective.teacher_top_k is {self.top_k}, and the vocabulary has {architecture.vocab_size} tokens; "
                "use at most that"
            )
        source = data.batches(config, rows=rows, dialogues=data.has_dialogues)
        name = config.objective.teacher
        return teacher.TaughtBatches(source, architecture, params, self.top_k, self.temperature, name)

    def validation(self, data: "gptjax.data.opening.RunData", config: Config, rows: Rows = None) -> None:
        """None: the likelihood of the validation split is enough."""

    def weight(self, batch: Batch) -> Float[Array, ""]:
        return self.text.weight(batch)

    def loss(
        self,
        models: Models,
        batch: Batch,
        *,
        total_weight: Float[Array, ""],
        hyper: Mapping[str, Array],
        dropout_keys: jax.Array | None = None,
    ) -> tuple[Float[Array, ""], Metrics]:
        """Metrics: `loss` (cross-entropy alone), `accuracy`, `teacher_divergence` (nats per token, softened)."""
        model = models.policy
        hidden, _, balance = model.forward(
            batch["tokens"],
            positions=batch["positions"],
            segment_ids=batch.get("segment_ids"),
            dropout_keys=dropout_keys,
        )
        weights = batch["weights"] / total_weight
        logits = head.scores(model.architecture, hidden, model.table())
        nll, _, correct = token_losses(logits, batch["targets"])
        softened = jax.nn.log_softmax(logits / self.temperature)
        theirs = jnp.take_along_axis(softened, batch["teacher_tokens"], axis=-1)
        whole = self.top_k == model.architecture.vocab_size
        kl = teacher.divergence(batch["teacher_log_probabilities"], theirs, whole=whole)
        metrics = {"loss": nll, "accuracy": correct, "teacher_divergence": kl}
        metrics = {name: (values * weights).sum() for name, values in metrics.items()}
        share = hyper["distillation_weight"]
        total = (1 - share) * metrics["loss"] + share * self.temperature**2 * metrics["teacher_divergence"]
        if balance is not None:
            metrics["balance_loss"] = (balance * weights.sum(1)).sum()
            total = total + hyper["balance_loss"] * metrics["balance_loss"]
        return total, metrics


def make(config: Config) -> Distillation:
    """The objective of a config. Raises UserError without a teacher, and for loss terms that it does not support."""
    objective = config.objective
    if not objective.teacher:
        raise UserError("objective.name=distillation needs a teacher: --config.objective.teacher=WORKDIR or hf:DIR")
    for name in ("z_loss", "label_smoothing", "logits_chunk"):
        if objective[name]:
            raise UserError(f"objective.{name} is {objective[name]}, which distillation does not support; set it to 0")
    text = LanguageModeling(config.data.isolate_documents, smooths=False, logits_chunk=0)
    return Distillation(text, objective.teacher_top_k, objective.distillation_temperature)
