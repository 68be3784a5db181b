"""Validation during training: the likelihood of the validation split and the objective's own metrics."""

import math
from pathlib import Path
from typing import Any

import jax

from gptjax.data.opening import RunData
from gptjax.errors import UserError
from gptjax.evaluation.answering import Answers
from gptjax.evaluation.likelihood import Likelihood, Scorer
from gptjax.evaluation.samples import Sampler
from gptjax.model import gpt, lora
from gptjax.objectives.objective import Batch, Metrics, Models, OfWholeBatch
from gptjax.optim.hyper import Hyper
from gptjax.parallel import partition
from gptjax.training.program import Program
from gptjax.training.rollouts import Rollouts
from gptjax.training.state import TrainState
from gptjax.training.step import reference_model


class Validator:
    """Evaluates a state; every process of a run takes part.

    Attributes:
      without: the sources that have no validation split.
    """

    def __init__(self, program: Program, data: RunData, workdir: Path, *, start: int, rollouts: Rollouts | None = None):
        """Drops the samples of steps after `start` if the run is resumed.

        With `rollouts`, held-out questions are answered and rewarded, and nothing else is measured.

        Raises UserError where early stopping is asked for and nothing can be validated.
        """
        config = program.config
        self._program, self._tokenizer = program, data.tokenizer
        stores = {source.name: source.store for source in data.stores}
        self._splits = {name: s.split("validation") for name, s in stores.items() if "validation" in s.splits}
        self.without = [name for name in stores if name not in self._splits]
        self._scorer = Scorer(
            program.architecture,
            program.mesh,
            batch_size=config.evaluation.batch_size or 2 * config.train.batch_size,
        )
        rows = partition.process_rows(config.train.batch_size, program.mesh)
        self._batches = program.objective.validation(data, config, rows)
        patience = config.train.early_stopping_patience
        if patience and not self._splits and self._batches is None:
            raise UserError(
                f"train.early_stopping_patience is {patience}, and data.source={config.data.source!r} has no "
                "validation split; raise data.validation_fraction, or set train.early_stopping_patience=0"
            )
        self._objective_metrics = jax.jit(self._metrics_of_batch, out_shardings=partition.replicated(program.mesh))
        self._sampler = self._answers = None
        if rollouts is not None:
            self._answers = Answers(program, data, workdir, rollouts, start=start)
        elif config.logging.samples:
            self._sampler = Sampler(config, workdir, program, data, start=start)

    def line(self, step: int, state: TrainState) -> dict[str, Any]:
        """Validation metrics after `step` updates, with the keys of metrics.jsonl; empty without data."""
        if self._answers is not None:
            return self._answers.line(step, state.evaluation_params)
        line = self._likelihood(state.evaluation_params)
        if self._batches is not None:  # `loss` is the objective's own; the text's loss becomes nll
            line = {("nll" if name == "loss" else name): value for name, value in line.items()}
            line |= self._mean_metrics(state)
        if self._sampler:
            self._sampler.sample(step, state.evaluation_params)
        return line

    def _likelihood(self, params: gpt.Params) -> dict[str, Any]:
        evaluation, tokenizer = self._program.config.evaluation, self._tokenizer
        options = {"eot_id": tokenizer.eot_id, "stride": evaluation.stride, "max_tokens": evaluation.max_tokens}
        parts = {name: self._scorer.score(params, split, **options) for name, split in self._splits.items()}
        if not parts:
            return {}
        whole = Likelihood.joined(list(parts.values()))
        line = {
            "loss": whole.loss,
            "perplexity": math.exp(min(whole.loss, 700)),
            "bits_per_byte": whole.bits_per_byte,
            "accuracy": whole.accuracy,
        }
        return line | ({f"loss/{name}": part.loss for name, part in parts.items()} if len(parts) > 1 else {})

    def _mean_metrics(self, state: TrainState) -> dict[str, float]:
        """The objective's metrics averaged over its validation batches, weighted by batch weight."""
        totals: dict[str, float] = {}
        weights, hyper = 0.0, self._program.hyper(0)
        for number in range(max(int(self._batches.steps_per_epoch), 1)):
            batch = self._program.to_device(self._batches[number])
            weight, metrics = jax.device_get(self._objective_metrics(state, batch, hyper))
            weights += float(weight)
            for name, value in metrics.items():
                totals[name] = totals.get(name, 0.0) + float(weight) * float(value)
        return {name: total / max(weights, 1e-9) for name, total in totals.items()}

    def _metrics_of_batch(self, state: TrainState, batch: Batch, hyper: Hyper) -> tuple[jax.Array, Metrics]:
        program = self._program
        with jax.sharding.use_abstract_mesh(program.mesh.abstract_mesh):
            first = lora.split(state.params)[1] or state.reference_params or {}
            reference = reference_model(program.objective, program.architecture, first)
            models = Models(gpt.bind(program.architecture, state.evaluation_params), reference)
            weight = program.objective.weight(batch)
            if isinstance(program.objective, OfWholeBatch):
                hyper = hyper | program.objective.whole_batch(models, batch, total_weight=weight)
            _, metrics = program.objective.loss(models, batch, total_weight=weight, hyper=hyper)
        return weight, metrics
