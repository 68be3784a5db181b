"""What a run reports while it trains (metrics.jsonl, terminal, times), and when it has to end."""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from gptjax.data.pipeline.batches import BatchSource
from gptjax.objectives.language_modeling import LanguageModeling
from gptjax.training import metrics, sinks, stopping, throughput
from gptjax.training.program import Program


class Recorder:
    """The numbers of a run, from the devices to the files.

    Metrics of a step are fetched after the next step was dispatched, so that the device never waits for the host. At
    most two steps are in flight, so that memory stays bounded and Ctrl-C acts at once. All processes record,
    but only the first one writes.
    """

    def __init__(
        self,
        program: Program,
        batches: BatchSource,
        workdir: Path,
        *,
        start: int,
        started: float,
        chief: bool,
        history: dict[str, Any],
        advice: Callable[[], str],
        shown: bool = True,
    ):
        """
        Args:
          start: the step at which this part of the run begins.
          started: when its set-up began (time.perf_counter).
          history: numbers of the run before `start`, from `metrics.history`.
          advice: returns what to do after a divergence.
          shown: whether anything is shown on the terminal.
        """
        config, monitor = program.config, program.objective.monitor
        device = program.mesh.devices.flat[0]
        peak = throughput.peak_flops(device, config.model.compute_dtype)
        self.num_steps, self.monitor = config.train.num_steps, monitor
        self.is_likelihood = monitor.name == "loss" and isinstance(program.objective, LanguageModeling)
        self.log = metrics.MetricsLog(workdir, step=start, enabled=chief)
        logging, values = config.logging, config.to_dict()
        chosen = {"tensorboard": logging.tensorboard, "trackers": logging.trackers}
        self.sinks = sinks.Sinks(sinks.makers(workdir, values, step=start, **chosen) if chief else {})
        self.display = metrics.Display(self.num_steps, start=start, enabled=chief and shown)
        self.meter = throughput.Meter(
            program.architecture.flops_per_token(),
            peak and peak * program.mesh.devices.size,
            started=started,
            before=history["seconds"],
        )
        self.stopper = stopping.EarlyStopping(
            config.train.early_stopping_patience,
            history["monitored"],
            min_delta=config.train.early_stopping_min_delta,
            lower_is_better=monitor.lower_is_better,
        )
        self._guard = stopping.DivergenceGuard(config.train.divergence_threshold, lowest=history["lowest"])
        self._advice = advice
        self._every, self._batches = config.logging.every, batches
        self._start, self._logged, self._tokens_seen = start, start, batches.num_tokens(0, start)
        self._pending: tuple[int, dict] | None = None  # metrics of a step, not fetched yet
        self._in_flight: Any = None  # the loss of the last step that was dispatched
        self._first = True

    @property
    def exhausted(self) -> bool:
        """Whether validation has stopped improving."""
        return self.stopper.exhausted

    def timed(self, activity: str) -> AbstractContextManager[None]:
        """Counts the body as one of throughput.ACTIVITIES; the first step counts as compilation."""
        return self.meter.doing("compile" if self._first and activity == "step" else activity)

    def dispatched(self, step: int, step_metrics: dict[str, ArrayLike], *, log: bool) -> None:
        """Called after an update was dispatched; `step` counts it. Records the one before. Raises RunError."""
        if self._first:
            self._first = False
            self.display.print(f"first step after {time.perf_counter() - self.meter.begin:.1f} s")
        self.flush()
        if log or step % self._every == 0 or step == self.num_steps:
            self._pending = step, step_metrics
        with self.timed("step"):
            jax.block_until_ready(self._in_flight)
        self._in_flight = step_metrics["loss"]

    def wait(self) -> None:
        """Waits until no step is running."""
        jax.block_until_ready(self._in_flight)

    def flush(self) -> None:
        """Fetches and writes the metrics of the last logged step. Raises RunError if the run has diverged."""
        if self._pending is None:
            return
        (step, device_metrics), self._pending = self._pending, None
        with self.timed("step"):
            values = jax.device_get(device_metrics)
        layers = {name for name, value in values.items() if name.startswith("norms/") and np.ndim(value)}
        numbers = {name: float(value) for name, value in values.items() if name not in layers}
        norms = {k: v for name in sorted(layers) for k, v in _by_layer(name, values[name])}
        line = {"step": step, "split": "train", **numbers, **self._speed(step)}
        line |= {"tokens_seen": self._tokens_seen, "epoch": self._batches.epoch(step)}
        line |= {f"epoch/{name}": epoch for name, epoch in self._batches.epochs(step).items()}
        line |= norms | self.meter.goodput()
        self.sinks.write(self.log.write(line))
        self.display.train(line)
        self._guard.check(step, numbers["loss"], self._advice())

    def _speed(self, step: int) -> dict[str, float | str]:
        """Figures since the last logged step, without the first step, which compiles, if there are others."""
        first = self._logged if self._logged > self._start else min(self._start + 1, step)
        new = self._batches.num_tokens(self._logged, step)
        timed = new if first == self._logged else self._batches.num_tokens(first, step)
        self._logged, self._tokens_seen = step, self._tokens_seen + new
        return self.meter.read(timed or new, step - first)

    def validation(self, step: int, line: dict[str, Any]) -> bool:
        """Writes the line of an evaluation; returns whether it is the best so far."""
        seen = self._tokens_seen + self._batches.num_tokens(self._logged, step)
        wall_time = time.perf_counter() - self.meter.begin
        line = {"step": step, "split": "validation", **line, "tokens_seen": seen, "wall_time_s": wall_time}
        self.sinks.write(self.log.write(line | self.meter.goodput()))
        self.display.validation(line)
        return self.stopper.update(line[self.monitor.name])

    def print(self, text: str) -> None:
        """A line for the terminal."""
        self.display.print(text)

    def close(self) -> None:
        self.display.close()
        self.sinks.close()

    def summary(self) -> str:
        """How the run ended, in a line."""
        early = f"stopped early: {self.stopper.patience} evaluations without improvement"
        ending, best = early if self.exhausted else "done", self.stopper.best
        if math.isnan(best):
            return f"{ending}; nothing was validated"
        perplexity = f", perplexity {math.exp(min(best, 700)):.2f}" if self.is_likelihood else ""
        return f"{ending}; best validation {self.monitor.name.replace('_', ' ')} {best:.4f}{perplexity}"


def _by_layer(name: str, norms: np.ndarray) -> list[tuple[str, float]]:
    """("norms/KIND/blocks/LAYER/PATH", norm) from the norms of stacked parameters, norms/KIND/blocks/PATH."""
    before, _, path = name.partition("/blocks/")
    return [(f"{before}/blocks/{layer}/{path}", float(norm)) for layer, norm in enumerate(norms)]
