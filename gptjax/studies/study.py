"""A study as a person writes it: a question, arms that differ in options, seeds, and a claim made before anything runs.

A study file has `get_study(arg="")`, which returns a `Study`; see experiments/. It is read with
`--study=FILE[:ARG] --study.seeds=5 --study.base.train.num_steps=2000`.
"""

import copy
import dataclasses
import importlib.util
import re
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptjax import config as config_lib
from gptjax.config import Config
from gptjax.errors import UserError

QUANTITIES = ("parameters", "flops_per_token", "tokens")  # what arms must agree in
NAME = r"[A-Za-z0-9][A-Za-z0-9_.]*"
CLAIM = re.compile(rf"\s*({NAME})\s*(<=|<|=)\s*({NAME})\s*(?:([+-])\s*([0-9.]+(?:e-?\d+)?))?\s*")


@dataclasses.dataclass(frozen=True)
class Claim:
    """The score of one arm is below that of another by a margin; see `statistics.compare`.

    Attributes:
      both_ways: whether the arms are also claimed the other way round: they are equal within the margin.
    """

    text: str
    ours: str
    theirs: str
    margin: float
    both_ways: bool = False


@dataclasses.dataclass
class Study:
    """What is asked, of what, and what would count as an answer.

    Attributes:
      question: what the study asks, in a sentence.
      base: the config that every arm starts from.
      arms: {name: {"section.option": value}}; the first one is the baseline.
      claims: "muon < adamw" (better), "wsd <= cosine + 0.01" (no worse by more than that), "mask = none + 0.005" (equal
        within that); a number that is left out is `margin`, or 0 after "<".
      margin: of claims with "<=" and "=", in units of the metric.
      source: paper, section, figure. found: what the source found.
      seeds: of initial values and of the order of the data; all arms share them.
      first_seed: the first of them.
      metric: of the last validation line of a cell; lower is better.
      unmatched: {quantity: why arms may differ in it}, of QUANTITIES.
      smoke, full: {"section.option" or "seeds": value}: what `:smoke` and `:full` set.
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
    metric: str = "loss"
    unmatched: dict[str, str] = dataclasses.field(default_factory=dict)
    smoke: dict[str, Any] = dataclasses.field(default_factory=dict)
    full: dict[str, Any] = dataclasses.field(default_factory=dict)
    name: str = ""

    @property
    def baseline(self) -> str:
        return next(iter(self.arms))

    def parsed_claims(self) -> list[Claim]:
        """Raises UserError for a claim that is none, or names no arm."""
        return [self._parsed(text) for text in self.claims]

    def _parsed(self, text: str) -> Claim:
        match = CLAIM.fullmatch(text)
        if not match:
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
            raise UserError(f"the claim {text!r} needs a margin: nothing is shown to be equal to the last digit")
        return Claim(text, ours, theirs, -margin if sign == "-" else margin, both_ways=relation == "=")

    def config_of(self, arm: str, seed: int) -> Config:
        """The config of one cell, not yet resolved. Raises UserError for an override that does not exist."""
        config = self.base.copy_and_resolve_references().unlock()
        set_options(config, self.arms[arm], f"arm {arm!r}")
        config.seed = config.data_seed = seed
        try:
            config_lib.validate(config)
        except UserError as error:
            raise UserError(f"arm {arm!r}: {error}") from None
        return config.lock()

    def seed_values(self) -> range:
        return range(self.first_seed, self.first_seed + self.seeds)

    def check(self) -> None:
        """Raises UserError for what is wrong with the study by itself."""
        if len(self.arms) < 1:
            raise UserError("a study has at least one arm")
        for arm in self.arms:
            if not re.fullmatch(NAME, arm):
                raise UserError(f"{arm!r} is no name of an arm: use letters, digits, '.' and '_'")
        same: dict[str, str] = {}
        for arm, overrides in self.arms.items():
            key = repr(sorted(overrides.items()))
            if key in same:
                raise UserError(f"the arms {same[key]!r} and {arm!r} are the same")
            same[key] = arm
        if not self.seeds >= 1 or not isinstance(self.seeds, int):
            raise UserError(f"study.seeds is {self.seeds}; a study has at least one seed")
        if self.claims and self.seeds < 2:
            raise UserError("study.seeds is 1, and a claim needs at least 2: one seed has no deviation")
        if not 0 <= self.margin < float("inf"):
            raise UserError(f"study.margin is {self.margin}; it must be a number of at least 0")
        if wrong := sorted(set(self.unmatched) - set(QUANTITIES)):
            raise UserError(f"study.unmatched names {wrong[0]!r}; what can be unmatched is {', '.join(QUANTITIES)}")
        self.parsed_claims()
        for arm in self.arms:
            self.config_of(arm, self.first_seed)


def set_options(config: Config, overrides: Mapping[str, Any], where: str) -> None:
    """Sets {"section.option": value}. Raises UserError for a name that is none."""
    known = config_lib.flat_options()
    for path, value in overrides.items():
        if path not in known:
            raise UserError(f"{where}: {path} is no option{config_lib.suggestion(path, known)}")
        section, _, name = path.rpartition(".")
        (config[section] if section else config)[name] = value  # `validate` says what is wrong with it


def apply_arg(study: Study, arg: str) -> Study:
    """Applies what follows the colon of --study=FILE:ARG.

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
    seeds = settings.pop("seeds", study.seeds)
    set_options(base, settings, f"study.{arg}")
    return dataclasses.replace(study, base=base, seeds=seeds)


def read(spec: str) -> Study:
    """The study of FILE[:ARG]. Raises UserError for what is wrong with the file, with its line."""
    name, _, arg = spec.partition(":")
    path = Path(name)
    if not path.is_file():
        raise UserError(f"--study={path}: there is no such file; the studies are in experiments/")
    loader = importlib.util.spec_from_file_location("study", path)
    if loader is None or loader.loader is None:
        raise UserError(f"--study={path} is no Python file")
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
