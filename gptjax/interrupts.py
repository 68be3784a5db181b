"""Ctrl-C ends a command at any moment: during imports, a compilation, or a callback that swallows exceptions.

Python runs a signal handler in the main thread, between two operations, and the exception that it raises can be lost:
a callback of JAX or of the garbage collector prints and drops it, an import turns it into an ImportError. So the
handler records the signal and raises KeyboardInterrupt, or ends the process at once during an import; any later error
is reported as the signal (`failures.describe`); and a thread ends the process if the main thread does not end soon.

`install` is called before anything else is imported, and only where gptjax is the command (`gptjax/__init__.py`).
"""

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

DEAF = 0.5  # seconds after which the main thread, if it has not run the handler, is taken to be inside C code
GRACE = 2.0  # seconds to close what is open
# Signals that end a job, besides Ctrl-C: from kill and schedulers, a closed connection, Slurm's --signal=USR1@120.
STOPPING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2") if hasattr(signal, name))
SECOND_GRACE = 10.0  # seconds after the second Ctrl-C, where other code handles signals (a loop that saves first)

received = ""  # the name of the signal that was acted on here
status = 0  # exit status of the command, once it is known

_installed = False
_goes_on = False  # the command takes Ctrl-C as one of its inputs
_phase = "importing"  # then "running", "ending"
_clean: list[Callable[[], Any]] = []
_leaving = threading.Lock()


def is_command(arguments: list[str]) -> bool:
    """Whether sys.orig_argv is a command of gptjax: `gptjax` or `python -m gptjax.VERB`."""
    rest = iter(arguments[1:])
    for argument in rest:
        if argument in ("-X", "-W"):
            next(rest, None)
        elif argument.startswith("-m"):
            module = argument[2:] or next(rest, "")
            return module.split(".")[0] == "gptjax"
        elif argument == "-c":
            return False
        elif not argument.startswith("-"):
            return os.path.basename(argument).removesuffix(".exe") == "gptjax"  # noqa: PTH119, before pathlib is there
    return False


def install() -> None:
    """Handles SIGINT from now on. Call it in the main thread."""
    global _installed
    _installed = True
    handle(signal.SIGINT)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    threading.Thread(target=_watch, args=(reader,), daemon=True).start()
    before = sys.unraisablehook
    sys.unraisablehook = lambda what: None if what.exc_type is KeyboardInterrupt else before(what)


def handle(*signals: int) -> dict[int, Any]:
    """Makes these signals end the command as Ctrl-C does, except those that are ignored (nohup, background jobs).

    Returns the previous handlers. Does nothing if gptjax is not the command.
    """
    before: dict[int, Any] = {}
    for number in signals if _installed else ():
        with suppress(ValueError):  # not the main thread, which alone may handle signals
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, _note)
    return before


@contextmanager
def answered_by(handler: Callable[[int, Any], Any]) -> Iterator[None]:
    """Ctrl-C calls `handler` with the number of the signal and the frame, and the command continues, as in a shell."""
    global _goes_on
    before = signal.signal(signal.SIGINT, handler)
    _goes_on = True
    try:
        yield
    finally:
        _goes_on = False
        signal.signal(signal.SIGINT, before)


def on_leaving(clean: Callable[[], Any]) -> None:
    """Calls `clean`, which must be quick, if the process ends without unwinding the stack."""
    _clean.append(clean)


def forget(clean: Callable[[], Any]) -> None:
    with suppress(ValueError):
        _clean.remove(clean)


def running() -> None:
    """The verb begins: from here on Ctrl-C raises KeyboardInterrupt, so that what is open is closed."""
    global _phase, received
    _phase, received = "running", ""


def ending(with_status: int) -> None:
    """The verb has ended and printed its last line."""
    global _phase, status
    _phase, status = "ending", with_status


def last_words() -> tuple[int, str]:
    """The exit status and the last line of a command that a signal has ended."""
    if received in ("", "SIGINT"):
        return 130, "failed: interrupted"
    return 1, f"failed: {stopped_by(received)}"


def stopped_by(name: str) -> str:
    return f"stopped by {name}. The same command continues from what is saved, or starts anew"


def leave(with_status: int, line: str = "") -> None:
    """Ends the process at once. Only the first thread that calls it does anything."""
    if not _leaving.acquire(blocking=False):
        time.sleep(5)
        os._exit(with_status)
    for clean in reversed(_clean):
        with suppress(Exception):
            clean()
    with suppress(Exception):
        if _phase != "importing":
            sys.stdout.flush()
    with suppress(OSError):
        os.write(2, f"{line}\n".encode() if line else b"")
    os._exit(with_status)


def leave_after_failure(with_status: int) -> None:
    """Runs the functions of atexit, then ends a command that has failed. Does nothing if gptjax is not the command.

    C++ threads of libraries may still run (writes to a full disk); during Python's own exit they abort the process.
    """
    if _installed:
        with suppress(Exception):
            atexit._run_exitfuncs()
            sys.stderr.flush()
        leave(with_status)


def _note(number: int, frame: Any) -> None:
    global received
    again, received = bool(received), received or signal.Signals(number).name
    if _phase == "ending":
        leave(status)
    if again or _phase == "importing" or _is_import(frame):
        leave(*last_words())
    raise KeyboardInterrupt


def _is_import(frame: Any) -> bool:
    """Whether an import is running: C modules print an exception there, or turn it into an ImportError."""
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


def _watch(reader: int) -> None:
    """Ends the process if the main thread does not: it is in C code, or the exception was lost."""
    interrupts = 0
    while data := os.read(reader, 64):
        for number in data:
            interrupts += number == signal.SIGINT
            with suppress(RuntimeError):  # from Python 3.12 on, no thread can start while the process exits
                if signal.getsignal(number) is _note:
                    threading.Thread(target=_end_soon, args=(number,), daemon=True).start()
                elif interrupts > 1 and not _goes_on:
                    threading.Thread(target=_end_after, args=(SECOND_GRACE,), daemon=True).start()


def _end_soon(number: int) -> None:
    global received
    time.sleep(DEAF)
    if received:
        _end_after(GRACE)
    elif _phase != "ending":
        received = signal.Signals(number).name
        leave(*last_words())


def _end_after(seconds: float) -> None:
    time.sleep(seconds)
    if _phase != "ending":
        leave(*last_words())
