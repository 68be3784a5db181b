"""Loaded into a disturbed process: counts file operations of it and its workers, and kills at a given one.

Python imports it before anything else. Nothing happens unless TORTURE_ROOT is set.
"""

import os
import signal
import sys

RECORD = 160  # bytes per line of the tally, so that its size gives the number of lines
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# The audit event, and the positions in its arguments of the path and of the directory that it is relative to.
_EVENTS = {
    "os.rename": (1, 3),
    "os.remove": (0, 1),
    "os.rmdir": (0, 1),
    "os.mkdir": (0, 2),
    "os.link": (1, 3),
    "os.symlink": (1, 2),
    "os.truncate": (0, None),
}


def install() -> None:
    """Starts counting.

    TORTURE_ROOT: only paths under it count. TORTURE_TALLY: a file to which each operation is appended.
    TORTURE_AT: the number of the operation at which TORTURE_WHO ("group", "parent" or "self") is killed.
    TORTURE_DELAY: seconds after that operation at which this process is killed instead, in the middle of later work.
    """
    root = os.environ["TORTURE_ROOT"]
    tally = os.open(os.environ["TORTURE_TALLY"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    at, who = int(os.environ.get("TORTURE_AT", "0")), os.environ.get("TORTURE_WHO", "group")
    delay = float(os.environ.get("TORTURE_DELAY", "0"))

    def count(event: str, path: str) -> None:
        line = f"{event} {path.removeprefix(root)}".encode(errors="replace")[: RECORD - 1]
        os.write(tally, line.replace(b"\n", b" ").ljust(RECORD - 1) + b"\n")
        if at and os.fstat(tally).st_size // RECORD >= at:
            if delay:
                signal.setitimer(signal.ITIMER_REAL, delay)  # SIGALRM has no handler, so it ends the process at once
            elif who == "group":
                os.killpg(os.getsid(0), signal.SIGKILL)
            else:
                os.kill(os.getsid(0) if who == "parent" else os.getpid(), signal.SIGKILL)

    def audit(event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            if not flags & _WRITES:
                return
            directory = None
        elif event in _EVENTS:
            place, relative = _EVENTS[event]
            path, directory = arguments[place], None if relative is None else arguments[relative]
        else:
            return
        if (path := _absolute(path, directory)) and path.startswith(root):
            count(event, path)

    def fsync(descriptor: int) -> None:
        """Counts os.fsync, which has no audit event."""
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        path = _absolute(f"/proc/self/fd/{number}", None, link=True)
        if path and path.startswith(root):
            count("os.fsync", path)
        original(descriptor)

    original, os.fsync = os.fsync, fsync
    sys.addaudithook(audit)


def _absolute(path: object, directory: int | None, *, link: bool = False) -> str | None:
    """The path of an event, or None for a descriptor."""
    try:
        if link:
            return os.readlink(path)  # noqa: PTH115
        path = os.fsdecode(path)
        if not path.startswith("/"):
            inside = directory is not None and directory >= 0
            path = os.path.join(os.readlink(f"/proc/self/fd/{directory}") if inside else os.getcwd(), path)  # noqa: PTH109, PTH115, PTH118
        return path
    except (OSError, TypeError):
        return None


if os.environ.get("TORTURE_ROOT"):
    install()
