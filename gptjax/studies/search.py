"""Hyper-parameter search: the values of options with the lowest validation loss, in given ranges.

Optuna proposes values, records trials and prunes; a trial is one cell per seed, run like the cells of a study. The
record is WORKDIR/search.log. After a kill, finished trials are not run again; a trial that was running continues from
its saved cells, and is then not pruned.
"""

import dataclasses
import itertools
import json
import math
import shlex
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptjax import config as config_lib
from gptjax.artifacts.lock import Lock
from gptjax.config import Config, Option, values
from gptjax.config.validation import option_problem
from gptjax.errors import RunError, UserError
from gptjax.files import regular, write_whole
from gptjax.studies import local
from gptjax.studies.cell import Cell
from gptjax.studies.cells import Plan
from gptjax.studies.study import Study, ends

SETTINGS = {
    "method": Option(
        "tpe",
        "tpe = near good earlier trials; random; grid = all combinations",
        choices=("grid", "random", "tpe"),
    ),
    "trials": Option(20, "trials of random and tpe", minimum=1, maximum=100_000),
    "points": Option(5, "grid values per range", minimum=2, maximum=1000),
    "seeds": Option(1, "seeds per trial; their mean loss counts", minimum=1, maximum=1000),
    "prune": Option(
        "median",
        "median = a trial stops if it is worse than the median of earlier trials at the same step; a grid is "
        "never pruned",
        choices=("median", "none"),
    ),
}
LOG_SCALE = 10  # ranges whose ends have at least this ratio are searched on a log scale
NEAR_END = 0.1  # share of a range that counts as near its end
MOST_CHECKED = 64  # whole numbers of a range that are all checked beforehand


@dataclasses.dataclass(frozen=True)
class Axis:
    """An option to search: its values, or the two ends of its range."""

    path: str
    values: tuple[Any, ...]
    between: bool

    @property
    def whole(self) -> bool:
        return all(isinstance(value, int) for value in self.values)

    @property
    def log(self) -> bool:
        return self.between and self.values[0] > 0 and self.values[1] / self.values[0] >= LOG_SCALE

    def grid(self, points: int) -> list[Any]:
        """The values, or `points` of the range, even on its scale, with both ends; to three digits."""
        if not self.between:
            return list(self.values)
        low, high = self.values
        inside = (np.geomspace if self.log else np.linspace)(low, high, points)[1:-1]
        if self.whole:
            return sorted({low, *(round(value) for value in inside.tolist()), high})
        return [low, *(float(f"{value:.3g}") for value in inside), high]

    def place(self, value: float) -> float:
        """The position of a value in its range: 0 at the lower end, 1 at the upper end."""
        low, high, value = (math.log(v) if self.log else v for v in (*self.values, value))
        return (value - low) / (high - low)

    def written(self) -> str:
        return (".." if self.between else ",").join(map(str, self.values))


@dataclasses.dataclass(frozen=True)
class Request:
    """What is searched, and how; the fields are those of SETTINGS."""

    axes: tuple[Axis, ...]
    method: str = "tpe"
    trials: int = 20
    points: int = 5
    seeds: int = 1
    prune: str = "median"


def read(chosen: Sequence[str]) -> Request:
    """Reads NAME=VALUE and section.option=RANGE from the command line. Raises UserError with the flag's name."""
    options, axes, given = config_lib.flat_options(), {}, {}
    for text in chosen:
        name, equals, value = text.partition("=")
        flag = f"--search.{name[:100]}"
        if name not in SETTINGS and name not in options:
            raise UserError(f"unknown option {flag}{config_lib.suggestion(name, [*SETTINGS, *options])}")
        if not equals:
            raise UserError(f"{flag} has no value; write {flag}=VALUE")
        if name in SETTINGS:
            if problem := option_problem(flag, SETTINGS[name], value):
                raise UserError(problem)
            given[name] = values.read(SETTINGS[name], value)
        else:
            axes[name] = _axis(flag, name, value)
    if not axes:
        raise UserError("nothing is searched; e.g. --search.optimizer.learning_rate=1e-4..1e-2")
    request = Request(tuple(axes.values()), **given)
    if request.method == "grid" and "trials" in given:
        raise UserError("--search.trials is for random and tpe; a grid tries all its points: set --search.points")
    if request.method == "grid" and "prune" in given and request.prune != "none":
        raise UserError("--search.prune is for random and tpe; a grid shows the loss of all its points")
    if request.method != "grid" and "points" in given:
        raise UserError("--search.points is for --search.method=grid; random and tpe try --search.trials")
    if request.method == "grid" and (count := math.prod(len(axis.grid(request.points)) for axis in request.axes)) > 1e5:
        raise UserError(f"the grid has {count} points; lower --search.points")
    return request


