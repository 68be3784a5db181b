"""Trains a run again from what its work directory records, and compares it with the first one, step by step.

Expected: the same code, packages and flags on the same CPU with the same number of devices write bit-identical
numbers. On another processor or a GPU, or with other packages, the losses agree to `differences.expected`: 1e-5 of
the loss in the first ten steps, then proportional to the step. A larger difference means another training.
"""

import contextlib
import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gptjax import config as config_lib
from gptjax import json_text
from gptjax.artifacts import mirror
from gptjax.errors import RunError, UserError
from gptjax.files import write_whole
from gptjax.studies import differences, local
from gptjax.studies.cell import Cell
from gptjax.studies.code import code_hash
from gptjax.studies.differences import Difference
from gptjax.training import metrics

# The entries of a line of metrics.jsonl that measure time. They are not compared.
TIMES = ("tokens_per_second", "step_time_s", "data_wait_s", "wall_time_s", "mfu", "mfu_convention", "goodput")
# Differences of these kinds only change rounding. Any other makes it another training.
ROUNDING = (
    *("packages", "Python", "device", "number of devices", "processes", "mesh", "platform", "processor"),
    *("environment", "gptjax", "code", "uncommitted code"),
)
MOST_CAUSES = 8


@dataclasses.dataclass(frozen=True)
class Departure:
    """The first number that differs: its step and split, its name, and both values."""

    step: int
    split: str
    name: str
    first: Any
    again: Any

    def in_words(self) -> str:
        return f"step {self.step}, {self.split} {self.name}: {self.first} at first, {self.again} now"


@dataclasses.dataclass(frozen=True)
class Reproduction:
    """The comparison of a run with the one that it repeats.

    Attributes:
      lines: number of common lines, up to the step `last`.
      departure: the first number that differs; None: all are bit-identical.
      exact: whether the numbers should be bit-identical.
      beyond: the first loss that differs by more than expected; None: no loss does.
      largest: largest relative difference of a loss, and its step.
      causes: the differences in what produced the two runs, the likeliest cause first.
    """

    lines: int
    last: int
    departure: Departure | None
    exact: bool
    beyond: Departure | None
    largest: tuple[float, int]
    causes: list[Difference]

    @property
    def holds(self) -> bool:
        return self.departure is None or (not self.exact and self.beyond is None)

    def in_words(self) -> str:
        size, step = self.largest
        if self.departure is None:
            return f"bit-identical: all numbers of {self.lines} lines up to step {self.last} are equal"
        if self.holds:
            return (
                f"equal within the tolerance: up to step {self.last} the losses differ by up to {size:.1g} of their "
                f"value (step {step}), and on another processor, or with another program, up to "
                f"{differences.expected(step):.1g} is expected there; first difference: "
                f"{self.departure.in_words()}{self._because()}"
            )
        where = self.departure if self.exact else self.beyond
        allowed = "the same code on the same CPU repeats every bit"
        if not self.exact:
            allowed = f"up to {differences.expected(where.step):.1g} of the loss is expected there"
        return f"it departs at {where.in_words()} ({allowed}; the losses differ by up to {size:.1g}){self._because()}"

    def _because(self) -> str:
        if not self.causes:
            return "; the records do not differ: config, data, code, packages and devices are the same"
        told = [f"{one.name} {one.ours!r} at first, {one.theirs!r} now" for one in self.causes[:MOST_CAUSES]]
        return f"; what differs: {'; '.join(one[:200] for one in told)}"


def rerun(run: Path, workdir: Path, *, steps: int = 0, show: Callable[[dict[str, str]], None]) -> Reproduction:
    """Trains `run` again in `workdir`, as far as it went or up to `steps`, and compares.

    It uses the run's compiler flags and, on a CPU, its number of devices. A command that was stopped continues.

    Raises UserError if `run` is not a run or the directory is not free, RunError if the training fails.
    """
    cell, last = _cell(run, workdir), _last(run)
    wanted = min(steps or last, last)
    _claim(run, workdir)
    if cell.step() < wanted and not cell.outcome():
        with _environment(run):
            local.run(
                [(cell,)], workers=1, show=show, halt=lambda cell: wanted < cell.num_steps and cell.step() >= wanted
            )
    reached = max(_steps(workdir), default=0)
    if reached < wanted and cell.outcome():
        raise RunError(
            f"it departs: the run diverged after step {reached}, and {run} went on to step {last}; {cell.outcome()}"
        )
    if reached < wanted:
        raise RunError(f"the run did not finish: it stopped at step {reached}; {workdir / 'log.txt'} says why")
    return compare(run, workdir, last=wanted)


