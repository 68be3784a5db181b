"""metrics.jsonl and the line on the terminal: where the numbers of a run go."""

import contextlib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from gptjax.errors import UserError
from gptjax.files import about, regular, words, write_whole


class MetricsLog:
    """Appends one JSON object per line to WORKDIR/metrics.jsonl; every plot and report is derived from it.

    A run that continues at `step` first drops the lines after it, so that each step is logged once. Only the first
    process has an `enabled` log.
    """

    def __init__(self, workdir: Path, *, step: int = 0, enabled: bool = True):
        self.path, self._enabled = workdir / "metrics.jsonl", enabled
        if enabled:
            drop_after(self.path, step)

    def write(self, line: dict[str, Any]) -> dict[str, Any]:
        """Returns the line as it was written: NaN and infinity become null. Raises OSError with the path in it."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        if self._enabled:
            append(self.path, clean)
        return clean


def append(path: Path, *lines: dict[str, Any]) -> None:
    """Adds lines to a JSON-lines file, each with one system call. Raises OSError with the path in it.

    If a line does not fit on the disk, its part is removed again, if possible.
    """
    with about(path), path.open("ab", buffering=0) as file:
        for line in lines:
            data, end = (json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8", errors="replace"), file.tell()
            try:
                while data:
                    data = data[file.write(data) :]
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(end)
                raise


def drop_after(path: Path, step: int) -> None:
    """Drops the lines of a JSON-lines file after `step`, and all lines if `step` is 0.

    A last line cut short by a kill or a full disk is dropped without a warning, other unreadable lines with one.
    """
    lines, rest = read_lines(path) if path.exists() and step else ([], 0)
    if rest:
        print(f"warning: {path}: {rest} damaged lines are dropped", file=sys.stderr)
    write_whole(path, (json.dumps(line, ensure_ascii=False) + "\n" for line in lines if line["step"] <= step))


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl that can be read. Raises UserError where it cannot be opened."""
    return read_lines(path)[0]


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a JSON-lines file that have a step, and the number of other lines, not counting the last."""
    try:
        texts = regular(path).read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {words(error)}") from None
    lines, damaged = [], 0
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if isinstance(line, dict) and type(line.get("step")) is int:
            lines.append(line)
        elif text.strip() and number < len(texts):
            damaged += 1
    return lines, damaged


def history(path: Path, monitor: str = "loss", step: int = sys.maxsize) -> dict[str, Any]:
    """What a run that continues at `step` needs from its lines so far, as JSON values that can go to other processes.

    Returns:
      lowest: the lowest training loss, or None. monitored: the values of `monitor` on the validation split. seconds:
      by activity, of the last line (see `throughput.Meter`).
    """
    lines = [line for line in read(path) if line["step"] <= step] if path.exists() and step else []
    last = lines[-1] if lines else {}
    return {
        "lowest": min(_numbers(lines, "train", "loss"), default=None),
        "monitored": _numbers(lines, "validation", monitor),
        "seconds": {
            k.removeprefix("seconds/"): v for k, v in last.items() if k.startswith("seconds/") and _is_number(v)
        },
    }


def _numbers(lines: list[dict[str, Any]], split: str, name: str) -> list[float]:
    return [line[name] for line in lines if line.get("split") == split and _is_number(line.get(name))]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class Display:
    """A progress line on a terminal; elsewhere one plain line at each evaluation. Only one process prints.

    A closed terminal (SIGHUP) or a full disk behind `2>file` ends the display, not the run.
    """

    def __init__(self, num_steps: int, *, start: int = 0, enabled: bool = True):
        self.console = Console(stderr=True, quiet=not enabled, highlight=False)
        self._live = self.console.is_terminal and enabled
        self._progress = Progress(
            TextColumn("[bold]step {task.completed}/{task.total}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self._live,
        )
        self._task = self._progress.add_task("train", total=num_steps, completed=start, numbers="compiling")
        self._say(self._progress.start)

    def _say(self, show: Callable[..., Any], *values: Any, **options: Any) -> None:
        try:
            show(*values, **options)
        except OSError:
            self.console.quiet = True

    def train(self, line: dict[str, Any]) -> None:
        name = "reward" if "reward" in line else "loss"
        numbers = f"{name} {line[name]:.4f}  {line['tokens_per_second']:,.0f} tokens/s"
        if "mfu" in line:
            numbers += f"  MFU {line['mfu']:.0%}"
        numbers += f"  data wait {line['data_wait_s'] / max(line['step_time_s'], 1e-9):.0%}"
        self._say(self._progress.update, self._task, completed=line["step"], numbers=numbers)

    def validation(self, line: dict[str, Any]) -> None:
        figures = [
            f"{name.replace('_', ' ')} {line[name]:.{digits}f}"
            for name, digits in (("perplexity", 2), ("bits_per_byte", 4))
            if name in line
        ]
        name = "reward" if "reward" in line else "loss"
        parts = [f"step {line['step']:>6}", f"validation {name} {line[name]:.4f}", *figures]
        self.print("  ".join([*parts, f"({line['wall_time_s']:.0f} s)"]))

    def print(self, text: str) -> None:
        self._say(self.console.print, text, markup=False, soft_wrap=True)

    def close(self) -> None:
        self._say(self._progress.stop)
        self._say(sys.stderr.flush)
