"""The plan of a study: its arms, resolved, with their sizes, and its cells, one run for each arm and seed.

A cell is identified by the hash of everything that decides its numbers: the resolved config, the code and the data.
A cell that exists is never run again; a change in any of the three makes it another cell.
"""

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import gptjax
from gptjax import config as config_lib
from gptjax.artifacts import mirror
from gptjax.artifacts.manifest import git_state
from gptjax.config import Config
from gptjax.data.opening import RunData
from gptjax.errors import RunError, UserError
from gptjax.files import write_whole
from gptjax.model import gpt
from gptjax.model.architecture import Architecture
from gptjax.studies import noise
from gptjax.studies.cell import Cell
from gptjax.studies.code import code_hash
from gptjax.studies.study import QUANTITIES, Claim, Study, ends
from gptjax.training.run import settle

TOLERANCE = 0.01  # relative difference that matched arms may have


@dataclasses.dataclass(frozen=True)
class Arm:
    """An arm with resolved options at one point of its grids: its config and its size.

    Attributes:
      point: the overrides of the base. tuned: those that come from grids, as text.
    """

    name: str
    point: dict[str, Any]
    tuned: str
    config: Config
    parameters: int
    flops_per_token: float
    tokens: int
    vocab_size: int

    @property
    def training_flops(self) -> float:
        return self.flops_per_token * self.tokens


@dataclasses.dataclass(frozen=True)
class Tried:
    """A point of the grids of an arm, with its scores by tuning seed; the point with the best mean is `chosen`."""

    point: dict[str, Any]
    scores: list[float]
    diverged: int
    chosen: bool


