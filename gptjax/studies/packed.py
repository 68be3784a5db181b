"""Several cells as one program: their steps are computed together; each has its own run, metrics and checkpoints.

Cells can be packed if their programs agree: they differ only in seeds and hyper-parameters (see `signature`). A GPU
computes sixteen small models in little more time than one; a CPU core gains nothing. A cell that diverges is recorded
and dropped, and the others go on. Each cell is a normal work directory and can be continued alone.

  python -m gptjax.studies.packed WORKDIR_OF_CELL WORKDIR_OF_CELL ...
"""

import contextlib
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gptjax import config as config_lib
from gptjax.artifacts import integrity
from gptjax.artifacts.lock import Lock
from gptjax.config import Config
from gptjax.errors import RunError
from gptjax.evaluation.validation import Validator
from gptjax.files import write_whole
from gptjax.parallel import mesh as mesh_lib
from gptjax.reporting.page import write_report
from gptjax.studies.cell import PACKED, note_failure
from gptjax.training import metrics, stopping
from gptjax.training.program import Program
from gptjax.training.recorder import Recorder
from gptjax.training.run import Ending, Run


class Member:
    """One cell of a pack: its run with its batches, its metrics, its validation."""

    def __init__(self, config: Config, workdir: Path, ending: Ending):
        lock = Lock.take(workdir)
        ending.add(lock.release)
        self.run = Run.open(config, workdir)
        self.run.lock = lock
        ending.add(self.run.close)
        monitor, start = self.run.program.objective.monitor.name, self.run.start
        history = metrics.history(workdir / "metrics.jsonl", monitor, start)
        told = {"start": start, "started": time.perf_counter(), "chief": True, "history": history}
        self.record = Recorder(self.run.program, self.run.batches, workdir, **told, advice=self.run.advice, shown=False)
        ending.add(self.record.close)
        self.validator = Validator(self.run.program, self.run.data, workdir, start=start)
        self.failure = ""

    def end(self, reason: str) -> None:
        """Ends this member after it diverged; the others go on."""
        self.failure = reason
        print(f"{self.run.workdir}: {reason}", file=sys.stderr)


def train(cells: Sequence[tuple[Config, Path]]) -> dict[Path, str]:
    """Trains cells with equal signatures from the same step. Returns the reasons of those that failed.

    Raises RunError after a signal, once every cell has saved.
    """
    with Ending() as ending:
        members = [Member(config, workdir, ending) for config, workdir in cells]
        for _, workdir in cells:
            write_whole(workdir / PACKED, f"{len(cells)}\n")
        stop = stopping.StopSignals()
        ending.add(stop.restore)
        _loop(members, stop)
        for member in members:
            member.run.checkpoints.wait()
    for _, workdir in cells:
        write_report(workdir)
    return {member.run.workdir: member.failure for member in members if member.failure}


def _loop(members: list[Member], stop: stopping.StopSignals) -> None:
    """The order within a step is that of `gptjax.train`: log, evaluate, save the old state, take the batch, advance."""
    first = members[0].run
    options, start = first.program.config, first.start
    if any(member.run.start != start for member in members):
        raise ValueError("packed cells start from different steps")
    devices = jax.devices()
    parts = math.gcd(len(devices), len(members))
    mesh = mesh_lib.make_mesh(options.mesh, devices[:parts], members=parts)
    packed = Program.of(options, mesh, objective=first.program.objective, members=len(members))
    hypers = [member.run.program.hyperparameters for member in members]
    state = _stacked([member.run.state() for member in members], packed)
    with jax.set_mesh(mesh):
        for step in range(start, options.train.num_steps + 1):
            last, due = step == options.train.num_steps, step > start
            evaluates = due and (last or step % options.evaluation.every == 0)
            saves = due and (last or step % options.train.checkpoint_every == 0)
            for index, member in enumerate(members):
                if (evaluates or saves or stop.received) and not member.failure:
                    _note(members, index, step, state, evaluates=evaluates, saves=saves or bool(stop.received))
            if last or all(member.failure for member in members):
                break
            if stop.received:
                raise RunError(f"stopped by {stop.received} at step {step}; the same command continues")
            with _timed(members, "data"):
                rows = [member.run.rows(step) for member in members]
                batch = packed.to_device({name: np.stack([row[name] for row in rows]) for name in rows[0]})
            with _timed(members, "step"):
                state, told = packed.step(state, batch, packed.hyper_of_members(hypers, step))
                values = jax.device_get(told)
            _tell(members, step + 1, values)


@contextlib.contextmanager
def _timed(members: list[Member], activity: str) -> Iterator[None]:
    """Adds the time of the body to the records of all members."""
    with contextlib.ExitStack() as stack:
        for member in members:
            stack.enter_context(member.record.timed(activity))
        yield


def _tell(members: list[Member], step: int, values: dict[str, Any]) -> None:
    """Writes each member's metrics to its own record."""
    for index, member in enumerate(members):
        if member.failure:
            continue
        try:
            member.record.dispatched(step, {name: value[index] for name, value in values.items()}, log=False)
        except RunError as error:
            member.end(str(error))


def _note(members: list[Member], index: int, step: int, state: Any, *, evaluates: bool, saves: bool) -> None:
    """Flushes, evaluates and saves one member while the others wait."""
    member = members[index]
    try:
        member.record.flush()
        own = jax.tree.map(lambda leaf: leaf[index], state)
        own = jax.device_put(own, jax.tree.map(lambda leaf: leaf.sharding, member.run.program.target))
        with jax.set_mesh(member.run.program.mesh):
            with _timed(members, "eval"):
                line = member.validator.line(step, own) if evaluates else {}
            saves |= bool(line) and member.record.validation(step, line)
            with _timed(members, "checkpoint"):
                if saves:
                    member.run.save(step, own, line)
    except RunError as error:
        member.end(str(error))


def _stacked(states: list[Any], packed: Program) -> Any:
    """The states of the members stacked into one, with the shardings of the packed program."""
    whole = jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *states)
    return jax.device_put(whole, jax.tree.map(lambda leaf: leaf.sharding, packed.target))


def main(workdirs: list[str]) -> None:
    """Trains the cells in these directories and records those that fail."""
    together: dict[int, list[tuple[Config, Path]]] = {}  # by first step; a kill may leave cells at different ones
    for workdir in map(Path, workdirs):
        config = config_lib.from_json((workdir / "cell.json").read_text(encoding="utf-8")).unlock()
        config.mesh.data = 1
        start = integrity.newest_whole(workdir / "checkpoints")
        together.setdefault(start, []).append((config.lock(), workdir))
    for _, cells in sorted(together.items()):
        for workdir, reason in train(cells).items():
            note_failure(workdir, reason)


if __name__ == "__main__":
    main(sys.argv[1:])
