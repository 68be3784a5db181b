"""A study: a question, arms that differ in options, seeds, and claims made before anything runs.

A study file has `get_study(arg="")`, which returns a `Study`; see experiments/. It is read with
`--study=FILE[:ARG] --study.seeds=5 --study.base.train.num_steps=2000`.
"""

import copy
import dataclasses
import importlib.util
import itertools
import math
import re
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gptjax import config as config_lib
from gptjax import files
from gptjax.config import Config, Option, values
from gptjax.errors import UserError

QUANTITIES = ("parameters", "flops_per_token", "tokens")  # what arms must agree in, besides their tuning budget
UNMATCHED = (*QUANTITIES, "tuning")
VARY = ("both", "seed", "data_seed")
FIRST_TUNING_SEED = 1_000_000  # first seed of tuning; those of noise start at the next constant
FIRST_NOISE_SEED = 2_000_000
HIGHER_IS_BETTER = ("accuracy", "margin", "reward")  # not allowed as metrics: claims assume lower is better
MOST_SEEDS = 1000
MOST_POINTS = 1000  # points of the grids of an arm
NAME = r"[A-Za-z0-9][A-Za-z0-9_.]*"
CLAIM = re.compile(rf"\s*({NAME})\s*(<=|<|=)\s*({NAME})\s*(?:([+-])\s*([0-9.]+(?:e-?\d+)?))?\s*")


class Grid(tuple):
    """Values of an option to try for an arm: Grid(1e-4, 3e-4, 1e-3). The arm gets the best one."""

    def __new__(cls, *values: Any):
        return super().__new__(cls, values)


@dataclasses.dataclass(frozen=True)
class Claim:
    """The claim that the score of one arm is below that of another by a margin; see `statistics.compare`.

    Attributes:
      both_ways: whether the reverse is claimed, too: the arms are equal within the margin.
    """

    text: str
    ours: str
    theirs: str
    margin: float
    both_ways: bool = False


