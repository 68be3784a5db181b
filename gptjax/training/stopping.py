"""Why a run ends before its last step: no more improvement, divergence, a signal."""

import math
import signal

from gptjax.errors import RunError


class EarlyStopping:
    """Counts evaluations since the best one, the ones of an earlier part of the run included."""

    def __init__(self, patience: int, history: list[dict]):
        self.patience, self.best, self.since = patience, math.inf, 0
        for line in history:
            if line["split"] == "validation" and line["loss"] is not None:
                self.update(line["loss"])

    def update(self, loss: float) -> bool:
        """Takes the next evaluation: is it the best so far?"""
        improved = loss < self.best
        self.best, self.since = min(loss, self.best), 0 if improved else self.since + 1
        return improved

    @property
    def exhausted(self) -> bool:
        return 0 < self.patience <= self.since


class DivergenceGuard:
    """Raises RunError on NaN, or when the loss stays `threshold` nats above its lowest for `patience` lines."""

    def __init__(self, threshold: float, patience: int = 5, lowest: float | None = None):
        """`lowest`: that of an earlier part of the run, if any."""
        self.threshold, self.patience = threshold, patience
        self.lowest, self.above = math.inf if lowest is None else lowest, 0

    def check(self, step: int, loss: float, advice: str) -> None:
        if not math.isfinite(loss):
            raise RunError(f"the training loss is {loss} at step {step}. {advice}")
        self.lowest = min(self.lowest, loss)
        self.above = self.above + 1 if loss > self.lowest + self.threshold else 0
        if self.above >= self.patience:
            raise RunError(
                f"the training loss diverged: {loss:.3f} at step {step}, {loss - self.lowest:.2f} nats above its "
                f"lowest (train.divergence_threshold={self.threshold}). {advice}"
            )


class StopSignals:
    """Notes SIGTERM and Ctrl-C so that the loop can save; a second Ctrl-C stops at once."""

    def __init__(self):
        self.received = ""
        self._old = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._old[number] = signal.signal(number, self._note)
            except ValueError:  # not the main thread: somebody else handles signals
                return

    def _note(self, number, frame):
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name

    def restore(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
