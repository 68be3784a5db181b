"""Opening files, writing results whole, and errors of the disk in plain words.

A result appears whole or not at all: it is written under a temporary name in the same directory, synced, and renamed.
A kill or a full disk leaves what was there before. The temporary name has the process id in it, so that `sweep` finds
what a killed process left.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import socket
import stat
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from gptjax.errors import UserError

_PARTIAL = re.compile(r"\..*\.(\d+)@([^/]*)\.partial")
_ABANDONED = 24 * 3600  # seconds without a change after which another machine's temporary file counts as abandoned


def expand(text: str | Path) -> Path:
    """The path that a person wrote: ~ and ~name are home directories. Raises UserError if no disk can have it."""
    text = os.fspath(text)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
        raise UserError(f"{text[:200]!r} is in an object store; a path on this machine is needed here")
    if "\0" in text:
        raise UserError(f"{text[:60]!r} is not a path: it has a character NUL")
    long = next((part for part in text.split("/") if len(os.fsencode(part)) > 255), None)
    if long is not None or len(os.fsencode(text)) > 4095:
        raise UserError(f"the path {text[:60] + '...'!r} is too long: a name has at most 255 bytes, a path 4,095")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UserError(f"{text!r}: there is no user {text.partition('/')[0]!r} on this machine") from None


def cache(chosen: str = "") -> Path:
    """Where stores, programs and mirrors are kept: `chosen` (data.cache_dir), else $GPTJAX_CACHE, else ~/.cache/gptjax.

    Raises UserError for what no disk has.
    """
    try:
        return expand(chosen or os.environ.get("GPTJAX_CACHE") or "~/.cache/gptjax")
    except UserError as error:
        raise UserError(f"{'data.cache_dir' if chosen else 'GPTJAX_CACHE'}: {error}") from None


def regular(path: Path) -> Path:
    """The path, if it is a file with an end. Raises UserError if it is missing, a directory, a pipe or a device.

    /dev/fd/N and /dev/stdin are allowed: the shell has opened them, and they end when their writer does.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise UserError(f"{path} cannot be read: {words(error)}") from None
    except ValueError:  # a NUL in it
        raise UserError(f"{str(path)!r} is not a path") from None
    if _handed_over(path) and not stat.S_ISDIR(mode):
        return path
    kinds = {
        stat.S_IFDIR: "a directory",
        stat.S_IFIFO: "a named pipe",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
        stat.S_IFSOCK: "a socket",
    }
    if kind := kinds.get(stat.S_IFMT(mode)):
        raise UserError(f"{path} is {kind}; a regular file is needed" + _PIPES * (kind == "a named pipe"))
    if path.resolve().parts[:2] in (("/", "proc"), ("/", "sys")):
        raise UserError(f"{path} is a virtual file of the kernel; a regular file is needed")
    return path


_PIPES = ", or a pipe that the shell opens: <(command)"


def _handed_over(path: Path) -> bool:
    return bool(re.fullmatch(r"/dev/(stdin|fd/\d+)|/proc/self/fd/\d+", str(path)))


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write into, which replaces `path` when the context ends without an exception.

    A symbolic link is followed; the owner and the mode of a replaced file are kept. A path that is not a regular file
    (/dev/null, a pipe) is written directly, since a rename would destroy it. Raises OSError with the path in it.
    """
    with about(path):
        path = Path(path).resolve()
        try:
            before = path.stat()
        except FileNotFoundError:
            before = None
        if before and not path.is_file():
            with path.open("wb") as file:
                yield file
            return
        partial = beside(path)
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
    """Writes a text, or the pieces of one, in UTF-8. `errors`: as in str.encode, for half a surrogate pair."""
    with whole_file(path) as file:
        for piece in [text] if isinstance(text, str) else text:
            file.write(piece.encode("utf-8", errors=errors))


@contextlib.contextmanager
def whole_directory(final: Path, *, replace: bool = False) -> Iterator[Path]:
    """A new directory that becomes `final` once everything in it is written and synced.

    Args:
      replace: whether an existing directory is replaced; otherwise it is kept, since another worker has written the
        same.

    Raises OSError with the path in it.
    """
    with about(final):
        directory = beside(final)
        directory.mkdir(parents=True)
        try:
            yield directory
            sync(directory)
            if replace and final.is_dir():
                before = beside(final)
                final.rename(before)
                directory.rename(final)
                shutil.rmtree(before, ignore_errors=True)
                return
            try:
                directory.rename(final)
            except OSError:
                if not final.is_dir():
                    raise
        finally:
            shutil.rmtree(directory, ignore_errors=True)


def beside(path: Path) -> Path:
    """A temporary name in the same directory: hidden, unique, with the process id and the host in it."""
    name = os.fsdecode(os.fsencode(path.name)[:100])  # the name of a file has at most 255 bytes
    return path.with_name(f".{name}.{uuid.uuid4().hex[:8]}.{os.getpid()}@{_host()}.partial")


def sweep(directory: Path) -> None:
    """Removes the temporary files that ended processes have left in a directory."""
    with contextlib.suppress(OSError):
        for path in list(Path(directory).iterdir()):
            if (match := _PARTIAL.fullmatch(path.name)) and not _at_work(path, int(match[1]), match[2]):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _at_work(path: Path, pid: int, host: str) -> bool:
    """Whether the process that writes `path` may still run; on another machine, the time of the last change decides."""
    if host != _host():
        with contextlib.suppress(OSError):
            return time.time() - path.stat().st_mtime < _ABANDONED
        return False
    return alive(pid)


_EXITING = 0x4  # PF_EXITING of Linux, among the flags in /proc/PID/stat


def alive(pid: int) -> bool:
    """Whether a process of this machine runs; one that is exiting, or a zombie, does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    with contextlib.suppress(OSError, ValueError, IndexError):  # only Linux has /proc/PID/stat
        after_name = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        return after_name[0] not in "ZX" and not int(after_name[6]) & _EXITING
    return True


