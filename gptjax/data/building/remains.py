"""The hidden directory in which a build works, and what happens to those that builds leave behind.

A build holds a lock on its directory, which the system releases with the process. A build that ends by itself, by an
error or by Ctrl-C, leaves the mark `kept`: the same command goes on from there. One that was killed leaves none; the
next build beside it removes it, unless it is the same, which goes on as well.
"""

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from gptjax import files
from gptjax.errors import UserError

LOCK, KEPT = "lock", "kept"
_KEPT_SECONDS = 7 * 24 * 3600
_HALF_REMOVED_SECONDS = 60  # without a lock and without a change, which a build that begins does not have
_PATTERN = ".*.building"


@contextlib.contextmanager
def claimed(work: Path, directory: Path) -> Iterator[Callable[[], None]]:
    """Makes the directory `work`, of the build of `directory`, and holds it; it is removed at the end.

    Yields a function after whose call it stays. Raises UserError where another process builds there, or nobody can.
    """
    stays = False

    def keep() -> None:
        nonlocal stays
        stays = True
        with contextlib.suppress(OSError):  # a full disk: then the time of the last change decides
            (work / KEPT).touch()

    with _lock(work, directory):
        for folder in (work, work / "cleaned", work / "tokens"):
            files.sweep(folder)
        with contextlib.suppress(OSError):
            (work / KEPT).unlink()
        try:
            yield keep
        finally:
            if not stays:
                shutil.rmtree(work, ignore_errors=True)


def _lock(work: Path, directory: Path) -> FileLock:
    lock = FileLock(work / LOCK)
    while True:
        try:
            work.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=1)
        except Timeout:
            raise UserError(f"{directory} is being built by another process: wait for it") from None
        except (FileExistsError, NotADirectoryError, PermissionError) as error:
            raise UserError(f"a token store cannot be made at {directory}: {files.words(error)}") from None
        except FileNotFoundError:  # swept between the two lines
            continue
        if (work / LOCK).exists():
            return lock
        lock.release()  # of a file that was swept


def sweep(parent: Path, *, but: Path) -> None:
    """Removes what killed builds have left in a directory, except the one that is to go on."""
    files.sweep(parent)
    with contextlib.suppress(OSError):
        for work in parent.glob(_PATTERN):
            if work == but or not work.is_dir() or _is_kept(work):
                continue
            if (work / LOCK).is_file():
                with contextlib.suppress(Timeout, OSError), FileLock(work / LOCK).acquire(timeout=0):
                    shutil.rmtree(work, ignore_errors=True)
            elif time.time() - work.stat().st_mtime > _HALF_REMOVED_SECONDS:
                shutil.rmtree(work, ignore_errors=True)


def _is_kept(work: Path) -> bool:
    with contextlib.suppress(OSError):
        return time.time() - (work / KEPT).stat().st_mtime < _KEPT_SECONDS
    return False
