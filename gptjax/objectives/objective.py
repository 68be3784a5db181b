"""What a training objective is. Each objective is a module beside this one, with the name used in `objective.name`.

A module has `make(config) -> Objective`. To add an objective, add the module (and data that have its fields).
Types of gptjax.data appear only in annotations and are not imported, so that a plan for a TPU does not need what they
import.
"""

import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from gptjax.config import Config
from gptjax.errors import UserError
from gptjax.model.gpt import GPT

Batch = dict[str, jax.Array]
Metrics = dict[str, Array]
Rows = Any  # the rows of the global batch that this process reads


class Field(NamedTuple):
    """One array of a batch.

    Attributes:
      axes: the name of each axis. The first is "row"; "length" is that of the sequence. These two are split over the
        mesh and over micro-batches; others, such as "pair", are whole.
    """

    axes: tuple[str, ...]
    dtype: str = "int32"

    def shape(self, rows: int, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """For a batch of `rows` rows; `sizes` are those of the other axes."""
        return tuple(rows if axis == "row" else sizes[axis] for axis in self.axes)


class Monitor(NamedTuple):
    """The validation metric that decides which checkpoint is the best, and when to stop early."""

    name: str
    lower_is_better: bool


class Models(NamedTuple):
    """The models that a loss may use. `reference` has the initial parameters, if the objective needs them."""

    policy: GPT
    reference: GPT | None = None


@runtime_checkable
class Objective(Protocol):
    """Computes the loss that is minimised from batches.

    Attributes:
      fields: what a batch has. Shardings, micro-batches, `plan` and the checks of the data derive from it.
      sizes: lengths of the axes that are neither "row" nor "length".
      monitor: see `Monitor`.
      reference: whether the initial parameters are kept beside the trained ones and passed to `loss`.
    """

    fields: Mapping[str, Field]
    sizes: Mapping[str, int]
    monitor: Monitor
    reference: bool

    def batches(
        self, data: "gptjax.data.opening.RunData", config: Config, rows: Rows = None
    ) -> "gptjax.data.pipeline.batches.BatchSource":
        """The training batches. Raises UserError for data that the objective cannot learn from."""
        ...

    def validation(
        self, data: "gptjax.data.opening.RunData", config: Config, rows: Rows = None
    ) -> "gptjax.data.pipeline.batches.BatchSource | None":
        """Batches whose metrics are averaged at each evaluation; None where the likelihood is enough."""
        ...

    def weight(self, batch: Batch) -> Float[Array, ""]:
        """The divisor of the loss of a global batch: its number of tokens, pairs or sequences in the loss."""
        ...

    def loss(
        self,
        models: Models,
        batch: Batch,
        *,
        total_weight: Float[Array, ""],
        hyper: Mapping[str, Array],
        dropout_keys: jax.Array | None = None,
    ) -> tuple[Float[Array, ""], Metrics]:
        """(loss to differentiate, metrics) of a micro-batch: sums, divided by the weight of the whole batch.

        Because the divisor is that of the global batch, losses, gradients and metrics of micro-batches add up to
        exactly those of the batch. There is a metric `loss`. `dropout_keys` has a key for each row; None: no dropout.
        """
        ...


@runtime_checkable
class Referenced(Protocol):
    """An objective whose batches hold log-probabilities of their texts under the initial model.

    They are computed once, before training, so that no second copy of the parameters is kept.
    """

    def referenced(
        self, data: "gptjax.data.opening.RunData", config: Config
    ) -> "list[gptjax.data.pipeline.preferences.Examples]":
        """The examples that need log-probabilities; empty where no reference is needed."""
        ...

    def log_probabilities(self, model: GPT, batch: Batch) -> Float[Array, "row pair"]:
        """Those of the answers, in nats."""
        ...


@runtime_checkable
class OfWholeBatch(Protocol):
    """An objective whose loss of a row depends on numbers computed from all rows, which get no gradient."""

    def whole_batch(self, models: Models, batch: Batch, *, total_weight: Float[Array, ""]) -> Metrics:
        """The numbers for a micro-batch: scalars whose sums over micro-batches `loss` finds in `hyper`."""
        ...


@runtime_checkable
class Writing(Protocol):
    """An objective whose batches the model writes; `batches` gives only questions (see `training.rollouts`).

    Attributes:
      group_size: answers to each question.
      max_new_tokens: of an answer.
      num_iterations: updates with the same answers; checkpoints and evaluations come only after the last of them.
    """

    group_size: int
    max_new_tokens: int
    num_iterations: int


def make(config: Config) -> Objective:
    """The objective of a config. "auto", which depends on the data, is taken as language modelling here."""
    name = config.objective.name
    return importlib.import_module(f"gptjax.objectives.{'language_modeling' if name == 'auto' else name}").make(config)


def settled_name(config: Config, data: "gptjax.data.opening.RunData") -> str:
    """`objective.name`, with "auto" decided by the data."""
    name = config.objective.name
    if name != "auto":
        return name
    if data.has_preferences:
        return "preference"
    return "instruction" if data.has_dialogues else "language_modeling"


def abstract_batch(objective: Objective, config: ConfigDict) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and dtypes of a global batch."""
    sizes = {"length": config.model.context_length, **objective.sizes}
    return {
        name: jax.ShapeDtypeStruct(field.shape(config.train.batch_size, sizes), jnp.dtype(field.dtype))
        for name, field in objective.fields.items()
    }


def check_fields(objective: Objective, batches: "gptjax.data.pipeline.batches.BatchSource", config: Config) -> None:
    """Raises UserError where the data lack a field that the objective needs."""
    if isinstance(objective, Writing):
        return
    if missing := [name for name in objective.fields if name not in (there := batches[0])]:
        raise UserError(
            f"objective.name={config.objective.name} needs {', '.join(missing)} in a batch, and "
            f"data.source={config.data.source!r} gives {', '.join(there)}; use data made for it, or another objective"
        )
