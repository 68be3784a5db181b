"""The work directory of a run: whose it is, and files that are whole or not there."""

import json
import os
from pathlib import Path

from gptjax import config as config_lib
from gptjax.errors import UserError

# What may differ when a work directory is continued: none of it changes a parameter that is trained.
FREE = ("computation", "place", "record", "score")
UNSAID = (("objective.name", "auto"), ("data_seed", -1))  # in the config of an older run, which did not resolve them


def claim(workdir: Path, config: config_lib.Config) -> None:
    """Makes the directory, or checks that the run in it has this config. Raises UserError with the differences."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be made: {error.strerror}") from None
    path = workdir / "config.json"
    if not os.access(workdir, os.W_OK):
        raise UserError(f"--workdir={workdir} is not writable")
    if not path.exists():
        return
    old = config_lib.from_json(path.read_text(encoding="utf-8"))
    differences, free = [], config_lib.affecting(*FREE)
    for (name, before), (_, now) in zip(*map(config_lib.flat_values, (old, config)), strict=True):
        if before != now and name not in free and (name, before) not in UNSAID:
            differences.append(f"  {name}: {before!r} there, {now!r} now")
    if differences:
        raise UserError(
            f"{workdir} holds a run of another config; use a new --workdir, or the old values:\n"
            + "\n".join(differences)
        )


def check_data(workdir: Path, identity: dict) -> None:
    recorded = json.loads((workdir / "manifest.json").read_text(encoding="utf-8"))["data"]
    for key in ("source_fingerprint", "tokenizer", "weights"):
        if key in recorded and recorded[key] != identity.get(key):
            raise UserError(
                f"the {key.replace('_', ' ')} of {identity['source']} is not the one {workdir} was trained on; "
                "restore the data or use a new --workdir"
            )
