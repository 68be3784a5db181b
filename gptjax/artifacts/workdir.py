"""The work directory of a run: whose it is, and files that are whole or not there."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptjax import config as config_lib
from gptjax import json_text
from gptjax.artifacts import integrity, mirror
from gptjax.errors import UserError
from gptjax.files import words

# What may differ when a work directory is continued: none of it changes a parameter that is trained.
FREE = ("computation", "place", "record", "score")
# What may differ on request: the rest of the run is trained in another way, from the same state and place in the data.
ON_REQUEST = ("hyper", "course")
UNSAID = (("objective.name", "auto"), ("data_seed", -1))  # in the config of an older run, which did not resolve them
SWITCHES = ("train.ema_decay",)  # on or off, they decide what a checkpoint holds

_OF_DATA = {
    "source_fingerprint": "the source fingerprint",
    "splits": "what is trained on and what is held out (fractions, cleaning, what is left out)",
    "tokenizer": "the tokenizer",
    "weights": "the weights",
}

Changes = dict[str, list[Any]]  # {"section.option": [before, now]}


def claim(workdir: Path, config: config_lib.Config, *, step: int = 0, allow_changes: bool = False) -> Changes:
    """Makes the directory, or checks that the run in it may go on with this config. Returns what is different.

    Args:
      step: that of the checkpoint from which the run goes on; 0: there is none, and on request anything may change.
      allow_changes: whether options that affect the rest of the training may differ, too.

    Raises UserError with the differences.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        if not isinstance(error, OSError):  # a NUL in it
            raise UserError(f"--workdir={str(workdir)!r} is not a path") from None
        reason = "it is there, and is not a directory" if isinstance(error, FileExistsError) else words(error)
        raise UserError(f"--workdir={workdir} cannot be made: {reason}") from None
    path = workdir / "config.json"
    if not os.access(workdir, os.W_OK):
        raise UserError(f"--workdir={workdir} is not writable")
    if not path.exists():
        return {}
    old = config_lib.from_json(path.read_text(encoding="utf-8", errors="replace"), path)
    changes = {
        name: [before, now]
        for (name, before), (_, now) in zip(*map(config_lib.flat_values, (old, config)), strict=True)
        if before != now and (name, before) not in UNSAID
    }
    free, on_request = config_lib.affecting(*FREE), config_lib.affecting(*ON_REQUEST)
    switched = {name for name in SWITCHES if name in changes and not all(changes[name])}
    fixed = [name for name in changes if step and (name not in free | on_request or name in switched)]
    if fixed:
        raise UserError(
            f"{mirror.shown(workdir)} holds a run of another config: {_listed(changes, fixed)}. What a run has learned "
            f"depends on that: use the old values, or start a run from this one with a new --workdir and "
            f"--config.init_from={mirror.shown(workdir)}"
        )
    asked = [name for name in changes if name not in free]
    if asked and not allow_changes:
        place = f"goes on from step {step}" if step else "begins anew"
        raise UserError(
            f"{mirror.shown(workdir)} holds a run of another config: {_listed(changes, asked)}. With --allow_changes "
            f"it {place} with the new values; otherwise use the old ones or a new --workdir"
        )
    return changes


def _listed(changes: Changes, names: Sequence[str], most: int = 5) -> str:
    known = [f"{name} is {changes[name][0]!r} there and {changes[name][1]!r} now" for name in names[:most]]
    return ", ".join(known) + (f" and {len(names) - most} more" if len(names) > most else "")


def check_data(workdir: Path, identity: dict) -> None:
    """Raises UserError where the data, or models that it learns from, are not those of a run, as its manifest says."""
    if reason := integrity.manifest_fault(workdir):
        print(f"warning: {reason}; whether the data are those of before is not checked", file=sys.stderr)
        return
    recorded = _read_manifest(workdir)["data"]
    same = bool(recorded.get("tokens")) and recorded["tokens"] == identity["tokens"]  # whatever the files are called
    for key in ("tokenizer", "weights") if same else ("source_fingerprint", "splits", "tokenizer", "weights"):
        if key in recorded and recorded[key] != identity.get(key):
            raise UserError(
                f"{_OF_DATA[key]} of {identity['source']} is not the one that {workdir} was trained on; restore "
                f"the data, or start a run from this one with a new --workdir and --config.init_from={workdir}"
            )
    models, before = identity.get("models", {}), recorded.get("models", {})
    for name in models:
        if isinstance(before, dict) and before.get(name, models[name]) != models[name]:
            raise UserError(
                f"{name} now has other parameters than those that {workdir} was trained with; put that model back, or "
                f"start a run from this one with a new --workdir and --config.init_from={workdir}"
            )


def read_changes(workdir: Path) -> list[dict[str, Any]]:
    """What was changed while a run went on, the first change first: {"step", "options": {name: [before, now]}}."""
    changes = _read_manifest(workdir).get("changes")
    return [change for change in changes if isinstance(change, dict)] if isinstance(changes, list) else []


def _read_manifest(workdir: Path) -> dict[str, Any]:
    """What manifest.json holds; nothing where it is missing or damaged."""
    try:
        manifest = json_text.read_json(workdir / "manifest.json")
    except UserError:
        return {}
    return manifest if isinstance(manifest, dict) else {}