@dataclasses.dataclass
class Study:
    """A question, the arms that answer it, and what would count as an answer.

    Attributes:
      question: what the study asks, in a sentence.
      base: the config that every arm starts from.
      arms: {name: {"section.option": value, or Grid of values}}; the first one is the baseline. With several grids all
        combinations are tried. The point with the best mean over the tuning seeds runs with all seeds.
      claims: "muon < adamw" (better), "wsd <= cosine + 0.01" (worse by at most that), "mask = none + 0.005" (equal
        within that); a missing number is `margin`, or 0 after "<".
      margin: default margin of claims with "<=" and "=", in units of the metric.
      source: paper, section, figure. found: what the source found.
      seeds: of initial values and of the order of the data; all arms share them.
      first_seed: the first of them.
      tuning_seeds: the number of seeds on which grids are tried, or the seeds: (0, 1). A number means other seeds, from
        1,000,000 on: a point's score on the seeds that chose it is biased (it is the best of several noisy scores), so
        these seeds are not used in the comparison. Seeds given by name may be among the study's: then such a cell is
        not run twice, and the arm's score has that bias.
      vary: what a seed changes: "both", the "seed" of initial values and dropout, or the "data_seed" of the order; the
        other one stays first_seed.
      metric: of the last validation line of a cell; lower is better.
      unmatched: {quantity: why arms may differ in it}, from UNMATCHED; "tuning" is the number of cells of grids.
      ladder: {rung: {"section.option": value}}: every arm is run at each of these sizes, the smallest first, and
          compared there with the baseline; the report has the law of loss against compute. A rung is predicted before
          it runs if it has more rungs below it than the law has free numbers.
        loss_floor: the pinned irreducible loss of the law; None: it is fitted.
        isoflop: arms are models of several sizes, each trained with one of a few budgets of FLOPs; the report has the
          tokens per parameter at the lowest loss of each budget.
        smoke, full: {"section.option", "seeds" or "ladder": value}: what `:smoke` and `:full` set.
    """

    question: str
    base: Config
    arms: dict[str, dict[str, Any]]
    claims: tuple[str, ...] = ()
    margin: float = 0.0
    source: str = ""
    found: str = ""
    seeds: int = 3
    first_seed: int = 0
    tuning_seeds: int | tuple[int, ...] = 1
    vary: str = "both"
    metric: str = "loss"
    unmatched: dict[str, str] = dataclasses.field(default_factory=dict)
    ladder: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    loss_floor: float | None = None
    isoflop: bool = False
    smoke: dict[str, Any] = dataclasses.field(default_factory=dict)
    full: dict[str, Any] = dataclasses.field(default_factory=dict)
    name: str = ""

    @property
    def baseline(self) -> str:
        return next(iter(self.arms))

    def parsed_claims(self) -> list[Claim]:
        """The claims. Raises UserError for a malformed claim, or one that names an unknown arm."""
        return [self._parsed(text) for text in self.claims]

    def _parsed(self, text: str) -> Claim:
        match = CLAIM.fullmatch(text)
        if not match or (match[5] or "").count(".") > 1 or match[5] == ".":
            raise UserError(
                f"the claim {text!r} is not of the form 'ours < theirs', 'ours <= theirs + 0.01' or 'a = b'"
            )
        ours, relation, theirs, sign, number = match.groups()
        for arm in (ours, theirs):
            if arm not in self.arms:
                hint = config_lib.suggestion(arm, self.arms)
                raise UserError(f"the claim {text!r} names {arm!r}, no arm{hint}; the arms are {', '.join(self.arms)}")
        if ours == theirs:
            raise UserError(f"the claim {text!r} compares an arm with itself")
        margin = float(number) if number else (0.0 if relation == "<" else self.margin)
        if relation == "=" and not margin > 0:
            raise UserError(f"the claim {text!r} needs a margin: exact equality cannot be shown")
        return Claim(text, ours, theirs, -margin if sign == "-" else margin, both_ways=relation == "=")

    def on_ladder(self) -> "Study":
        """The same study without a ladder: ARM.RUNG is an arm, and each claim is made at every rung."""
        if not self.ladder:
            return self
        arms = {
            f"{arm}.{rung}": size | overrides
            for rung, size in self.ladder.items()
            for arm, overrides in self.arms.items()
        }
        claims = tuple(_at_rung(claim, rung) for rung in self.ladder for claim in self.claims)
        return dataclasses.replace(self, arms=arms, claims=claims, ladder={})

    def grids(self, arm: str) -> dict[str, Grid]:
        return {path: value for path, value in self.arms[arm].items() if isinstance(value, Grid)}

    def points(self, arm: str) -> list[dict[str, Any]]:
        """The overrides of an arm at each point of its grids; one point if it has none."""
        grids = self.grids(arm)
        fixed = {path: value for path, value in self.arms[arm].items() if path not in grids}
        return [fixed | dict(zip(grids, values, strict=True)) for values in itertools.product(*grids.values())]

    def tuning_budget(self, arm: str) -> int:
        """Number of cells that choose the point of an arm."""
        points = len(self.points(arm))
        return points * len(self.tuning_seed_values()) if points > 1 else 0

    def config_of(self, arm: str, seed: int, point: Mapping[str, Any] | None = None) -> Config:
        """The config of one cell, not yet resolved. Raises UserError for an override that does not exist.

        `point`: the overrides; None: those of the first point of the arm.
        """
        config = self.base.copy_and_resolve_references().unlock()
        set_options(config, self.points(arm)[0] if point is None else point, f"arm {arm!r}")
        self.set_seed(config, seed)
        try:
            config_lib.validate(config)
        except UserError as error:
            raise UserError(f"arm {arm!r}: {error}") from None
        return config.lock()

    def set_seed(self, config: Config, seed: int) -> None:
        config.seed = seed if self.vary != "data_seed" else self.first_seed
        config.data_seed = seed if self.vary != "seed" else self.first_seed

    def seed_values(self) -> range:
        return range(self.first_seed, self.first_seed + self.seeds)

    def tuning_seed_values(self) -> list[int]:
        if isinstance(self.tuning_seeds, tuple):
            return list(self.tuning_seeds)
        return [FIRST_TUNING_SEED + self.first_seed + i for i in range(self.tuning_seeds)]

    def noise_seed_values(self) -> list[int]:
        """Seeds of the runs that measure the deviation between seeds; none of the study or its tuning."""
        return [FIRST_NOISE_SEED + self.first_seed + i for i in range(max(self.seeds, 3))]

    def check(self) -> None:
        """Raises UserError for mistakes that show without data."""
        self._check_kinds()
        if len(self.arms) < 1:
            raise UserError("a study has at least one arm")
        for arm in self.arms:
            if not re.fullmatch(NAME, arm):
                raise UserError(f"{arm!r} is no name of an arm: use letters, digits, '.' and '_'")
        self._check_numbers()
        for arm in self.arms:
            self._check_arm(arm)
        same: dict[str, str] = {}
        for arm, overrides in self.arms.items():
            key = repr(sorted(overrides.items()))
            if key in same:
                raise UserError(f"the arms {same[key]!r} and {arm!r} are the same")
            same[key] = arm
        self.parsed_claims()
        if self.ladder:
            self._check_ladder()

    def _check_ladder(self) -> None:
        """Raises UserError for mistakes in the ladder."""
        if len(self.ladder) < (fewest := 2 if self.loss_floor is not None else 3):
            pinned = "" if fewest == 2 else ", or two and a loss_floor"
            raise UserError(f"study.ladder has {len(self.ladder)} rungs; a law needs at least {fewest}{pinned}")
        for rung, size in self.ladder.items():
            if not re.fullmatch(r"[A-Za-z0-9_]+", rung):
                raise UserError(f"{rung!r} is no name of a rung: use letters, digits and '_'")
            for arm, overrides in self.arms.items():
                if both := sorted(size.keys() & overrides.keys()):
                    raise UserError(f"the rung {rung!r} and the arm {arm!r} both set {both[0]}; let one of them set it")
            if grid := next((path for path, value in size.items() if isinstance(value, Grid)), ""):
                raise UserError(f"the rung {rung!r} has a grid of {grid}; grids belong to arms")
        self.on_ladder().check()

    def _check_kinds(self) -> None:
        """Raises UserError for a field of a wrong type."""
        arms, claims, unmatched = self.arms, self.claims, self.unmatched
        right = {
            "base is not a config: begin with gptjax.config.get_default()": isinstance(self.base, Config),
            'arms must be {name: {"section.option": value}}': isinstance(arms, dict)
            and all(isinstance(name, str) and isinstance(options, dict) for name, options in arms.items()),
            'claims must be texts: ("a < b",)': isinstance(claims, tuple | list)
            and all(isinstance(claim, str) for claim in claims),
            "unmatched must be {quantity: reason}": isinstance(unmatched, dict),
            "metric must be the name of a metric": isinstance(self.metric, str),
            'ladder must be {rung: {"section.option": value}}': isinstance(self.ladder, dict)
            and all(isinstance(name, str) and isinstance(options, dict) for name, options in self.ladder.items()),
            "loss_floor must be None or a number of at least 0": self.loss_floor is None
            or (isinstance(self.loss_floor, int | float) and 0 <= self.loss_floor < float("inf")),
        }
        if wrong := [what for what, holds in right.items() if not holds]:
            raise UserError(f"study.{wrong[0]}")
        if self.metric in HIGHER_IS_BETTER:
            raise UserError(f"study.metric is {self.metric!r}, where higher is better; use loss or bits_per_byte")

    def _check_numbers(self) -> None:
        for name, value in (("seeds", self.seeds), ("first_seed", self.first_seed)):
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 2**31:
                raise UserError(f"study.{name} is {value!r}; it must be a whole number of at least 0")
        if not 1 <= self.seeds <= MOST_SEEDS:
            raise UserError(f"study.seeds is {self.seeds}; a study has at least one seed and at most {MOST_SEEDS}")
        if self.claims and self.seeds < 2:
            raise UserError("study.seeds is 1; a claim needs at least 2, since one seed has no deviation")
        if not isinstance(self.margin, int | float) or not 0 <= self.margin < float("inf"):
            raise UserError(f"study.margin is {self.margin!r}; it must be a number of at least 0")
        seeds = self.tuning_seeds if isinstance(self.tuning_seeds, tuple) else (self.tuning_seeds,)
        whole = all(isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed <= 2**31 for seed in seeds)
        if not whole or not seeds or len(set(seeds)) < len(seeds) or self.tuning_seeds == 0:
            raise UserError(f"study.tuning_seeds is {self.tuning_seeds!r}; it must be a number of seeds, or (0, 1)")
        if self.tuning_seeds == seeds[0] and seeds[0] > MOST_SEEDS:
            raise UserError(f"study.tuning_seeds is {self.tuning_seeds}; at most {MOST_SEEDS} are tried")
        if self.vary not in VARY:
            raise UserError(f"study.vary is {self.vary!r}; choose from {', '.join(VARY)}")
        if wrong := sorted(set(self.unmatched) - set(UNMATCHED)):
            raise UserError(f"study.unmatched names {wrong[0]!r}; what can be unmatched is {', '.join(UNMATCHED)}")

    def _check_arm(self, arm: str) -> None:
        """Raises UserError for mistakes in the options or grids of an arm."""
        if seed := {"seed", "data_seed"} & self.arms[arm].keys():
            raise UserError(f"arm {arm!r} sets {min(seed)}; all arms use the seeds of the study (study.seeds)")
        known = self.base.copy_and_resolve_references().unlock()
        set_options(known, self.arms[arm], f"arm {arm!r}")
        if (count := math.prod(map(len, self.grids(arm).values()))) > MOST_POINTS:
            raise UserError(f"arm {arm!r}: its grids have {count} combinations; at most {MOST_POINTS} are tried")
        for path, grid in self.grids(arm).items():
            if len({repr(value) for value in grid}) < max(len(grid), 2):
                raise UserError(f"arm {arm!r}: the grid of {path} needs at least two different values")
        for point in self.points(arm):
            self.config_of(arm, self.first_seed, point)
        for path, grid in self.grids(arm).items():
            if len(grid) == 2 == len(ends(path, grid)):
                raise UserError(
                    f"arm {arm!r}: the grid of {path} has only two values, {grid[0]} and {grid[1]}; an optimum at an "
                    "end gives no verdict; add values"
                )


