"""Why a run ends before its last step: no more improvement, divergence, a signal."""

import contextlib
import math
import signal
from collections.abc import Iterable

from gptjax import interrupts
from gptjax.errors import RunError


class EarlyStopping:
    """Counts evaluations since the last improvement, also those before the run was continued.

    Attributes:
      best: the best value so far; NaN before the first.
    """

    def __init__(
        self, patience: int, history: Iterable[float], *, min_delta: float = 0.0, lower_is_better: bool = True
    ):
        """
        Args:
          patience: evaluations without an improvement, after which a run is exhausted; 0: never.
          history: values of earlier evaluations.
          min_delta: an evaluation counts only if it is better by more than this than the last that counted.
        """
        self.patience, self.best, self.since = patience, math.nan, 0
        self._sign = 1.0 if lower_is_better else -1.0
        self._min_delta, self._mark = min_delta, math.inf
        for value in history:
            self.update(value)

    def update(self, value: float) -> bool:
        """Takes the next evaluation; returns whether it is the best so far."""
        score = self._sign * value
        is_best = score < self._sign * self.best or (math.isnan(self.best) and not math.isnan(value))
        self.best = value if is_best else self.best
        improved = score < self._mark - self._min_delta
        self._mark, self.since = (score, 0) if improved else (self._mark, self.since + 1)
        return is_best

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


SIGNALS = (signal.SIGINT, *interrupts.STOPPING)


class StopSignals:
    """Notes the signals that end a job, so that the loop can save; a second Ctrl-C stops at once.

    A signal that is ignored when the process starts stays ignored: SIGHUP under nohup, SIGINT in a script's background.
    """

    def __init__(self, *, noting: bool = True):
        """Without `noting`, a signal ends the command at once until `note` is called."""
        self.received = ""
        self._old = {} if noting else interrupts.handle(*SIGNALS)
        if noting:
            self.note()

    def note(self) -> None:
        for number in SIGNALS:
            with contextlib.suppress(ValueError):  # not the main thread: somebody else handles signals
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._old.setdefault(number, signal.signal(number, self._note))

    def _note(self, number, frame):
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or signal.Signals(number).name

    def restore(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old = {}
