"""Progress of a study: a live table on a terminal, otherwise a few lines."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from gptjax.reporting.markup import duration
from gptjax.studies.cell import Cell
from gptjax.studies.cells import Plan

EVERY = {True: 1.0, False: 60.0}  # seconds between two updates, on a terminal and elsewhere
MOST_ROWS = 40  # rows of the table


@dataclasses.dataclass(frozen=True)
class Pace:
    """Where a running cell is: its last step, its loss, and its speed (0: not yet known)."""

    step: int
    num_steps: int
    loss: float | None
    steps_per_second: float

    @property
    def left(self) -> float | None:
        """Seconds left; None if not yet known."""
        return (self.num_steps - self.step) / self.steps_per_second if self.steps_per_second else None


class Progress:
    """Receives the states of cells while they run; counts and shows them.

    Args:
      cells: those to run now. others: cells of the study that finished before.
      later: number of cells that follow once grids are tuned.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        others: Sequence[Cell] = (),
        *,
        later: int = 0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.console = console or Console(stderr=True, highlight=False)
        self._cells = {cell.name: cell for cell in cells}
        self._waiting = dict(self._cells)
        self._later, self._clock = later, clock
        self.done = sum(cell.outcome() == "done" for cell in others)
        self.diverged = sum(cell.outcome() not in ("", "done") for cell in others)
        self.without_result = 0
        self._running: dict[str, Pace] = {}
        self._begun: dict[str, tuple[float, int]] = {}  # of running cells: when they were first seen, and at which step
        self._looked = clock()
        self._live = (
            Live(console=self.console, auto_refresh=False, transient=True) if self.console.is_terminal else None
        )

    def start(self) -> None:
        if self._live:
            self._say(self._live.start)
        else:
            self._print(f"{len(self._cells)} cells to run; {self.counts()}")

    def stop(self) -> None:
        if self._live:
            self._say(self._live.stop)

    def __call__(self, states: dict[str, str]) -> None:
        """Takes the states of cells: "step 3 of 10", or how one has ended."""
        now = self._clock()
        for name, words in states.items():
            if words.startswith("step "):
                self._begun.setdefault(name, (now, self._cells[name].step() if name in self._cells else 0))
            else:
                self._ended(name, words, now)
        if now - self._looked >= EVERY[self._live is not None]:
            self._looked = now
            running = [name for name, words in states.items() if words.startswith("step ") and name in self._cells]
            self._running = {name: self._pace(name, now) for name in running}
            self._show()

    def _ended(self, name: str, words: str, now: float) -> None:
        self._running.pop(name, None)
        begun, _ = self._begun.pop(name, (now, 0))
        cell = self._waiting.pop(name, None)
        self.done += words == "done"
        self.without_result += words.startswith(("no result", "stopped"))
        self.diverged += words != "done" and not words.startswith(("no result", "stopped"))
        loss = cell.last_line("validation").get("loss") if cell and words == "done" else None
        told = f", loss {loss:.4f}" if isinstance(loss, float) else ""
        self._print(f"{name}: {words}{told} ({duration(now - begun)}); {self.counts()}{self._left_in_words()}")

    def _pace(self, name: str, now: float) -> Pace:
        """Pace since the cell was first seen, so that earlier steps of a continued cell do not count."""
        cell = self._cells[name]
        line = cell.last_line("train")
        step = line.get("step", 0)
        begun, first = self._begun.get(name, (now, step))
        speed = (step - first) / (now - begun) if step > first and now > begun else 0.0
        return Pace(step, cell.num_steps, line.get("loss"), speed)

    @property
    def left(self) -> float | None:
        """Seconds until everything is finished, at the current pace; None if not yet known."""
        speed = sum(pace.steps_per_second for pace in self._running.values())
        if not speed:
            return None
        waiting = [cell for name, cell in self._waiting.items() if name not in self._running]
        steps = sum(pace.num_steps - pace.step for pace in self._running.values()) + sum(c.num_steps for c in waiting)
        longest = max(cell.num_steps for cell in self._cells.values())
        return (steps + self._later * longest) / speed

    def counts(self) -> str:
        missing = len(self._waiting) + self._later
        told = [f"{self.done} done", f"{missing} missing", f"{self.diverged} diverged"]
        return ", ".join(told + [f"{self.without_result} without a result"] * bool(self.without_result))

    def _left_in_words(self) -> str:
        return f"; about {duration(self.left)} left" if self.left is not None else ""

    def _show(self) -> None:
        if self._live:
            self._say(self._live.update, self.table(), refresh=True)
        elif self._running:
            steps = ", ".join(f"{n} step {p.step} of {p.num_steps}" for n, p in [*self._running.items()][:8])
            self._print(f"{steps}; {self.counts()}{self._left_in_words()}")

    def table(self) -> Table:
        """The running cells, and the totals."""
        table = Table(
            title=f"{self.counts()}{self._left_in_words()}", title_justify="left", box=None, padding=(0, 2, 0, 0)
        )
        for head, side in (("cell", "left"), *((head, "right") for head in ("step", "loss", "steps/s", "left"))):
            table.add_column(head, justify=side, no_wrap=head != "cell")
        for name, pace in [*self._running.items()][:MOST_ROWS]:
            table.add_row(
                name,
                f"{pace.step:,}/{pace.num_steps:,}",
                f"{pace.loss:.4f}" if isinstance(pace.loss, int | float) else "",
                f"{pace.steps_per_second:,.2f}" if pace.steps_per_second else "",
                duration(pace.left) if pace.left is not None else "",
            )
        return table

    def _print(self, text: str) -> None:
        self._say(self.console.print, text, markup=False, soft_wrap=True)

    def _say(self, show: Callable[..., Any], *values: Any, **options: Any) -> None:
        """Prints. If the terminal is gone or the disk behind `2>file` is full, output ends and the study goes on."""
        try:
            show(*values, **options)
        except OSError:
            self.console.quiet, self._live = True, None


@contextlib.contextmanager
def shown(plan: Plan, cells: Sequence[Cell]) -> Iterator[Progress]:
    """Shows the progress of these cells of a plan while they run."""
    now = {cell.key for cell in cells}
    others = {cell.key: cell for cell in (*plan.tuning, *plan.cells) if cell.key not in now}
    progress = Progress(cells, [*others.values()], later=max(plan.count - len(now | others.keys()), 0))
    progress.start()
    try:
        yield progress
    finally:
        progress.stop()
