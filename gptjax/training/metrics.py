"""metrics.jsonl, the line on the terminal, TensorBoard: where the numbers of a run go."""

import contextlib
import json
import math
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from gptjax.files import write_whole


class MetricsLog:
    """Appends one JSON object a line to WORKDIR/metrics.jsonl; every plot and report is derived from it.

    A run that continues at `step` first drops the lines after it, so that each step is logged once. Of several
    processes the first writes, and the others have one that is not `enabled`.
    """

    def __init__(self, workdir: Path, *, step: int = 0, tensorboard: bool = False, enabled: bool = True):
        self.path = workdir / "metrics.jsonl"
        self._file, self._tensorboard = None, None
        if enabled:
            drop_after(self.path, step)
            self._file = self.path.open("a", buffering=1)
            self._tensorboard = _tensorboard_writer(workdir, step) if tensorboard else None

    def write(self, line: dict[str, Any]) -> None:
        """Numbers are rounded to float32's seven digits at most by JSON's repr; NaN and infinity become null."""
        if self._file is None:
            return
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        self._file.write(json.dumps(clean) + "\n")
        if self._tensorboard:
            for name, value in clean.items():
                if name != "step" and isinstance(value, int | float):
                    self._tensorboard.add_scalar(f"{line['split']}/{name}", value, line["step"])

    def close(self) -> None:
        if self._file:
            with contextlib.suppress(OSError):  # a full disk, which `write` has reported
                self._file.close()
        if self._tensorboard:
            self._tensorboard.close()


def drop_after(path: Path, step: int) -> None:
    """Keeps the lines of a JSON-lines file up to `step`: none where the run begins anew, at step 0."""
    lines = read(path) if path.exists() else []
    kept = [line for line in lines if line["step"] <= step] if step else []
    write_whole(path, (json.dumps(line, ensure_ascii=False) + "\n" for line in kept))


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line cut short by a kill is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").split("\n"):
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def history(path: Path, monitor: str = "loss", step: int = sys.maxsize) -> dict[str, Any]:
    """What a run that continues at `step` must know of its past: JSON values, so that processes can pass it on.

    Returns:
      lowest: the lowest training loss, or None. monitored: the values of `monitor` on the validation split. seconds:
      by activity, of the last line (see `throughput.Meter`).
    """
    lines = [line for line in read(path) if line["step"] <= step] if path.exists() and step else []
    finite = [line["loss"] for line in lines if line["split"] == "train" and line["loss"] is not None]
    last = lines[-1] if lines else {}
    return {
        "lowest": min(finite, default=None),
        "monitored": [x[monitor] for x in lines if x["split"] == "validation" and x.get(monitor) is not None],
        "seconds": {k.removeprefix("seconds/"): v for k, v in last.items() if k.startswith("seconds/")},
    }


def _tensorboard_writer(workdir: Path, step: int):
    # tensorboardX imports torch where it is installed (1 s), for tensors that are never given to it.
    hidden = {} if "torch" in sys.modules else {"torch": None}
    sys.modules.update(hidden)
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        return None
    finally:
        for name in hidden:
            del sys.modules[name]
    return SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1 if step else None)


class Display:
    """A progress line on a terminal; elsewhere one plain line at each evaluation. Only one process speaks."""

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
        self._progress.start()

    def train(self, line: dict[str, Any]) -> None:
        numbers = f"loss {line['loss']:.4f}  {line['tokens_per_second']:,.0f} tokens/s"
        if "mfu" in line:
            numbers += f"  MFU {line['mfu']:.0%}"
        numbers += f"  data wait {line['data_wait_s'] / max(line['step_time_s'], 1e-9):.0%}"
        self._progress.update(self._task, completed=line["step"], numbers=numbers)

    def validation(self, line: dict[str, Any]) -> None:
        figures = [
            f"{name.replace('_', ' ')} {line[name]:.{digits}f}"
            for name, digits in (("perplexity", 2), ("bits_per_byte", 4))
            if name in line
        ]
        parts = [f"step {line['step']:>6}", f"validation loss {line['loss']:.4f}", *figures]
        self.print("  ".join([*parts, f"({line['wall_time_s']:.0f} s)"]))

    def print(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        self._progress.stop()
        sys.stderr.flush()
