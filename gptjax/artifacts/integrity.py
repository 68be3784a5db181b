"""Whether the checkpoint of a step is whole: what must be in its directory, and the checksums of what Orbax wrote.

Checksums are written in the background once a save is complete (`seal`), and compared before a checkpoint is used
(`fault`). If there are none, because the checkpoint is older or its process was killed, only the files are checked.
A damaged directory is never deleted: a run that continues before it renames it (`set_aside`).
"""

import functools
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pydantic

from gptjax import config as config_lib
from gptjax import files, foreign, json_text
from gptjax.artifacts import mirror
from gptjax.artifacts.mirror import shown
from gptjax.buckets import Object
from gptjax.errors import UserError

FORMAT = 2  # of checkpoints that are written; lower ones can be read
CHECKSUMS = "checksums.json"
_DIFFERS = "{} is not as it was written (its checksum differs)"
_WORKERS = 4  # files that are read at once; hashing lets other threads run


class _Tokenizer(foreign.Schema):
    json_text: str = pydantic.Field(alias="json")
    eot_token: str


class _Metadata(foreign.Schema):
    """`metadata` of a step, of any format."""

    format: int = pydantic.Field(1, ge=1)
    step: int = pydantic.Field(ge=0)
    config: dict[str, Any]
    tokenizer: _Tokenizer
    chat_template: dict[str, Any] | None = None
    generation: dict[str, Any] | None = None
    metrics: dict[str, Any]
    monitor: list[str | bool] = pydantic.Field(["validation_loss", True], min_length=2, max_length=2)


class _Config(foreign.Schema):
    """config.json, which has every option that its gptjax knew."""

    model: dict[str, Any] = pydantic.Field(min_length=1)
    data: dict[str, Any] = pydantic.Field(min_length=1)
    train: dict[str, Any] = pydantic.Field(min_length=1)


class _Checksums(foreign.Schema):
    """sha256 of a step saved on a disk; md5, which the bucket itself keeps, of a step in a bucket."""

    sha256: dict[str, str]
    md5: dict[str, str] = pydantic.Field(default_factory=dict)


class _Manifest(foreign.Schema):
    data: dict[str, Any]


def step_directories(directory: Path) -> list[int]:
    """The steps that have a directory under a checkpoints directory, whole or not, ascending."""
    try:
        return sorted(int(p.name) for p in directory.iterdir() if p.name.isascii() and p.name.isdigit())
    except OSError:
        return []


def finished_steps(directory: Path) -> list[int]:
    """Steps under a checkpoints directory whose save was completed, ascending."""
    return [step for step in step_directories(directory) if (directory / str(step) / "metadata").exists()]


def read_metadata(checkpoint: Path) -> dict[str, Any]:
    """Config, tokenizer and metrics stored with a checkpoint, in the current format.

    Raises UserError where it cannot be read, or was written by a newer gptjax.
    """
    path = checkpoint / "metadata" / "metadata"
    try:
        metadata = json_text.read_json(path)
        version = metadata.get("format") if isinstance(metadata, dict) else None
        if isinstance(version, int) and version > FORMAT:
            raise _Newer(
                f"{checkpoint} is of checkpoint format {version}, and this gptjax reads up to {FORMAT}; use the gptjax "
                "that wrote it, or a newer one"
            )
        foreign.check(_Metadata, metadata, path)
    except _Newer:
        raise
    except UserError as error:
        raise UserError(f"{checkpoint} is not a readable gptjax checkpoint: {error}") from None
    return {"format": 1, "monitor": ["validation_loss", True], "generation": {}} | metadata


class _Newer(UserError):
    """A checkpoint is not damaged, but of a newer format."""


# ---- Checksums ---------------------------------------------------------------------------------------------


def seal(checkpoint: Path) -> None:
    """Writes the checksums of all files of a step that is complete. Raises OSError."""
    sums: dict[str, dict[str, str]] = {"sha256": {}}
    if (there := mirror.objects(checkpoint)) is not None:
        sums["md5"] = {name: found.md5 for name, found in there.items() if found.md5 and _counts(name)}
    else:
        names = [path.relative_to(checkpoint).as_posix() for path in _files(checkpoint)]
        sums["sha256"] = dict(zip(names, _digests(checkpoint, names), strict=True))
    mirror.write(checkpoint / CHECKSUMS, json.dumps(sums, indent=1) + "\n")


def _files(checkpoint: Path) -> Iterator[Path]:
    for parent, directories, names in os.walk(checkpoint):
        directories.sort()
        yield from (Path(parent, name) for name in sorted(names) if _counts(name))


def _counts(name: str) -> bool:
    last = name.rpartition("/")[2]
    return last != CHECKSUMS and not last.startswith(".")


def _digests(checkpoint: Path, names: list[str], kind: str = "sha256") -> list[str]:
    def digest(name: str) -> str:
        with (checkpoint / name).open("rb") as file:
            return hashlib.file_digest(file, kind).hexdigest()

    with ThreadPoolExecutor(_WORKERS) as pool:
        return list(pool.map(digest, names))


