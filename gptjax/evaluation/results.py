"""Results of an evaluation: their file and its name, the items beside it, the table that is printed."""

import hashlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gptjax import outputs
from gptjax.evaluation import metrics as items
from gptjax.evaluation.compare import ITEMS_SUFFIX
from gptjax.evaluation.metrics import Outcome

_LONGEST_NAME = 120  # bytes of a file's name
_FILE_COLUMNS = 160  # of a table that is not printed to a terminal

Outcomes = Mapping[str, Outcome]


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def to_json(outcomes: Outcomes) -> dict[str, dict[str, Any]]:
    return {
        task: {name: estimate.to_json() for name, estimate in outcome.metrics.items()}
        for task, outcome in outcomes.items()
    }


def file_name(tasks: Sequence[str], data: str, step: int) -> str:
    """TASKS-DATA-STEP; if that is too long, the first task only, and a digest that keeps names distinct."""
    name = "-".join([*tasks, data, str(step)])
    if len(name.encode()) > _LONGEST_NAME:
        digest = hashlib.sha256(name.encode()).hexdigest()[:6]
        more = f"and-{len(tasks) - 1}-more-" if len(tasks) > 1 else ""
        name = f"{tasks[0][:32]}-{more}{data[-24:]}-{step}-{digest}"
    return re.sub(r"[^\w.=+-]+", "-", name).strip("-.")


def write(place: str | Path, answer: dict[str, Any], outcomes: Outcomes) -> None:
    """Writes the results, and beside them the items that --compare reads. Raises RunError."""
    if outcomes and outputs.keeps_files(place):
        outputs.write(outputs.beside(place, ITEMS_SUFFIX), items.lines(outcomes))
    outputs.write(place, json.dumps(answer, indent=1) + "\n")


def number(value: float, sign: str = "") -> str:
    return f"{value:{sign}.4f}" if abs(value) < 1e6 else f"{value:{sign}.4g}"


def console() -> Console:
    return Console(width=None if sys.stdout.isatty() else _FILE_COLUMNS)


def show(outcomes: Outcomes, title: str) -> None:
    """Prints a table of the results and their signatures; warnings go to stderr."""
    table = Table("task", "metric", "value", "95 % interval", "n")
    for task, outcome in outcomes.items():
        for name, estimate in outcome.metrics.items():
            low, high = estimate.ci95
            interval = f"{number(low)} .. {number(high)}" if low == low else ""  # NaN: no interval
            table.add_row(task, name, number(estimate.value), interval, f"{estimate.n:,}")
    terminal = console()
    show_title(terminal, title)
    terminal.print(table)
    for signature in dict.fromkeys(e.signature for outcome in outcomes.values() for e in outcome.metrics.values()):
        terminal.print(f"  {signature}", style="dim", soft_wrap=True, highlight=False, markup=False)
    sys.stdout.flush()
    for warning in dict.fromkeys(warning for outcome in outcomes.values() for warning in outcome.warnings):
        warn(warning)


def show_title(terminal: Console, title: str) -> None:
    """A line by itself: the title of a rich table is broken at the width of the table, and a path is often longer."""
    terminal.print(title, style="table.title", markup=False, soft_wrap=True, highlight=False)


def progress(what: str):
    """A progress display on the terminal; None without a terminal."""

    def tell(done: int, total: int) -> None:
        end = "\n" if done == total else ""
        print(f"\r{what} {done / total:4.0%}\x1b[K", end=end, file=sys.stderr, flush=True)

    return tell if sys.stderr.isatty() else None