class Plan:
    """A resolved study: its arms with their sizes, and its cells with their work directories.

    An arm with grids is tuned first, by the cells `tuning`. Its other cells are known only after that.
    """

    def __init__(self, study: Study, workdir: Path):
        """Raises UserError for mistakes in the study. Builds missing token stores."""
        study.check()
        self.study, self.workdir = study.on_ladder(), Path(workdir)
        self.rungs, self.families = tuple(study.ladder), tuple(study.arms)
        self.changes: list[dict[str, Any]] = []  # old claims, margin and metric, if changed after cells ran
        self.code = code_hash()
        self._data: dict[str, RunData] = {}
        self._sizes: dict[str, tuple[int, float]] = {}
        self.points = {name: [self.arm_at(name, one) for one in self.study.points(name)] for name in self.study.arms}
        self._check_different()
        flops = [self.points[self.at(self.families[0], rung)][0].training_flops for rung in self.rungs]
        if any(later <= before for before, later in itertools.pairwise(flops)):
            told = ", ".join(f"{rung} {value:.3g}" for rung, value in zip(self.rungs, flops, strict=True))
            raise UserError(f"study.ladder: each rung must cost more than the one before; their FLOPs are {told}")

    def at(self, family: str, rung: str) -> str:
        """The name of the arm of a family at a rung of the ladder."""
        return f"{family}.{rung}"

    def opponent(self, arm: str) -> str:
        """The arm that this one is compared with: the baseline, on a ladder at the same rung."""
        return self.at(self.families[0], arm.rpartition(".")[2]) if self.rungs else self.study.baseline

    def _open(self, config: Config) -> RunData:
        parts = {
            path: value for path, value in config_lib.flat_values(config) if path.startswith(("data.", "tokenizer"))
        }
        key = json.dumps(parts, sort_keys=True, default=str)
        if key not in self._data:
            self._data[key] = RunData.open(config)
        return self._data[key]

    def arm_at(self, name: str, point: dict[str, Any]) -> Arm:
        """An arm with these overrides. Raises UserError for mistakes in them."""
        config = self.study.config_of(name, self.study.first_seed, point)
        data = self._open(config)
        resolved, *_ = settle(config, None, data)
        model = json.dumps(resolved.model.to_dict(), sort_keys=True)
        if model not in self._sizes:
            architecture = Architecture.from_config(resolved.model, resolved.model.vocab_size)
            count = gpt.parameter_count(gpt.abstract_params(architecture))
            self._sizes[model] = count, architecture.flops_per_token()
        parameters, flops = self._sizes[model]
        grids = self.study.grids(name)
        return Arm(
            name=name,
            point=point,
            tuned=", ".join(f"{path} {point[path]}" for path in grids),
            config=resolved,
            parameters=parameters,
            flops_per_token=flops,
            tokens=resolved.train.num_steps * resolved.train.batch_size * resolved.model.context_length,
            vocab_size=data.tokenizer.vocab_size,
        )

    def _check_different(self) -> None:
        """Raises UserError for arms, or points of a grid, that are equal after resolving their options."""
        seen: dict[tuple[str, ...], str] = {}
        for name, points in self.points.items():
            texts = [_trained(arm.config) for arm in points]
            if len(set(texts)) < len(texts):
                raise UserError(f"arm {name!r}: two points of its grids are the same once their options are resolved")
            key = tuple(sorted(texts))
            if key in seen:
                raise UserError(f"the arms {seen[key]!r} and {name!r} are the same once their options are resolved")
            seen[key] = name

    @property
    def arms(self) -> dict[str, Arm]:
        """Each arm at its chosen point, or at its first point before it is tuned."""
        return {name: self.chosen(name) or points[0] for name, points in self.points.items()}

    @cached_property
    def tuning(self) -> list[Cell]:
        """The cells that choose the points of arms with grids."""
        seeds = self.study.tuning_seed_values()
        tuned = [points for points in self.points.values() if len(points) > 1]
        return [self.cell(arm, seed, arm.tuned) for seed in seeds for points in tuned for arm in points]

    @property
    def cells(self) -> list[Cell]:
        """All cells: the first seed of all arms first. An arm that is not tuned yet has none."""
        arms = [arm for name in self.points if (arm := self.chosen(name))]
        return [self.cell(arm, seed) for seed in self.study.seed_values() for arm in arms]

    @property
    def count(self) -> int:
        """Number of all cells, those of tuning included; a cell of both counts once."""
        both = {cell.key for cell in self.tuning} & {cell.key for cell in self.cells}
        return len(self.tuning) + len(self.points) * self.study.seeds - len(both)

    def cell(self, arm: Arm, seed: int, point: str = "") -> Cell:
        """The cell of an arm and a seed. `point`: its name in messages."""
        key = arm.name, seed, repr(arm.point)
        if key not in self._cells:
            self._cells[key] = self._cell(arm, seed)
        return dataclasses.replace(self._cells[key], point=point)

    @cached_property
    def _cells(self) -> dict[tuple[str, int, str], Cell]:
        return {}

    def _cell(self, arm: Arm, seed: int) -> Cell:
        config = self.study.config_of(arm.name, seed, arm.point)
        resolved = arm.config.copy_and_resolve_references().unlock()
        self.study.set_seed(resolved, seed)
        fingerprint = self._open(config).identity["source_fingerprint"]
        text = "\n".join([config_lib.to_json(resolved), self.code, json.dumps(fingerprint)])
        key = hashlib.sha256(text.encode()).hexdigest()
        place = mirror.within(self.workdir, f"cells/{arm.name}-seed{seed}-{key[:8]}")
        return Cell(arm.name, seed, config, resolved.lock(), key, place, resolved.train.num_steps)

    def chosen(self, name: str) -> Arm | None:
        """The arm at its best point: the lowest mean score over the tuning seeds; None where cells are missing.

        Of equal points it is the first. Once made, the choice never changes.
        """
        points = self.points[name]
        if len(points) == 1:
            return points[0]
        if name not in self._choices:
            tried = [self._tried(arm) for arm in points]
            if any(len(scores) < len(self.study.tuning_seed_values()) for scores in tried):
                return None
            self._choices[name] = min(range(len(points)), key=lambda i: sum(tried[i]))
        return points[self._choices[name]]

    @cached_property
    def _choices(self) -> dict[str, int]:
        return {}

    def _tried(self, arm: Arm) -> list[float]:
        cells = [self.cell(arm, seed) for seed in self.study.tuning_seed_values()]
        return [cell.score(self.study.metric, self._uniform(arm, self.tuning)) for cell in cells if cell.outcome()]

    def sensitivity(self, name: str) -> list[Tried]:
        """The points of the grids of an arm with their scores; empty if it has no grid."""
        points, chosen = self.points[name], self.chosen(name)
        if len(points) == 1:
            return []
        seeds = self.study.tuning_seed_values()
        bad = [sum(self.cell(arm, s).outcome() not in ("", "done") for s in seeds) for arm in points]
        grids = self.study.grids(name)
        return [
            Tried({path: arm.point[path] for path in grids}, self._tried(arm), count, arm is chosen)
            for arm, count in zip(points, bad, strict=True)
        ]

    def censored(self, name: str) -> list[str]:
        """One sentence for each option whose chosen value is at the end of its grid: the optimum may lie beyond."""
        chosen = self.chosen(name)
        if chosen is None:
            return []
        grids = self.study.grids(name)
        found = {path: ends(path, grid).get(chosen.point[path]) for path, grid in grids.items()}
        return [
            f"the best {path} of {name} is {chosen.point[path]}, the {end} that was tried"
            for path, end in found.items()
            if end
        ]

    def no_verdict(self, claim: Claim) -> str:
        """Why a claim cannot have a verdict, whatever its scores; "" if it can."""
        edges = [name for name in dict.fromkeys((claim.ours, claim.theirs)) if self.censored(name)]
        return " and ".join(f"the optimum of {name} is at the edge of its grid" for name in edges)

    def mismatches(self) -> list[str]:
        """Sentences on what arms differ in by more than TOLERANCE without a reason in `unmatched`."""
        found: dict[tuple[str, str], str] = {}
        for arm in (arm for points in self.points.values() for arm in points):
            base = self.arms[self.opponent(arm.name)]
            for quantity in QUANTITIES:
                ours, theirs = getattr(arm, quantity), getattr(base, quantity)
                if abs(ours - theirs) > TOLERANCE * theirs and quantity not in self.study.unmatched:
                    at = f" at {arm.tuned}" if arm.tuned else ""
                    found.setdefault(
                        (arm.name, quantity),
                        f"{arm.name}{at} has {ours:,.0f} {quantity.replace('_', ' ')}, {base.name} {theirs:,.0f} "
                        f"({ours / theirs - 1:+.1%})",
                    )
        return list(found.values())

    def check_matched(self) -> None:
        """Raises UserError if arms do not match."""
        if found := self.mismatches():
            raise UserError(
                f"the arms do not match: {'; '.join(found)}. Make them equal, or say in study.unmatched why they may "
                "differ: {'" + QUANTITIES[0] + "': 'reason'}"
            )
        budgets = {name: self.study.tuning_budget(name) for name in self.points}
        if len(set(budgets.values())) > 1 and "tuning" not in self.study.unmatched:
            told = ", ".join(f"{name} {budget}" for name, budget in budgets.items())
            raise UserError(
                f"the arms are not tuned alike (tuning cells: {told}). Give them grids with the same number of "
                "points, or say in study.unmatched why they may differ: {'tuning': 'reason'}"
            )

    def differences(self) -> dict[str, dict[str, list[Any]]]:
        """{arm: {"section.option": [of its opponent, of the arm]}}, resolved; the baseline's against its first rung."""
        values = {name: dict(config_lib.flat_values(arm.config)) for name, arm in self.arms.items()}
        found = {}
        for name, own in values.items():
            opponent = self.opponent(name)
            base = values[self.study.baseline if name == opponent else opponent]
            found[name] = {path: [base[path], value] for path, value in own.items() if value != base[path]}
        return found

    def missing(self) -> list[Cell]:
        """The known cells that have not finished, those of tuning first."""
        cells = {cell.key: cell for cell in (*self.cells, *self.tuning)}  # tuning last: its names have the point
        first = {cell.key for cell in self.tuning}
        return sorted((cell for cell in cells.values() if not cell.outcome()), key=lambda cell: cell.key not in first)

    def noise_cells(self) -> list[Cell]:
        """The cells of the A/A study of the baseline; none before its grid is tuned."""
        arm = self.chosen(self.study.baseline)
        return [self.cell(arm, seed, "noise") for seed in self.study.noise_seed_values()] if arm else []

    def noise_missing(self) -> list[Cell]:
        """Unfinished cells that `measure_noise` needs: the tuning of the baseline, then the A/A study."""
        tuning = [cell for cell in self.tuning if cell.arm == self.study.baseline]
        return [cell for cell in tuning + self.noise_cells() if not cell.outcome()]

    def measure_noise(self) -> noise.Noise:
        """Records the deviation between seeds from the A/A study. Raises RunError if a cell is missing."""
        cells = self.noise_cells()
        if not cells or any(cell.outcome() != "done" for cell in cells):
            bad = [cell.name for cell in cells if cell.outcome() != "done"]
            raise RunError(f"the noise is not known: {', '.join(bad) or 'the baseline'} has not finished")
        scores = [cell.score(self.study.metric, math.nan) for cell in cells]
        sigma, low, high = noise.deviation(scores)
        found = noise.Noise(
            **self._noise_wanted(cells),
            sigma=sigma,
            low=low,
            high=high,
            n=len(cells),
            seeds=tuple(c.seed for c in cells),
        )
        noise.write(self.workdir, found)
        return found

    def noise(self) -> noise.Noise | None:
        """The noise that `--noise` measured for this baseline with this code; else None."""
        cells = self.noise_cells()
        return noise.read(self.workdir, self._noise_wanted(cells)) if cells else None

    def _noise_wanted(self, cells: list[Cell]) -> dict[str, Any]:
        scale = {"arm": self.study.baseline, "metric": self.study.metric, "scale": self.scale()}
        return scale | {"key": cells[0].key, "code": self.code}

    def scale(self) -> str:
        """The size for which verdicts hold; on a ladder, that of its first rung."""
        first = self.arms[self.study.baseline]
        return f"{first.parameters:,} parameters, {first.tokens:,} tokens"

    def uniform(self, arm: str) -> float:
        """The score of a model that gives every token the same probability, in the unit of the metric."""
        return self._uniform(self.arms[arm], [*self.tuning, *self.cells])

    def _uniform(self, arm: Arm, cells: Iterable[Cell]) -> float:
        nats, metric = math.log(arm.vocab_size), self.study.metric
        if metric == "perplexity":
            return math.exp(nats)
        if metric == "loss":
            return nats
        # The ratio is taken from a cell of this arm, or else from an arm with the same tokenizer.
        alike = (cell for cell in cells if cell.resolved.tokenizer == arm.config.tokenizer)
        near = sorted(alike, key=lambda cell: cell.arm != arm.name)
        last = (cell.last_line("validation") for cell in near)
        ratios = (line[metric] / line["loss"] for line in last if line.get(metric) and line.get("loss"))
        return nats * next(ratios, math.inf)

    def scores(self, arm: str) -> list[float]:
        """Scores of the finished cells of an arm, by seed; without those that lack this metric."""
        ended = [cell for cell in self.cells if cell.arm == arm and cell.outcome()]
        found = [cell.score(self.study.metric, self.uniform(arm)) for cell in sorted(ended, key=lambda cell: cell.seed)]
        return [score for score in found if math.isfinite(score)]

    def claim(self) -> None:
        """Makes the work directory, or checks that it belongs to this study and this code. Raises UserError."""
        path = self.workdir / "study.json"
        said = {"claims": list(self.study.claims), "margin": self.study.margin, "metric": self.study.metric}
        if path.exists():
            try:
                recorded = json.loads(path.read_text(encoding="utf-8"))
                name, code = recorded["name"], recorded["code"]
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{path} is damaged; remove it and run the command again: it keeps the cells") from None
            if name != self.study.name:
                raise UserError(
                    f"{self.workdir} holds the study {name!r}, not {self.study.name!r}; use a new --workdir"
                )
            if code["sha256"] != self.code:
                raise UserError(
                    f"{self.workdir} was made by other code{_commit(code)}; cells of two codes are not compared. Use "
                    "that code or a new --workdir"
                )
            self.changes = recorded.get("changes", [])
            before = {name: recorded.get(name) for name in said}
            if before != said and any(cell.outcome() for cell in (*self.tuning, *self.cells)):
                self.changes = [*self.changes, before]
        self.workdir.mkdir(parents=True, exist_ok=True)
        about = {"name": self.study.name, "question": self.study.question, "source": self.study.source}
        about |= {"tuning_cells": {name: self.study.tuning_budget(name) for name in self.points}}
        about |= said | ({"changes": self.changes} if self.changes else {})
        about |= {"code": {"sha256": self.code, "version": gptjax.__version__, "git": git_state()}}
        write_whole(path, json.dumps(about, indent=1, ensure_ascii=False) + "\n")


def _trained(config: Config) -> str:
    """What identifies a run: its config without what is recorded and where its data are stored."""
    place = config_lib.affecting("place")
    kept = {
        path: value
        for path, value in config_lib.flat_values(config)
        if path not in place and not path.startswith("logging.")
    }
    return json.dumps(kept, sort_keys=True)


def _commit(code: dict[str, Any]) -> str:
    commit = (code.get("git") or {}).get("commit")
    return f" (commit {commit[:10]})" if commit else ""
