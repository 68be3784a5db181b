"""The work directory of a run: whether a config, and data, may continue the run in it."""

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

# Effects of options that may differ when a run continues: they do not change the trained parameters.
FREE = ("computation", "place", "record", "score")
# Those that may differ with --allow_changes: state and position in the data stay, the further training differs.
ON_REQUEST = ("hyper", "course")
UNSAID = (("objective.name", "auto"), ("data_seed", -1))  # unresolved in configs of older versions
SWITCHES = ("train.ema_decay",)  # switching them on or off changes what a checkpoint holds

_OF_DATA = {
    "source_fingerprint": "the source fingerprint",
    "splits": "the split into training and held-out data (fractions, cleaning, exclusions)",
    "tokenizer": "the tokenizer",
    "weights": "the weights",
}

Changes = dict[str, list[Any]]  # {"section.option": [before, now]}


def claim(workdir: Path, config: config_lib.Config, *, step: int = 0, allow_changes: bool = False) -> Changes:
    """Makes the directory, or checks that the run in it may continue with this config. Returns the differences.

    Args:
      step: of the checkpoint from which the run continues; 0: none, and with `allow_changes` any option may differ.
      allow_changes: whether options that affect further training may differ, too.

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
        place = f"goes on from step {step}" if step else "starts over"
        raise UserError(
            f"{mirror.shown(workdir)} holds a run of another config: {_listed(changes, asked)}. With --allow_changes "
            f"it {place} with the new values; otherwise use the old ones or a new --workdir"
        )
    return changes


def _listed(changes: Changes, names: Sequence[str], most: int = 5) -> str:
    known = [f"{name} was {changes[name][0]!r} and is {changes[name][1]!r} now" for name in names[:most]]
    return ", ".join(known) + (f" and {len(names) - most} more" if len(names) > most else "")


def check_data(workdir: Path, identity: dict) -> None:
    """Raises UserError if the data, or models that it learns from, differ from those in the manifest of the run."""
    if reason := integrity.manifest_fault(workdir):
        print(f"warning: {reason}; cannot check whether the data are the same as before", file=sys.stderr)
        return
    recorded = _read_manifest(workdir)["data"]
    same = bool(recorded.get("tokens")) and recorded["tokens"] == identity["tokens"]  # files may be renamed
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
    """Options that were changed during a run, in order of time: {"step", "options": {name: [before, now]}}."""
    changes = _read_manifest(workdir).get("changes")
    return [change for change in changes if isinstance(change, dict)] if isinstance(changes, list) else []


def _read_manifest(workdir: Path) -> dict[str, Any]:
    """The content of manifest.json; empty if it is missing or damaged."""
    try:
        manifest = json_text.read_json(workdir / "manifest.json")
    except UserError:
        return {}
    return manifest if isinstance(manifest, dict) else {}
