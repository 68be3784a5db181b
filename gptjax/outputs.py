"""The output file of a command, named by a flag: a file on a disk, or an object in a bucket."""

import re
from collections.abc import Iterable
from pathlib import Path

from gptjax import files
from gptjax.buckets import Bucket, is_url
from gptjax.errors import RunError, UserError


def claim(place: str | Path, flag: str = "output") -> None:
    """Makes the directory of an output. Raises UserError, before the work begins, if it cannot be written."""
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
        if not path.exists():  # finds a directory that cannot be written now, not after the work
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
    """Writes the whole text or nothing. Raises RunError that names `what`. `errors`: as in str.encode."""
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
    """The name of a file beside an output: the same with another suffix."""
    return re.sub(r"(?<=[^/])\.[^./]*$", "", str(place)) + suffix


def keeps_files(place: str | Path) -> bool:
    """Whether files may be written beside an output: not beside /dev/null or a pipe."""
    return is_url(place) or Path(place).is_file() or not Path(place).exists()


def _object(url: str | Path, flag: str) -> tuple[Bucket, str]:
    parent, _, name = str(url).rpartition("/")
    if not name or parent.endswith("/"):
        raise UserError(f"--{flag}={url} names no object; write gs://BUCKET/PATH/FILE")
    return Bucket(parent), name