def _axis(flag: str, path: str, text: str) -> Axis:
    """A range LOW..HIGH, or values VALUE,VALUE,..."""
    option = config_lib.flat_options()[path]
    number = isinstance(option.default, int | float) and not isinstance(option.default, bool)
    if not (number or option.duration) or option.affects in ("place", "record", "computation", "score"):
        raise UserError(
            f"{flag}: {path} is not a number that changes the training; compare such options as arms of a study"
        )
    if "seed" in path:
        raise UserError(f"{flag}: a seed is not a hyper-parameter; --search.seeds=3 averages over seeds")
    between = ".." in text
    parts = text.split("..") if between else text.split(",")
    if len(parts) < 2 or (between and len(parts) > 2):
        raise UserError(f"{flag} is {values.shown(text)}; write a range, LOW..HIGH, or values, VALUE,VALUE,...")
    found = []
    for part in parts:
        if problem := option_problem(flag, option, part):
            raise UserError(problem)
        value = values.read(option, part)
        if not isinstance(value, int | float):
            raise UserError(f"{flag} is {values.shown(text)}; a search needs numbers; durations in steps")
        found.append(value)
    if between and found[0] > found[1]:
        raise UserError(f"{flag} is {values.shown(text)}: its ends are reversed; write {parts[1]}..{parts[0]}")
    if len(set(found)) < len(found):
        raise UserError(f"{flag} is {values.shown(text)}; its values must be different")
    return Axis(path, tuple(found), between)


