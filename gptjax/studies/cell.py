"""A cell: one run of a study, with its resolved config, its work directory and its outcome."""

import contextlib
import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

from gptjax import config as config_lib
from gptjax.artifacts import mirror
from gptjax.config import Config
from gptjax.errors import UserError
from gptjax.files import write_whole
from gptjax.training import metrics

PACKED = "packed.txt"  # in the work directory of a packed cell: how many cells shared the program
TAIL = 65_536  # bytes at the end of metrics.jsonl that are searched first for the last line
FREE = ("place", "record")  # options that do not change the compiled program
RUNNER = '''\
"""{text}

  python -m gptjax.train --config={path} --workdir={workdir}
"""

from pathlib import Path

from gptjax.config import from_json


def get_config():
    return from_json((Path(__file__).parent / "cell.json").read_text(encoding="utf-8")).unlock()
'''


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
      config: as the study sets it. resolved: with what the run derives from the data.
      key: hash of the resolved config, the code and the data.
      workdir: its work directory.
      point: the values of its grids, for a cell that tunes its arm.
    """

    arm: str
    seed: int
    config: Config
    resolved: Config
    key: str
    workdir: Path
    num_steps: int
    point: str = ""

    @property
    def name(self) -> str:
        return f"{self.arm}{self.point and f'({self.point})'}-seed{self.seed}"

    @property
    def config_file(self) -> Path:
        """The cell's own config file, with the command that runs the cell again."""
        return self.workdir / "cell.py"

    def prepare(self) -> None:
        """Makes the work directory with the config file."""
        self.workdir.mkdir(parents=True, exist_ok=True)
        write_whole(self.workdir / "cell.json", config_lib.to_json(self.config))
        text = f"The cell {self.name} of a study."
        path, workdir = mirror.shown(self.config_file), mirror.shown(self.workdir)
        write_whole(self.config_file, RUNNER.format(text=text, path=path, workdir=workdir))
        mirror.push(self.workdir, ["cell.json", "cell.py"])

    def lines(self, split: str) -> list[dict[str, Any]]:
        path = self.workdir / "metrics.jsonl"
        return [line for line in metrics.read(path) if line.get("split") == split] if path.exists() else []

    def last_line(self, split: str) -> dict[str, Any]:
        """The last complete line of a split, read from the end of the file; empty if there is none."""
        tail = TAIL
        while True:
            try:
                with (self.workdir / "metrics.jsonl").open("rb") as file:
                    size = file.seek(0, os.SEEK_END)
                    file.seek(max(size - tail, 0))
                    texts = file.read().split(b"\n")
            except OSError:
                return {}
            for text in reversed(texts):
                with contextlib.suppress(ValueError):
                    line = json.loads(text)
                    if isinstance(line, dict) and line.get("split") == split and isinstance(line.get("step"), int):
                        return line
            if tail >= size:
                return {}
            tail *= 4

    def together(self) -> int:
        """How many cells shared its program; 1: it ran alone."""
        path = self.workdir / PACKED
        return int(path.read_text(encoding="utf-8")) if path.exists() else 1

    def step(self) -> int:
        """The last step in its metrics."""
        return self.last_line("train").get("step", 0)

    def outcome(self) -> str:
        """ "done", how it diverged, or "" if it has not finished."""
        if self.last_line("validation").get("step") == self.num_steps:
            return "done"
        path = self.workdir / "diverged.txt"
        return path.read_text(encoding="utf-8").strip() if path.exists() else ""

    def fail(self, reason: str) -> None:
        """Records that the cell diverged; that is a result, too."""
        note_failure(self.workdir, reason)

    def score(self, metric: str, uniform: float) -> float:
        """The metric of the last validation; for a cell that diverged, that of a uniform model.

        Args:
          uniform: the score of a model that gives every token the same probability.

        Raises UserError if the validation has no such metric.
        """
        if self.outcome() != "done":
            return uniform
        line = self.last_line("validation")
        if metric not in line:
            known = [name for name, value in line.items() if isinstance(value, int | float) and name != "step"]
            raise UserError(f"study.metric is {metric!r}; the validation of {self.name} has {', '.join(known)}")
        value = line[metric]
        return value if isinstance(value, int | float) and math.isfinite(value) else uniform


def note_failure(workdir: Path, reason: str) -> None:
    """Writes how a cell diverged, without paths, so that the same study elsewhere writes the same text."""
    last = reason.strip().splitlines()[-1]
    for path in (workdir.absolute(), workdir):
        last = last.replace(str(path), "the cell")
    write_whole(workdir / "diverged.txt", last[:500] + "\n")
    mirror.push(workdir, ["diverged.txt"])


def signature(config: Config) -> str:
    """Everything that packed cells must share: all but seeds, hyper-parameters and what is recorded.

    It includes which hyper-parameters are zero, since without dropout, label smoothing or an average another program
    is compiled; and the number of steps and the evaluation interval.
    """
    free = config_lib.affecting("hyper", *FREE) | {"data_seed"}
    if config.objective.name == "reinforcement":  # it generates its batches during training, so it is never packed
        free = frozenset()
    together = {"evaluation.every", "train.checkpoint_every", "logging.every"}
    values = dict(config_lib.flat_values(config))
    kept = {path: value for path, value in values.items() if path not in free or path in together}
    switches = {path: bool(values[path]) for path in ("train.ema_decay", "objective.label_smoothing")}
    return json.dumps(kept | switches, sort_keys=True)
