"""One writer in a work directory: WORKDIR/.lock says which process writes there.

The file appears whole or not at all (a link to a file that is written before), which also holds on NFS, where `flock`
does not keep other machines out. It names the host, the process, and since when.

* An owner on this machine (the same boot, the same view of processes) counts as long as its process is there; that the
  number was not given to another process since is told by the time at which the process started.
* Of an owner elsewhere only the lock itself is seen: the owner touches it every BEAT seconds, and one that was not
  touched for STALE seconds is left. The clock is that of the disk.
* A lock that is left is taken over by exactly one process: the one that links its own claim to a name with the token
  of the lock in it, and still finds the lock as it was. A claim of a process that then died is taken over likewise.
* A run in a bucket has the lock of its mirror, which is of this machine, and one in the bucket (`bucket_lock`).
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
        """Makes the directory where there is none. Raises UserError if another process writes there, or nobody can."""
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
        """Raises RunError where another process has taken the directory over, since this one gave no sign of life."""
        holder = _read(self._path)
        if holder is not None and holder.token != self._owner.token:
            raise RunError(owners.taken_over(mirror.shown(self._path.parent), holder))
        if self._bucket:
            self._bucket.check()

    def release(self) -> None:
        """Removes the lock, and the directory if it was made for nothing."""
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
            with contextlib.suppress(OSError):  # something is in it
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
        """Whether a lock whose owner is gone is now this one's. Raises UserError where the owner is there."""
        chain, place = [], self._path  # the lock, the claim to it, the claim to that, ...
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
        os.replace(place, self._path)  # noqa: PTH105, it says that a file there is replaced
        for claim, _ in chain[1:]:
            claim.unlink(missing_ok=True)
        return True

    def _sweep(self) -> None:
        """Removes what starters that were killed have left; a claim to a lock that is no more is void."""
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
    """What a lock says; None if there is none. One that cannot be read has an owner of which nothing is known."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        return owners.unreadable(files.words(error))
    return owners.read(text)


def _refused(what: str, error: OSError | ValueError) -> Exception:
    """The error to raise: a mistake in the request, or, of a full or broken disk, the error itself."""
    if isinstance(error, ValueError):
        return UserError(f"{what}: it is not a path")
    return UserError(f"{what}: {files.words(error)}") if error.errno in _REFUSED else error