def fault(checkpoint: Path) -> str | None:
    """What is wrong with the checkpoint of a step, in words; None if it is whole.

    Raises UserError for a checkpoint that is whole, and of a newer gptjax.
    """
    if reason := _form(checkpoint):
        return reason
    try:
        if (there := mirror.objects(checkpoint)) is not None:
            return _content_of(checkpoint, there)
        sums = checkpoint / CHECKSUMS
        paths = [*_files(checkpoint), *([sums] if sums.exists() else [])]
        return _content(checkpoint, tuple((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in paths))
    except OSError as error:
        return f"{error.filename or checkpoint}: {files.words(error)}"


def _form(checkpoint: Path) -> str | None:
    """Which part of a checkpoint is missing or cannot be read. Cheap: no checksums."""
    for name in ("state", "metadata"):
        if not (checkpoint / name).is_dir():
            return f"{name} is missing"
    try:
        metadata = read_metadata(checkpoint)
        if checkpoint.parent.name == "checkpoints" and str(metadata["step"]) != checkpoint.name:
            return f"its metadata is of step {metadata['step']}"
        read_config(metadata, checkpoint)
        for path in (checkpoint / "metrics" / "metrics", checkpoint / "_CHECKPOINT_METADATA"):
            if path.exists():
                foreign.check(foreign.Schema, json_text.read_json(path), path)
    except _Newer:
        raise
    except UserError as error:
        return str(error).removeprefix(f"{checkpoint} is not a readable gptjax checkpoint: ")
    return None


@functools.lru_cache(maxsize=64)
def _content(checkpoint: Path, stamps: tuple[tuple[str, int, int], ...]) -> str | None:
    """Which file has changed since it was written. `stamps` (names, sizes, times) are the key of the cached answer."""
    if not (checkpoint / CHECKSUMS).exists():
        return None
    try:
        known = foreign.read(_Checksums, checkpoint / CHECKSUMS)
    except UserError as error:
        return str(error)
    for kind, sums in (("sha256", known.sha256), ("md5", known.md5)):
        for name in sums:
            if not (checkpoint / name).is_file():
                return f"{name} is missing"
        for name, digest in zip(sums, _digests(checkpoint, list(sums), kind), strict=True):
            if digest != sums[name]:
                return _DIFFERS.format(name)
    return None


def _content_of(checkpoint: Path, there: dict[str, Object]) -> str | None:
    """`_content` of a step in a bucket: compares the bucket's own md5, and reads files that have sha256."""
    if CHECKSUMS not in there:
        return None
    try:
        known = foreign.read(_Checksums, checkpoint / CHECKSUMS)
    except UserError as error:
        return str(error)
    if missing := [name for name in (*known.sha256, *known.md5) if name not in there]:
        return f"{missing[0]} is missing"
    for name, digest in known.md5.items():
        if there[name].md5 and there[name].md5 != digest:
            return _DIFFERS.format(name)
    return _read_sums(checkpoint, tuple(known.sha256.items()), tuple(there[name] for name in known.sha256))


@functools.lru_cache(maxsize=64)
def _read_sums(checkpoint: Path, sums: tuple[tuple[str, str], ...], stamps: tuple[Object, ...]) -> str | None:
    with ThreadPoolExecutor(_WORKERS) as pool:
        found = pool.map(lambda entry: mirror.sha256(checkpoint, entry[0]), sums)
        return next((_DIFFERS.format(name) for (name, sha), now in zip(sums, found, strict=True) if sha != now), None)


def read_config(metadata: dict[str, Any], where: Path) -> config_lib.Config:
    """The config stored with a checkpoint, locked. Raises UserError."""
    return config_lib.from_json(json.dumps(metadata["config"]), f"the config of {where}")


# ---- A work directory --------------------------------------------------------------------------------------


def newest_whole(directory: Path, *, tell: bool = True) -> int:
    """The newest step under a checkpoints directory that is whole; 0 if there is no checkpoint at all.

    Warns of each newer one that is damaged. Raises UserError where there are checkpoints but none is whole.
    """
    steps, faults = step_directories(directory), []
    for step in reversed(steps):
        reason = fault(directory / str(step))
        if reason is None:
            if tell and faults:
                print(f"warning: {'; '.join(faults)}. Step {step} is the newest that is whole", file=sys.stderr)
            return step
        faults.append(f"the checkpoint {shown(directory / str(step))} is damaged: {reason}")
    if faults:
        more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise UserError(
            f"no checkpoint in {shown(directory)} is whole: {'; '.join(faults[:3])}{more}. Restore one from a copy, or "
            "use another --workdir"
        )
    return 0


def set_aside(directory: Path, newest: int) -> None:
    """Renames damaged checkpoints: those newer than the newest whole step, and those with missing parts."""
    for step in step_directories(directory):
        path = directory / str(step)
        if step > newest or _form(path):
            place = path.with_name(f"{step}.damaged")
            number = 1
            while place.exists():
                number += 1
                place = path.with_name(f"{step}.damaged-{number}")
            with files.about(path):
                mirror.set_aside(path, place)
            print(
                f"warning: the damaged checkpoint {shown(path)} was renamed to {shown(place)}; it is ignored",
                file=sys.stderr,
            )


def mend(workdir: Path, step: int) -> None:
    """Restores a missing or damaged config.json from the checkpoint of `step`; 0: there is none. Prints a warning.

    A damaged one is kept as config.json.damaged.
    """
    path, checkpoint = workdir / "config.json", workdir / "checkpoints" / str(step)
    try:
        if path.exists():
            stored = foreign.read(_Config, path)
            config_lib.from_json(json.dumps(stored.model_dump()), path)
            return
        reason = f"{path} is missing" if step else ""
    except UserError as error:
        reason = str(error)
        path.replace(path.with_name("config.json.damaged"))
    if step:
        files.write_whole(path, config_lib.to_json(read_config(read_metadata(checkpoint), checkpoint)))
        reason += f"; it is restored from {checkpoint}"
    if reason:
        print(f"warning: {reason}", file=sys.stderr)


def manifest_fault(workdir: Path) -> str | None:
    """What is wrong with manifest.json, in words; None if it can be read."""
    try:
        foreign.read(_Manifest, workdir / "manifest.json")
    except UserError as error:
        return str(error)
    return None
