"""The hidden work directory of a build, and the removal of those that builds leave behind.

A build locks its directory; the system releases the lock with the process. A build that ends with an error or Ctrl-C
leaves the file `kept`, and the same command continues from there. A killed build leaves no such file: the same command
continues from there, too, but another build in the same folder removes the directory.
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
_HALF_REMOVED_SECONDS = 60  # without a change; a directory without a lock file is then removed
_PATTERN = ".*.building"


@contextlib.contextmanager
def claimed(work: Path, directory: Path) -> Iterator[Callable[[], None]]:
    """Makes and locks `work`, the work directory of the build of `directory`, and removes it at the end.

    Yields a function; if it is called, `work` is kept. Raises UserError if another process builds there, or `work`
    cannot be made.
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
    """Removes the work directories of killed builds from a directory, except `but`."""
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