def _at_rung(claim: str, rung: str) -> str:
    """A claim about arms, made about the same arms at a rung."""
    match = CLAIM.fullmatch(claim)
    ours, theirs = match.end(1), match.end(3)
    return f"{claim[:ours]}.{rung}{claim[ours:theirs]}.{rung}{claim[theirs:]}"


def ends(path: str, tried: Sequence[Any]) -> dict[Any, str]:
    """{value: "smallest" or "largest"} of the values of an option beyond which an optimum may lie.

    The limit of an option is no such end, since nothing lies beyond it: 0 for dropout. Texts have no order and no
    ends; durations in one unit do.
    """
    option = config_lib.flat_options()[path]
    numbers = {value: _number(option, value) for value in tried}
    units = {unit for _, unit in numbers.values()}
    if len(units) != 1 or None in units:
        return {}
    found = {min(tried, key=numbers.__getitem__): "smallest", max(tried, key=numbers.__getitem__): "largest"}
    return {value: word for value, word in found.items() if numbers[value][0] not in (option.minimum, option.maximum)}


def _number(option: Option, value: Any) -> tuple[float, str | None]:
    """A value as a number with its unit; unit None: it is not a number."""
    text = re.fullmatch(r"\s*([0-9.]+)\s*(%|[a-z ]+)", str(value)) if option.duration else None
    try:
        value = float(text[1]) if text else values.read(option, value)
    except ValueError:
        return 0.0, None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return (float(value), text[2] if text else "") if number else (0.0, None)