def optuna() -> Any:
    """The library. Raises UserError if it is not installed."""
    try:
        import optuna
    except ImportError:
        raise UserError("--search needs Optuna: pip install 'gptjax[search]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna


class Search:
    """A search in a work directory."""

    def __init__(self, config: Config, request: Request, workdir: Path):
        """Raises UserError for values that the config cannot have. Builds a missing token store."""
        self._optuna, self.request, self.workdir = optuna(), request, workdir
        study = Study(question="search", base=config, arms={"trial": {}}, name="search", first_seed=config.seed)
        self.plan = Plan(dataclasses.replace(study, seeds=request.seeds), workdir)
        for axis in request.axes:
            every = axis.between and axis.whole and axis.values[1] - axis.values[0] <= MOST_CHECKED
            for value in range(axis.values[0], axis.values[1] + 1) if every else axis.values:
                self.plan.study.config_of("trial", config.seed, {axis.path: value})
        self._path = workdir / "search.log"
        self._pending: dict[int, tuple[list[Cell], Any]] = {}  # trial number -> its cells, its Optuna trial
        self._told: dict[int, int] = {}  # trial number -> last step whose loss was reported to Optuna
        self._stopped: set[int] = set()

    def run(self, *, workers: int, show: Callable[[dict[str, str]], None]) -> None:
        """Runs the missing trials. Raises RunError if some have no result then."""
        lock = Lock.take(self.workdir)
        try:
            self.plan.claim()
            self._claim()
            self._study = self._open()
            local.run(self._jobs(), workers=workers, show=show, halt=self._halt, ended=self._ended)
        finally:
            lock.release()
        if self._pending:
            raise RunError(f"{len(self._pending)} trials have no result; the same command continues them")

    def _claim(self) -> None:
        """Records what is searched, or checks that it is the same. Only the number of trials may change."""
        path, request = self.workdir / "search.json", self.request
        about = {"method": request.method, "seeds": request.seeds, "config": config_lib.to_json(self.plan.study.base)}
        about |= {"axes": {axis.path: axis.written() for axis in request.axes}}
        about |= {"points": request.points} if request.method == "grid" else {}
        if path.exists():
            try:
                before = json.loads(path.read_text(encoding="utf-8"))
                changed = [name for name in about if before[name] != about[name]]
            except (ValueError, KeyError, TypeError):
                changed = ["method"]
            if changed:
                raise UserError(
                    f"{self.workdir} holds another search: its {changed[0]} differs. Use a new --workdir, or the same "
                    "flags; only --search.trials may grow"
                )
        write_whole(path, json.dumps(about, indent=1) + "\n")

    def _open(self) -> Any:
        """Optuna's study from search.log. Raises UserError if it is damaged."""
        journal = self._optuna.storages.journal
        if self._path.exists():
            data = regular(self._path).read_bytes()
            if not data.endswith(b"\n"):  # a line cut short by a kill
                write_whole(self._path, data[: data.rfind(b"\n") + 1].decode(errors="replace"))
        lock = journal.JournalFileOpenLock(str(self._path))
        Path(f"{self._path}.lock").unlink(missing_ok=True)  # of a killed process; the work directory has its own lock
        try:
            storage = self._optuna.storages.JournalStorage(journal.JournalFileBackend(str(self._path), lock))
            pruner = self._optuna.pruners.MedianPruner() if self._prunes else self._optuna.pruners.NopPruner()
            study = self._optuna.create_study(
                storage=storage, study_name="search", load_if_exists=True, pruner=pruner, direction="minimize"
            )
            study.get_trials()
        except (ValueError, LookupError, TypeError, AttributeError, AssertionError):
            raise UserError(f"{self._path} is damaged; remove it: cells that are done do not run again") from None
        return study

    @property
    def _prunes(self) -> bool:
        return self.request.prune == "median" and self.request.method != "grid"

    def _jobs(self) -> Iterator[tuple[Cell]]:
        """The cells of running trials, then of new ones; each new trial is proposed when there is room for it."""
        states = self._optuna.trial.TrialState
        space = {axis.path: self._distribution(axis) for axis in self.request.axes}
        for trial in self._study.get_trials(states=(states.RUNNING,)):
            if trial.params.keys() == space.keys():
                yield from self._cells(trial.number, trial.params, None)
            else:  # killed between the proposal and its record
                self._study.tell(trial.number, state=states.FAIL)
        if self.request.method == "grid":
            tried = [trial.params for trial in self._trials()]
            for point in self._grid():
                if point not in tried:
                    frozen = self._optuna.trial.create_trial(state=states.RUNNING, params=point, distributions=space)
                    self._study.add_trial(frozen)
                    yield from self._cells(len(self._study.trials) - 1, point, None)
            return
        while (index := len(self._trials())) < self.request.trials:
            # A new sampler for each trial, so that a killed and restarted search proposes the same values.
            self._study.sampler = self._sampler(self.plan.study.base.seed + index)
            trial = self._study.ask(space)
            yield from self._cells(trial.number, trial.params, trial)

    def _sampler(self, seed: int) -> Any:
        samplers = self._optuna.samplers
        return samplers.RandomSampler(seed) if self.request.method == "random" else samplers.TPESampler(seed=seed)

    def _distribution(self, axis: Axis) -> Any:
        kinds = self._optuna.distributions
        if self.request.method == "grid" or not axis.between:
            return kinds.CategoricalDistribution(axis.grid(self.request.points))
        kind = kinds.IntDistribution if axis.whole else kinds.FloatDistribution
        return kind(*axis.values, log=axis.log)

    def _grid(self) -> list[dict[str, Any]]:
        axes = self.request.axes
        return [
            dict(zip((axis.path for axis in axes), point, strict=True))
            for point in itertools.product(*(axis.grid(self.request.points) for axis in axes))
        ]

    def _trials(self) -> list[Any]:
        """All trials that have a state."""
        return [trial for trial in self._study.get_trials() if trial.state.name in ("COMPLETE", "PRUNED", "RUNNING")]

    def cells(self, params: Mapping[str, Any]) -> list[Cell]:
        arm = self.plan.arm_at("trial", dict(params))
        point = ", ".join(f"{path} {_short(value)}" for path, value in params.items())
        return [self.plan.cell(arm, seed, point) for seed in self.plan.study.seed_values()]

    def _cells(self, number: int, params: Mapping[str, Any], trial: Any) -> Iterator[tuple[Cell]]:
        """The cells of a trial that have to run; waits for a cell that another trial is running."""
        try:
            cells = self.cells(params)
        except UserError:
            self._study.tell(number, state=self._optuna.trial.TrialState.FAIL)
            raise
        taken = {cell.key for others, _ in self._pending.values() for cell in others}
        self._pending[number] = cells, trial
        for cell in cells:
            if not cell.outcome() and cell.key not in taken and number not in self._stopped:
                yield (cell,)
        self._settle()

    def _halt(self, cell: Cell) -> bool:
        """Whether to stop a cell because its trial is worse than earlier ones, judged by the first of its seeds."""
        for number, (cells, trial) in self._pending.items():
            if cell.key not in {one.key for one in cells}:
                continue
            if self._prunes and trial is not None and cell.key == cells[0].key and number not in self._stopped:
                for line in cell.lines("validation"):
                    new = self._told.get(number, 0) < line["step"] < cell.num_steps
                    if new and line.get("loss") is not None:
                        self._told[number] = line["step"]
                        trial.report(line["loss"], line["step"])
                        if trial.should_prune():
                            self._stopped |= {
                                n for n, (same, _) in self._pending.items() if cell.key in {one.key for one in same}
                            }
            return number in self._stopped
        return False

    def _ended(self, cell: Cell) -> None:
        self._settle()

    def _settle(self) -> None:
        """Reports to Optuna the trials whose cells have all ended, and those that were pruned."""
        for number, (cells, _) in list(self._pending.items()):
            if all(cell.outcome() for cell in cells):
                uniform = self.plan.uniform("trial")
                self._study.tell(number, float(np.mean([cell.score("loss", uniform) for cell in cells])))
            elif number in self._stopped:
                self._study.tell(number, state=self._optuna.trial.TrialState.PRUNED)
            else:
                continue
            del self._pending[number]

    def text(self, command: Sequence[str] = ()) -> str:
        """A table of trials, the best first; the best values, whether they are at an edge, and the command to train.

        `command`: the command that trains the config; the best values are appended.
        """
        done = [trial for trial in self._trials() if trial.state.name != "RUNNING"]
        order = sorted(done, key=lambda trial: (trial.state.name == "PRUNED", trial.value, trial.number))
        paths = [axis.path for axis in self.request.axes]
        rows = [["trial", *paths, "loss", ""]]
        for trial in order:
            outcomes = [cell.outcome() for cell in self.cells(trial.params)]
            diverged = any(outcome not in ("", "done") for outcome in outcomes)
            note = f"pruned at step {trial.last_step}" if trial.state.name == "PRUNED" else "diverged" * diverged
            loss = "" if trial.value is None else f"{trial.value:.4f}"
            rows.append([str(trial.number), *(_short(trial.params[path]) for path in paths), loss, note])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        if not order or order[0].state.name == "PRUNED":
            return "\n".join([*lines, "", "no trial is finished"])
        if rows[1][-1] == "diverged":
            return "\n".join([*lines, "", "every trial diverged: search lower learning rates"])
        best = order[0].params
        told = ", ".join(f"{path} {_short(best[path])}" for path in paths)
        lines += ["", f"best: {told}, with a validation loss of {order[0].value:.4f}"]
        lines += [sentence for axis in self.request.axes if (sentence := self._edge(axis, best, done))]
        if command:
            options = [f"--config.{path}={best[path]!r}" for path in paths]
            words = [*command, *options, f"--workdir={self.workdir / 'best'}"]
            lines += ["train with it:", f"  {shlex.join(words)}"]
        return "\n".join(lines)

    def _edge(self, axis: Axis, best: Mapping[str, Any], trials: Sequence[Any]) -> str:
        """A sentence if the best value is the smallest or largest that was tried, so a better one may be beyond it."""
        value = best[axis.path]
        end = ends(axis.path, sorted({trial.params[axis.path] for trial in trials})).get(value)
        if not end:
            return ""
        inside = axis.between and NEAR_END < axis.place(value) < 1 - NEAR_END
        advice = "raise --search.trials" if inside else "widen the range" if axis.between else "give values beyond it"
        return f"the best {axis.path} is the {end} that was tried: {advice}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
