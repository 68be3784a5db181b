"""A work directory in an object store, and its mirror on this machine.

The mirror is a directory in the cache, whose file `POINTER` names the bucket. All files of a run except the arrays of
its checkpoints are read and written there; `push` copies files that have changed to the bucket. Orbax writes
checkpoints to the bucket directly, from every machine. `pull` makes the mirror equal to the bucket. All functions take
the path of any work directory, and do nothing for one on a disk.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from filelock import FileLock

from gptjax import files
from gptjax.artifacts import owner as owners
from gptjax.buckets import Bucket, Object, cache, file_md5, is_url
from gptjax.errors import UserError

POINTER = ".bucket.json"
OWN = (POINTER, ".pull.lock")  # the files of an empty mirror
LOG = "log.txt"  # of a cell: its study has it open, so `pull` does not replace it
COMMITTED = "commit_success.txt"  # Orbax writes it into a bucket once a step is complete
CHECKPOINTS = "checkpoints"
_STATE = re.compile(r"checkpoints/[^/]+/state/.*")  # the arrays: Orbax reads them where they are
_OF_CELL = re.compile(r"cells/[^/]+/checkpoints/.*")  # in a study: only the cell's own run needs them
_LOCAL = re.compile(r"(.*/)?\.[^/]*|checkpoints/.*")  # not copied by `push`: locks, the pointer, unfinished files
_urls: dict[str, str] = {}  # {mirror: URL}, for messages
_pushed: dict[Path, dict[str, tuple[int, int]]] = {}  # (size, time) of the files that the bucket has


def place(text: str | Path, *, part: str = "read") -> Path:
    """The directory that a command names: itself, or the mirror of a URL, which is not brought up to date here.

    Args:
      part: separates mirrors of one URL: each process of a run has its own, and all readers share one.

    Raises UserError for a URL that cannot be opened.
    """
    if not is_url(text):
        return files.expand(text)
    url = os.fspath(text)
    checkpoint = re.fullmatch(r"(.*)/(checkpoints/\d+)/*", url)
    bucket = Bucket(checkpoint[1] if checkpoint else url)
    name = re.sub(r"[^\w.-]+", "-", bucket.url)[-80:]
    digest = hashlib.sha256(bucket.url.encode()).hexdigest()[:8]
    directory = cache() / f"{name}-{digest}" / part
    _point(directory, bucket.url)
    return directory / checkpoint[2] if checkpoint else directory


def _point(directory: Path, url: str) -> None:
    """Makes a directory the mirror of a URL."""
    directory.mkdir(parents=True, exist_ok=True)
    _urls[str(directory)] = url
    if not (directory / POINTER).exists():
        files.write_whole(directory / POINTER, json.dumps({"url": url}) + "\n")
        _bucket_of.cache_clear()


def within(workdir: Path, name: str) -> Path:
    """The work directory of that name below one; below a mirror, a mirror too."""
    if (bucket := bucket_of(workdir)) is not None:
        _point(workdir.absolute() / name, bucket / name)
    return workdir / name


def in_words(text: str) -> str:
    """`text` for the user: with URLs instead of the directories of mirrors."""
    for directory in sorted(_urls, key=len, reverse=True):
        text = text.replace(directory, _urls[directory])
    return text


def opened(text: str | Path) -> Path:
    """`place`, brought up to date, to read a run. Raises UserError where the bucket cannot be read."""
    path = place(text)
    pull(path.parents[1] if path.parent.name == CHECKPOINTS else path)
    return path


def copies(url: str, names: Collection[str]) -> Path:
    """A mirror of these objects only, as far as they exist. Raises UserError where the bucket cannot be read."""
    directory = place(url, part="files")
    bucket = bucket_of(directory)
    bucket.get([name for name in names if name in bucket.list()], directory)
    return directory


def writable(text: str | Path, *, process: int = 0) -> Path:
    """`place` for a run that writes. Raises UserError where Orbax cannot write checkpoints there."""
    if is_url(text) and not os.fspath(text).startswith("gs://"):
        scheme = os.fspath(text).partition("://")[0]
        raise UserError(
            f"--workdir={text}: Orbax cannot write checkpoints to {scheme}://; use gs:// or a "
            f"directory, and copy the run to {scheme}:// when it is done"
        )
    return place(text, part=f"run-{process}")


@functools.lru_cache(maxsize=1024)
def _bucket_of(directory: Path) -> Bucket | None:
    try:
        bucket = Bucket(files.read_json(directory / POINTER)["url"])
        _urls[str(directory)] = bucket.url
        return bucket
    except (FileNotFoundError, NotADirectoryError):
        return None


def bucket_of(workdir: Path) -> Bucket | None:
    """The bucket whose mirror a work directory is; None for one on a disk."""
    return _bucket_of(Path(workdir).absolute())


def _owner(path: Path) -> tuple[Bucket, str] | None:
    """The bucket, and the name in it, of a path in a mirror."""
    path = Path(path).absolute()
    for directory in (path, *path.parents[:4]):
        if (bucket := _bucket_of(directory)) is not None:
            return bucket, path.relative_to(directory).as_posix()
    return None


def shown(path: Path) -> str:
    """A path as the user knows it: by URL if it is in a mirror."""
    owner = _owner(path)
    if owner is None:
        return str(path)
    bucket, name = owner
    return bucket.url if name == "." else f"{bucket.url}/{name}"


def orbax_path(path: Path) -> Any:
    """The path that Orbax reads and writes."""
    if _owner(path) is None:
        return path
    from etils import epath

    return epath.Path(shown(path))


def arrays(checkpoint: Path) -> Any:
    """The directory of a checkpoint's arrays for Orbax: a local copy if Orbax cannot read the store."""
    owner = _owner(checkpoint)
    if owner is None or owner[0].scheme == "gs":
        return orbax_path(checkpoint / "state")
    bucket, name = owner
    workdir = Path(checkpoint).absolute().parents[name.count("/")]
    found = bucket.list(f"{name}/state")
    bucket.get([key for key, there in found.items() if not _equal(workdir / key, there)], workdir)
    return checkpoint / "state"


