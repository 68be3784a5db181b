"""One writer in a work directory: WORKDIR/.lock says which process writes there.

The file is created whole, as a link to a finished file. This is atomic on NFS too, where `flock` does not exclude other
machines. It names the host, the process, and its time.

* The lock of an owner on this machine (same boot, same container) is valid as long as its process is alive. The start
  time of the process shows whether its number was given to another process.
* An owner elsewhere touches its lock every BEAT seconds; a lock that was not touched for STALE seconds is abandoned.
  The clock is that of the disk.
* An abandoned lock is taken over by exactly one process: the one that links its own claim to a name with the lock's
  token, and then finds the lock unchanged. The claim of a process that died is taken over in the same way.
* A run in a bucket has the lock of its mirror, for this machine, and one in the bucket (`bucket_lock`).
"""

import contextlib
import dataclasses
import errno
import json
import os
import threading
from pathlib import Path

from gptjax import files, interrupts
from gptjax.artifacts import mirror
from gptjax.artifacts import owner as owners
from gptjax.artifacts.bucket_lock import BucketLock
from gptjax.artifacts.owner import BEAT, STALE, Owner
from gptjax.errors import RunError, UserError

NAME = ".lock"
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP)


class Lock:
    """The lock of a work directory, held from `take` to `release`."""

    def __init__(self, workdir: Path):
        self._path, self._made = Path(workdir).absolute() / NAME, []
        self._owner = Owner.new()
        self._ended = threading.Event()
        self._bucket: BucketLock | None = None

    @classmethod
    def take(cls, workdir: Path) -> "Lock":
        """Makes the directory if needed. Raises UserError if another process writes there, or it is not writable."""
        lock = cls(workdir)
        lock._make_directory()
        lock._acquire()
        try:
            if (bucket := mirror.bucket_of(workdir)) is not None:
                lock._bucket = BucketLock.take(bucket, lock._owner)
        except BaseException:
            lock.release()
            raise
        interrupts.on_leaving(lock.release)
        threading.Thread(target=lock._beat, name="lock", daemon=True).start()
        return lock

    def check(self) -> None:
        """Raises RunError if another process has taken the directory over, because this one gave no sign of life."""
        holder = _read(self._path)
        if holder is not None and holder.token != self._owner.token:
            raise RunError(owners.taken_over(mirror.shown(self._path.parent), holder))
        if self._bucket:
            self._bucket.check()

    def release(self) -> None:
        """Removes the lock, and the directory if `take` made it and it is empty."""
        if self._ended.is_set():
            return
        self._ended.set()
        interrupts.forget(self.release)
        if self._bucket:
            self._bucket.release()
        holder = _read(self._path)
        if holder is not None and holder.token == self._owner.token:
            with contextlib.suppress(OSError):
                self._path.unlink()
        for directory in reversed(self._made):
            with contextlib.suppress(OSError):  # it is not empty
                directory.rmdir()

    def _make_directory(self) -> None:
        workdir = self._path.parent
        try:
            missing = [d for d in (*reversed(workdir.parents), workdir) if not d.exists()]
            workdir.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            raise _refused(f"--workdir={workdir} cannot be made", error) from None
        self._made = missing

    def _acquire(self) -> None:
        mine = self._path.with_name(f"{NAME}.{self._owner.token}")
        try:
            self._write(mine)
            while not self._link(mine, self._path):
                if self._take_over(mine):
                    break
            self._sweep()
        except OSError as error:
            raise _refused(f"--workdir={self._path.parent} is not writable", error) from None
        finally:
            with contextlib.suppress(OSError):
                mine.unlink()

    def _write(self, path: Path) -> None:
        with files.about(self._path):
            path.write_text(json.dumps(dataclasses.asdict(self._owner)) + "\n", encoding="utf-8")

    def _link(self, mine: Path, place: Path) -> bool:
        """Whether this process now owns `place`, a lock or a claim."""
        try:
            os.link(mine, place)
            return True
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            try:
                descriptor = os.open(place, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            except FileExistsError:
                return False
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(mine.read_text(encoding="utf-8"))
            return True

    def _take_over(self, mine: Path) -> bool:
        """Takes an abandoned lock over; returns whether that succeeded. Raises UserError if its owner is alive."""
        chain, place = [], self._path  # the lock, the claim to it, the claim to that claim, ...
        while (owner := _read(place)) is not None:
            chain.append((place, owner))
            place = self._path.with_name(f"{NAME}.{owner.token}.claim")
        if not chain:
            return False
        last, owner = chain[-1]
        os.utime(mine)
        silence = STALE
        with contextlib.suppress(FileNotFoundError):
            silence = mine.stat().st_mtime - last.stat().st_mtime
        if owner.is_there(silence):
            raise UserError(owners.refusal(mirror.shown(self._path.parent), owner))
        if not self._link(mine, place):
            return False
        head = _read(self._path)
        if head != chain[0][1]:  # another process was faster
            place.unlink(missing_ok=True)
            return False
        os.replace(place, self._path)  # noqa: PTH105 (the name says that an existing file is replaced)
        for claim, _ in chain[1:]:
            claim.unlink(missing_ok=True)
        return True

    def _sweep(self) -> None:
        """Removes files of processes that were killed while they took the lock, and claims to locks that are gone."""
        for path in self._path.parent.glob(f"{NAME}.*"):
            with contextlib.suppress(OSError):
                old = self._path.stat().st_mtime - path.stat().st_mtime > STALE
                if old or (path.suffix == ".claim" and self._owner.token not in path.name):
                    path.unlink()

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            holder = _read(self._path)
            if holder is not None and holder.token == self._owner.token:
                with contextlib.suppress(OSError):
                    os.utime(self._path)
            if self._bucket:
                self._bucket.beat()


def _read(path: Path) -> Owner | None:
    """The owner in a lock; None if there is no lock. A lock that cannot be read has an unknown owner."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        return owners.unreadable(files.words(error))
    return owners.read(text)


def _refused(what: str, error: OSError | ValueError) -> Exception:
    """The error to raise: a UserError, or the error itself if the disk is full or broken."""
    if isinstance(error, ValueError):
        return UserError(f"{what}: it is not a path")
    return UserError(f"{what}: {files.words(error)}") if error.errno in _REFUSED else error