def set_options(config: Config, overrides: Mapping[str, Any], where: str) -> None:
    """Sets {"section.option": value}. Raises UserError for an unknown name."""
    known = config_lib.flat_options()
    for path, value in overrides.items():
        if path not in known:
            raise UserError(f"{where}: {path} is not an option{config_lib.suggestion(path, known)}")
        section, _, name = path.rpartition(".")
        (config[section] if section else config)[name] = value  # `validate` reports bad values


def apply_arg(study: Study, arg: str) -> Study:
    """Applies the ARG of --study=FILE:ARG.

    smoke: minutes on two cores, for any study: the config of `:runlocal`, and what `study.smoke` sets. full: what
    `study.full` sets, for an accelerator.
    """
    if arg not in ("", "smoke", "full"):
        raise UserError(f"--study=FILE:{arg}: unknown argument {arg!r}; use smoke, full or nothing")
    base = copy.deepcopy(study.base)
    settings = dict({"smoke": study.smoke, "full": study.full}.get(arg, {}))
    if arg == "smoke":
        base = config_lib.apply_arg(base, "runlocal")
    if arg == "full" and not settings:
        raise UserError("--study=FILE:full: this study has no larger size; leave it out")
    own = {name: settings.pop(name) for name in ("seeds", "ladder") if name in settings}
    set_options(base, settings, f"study.{arg}")
    return dataclasses.replace(study, base=base, **own)


def read(spec: str) -> Study:
    """The study of FILE[:ARG]. Raises UserError for mistakes in the file, with their line."""
    name, _, arg = spec.partition(":")
    path = files.expand(name)
    if not path.exists():
        raise UserError(f"--study={path}: there is no such file; the studies are in experiments/")
    files.regular(path)
    loader = importlib.util.spec_from_file_location("study", path)
    if loader is None or loader.loader is None:
        raise UserError(f"--study={path} is not a Python file")
    module = importlib.util.module_from_spec(loader)
    try:
        loader.loader.exec_module(module)
        if not hasattr(module, "get_study"):
            raise UserError(f"--study={path} has no function get_study(); see experiments/")
        study = module.get_study(arg)
    except UserError:
        raise
    except Exception as error:
        numbers = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == path]
        numbers += [error.lineno] if isinstance(error, SyntaxError) else []
        place = f" at line {numbers[-1]}" if numbers else ""
        raise UserError(
            f"--study={path} failed{place}: {type(error).__name__}: {error}".splitlines()[0][:400]
        ) from None
    if not isinstance(study, Study):
        raise UserError(f"--study={path}: get_study() returned {type(study).__name__}, not a Study")
    return dataclasses.replace(study, name=study.name or path.stem)
