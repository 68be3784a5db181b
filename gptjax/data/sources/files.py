"""Files by glob, on this machine or behind fsspec (`gs://`, `s3://`), decompressed as they are read."""

import atexit
import bz2
import contextlib
import glob
import gzip
import io
import itertools
import logging
import lzma
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gptjax.buckets import Bucket
from gptjax.errors import UserError
from gptjax.files import about, disk_fails, expand, regular, words

COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
_SEVERAL = re.compile(r"@[0-9.]+%?$|\+\s*([a-z_]+:.*)?$|[\s,][a-z_]+:")  # what was meant as several sources
_MIXTURE = ". Of several sources a run is made by data.source='SPEC@WEIGHT + SPEC@WEIGHT', with spaces around +"
DAMAGE = (EOFError, OSError, zlib.error, lzma.LZMAError)  # what reading a damaged file raises
_BUFFER_BYTES = 1 << 20


class File(NamedTuple):
    """A file that a glob matched.

    Attributes:
      path: absolute path, or URL.
      name: path below the fixed start of the glob, with `/`.
      size: bytes as stored.
      version: changes with the file: its modification time, or the tag of the remote store.
    """

    path: str
    name: str
    size: int
    version: str


def is_remote(path: str) -> bool:
    return "://" in path


def is_compressed(path: str) -> bool:
    return path.endswith(COMPRESSED)


def find_files(spec: str, pattern: str) -> list[File]:
    """The files that match `pattern`, which may contain `**`, in the order of their paths.

    Raises:
      UserError: nothing matches, the pattern is a directory, or the remote store cannot be listed; names
      `spec`.
    """
    return _find_remote(spec, pattern) if is_remote(pattern) else _find_local(spec, pattern)


def _find_local(spec: str, pattern: str) -> list[File]:
    if pattern in ("-", "/dev/stdin") or pattern.startswith("/dev/fd/"):
        return [_handed_over("/dev/stdin" if pattern == "-" else pattern)]
    whole = expand(pattern).absolute()
    if whole.is_dir():
        raise UserError(f"{spec!r} is a directory: name its files, for example '{spec.rstrip('/')}/**/*.txt'")
    if whole.exists():
        return [_local_file(regular(whole), whole.name)]
    found = (Path(path) for path in _matches(whole))
    paths = _each_once([regular(path) for path in sorted(set(found)) if not path.is_dir()])
    if not paths:
        raise UserError(
            f"no file matches {_cut(spec)!r} (looked for {_cut(str(whole))}): check the path and the glob"
            + _MIXTURE * bool(_SEVERAL.search(spec))
        )
    prefix = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), whole.parts))
    return [_local_file(path, path.relative_to(prefix).as_posix()) for path in paths]


def _cut(text: str, most: int = 200) -> str:
    return text if len(text) <= most else f"{text[:most]}..."


def _matches(pattern: Path) -> Iterator[str]:
    """The paths that match a glob. Unlike glob.glob, `**` enters each directory once, so a circle of links ends."""
    if "**" not in pattern.parts:
        yield from glob.glob(str(pattern))  # noqa: PTH207 (Path.glob takes no absolute pattern)
        return
    at = pattern.parts.index("**")
    rest = pattern.parts[at + 1 :]
    rest = rest[next((i for i, part in enumerate(rest) if part != "**"), len(rest)) :] or ("*",)
    for directory in _directories(glob.glob(str(Path(*pattern.parts[:at])))):  # noqa: PTH207
        yield from _matches(Path(glob.escape(directory), *rest))


def _directories(roots: list[str]) -> Iterator[str]:
    """The directories at and below the roots that are not hidden, each once, through a link only if necessary."""
    entered: set[tuple[int, int]] = set()
    direct, links = sorted(roots, reverse=True), []
    while direct or links:
        directory = direct.pop() if direct else links.pop(0)
        try:
            stat = os.stat(directory)  # noqa: PTH116
            if (stat.st_dev, stat.st_ino) in entered:
                continue
            entries = sorted(os.scandir(directory), key=lambda entry: entry.name, reverse=True)
        except OSError:  # no directory, a link to nothing, no permission: skipped, as by glob.glob
            continue
        entered.add((stat.st_dev, stat.st_ino))
        yield directory
        below = [entry for entry in entries if not entry.name.startswith(".") and entry.is_dir()]
        direct += [entry.path for entry in below if not entry.is_symlink()]
        links += [entry.path for entry in reversed(below) if entry.is_symlink()]


def _each_once(paths: list[Path]) -> list[Path]:
    """One path for each file: the one without links, else the shortest."""
    chosen: dict[str, Path] = {}
    for path in paths:
        real = os.path.realpath(path)
        before = chosen.setdefault(real, path)
        chosen[real] = min(before, path, key=lambda path: (str(path) != real, len(path.parts), path))
    if len(chosen) < len(paths):
        logging.getLogger(__name__).warning(
            "%d paths lead to files that have another path too, such as %s: each file is read once",
            len(paths) - len(chosen),
            next(path for path in paths if path not in set(chosen.values())),
        )
    return sorted(chosen.values())


def _handed_over(path: str) -> File:
    """A file that the shell has opened: its own path, or a copy of a pipe, which cannot be read twice."""
    try:
        if Path(path).is_file():
            return _local_file(regular(Path(os.path.realpath(path))), "stdin")
        directory = Path(tempfile.mkdtemp(prefix="gptjax-"))
        atexit.register(shutil.rmtree, directory, ignore_errors=True)
        copy = directory / "stdin"
        with about(copy), Path(path).open("rb") as pipe, copy.open("wb") as file:
            shutil.copyfileobj(pipe, file, _BUFFER_BYTES)
    except OSError as error:
        if disk_fails(error):
            raise
        raise UserError(f"{path} cannot be read: {words(error)}") from None
    return _local_file(copy, "stdin")


