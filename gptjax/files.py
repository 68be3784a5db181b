"""How a result appears on a disk: whole or not at all, in UTF-8.

It is written beside its place, synced, and renamed. A kill or a full disk leaves what was there before.
"""

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write into, which takes the place of `path` when the context ends without an exception.

    A symbolic link is followed; the owner and the mode of a file that is replaced are kept. What is no regular file
    (/dev/null, a pipe) is written into, since a rename would destroy it. Raises OSError.
    """
    path = Path(path).resolve()
    try:
        before = path.stat()
    except FileNotFoundError:
        before = None
    if before and not path.is_file():
        with path.open("wb") as file:
            yield file
        return
    partial = path.with_name(f".{path.name[:100]}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if before:
            partial.chmod(before.st_mode & 0o7777)
            with contextlib.suppress(PermissionError):  # another user's file in a directory of ours
                os.chown(partial, before.st_uid, before.st_gid)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_whole(path: Path, text: str | Iterable[str], *, errors: str = "strict") -> None:
    """Writes a text, or the pieces of one, in UTF-8. `errors`: of half a surrogate pair, which UTF-8 does not have."""
    with whole_file(path) as file:
        for piece in [text] if isinstance(text, str) else text:
            file.write(piece.encode("utf-8", errors=errors))


@contextlib.contextmanager
def whole_directory(final: Path) -> Iterator[Path]:
    """A new directory that becomes `final` once everything in it is written."""
    directory = final.with_name(f"{final.name}.{uuid.uuid4().hex[:8]}.partial")
    directory.mkdir(parents=True)
    try:
        yield directory
        try:
            directory.rename(final)
        except OSError:
            if not final.is_dir():  # otherwise another worker has written the same
                raise
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """One line of JSON."""
    path.write_text(json.dumps(value, ensure_ascii=False) + "\n", encoding="utf-8", errors="surrogatepass")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8", errors="surrogatepass"))
