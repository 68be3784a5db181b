"""Who writes in a work directory, as a lock on a disk or in a bucket says."""

import contextlib
import dataclasses
import json
import os
import socket
import time
import uuid
from pathlib import Path
from typing import Any

from gptjax import files

BEAT = 15.0  # seconds between signs of life
STALE = 120.0  # seconds without one after which an owner on another machine counts as gone


@dataclasses.dataclass(frozen=True)
class Owner:
    """Who writes in a work directory, as its lock says.

    Attributes:
      machine: an id of the boot and the process namespace: equal for processes that can see each other.
      started: when the process started, in the ticks of its machine; "" if that is not known.
      token: of this lock alone.
    """

    host: str
    machine: str
    pid: int
    started: str
    since: str
    token: str

    @classmethod
    def new(cls) -> "Owner":
        pid, since = os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S %z")
        return cls(socket.gethostname(), machine(), pid, started(pid), since, uuid.uuid4().hex)

    def is_there(self, silence: float) -> bool:
        """Whether the process is alive; `silence`: seconds since it touched its lock, by the clock of disk or store."""
        if self.machine and self.machine == machine():
            return files.alive(self.pid) and started(self.pid) == self.started
        return silence < STALE


def read(text: str) -> Owner:
    """The owner in the text of a lock; an unknown owner if it cannot be read."""
    with contextlib.suppress(ValueError, TypeError, LookupError, RecursionError):
        value: dict[str, Any] = json.loads(text)
        owner = Owner(**{field.name: value[field.name] for field in dataclasses.fields(Owner)}) if value else None
        if owner and isinstance(owner.pid, int) and str(owner.token).isalnum():
            return owner
    return unreadable("its lock cannot be read")


def unreadable(reason: str) -> Owner:
    return Owner("an unknown host", "", 0, "", f"an unknown time ({reason})", "unreadable")


def refusal(workdir: str | Path, owner: Owner) -> str:
    """The error for a process that may not write there."""
    text = (
        f"--workdir={workdir}: process {owner.pid} on {owner.host} has been writing there since {owner.since}; "
        "wait for its end, stop it, or use another --workdir"
    )
    if owner.machine != machine():
        text += f". If it is gone, the directory is free {STALE:.0f} s after its last sign of life"
    return text


def taken_over(workdir: str | Path, owner: Owner) -> str:
    """The error for a process whose lock another one has taken over."""
    return (
        f"{workdir} was taken over by process {owner.pid} on {owner.host} since {owner.since}, because this process "
        f"gave no sign of life for {STALE:.0f} s. This process has stopped writing"
    )


def machine() -> str:
    """An id that is equal for processes of one boot in one process namespace (container), which see each other."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return socket.gethostname()


def started(pid: int) -> str:
    """When a process started, in ticks since the boot; "" where the system does not say."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[19]
    return ""