def _local_file(path: Path, name: str) -> File:
    stat = path.stat()
    return File(str(path), name, stat.st_size, str(stat.st_mtime_ns))


def _find_remote(spec: str, pattern: str) -> list[File]:
    if bucket := _bucket(pattern):
        (root, path), found = bucket, bucket[0].glob(bucket[1])
        whole = root.__truediv__
    else:
        file_system, path = _file_system(pattern)
        whole = file_system.unstrip_protocol
        try:
            found = {name: info for name, info in file_system.glob(path, detail=True).items() if info["type"] == "file"}
        except Exception as error:  # each remote store raises its own
            raise UserError(f"{spec!r}: {pattern} cannot be listed: {_reason(error)}") from None
    if not found:
        raise UserError(
            f"no file matches {spec!r} (looked for {pattern}): check the path and the glob"
            + _MIXTURE * bool(_SEVERAL.search(spec))
        )
    fixed = list(itertools.takewhile(lambda part: not glob.has_magic(part), path.split("/")))
    if len(fixed) == len(path.split("/")):
        fixed.pop()
    prefix = "/".join([*fixed, ""])
    return [
        File(whole(name), name.removeprefix(prefix), info["size"], _remote_version(info))
        for name, info in sorted(found.items())
    ]


def _reason(error: Exception) -> str:
    text = " ".join(str(words(error) if isinstance(error, OSError) else error).split())
    return _cut(text or "the remote store does not say why")


def _remote_version(info: dict[str, Any]) -> str:
    names = ("etag", "ETag", "md5Hash", "generation", "mtime", "LastModified", "last_modified", "created")
    return str(next((info[name] for name in names if info.get(name)), info["size"]))


def _bucket(url: str) -> tuple[Bucket, str] | None:
    """(the bucket of a URL, the name in it); None for other protocols, which fsspec opens."""
    match = re.fullmatch(r"((?:gs|gcs|s3)://[^/]*)/(.+)", url, re.DOTALL)
    return (Bucket(match[1]), match[2]) if match else None


def _file_system(path: str) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs

        return url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise UserError(f"{path!r} cannot be opened: {error}; pip install 'gptjax[data]', gcsfs or s3fs") from None
    except Exception as error:  # each remote store raises its own
        raise UserError(f"{path!r} cannot be reached: {_reason(error)}; check the address and the network") from None


def check_version(path: str, version: str) -> None:
    """Raises UserError if the local file has changed since it was found."""
    if not is_remote(path) and (not Path(path).is_file() or str(Path(path).stat().st_mtime_ns) != version):
        raise UserError(f"{path} was changed or removed while it was read; run again when nothing writes to it")


def open_bytes(path: str | Path, start: int = 0) -> io.IOBase:
    """Opens a file at byte `start`, decompressed as its suffix says.

    Raises:
      OSError: it cannot be opened. Reading raises one of `DAMAGE` if it is damaged.
      UserError: the package that opens such files is not installed.
    """
    path = str(path)
    file = _open_stored(path)
    if is_compressed(path):
        return _Decompressed(file, Path(path).suffix)
    file.seek(start)
    return file


def _zstd_stream(file: io.IOBase) -> Any:
    import pyarrow

    return pyarrow.CompressedInputStream(file, "zstd")


_STREAMS = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".zst": _zstd_stream,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
}


class _Decompressed(io.BufferedReader):
    """The decompressed content of a file; closing it also closes the file."""

    def __init__(self, stored: io.IOBase, suffix: str):
        self._stored = stored
        super().__init__(_STREAMS[suffix](stored), _BUFFER_BYTES)

    def close(self) -> None:
        super().close()
        self._stored.close()


def _open_stored(path: str) -> io.IOBase:
    if bucket := _bucket(path):
        return bucket[0].open(bucket[1])
    if is_remote(path):
        file_system, name = _file_system(path)
        return file_system.open(name, "rb")
    return Path(path).open("rb")


@contextlib.contextmanager
def named_damage(path: str) -> Iterator[None]:
    """Turns errors of opening or reading a file into a UserError that names it."""
    try:
        yield
    except DAMAGE as error:
        raise UserError(f"{path} cannot be read to its end: {damage(error)}") from None


def damage(error: Exception) -> str:
    """What is wrong with a damaged file, in words."""
    if isinstance(error, OSError) and error.errno:
        return words(error)
    if isinstance(error, EOFError):
        return "the file is cut off: its compressed data is incomplete"
    if isinstance(error, gzip.BadGzipFile):
        return "its compressed data is damaged: the checksum differs, or uncompressed data follows"
    return f"its compressed data is damaged: {' '.join(str(error).split())[:200]}"


class ByteRange(io.RawIOBase):
    """The next `length` bytes of an open file, as a file; wrap it in io.BufferedReader."""

    def __init__(self, file: io.IOBase, length: int):
        self._file = file
        self._rest = length

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(min(len(buffer), self._rest))
        buffer[: len(data)] = data
        self._rest -= len(data)
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


@contextlib.contextmanager
def zstd_writer(path: Path) -> Iterator[io.IOBase]:
    """A new file that is compressed as it is written."""
    import pyarrow

    with path.open("wb") as file, pyarrow.CompressedOutputStream(file, "zstd") as stream:
        writer = io.BufferedWriter(stream, _BUFFER_BYTES)
        yield writer
        writer.detach()  # flushes, and leaves the closing to the context