def _cell(run: Path, workdir: Path) -> Cell:
    path = run / "config.json"
    if not path.is_file():
        raise UserError(f"--reproduce={run} is not a work directory: it has no config.json")
    config = config_lib.from_json(path.read_text(encoding="utf-8", errors="replace"), path)
    config_lib.validate(config)
    return Cell(run.resolve().name, config.seed, config, config, "", workdir, config.train.num_steps, "again")


def _last(run: Path) -> int:
    if not (steps := _steps(run)):
        raise UserError(f"--reproduce={run}: its metrics.jsonl has no step to compare with")
    return max(steps)


def _steps(workdir: Path) -> list[int]:
    path = workdir / "metrics.jsonl"
    return [line["step"] for line in metrics.read(path)] if path.exists() else []


def _claim(run: Path, workdir: Path) -> None:
    """Makes the directory, or checks that it belongs to this reproduction. Raises UserError."""
    path, about = workdir / "reproduction.json", {"of": mirror.shown(run.resolve()), "code": code_hash()}
    if path.exists():
        with contextlib.suppress(UserError):
            if json_text.read_json(path) == about:
                return
    if workdir.exists() and (not workdir.is_dir() or any(p.name not in mirror.OWN for p in workdir.iterdir())):
        raise UserError(f"{workdir} exists already; give the reproduction a new directory: --workdir=DIR")
    workdir.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(about, indent=1) + "\n")
    mirror.push(workdir, [path.name])


@contextlib.contextmanager
def _environment(run: Path) -> Iterator[None]:
    """Sets the compiler flags and the number of CPU devices that the run had."""
    manifest = differences.manifest(run)
    stored, devices = manifest.get("environment"), manifest.get("devices")
    stored, devices = (part if isinstance(part, dict) else {} for part in (stored, devices))
    before = dict(os.environ)
    for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"):
        os.environ.pop(name, None)
        if isinstance(stored.get(name), str):
            os.environ[name] = stored[name]
    count = devices.get("count")
    forced = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if devices.get("platform") == "cpu" and isinstance(count, int) and 0 < count <= 4096 and not forced:
        os.environ["JAX_NUM_CPU_DEVICES"] = str(count)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def compare(run: Path, again: Path, *, last: int) -> Reproduction:
    """Compares the records of two runs up to a step."""
    one, other = _lines(run, last), _lines(again, last)
    shared = sorted(one.keys() & other.keys())
    if not shared:
        raise RunError(f"{run} and {again} have no step in common up to step {last}")
    departures = list(_departures(one, other))
    losses = [d for d in departures if d.name == "loss"]
    sizes = [(differences.relative(d.first, d.again), d.step) for d in losses]
    causes = differences.compare(run, again)[0]
    rounding = [cause for cause in causes if cause.name.partition(":")[0] in ROUNDING]
    devices = differences.manifest(again).get("devices")
    on_cpu = isinstance(devices, dict) and devices.get("platform") == "cpu"
    return Reproduction(
        lines=len(shared),
        last=last,
        departure=min(departures, key=lambda d: d.step, default=None),
        exact=on_cpu and not rounding,
        beyond=next(
            (d for d, (size, step) in zip(losses, sizes, strict=True) if size > differences.expected(step)), None
        ),
        largest=max(sizes, default=(0.0, 0)),
        causes=causes,
    )


def _departures(one: dict[tuple[int, str], dict], other: dict[tuple[int, str], dict]) -> Iterator[Departure]:
    """Differences in the lines that both have, by step; the loss of a line first."""
    for step, split in sorted(one.keys() & other.keys()):
        first, again = one[step, split], other[step, split]
        for name in sorted(first.keys() | again.keys(), key=lambda name: (name != "loss", name)):
            if name not in TIMES and not name.startswith("seconds/") and first.get(name) != again.get(name):
                yield Departure(step, split, name, first.get(name), again.get(name))


def _lines(workdir: Path, last: int) -> dict[tuple[int, str], dict[str, Any]]:
    lines = metrics.read(workdir / "metrics.jsonl")
    return {(line["step"], str(line.get("split"))): line for line in lines if line["step"] <= last}


def beside(run: Path) -> Path:
    """A directory beside a run for its reproduction: a new one, or one that was begun."""
    run = run.resolve()
    names = itertools.chain([""], (f"-{i}" for i in itertools.count(2)))
    places = (run.with_name(f"{run.name}-reproduced{name}") for name in names)
    return next(place for place in places if not place.exists() or not _taken(run, place))


def _taken(run: Path, place: Path) -> bool:
    """Whether a place holds anything other than a begun reproduction of this run with this code."""
    try:
        return json_text.read_json(place / "reproduction.json") != {"of": str(run), "code": code_hash()}
    except UserError:
        return True