def _host() -> str:
    return re.sub(r"[^\w-]", "-", socket.gethostname())[:40]


def sync(directory: Path) -> None:
    """Calls fsync for everything under a directory."""
    for parent, _, names in os.walk(directory):
        for path in (Path(parent), *(Path(parent, name) for name in names)):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that does not sync directories
                    raise
            finally:
                os.close(descriptor)


@contextlib.contextmanager
def about(path: Path) -> Iterator[None]:
    """Adds the path to an OSError without one: write() on a full disk knows only a file descriptor."""
    try:
        yield
    except OSError as error:
        if error.errno and not error.filename:
            error.filename = str(path)
        raise


_WORDS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota of the disk is used up",
    errno.EFBIG: "the file would be larger than is allowed",
    errno.EROFS: "the disk is read-only",
    errno.EACCES: "there is no permission",
    errno.EPERM: "there is no permission",
    errno.ENOENT: "there is no such file or directory",
    errno.ENOTDIR: "a part of the path is a file, not a directory",
    errno.EISDIR: "it is a directory",
    errno.EEXIST: "it exists",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ELOOP: "its links lead in a circle",
    errno.EIO: "the disk reports an error",
    errno.ESTALE: "the network disk has lost it",
    errno.EMFILE: "this process has too many open files",
    errno.ENXIO: "nothing is there to open",
}


_GOES_ON = "the same command then goes on"
_REMEDIES = {
    errno.ENOSPC: "Make room",
    errno.EDQUOT: "Make room, or have the quota raised",
    errno.EFBIG: "Raise the limit (ulimit -f), or use another disk",
    errno.EROFS: "Have it mounted for writing, or use another disk",
    errno.EIO: "See what the system's log says of it (dmesg), or use another disk",
    errno.ESTALE: "Have it mounted again",
}


def disk_fails(error: OSError) -> bool:
    """Whether it is the disk that cannot, and not the path that is wrong: the same request may succeed later."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE)


def words(error: OSError) -> str:
    """What went wrong with a file, in words, without its path."""
    text = _WORDS.get(error.errno or 0) or error.strerror or str(error) or type(error).__name__
    return text[:1].lower() + text[1:] if text[1:2].islower() else text


def explain(error: OSError) -> str:
    """What went wrong with a file: its path, the reason, and for errors of a disk what to do."""
    path = error.filename if isinstance(error.filename, str) else None
    if not path and error.errno == errno.ENOSPC:  # the error names no path: most likely that of temporary files
        path = tempfile.gettempdir()
    text = f"{path}: {words(error)}" if path else words(error)
    if (remedy := _REMEDIES.get(error.errno or 0)) is None:
        return text
    free = space(Path(path)) if path and error.errno == errno.ENOSPC else ""  # of a quota the disk's says nothing
    return f"{text}{free}. {remedy}; {_GOES_ON}"


def goes_on(text: str) -> bool:
    """Whether a message ends with the advice of `explain` about a disk."""
    return text.endswith(_GOES_ON)


def space(path: Path) -> str:
    """The free space on the disk of a path, in brackets; "" if it is unknown."""
    for place in (path, *path.absolute().parents):
        with contextlib.suppress(OSError):
            usage = shutil.disk_usage(place)
            return f" ({usage.free / 2**20:.1f} of {usage.total / 2**20:.0f} MiB free)"
    return ""


def save_array(path: str | Path, array: Any) -> None:
    """Writes a .npy file. Raises OSError with the path and the reason, where NumPy gives only a number of items."""
    import numpy as np

    with about(Path(path)), Path(path).open("wb") as file:
        np.save(_Write(file.write), array)


class _Write(NamedTuple):
    """An object with a method `write` only: into a real file, NumPy would write without Python."""

    write: Callable[[Any], Any]


def write_json(path: Path, value: Any) -> None:
    """One line of JSON. Raises OSError with the path in it."""
    with about(path):
        path.write_text(json.dumps(value, ensure_ascii=False) + "\n", encoding="utf-8", errors="surrogatepass")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8", errors="surrogatepass"))
