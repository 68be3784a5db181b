"""One writer in a work directory in a bucket: the object `.lock` says which process writes there.

It is written on condition that it does not exist; object stores let only one writer succeed. The owner rewrites it
every BEAT seconds; the clock is that of the store. An abandoned lock is taken over by the process that creates the
object with the lock's token in its name and then finds the lock unchanged.
"""

import contextlib
import dataclasses
import json
import time

from gptjax.artifacts import owner as owners
from gptjax.artifacts.owner import STALE, Owner
from gptjax.buckets import Bucket
from gptjax.errors import RunError, UserError

NAME = ".lock"


class BucketLock:
    """The lock in a bucket, held from `take` to `release`."""

    def __init__(self, bucket: Bucket, owner: Owner):
        self._bucket, self._owner = bucket, owner
        self._text = (json.dumps(dataclasses.asdict(owner)) + "\n").encode()
        self._hasty = Bucket(bucket.url, patience=0.0)  # without retries: for heartbeats, and for the release

    @classmethod
    def take(cls, bucket: Bucket, owner: Owner) -> "BucketLock":
        """Raises UserError where another process writes there, or the bucket does not exist or cannot be written."""
        lock = cls(bucket, owner)
        while True:
            holder = _read(bucket, NAME)
            if bucket.create(NAME, lock._text) if holder is None else lock._take_over(holder):
                return lock

    def check(self) -> None:
        """Raises RunError where another process has taken the run over, because this one gave no sign of life."""
        holder = _read(self._bucket, NAME)
        if holder is not None and holder.token != self._owner.token:
            raise RunError(owners.taken_over(self._bucket.url, holder))

    def beat(self) -> None:
        """Writes a sign of life. If the store does not answer, the next one follows in BEAT seconds."""
        with contextlib.suppress(UserError, RunError):
            if (holder := _read(self._hasty, NAME)) is not None and holder.token == self._owner.token:
                self._hasty.write(NAME, self._text)

    def release(self) -> None:
        with contextlib.suppress(UserError, RunError):
            if (holder := _read(self._hasty, NAME)) is not None and holder.token == self._owner.token:
                self._hasty.remove([NAME])

    def _take_over(self, holder: Owner) -> bool:
        """Takes an abandoned lock over; returns whether that succeeded. Raises UserError if its owner is alive."""
        claim, mine = f"{NAME}.{holder.token}.claim", f"{NAME}.{self._owner.token}"
        self._bucket.write(mine, self._text)  # its time is the clock of the store
        try:
            now = self._bucket.modified(mine) or time.time()
            if holder.is_there(self._silence(NAME, now)):
                raise UserError(owners.refusal(self._bucket.url, holder))
            if not self._bucket.create(claim, self._text):
                rival = _read(self._bucket, claim)
                if rival is not None and rival.is_there(self._silence(claim, now)):
                    raise UserError(owners.refusal(self._bucket.url, rival))
                self._bucket.remove([claim])  # its process died while taking over
                return False
            try:
                if _read(self._bucket, NAME) != holder:
                    return False
                self._bucket.write(NAME, self._text)
                return True
            finally:
                self._bucket.remove([claim])
        finally:
            self._bucket.remove([mine])

    def _silence(self, name: str, now: float) -> float:
        """Seconds since an object was written; STALE if it does not exist."""
        modified = self._bucket.modified(name)
        return STALE if modified is None else now - modified


def _read(bucket: Bucket, name: str) -> Owner | None:
    data = bucket.read(name)
    return None if data is None else owners.read(data.decode(errors="replace"))
