"""Why do two runs differ? Compares their inputs, the likeliest cause first, and finds where their losses part.

Two runs of one config on one machine write the same losses, bit by bit. On another processor the first steps agree to
1e-5, and later ones drift as it rounds differently: see `expected`.
"""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptjax import config as config_lib
from gptjax.errors import UserError
from gptjax.training import metrics

ROUNDING = 1e-5  # relative difference of the first steps of one config on another processor
FIRST_STEPS = 10
MOST_DRIFT = 0.01
# Kinds of options, the likeliest cause first, with the effect of a difference.
KINDS = {
    "model": "another function is computed",
    "training": "it is trained on other data or in another way",
    "hyper": "other hyper-parameters",
    "course": "it is trained in another way",
    "computation": "it is computed in another order: rounding",
    "score": "the validation loss is measured on other tokens",
    "place": "where the data are stored; whether they differ is seen by their fingerprint",
    "record": "what is measured, shown and kept",
}


@dataclasses.dataclass(frozen=True)
class Difference:
    """One difference between two runs: its name, both values, and its effect."""

    name: str
    ours: Any
    theirs: Any
    effect: str


@dataclasses.dataclass(frozen=True)
class Parting:
    """Where the training losses of two runs part.

    Attributes:
      step: the first step with different losses; None: all common steps are bit-identical.
      shared: number of common steps.
      early: largest relative difference of the losses in the first steps; largest: in all steps.
    """

    step: int | None
    shared: int
    early: float
    largest: float

    def in_words(self) -> str:
        if not self.shared:
            return "the runs have no common step"
        if self.step is None:
            return f"the losses of all {self.shared} common steps are bit-identical"
        drift = f"by up to {self.early:.1g} of the loss in the first {FIRST_STEPS} steps, {self.largest:.1g} later"
        kind = "as rounding does" if self.early <= ROUNDING else "which is more than rounding"
        return f"the losses part at step {self.step}, {drift}: {kind}"


def compare(ours: Path, theirs: Path) -> tuple[list[Difference], Parting]:
    """The differences of two work directories, the likeliest cause first. Raises UserError if one is none."""
    return list(_differences(ours, theirs)), parting(ours, theirs)


def _differences(ours: Path, theirs: Path) -> Iterator[Difference]:
    for workdir in (ours, theirs):
        if not workdir.is_dir():
            raise UserError(f"{workdir} is not a work directory: it is {'a file' if workdir.exists() else 'not there'}")
    one, other = (dict(config_lib.flat_values(_config(path))) for path in (ours, theirs))
    kinds = {path: option.affects for path, option in config_lib.flat_options().items()}
    changed = [path for path in one if one[path] != other[path]]
    for path in sorted(changed, key=lambda path: list(KINDS).index(kinds[path])):
        yield Difference(path, one[path], other[path], KINDS[kinds[path]])
    produced = manifest(ours), manifest(theirs)
    if not all(produced):
        states = ["is there" if found else "is missing or damaged" for found in produced]
        yield Difference("manifest.json", *states, "code, data and packages are not compared")
        return
    for name, keys, effect in (
        ("data", ("data", "source_fingerprint"), "the data are others"),
        ("splits of the data", ("data", "splits"), "the training or the held-out text differs"),
        ("tokenizer", ("data", "tokenizer", "sha256"), "the tokens are others"),
        ("changes while it ran", ("changes",), "its training was changed from some step on"),
        ("gptjax", ("gptjax",), "another version of this package"),
        ("code", ("git", "commit"), "other code"),
        ("uncommitted code", ("git", "diff_sha256"), "other code"),
        ("packages", ("packages",), "programs may be compiled in another way: rounding"),
        ("Python", ("python",), "hardly anything"),
        ("device", ("devices", "kind"), "it rounds differently"),
        ("number of devices", ("devices", "count"), "sums are made in another order: rounding"),
        ("processes", ("devices", "processes"), "sums are made in another order: rounding"),
        ("mesh", ("mesh",), "sums are made in another order: rounding"),
        ("platform", ("platform",), "another system or processor: rounding"),
        ("processor", ("processor",), "it rounds differently: it may fuse multiplication and addition"),
        ("environment", ("environment",), "flags of the compiler: rounding"),
        ("random numbers", ("prng", "implementation"), "other initial values, order and dropout"),
    ):
        one_value, other_value = (_find(one, keys) for one in produced)
        if one_value == other_value:
            continue
        if isinstance(one_value, dict) and isinstance(other_value, dict):
            for key in sorted(one_value.keys() | other_value.keys()):
                if one_value.get(key) != other_value.get(key):
                    yield Difference(f"{name}: {key}", one_value.get(key), other_value.get(key), effect)
        else:
            yield Difference(name, one_value, other_value, effect)


def parting(ours: Path, theirs: Path) -> Parting:
    """Where the training losses of two runs part."""
    one, other = _losses(ours), _losses(theirs)
    shared = sorted(one.keys() & other.keys())
    apart = {step: relative(one[step], other[step]) for step in shared if one[step] != other[step]}
    early = [apart.get(step, 0.0) for step in shared if step <= FIRST_STEPS]
    return Parting(min(apart, default=None), len(shared), max(early, default=0.0), max(apart.values(), default=0.0))


def expected(step: int) -> float:
    """The relative difference of a loss that another processor may cause at a step.

    ROUNDING in the first steps, then proportional to the step, up to MOST_DRIFT. Measured: after 2,000 steps the
    losses of a processor with AVX-512 and of one with AVX2 differed by less than 5e-5; this allows 2e-3 there.
    """
    return min(ROUNDING * max(step / FIRST_STEPS, 1), MOST_DRIFT)


def relative(ours: float | None, theirs: float | None) -> float:
    """The difference of two values relative to the larger one; infinity if one of them is not a number."""
    if ours is None or theirs is None:
        return math.inf
    return abs(ours - theirs) / max(abs(ours), abs(theirs))


def _losses(workdir: Path) -> dict[int, float | None]:
    path = workdir / "metrics.jsonl"
    if not path.exists():
        raise UserError(f"{workdir} is not a work directory: it has no metrics.jsonl")
    return {line["step"]: line.get("loss") for line in metrics.read(path) if line.get("split") == "train"}


def _config(workdir: Path) -> config_lib.Config:
    try:
        return config_lib.from_json((workdir / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{workdir} is not a work directory: it has no config.json") from None
    except (OSError, ValueError, KeyError, AttributeError, TypeError, UserError):
        raise UserError(f"{workdir / 'config.json'} is damaged: it is not a config of a run") from None


def manifest(workdir: Path) -> dict[str, Any]:
    """The content of manifest.json; empty if it is missing or damaged."""
    try:
        found = json.loads((workdir / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _find(found_in: Any, keys: tuple[str, ...]) -> Any:
    for key in keys:
        found_in = found_in.get(key) if isinstance(found_in, dict) else None
    return found_in