def objects(checkpoint: Path) -> dict[str, Object] | None:
    """The objects of a checkpoint in its bucket, by names relative to it; None on a disk."""
    owner = _owner(checkpoint)
    if owner is None:
        return None
    bucket, name = owner
    return {key.removeprefix(f"{name}/"): value for key, value in bucket.list(name).items()}


def pull(workdir: Path, below: str = "") -> None:
    """Makes a mirror equal to its bucket, or only the part `below` a name. Leaves out arrays and incomplete steps.

    In a study, also leaves out checkpoints of cells, and does not touch cells that are running on this machine.
    """
    if (bucket := bucket_of(workdir)) is None:
        return
    with FileLock(workdir / OWN[1]):
        found = bucket.list(below)
        whole = {name.rpartition("/")[0] for name in found if name.count("/") == 2 and name.endswith(f"/{COMMITTED}")}
        busy = tuple(f"cells/{path.parent.name}/" for path in (workdir / "cells").glob("*/.lock") if _is_held(path))
        wanted = {
            name: there
            for name, there in found.items()
            if not (_STATE.fullmatch(name) or _OF_CELL.fullmatch(name) or _hidden(name) or name.startswith(busy))
            and (_step(name) is None or _step(name) in whole)
            and not (_is_log(name) and (workdir / name).exists())
        }
        for name in _files(workdir, below).keys() - wanted.keys():
            arrays = _STATE.fullmatch(name) and _step(name) in whole
            if not (arrays or _OF_CELL.fullmatch(name) or name.startswith(busy) or _is_log(name)):
                (workdir / name).unlink(missing_ok=True)
        fetched = [name for name, there in wanted.items() if not _equal(workdir / name, there)]
        bucket.get(fetched, workdir)
        for name in fetched:  # keep the times: of several evaluations the newest is used
            if modified := wanted[name].modified:
                os.utime(workdir / name, (modified, modified))
        for step in whole:  # an empty directory: where the arrays would be
            (workdir / step / "state").mkdir(parents=True, exist_ok=True)
        for directory in (workdir / CHECKPOINTS).glob("*/"):
            if f"{CHECKPOINTS}/{directory.name}" not in whole and re.fullmatch(r"\d+", directory.name):
                shutil.rmtree(directory)
    if not below:
        _pushed[Path(workdir).absolute()] = _files(workdir)


def _is_held(lock: Path) -> bool:
    """Whether a process of this machine holds a lock."""
    with contextlib.suppress(OSError):
        return owners.read(lock.read_text(encoding="utf-8", errors="replace")).is_there(owners.STALE)
    return False


def push(workdir: Path, names: Collection[str] | None = None) -> None:
    """Copies the files of a mirror that have changed since it was last equal to the bucket; `names`: only these.

    In a study, leaves out the files of cells, which have mirrors of their own.
    """
    if (bucket := bucket_of(workdir)) is None:
        return
    known = _pushed.setdefault(Path(workdir).absolute(), {})
    own = _files(workdir, cells=False)
    found = {name: stamp for name, stamp in own.items() if not _LOCAL.fullmatch(name)}
    changed = [name for name, stamp in found.items() if known.get(name) != stamp and (names is None or name in names)]
    bucket.put(changed, workdir)
    known.update({name: found[name] for name in changed})


def set_aside(path: Path, after: Path) -> None:
    """Renames a checkpoint, in the bucket too."""
    if (owner := _owner(path)) is not None:
        bucket, name = owner
        bucket.move(name, f"{name.rpartition('/')[0]}/{after.name}")
    path.rename(after)


def write(path: Path, text: str) -> None:
    """Writes a file of a checkpoint, in the bucket too."""
    if (owner := _owner(path)) is not None:
        bucket, name = owner
        bucket.write(name, text.encode())
    files.write_whole(path, text)


def sha256(checkpoint: Path, file: str) -> str:
    """sha256 of a file of a checkpoint that is in a bucket, read from there."""
    bucket, name = _owner(checkpoint)
    return bucket.sha256(f"{name}/{file}")


def _files(workdir: Path, below: str = "", *, cells: bool = True) -> dict[str, tuple[int, int]]:
    """Size and time of the files of a mirror. `cells`: also those of mirrors within it."""
    found = {}
    for parent, directories, names in os.walk(workdir / below):
        if not cells:
            directories[:] = [name for name in directories if not Path(parent, name, POINTER).exists()]
        for name in names:
            path = Path(parent, name)
            key = path.relative_to(workdir).as_posix()
            if not _hidden(key):
                stat = path.stat()
                found[key] = stat.st_size, stat.st_mtime_ns
    return found


def _is_log(name: str) -> bool:
    return name.rpartition("/")[2] == LOG


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _step(name: str) -> str | None:
    match = re.match(r"(checkpoints/\d+)/", name)
    return match and match[1]


def _equal(path: Path, there: Object) -> bool:
    return bool(there.md5) and path.is_file() and path.stat().st_size == there.size and file_md5(path) == there.md5
