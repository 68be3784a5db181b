"""Runs the cells of a study on this machine: one process per core on a CPU, one per GPU where there are any.

A small model gains less from a second core than a second run does: on two cores, two runs side by side finish sooner
than one after the other.
"""

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from gptjax import interrupts
from gptjax.artifacts import mirror
from gptjax.errors import RunError
from gptjax.studies.cell import Cell, signature

# Messages of training that diverged (training/stopping.py, training/run.py).
DIVERGED = re.compile("the training loss (is|diverged)|the parameters are not finite")
POLL = 0.2  # seconds between two looks at the processes
GRACE = 120  # seconds in which a stopped cell may save
PR_SET_PDEATHSIG = 1  # of Linux: makes the kernel send a signal to this process when its parent ends


Job = Sequence[Cell]  # one cell, or several packed cells


class Slots:
    """The places where cells run: GPUs, or else cores."""

    def __init__(self, workers: int = 0):
        """`workers`: jobs at once; 0: one per GPU or core."""
        self._gpus = _gpus()
        self._cores = (
            sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [*range(os.cpu_count() or 1)]
        )
        self.count = min(workers or sys.maxsize, len(self._gpus or self._cores))

    def start(self, slot: int, job: Job) -> subprocess.Popen:
        """Starts a cell, or packed cells, in one of the places."""
        first = job[0]
        command = [sys.executable, "-m", "gptjax.train", f"--config={first.config_file}", f"--workdir={first.workdir}"]
        if len(job) > 1:
            command = [sys.executable, "-m", "gptjax.studies.packed", *(str(cell.workdir) for cell in job)]
        environment = dict(os.environ)
        share: list[int] = []
        if self._gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self._gpus[slot]
        elif self.count > 1:
            share = self._cores[slot :: self.count]
        with (first.workdir / mirror.LOG).open("ab") as log:
            return subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, preexec_fn=lambda: _settle_in(share)
            )


def _gpus() -> list[str]:
    """The names of the usable GPUs, found without starting JAX."""
    if os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        return []
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return visible.split(",")
    return sorted(path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*"))


def computes_on_cores() -> bool:
    """Whether cells run on CPU cores, where packing gains nothing."""
    return not _gpus()


def _settle_in(cores: Sequence[int]) -> None:
    """Runs in the process of a cell: pins it to its cores, and stops it when the study's process ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if cores:
            os.sched_setaffinity(0, cores)


def run(
    jobs: Iterable[Job],
    *,
    workers: int = 0,
    show: Callable[[dict[str, str]], None] = lambda states: None,
    halt: Callable[[Cell], bool] = lambda cell: False,
    ended: Callable[[Cell], None] = lambda cell: None,
) -> None:
    """Runs every cell to its end. A cell that diverges counts as finished; other failures leave it unfinished.

    Args:
      jobs: cells, alone or packed; the next job is taken when a place is free.
      workers: jobs at once; 0: one per core, or one per GPU.
      show: called with what running and just finished cells are doing, {name: text}.
      halt: called at each poll for each running cell; True stops it after saving.
      ended: called with each cell whose process has ended.

    Raises RunError after Ctrl-C or a signal of a scheduler: the cells have saved, and the same command continues.
    """
    slots, waiting, more = Slots(workers), iter(jobs), True
    running: dict[int, tuple[Job, subprocess.Popen]] = {}
    asked: list[int] = []
    numbers = [n for n in (signal.SIGINT, *interrupts.STOPPING) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {n: signal.signal(n, lambda number, frame: asked.append(number)) for n in numbers}
    try:
        while more or running:
            for slot in range(slots.count):
                if more and slot not in running:
                    if (job := next(waiting, None)) is None:
                        more = False
                        continue
                    for cell in job:
                        cell.prepare()
                    running[slot] = job, slots.start(slot, job)
            halted = [slot for slot, (job, _) in running.items() if any(halt(cell) for cell in job)]
            for slot in halted:
                _stop([running[slot][1]])
            at_work = [cell for job, _ in running.values() for cell in job]
            show({cell.name: f"step {cell.step()} of {cell.num_steps}" for cell in at_work})
            for slot, (job, process) in list(running.items()):
                if process.poll() is not None:
                    del running[slot]
                    log = job[0].workdir / mirror.LOG
                    mirror.push(job[0].workdir, [mirror.LOG])
                    words = {cell.name: _ended(cell, process.returncode, log) for cell in job}
                    show(dict.fromkeys(words, "stopped early") if slot in halted else words)
                    for cell in job:
                        ended(cell)
            if asked:
                raise RunError(f"stopped by {signal.Signals(asked[0]).name}; the same command runs what is missing")
            time.sleep(POLL)
    finally:
        _stop([process for _, process in running.values()])
        for number, handler in before.items():
            signal.signal(number, handler)


def packs(cells: Sequence[Cell], *, most: int) -> list[Job]:
    """Groups cells of equal signature into packs of at most `most`; cells that may stop early run alone."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        alone = cell.name if cell.resolved.train.early_stopping_patience else ""
        groups.setdefault(f"{signature(cell.resolved)} {cell.step()} {alone}", []).append(cell)
    return [tuple(group[i : i + most]) for group in groups.values() for i in range(0, len(group), most)]


def _ended(cell: Cell, status: int, log: Path) -> str:
    """The outcome of a cell whose process has ended, in a word; records if it diverged.

    A signal, a full disk or too little memory is no result of the arm: the next command continues such a cell.
    """
    if outcome := cell.outcome():
        return outcome
    text = log.read_text(encoding="utf-8", errors="replace").strip()
    last = text.splitlines()[-1] if text else f"exit status {status}"
    if status == 1 and DIVERGED.search(last):
        cell.fail(last)
        return last
    return f"no result: {last} ({mirror.shown(log)})"


def _stop(processes: Sequence[subprocess.Popen]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
