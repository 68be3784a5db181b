"""A file that a command writes at its end, named by a flag: on a disk, or an object in a bucket."""

import re
from collections.abc import Iterable
from pathlib import Path

from gptjax import files
from gptjax.buckets import Bucket, is_url
from gptjax.errors import RunError, UserError


def claim(place: str | Path, flag: str = "output") -> None:
    """Makes the directory of a result. Raises UserError where the result cannot be written, before the work."""
    if is_url(place):
        bucket, name = _object(place, flag)
        bucket.try_writing(name)
        return
    path = files.expand(place)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.sweep(path.parent)
        if path.is_dir():
            raise UserError(f"--{flag}={path} is a directory; name a file")
        if not path.exists():  # a directory that cannot be written shows now, and not after the work
            trial = files.beside(path)
            trial.touch()
            trial.unlink()
    except OSError as error:
        if files.disk_fails(error):
            raise
        raise UserError(f"--{flag}={path} cannot be written: {files.words(error)}") from None
    except ValueError:
        raise UserError(f"--{flag}={str(path)!r} is not a path") from None


def write(place: str | Path, lines: str | Iterable[str], what: str = "the results", *, errors: str = "replace") -> None:
    """Writes a whole text or nothing. Raises RunError, which names `what`. `errors`: of half a surrogate pair."""
    if is_url(place):
        bucket, name = _object(place, "output")
        bucket.write(name, "".join([lines] if isinstance(lines, str) else lines).encode("utf-8", errors=errors))
        return
    path = files.expand(place)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.sweep(path.parent)
        files.write_whole(path, lines, errors=errors)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise RunError(f"{what} could not be written: {files.explain(error)}; or give another --output") from None


def beside(place: str | Path, suffix: str) -> str:
    """The name of what stands beside a result, with another end."""
    return re.sub(r"(?<=[^/])\.[^./]*$", "", str(place)) + suffix


def keeps_files(place: str | Path) -> bool:
    """Whether something may stand beside a result: not beside /dev/null or a pipe."""
    return is_url(place) or Path(place).is_file() or not Path(place).exists()


def _object(url: str | Path, flag: str) -> tuple[Bucket, str]:
    parent, _, name = str(url).rpartition("/")
    if not name or parent.endswith("/"):
        raise UserError(f"--{flag}={url} names no object; write gs://BUCKET/PATH/FILE")
    return Bucket(parent), name
