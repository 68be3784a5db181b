"""A process that has imported gptjax and JAX and forks one command after the other, which saves their start-up.

  python -m tools.torture.server MODULE ...

Reads jobs from standard input, one JSON object per line: argv (of `gptjax VERB ...`), env, cwd, stdout, stderr
(files), and real: whether to start a new interpreter instead. Answers with the pid once the command has its session,
and with the status when it has ended. Orphaned processes become its children, so that none stays a zombie.
"""

import ctypes
import importlib
import json
import os
import pkgutil
import signal
import sys
import tempfile
from typing import Any

_SET_CHILD_SUBREAPER = 36  # of linux/prctl.h
_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM}


def main() -> int:
    """Serves until its input ends. In a forked child: runs the job, and exits like the command."""
    ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    _import_all("gptjax")
    jobs, answers = os.fdopen(os.dup(0), "r"), os.dup(1)
    os.write(answers, b'{"ready": true}\n')
    for line in jobs:
        job = json.loads(line)
        ready, begun = os.pipe()
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        pid = os.fork()
        if pid == 0:
            for descriptor in (answers, ready):
                os.close(descriptor)
            return _run(job, begun)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        os.close(begun)
        os.read(ready, 1)
        os.close(ready)
        os.write(answers, json.dumps({"pid": pid}).encode() + b"\n")
        os.write(answers, json.dumps({"status": _wait(pid)}).encode() + b"\n")
    return 0


def _import_all(package: str) -> None:
    """Imports everything that a command imports while it runs; packages that are not installed are skipped."""
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
        if not module.name.endswith("__main__"):
            try:
                importlib.import_module(module.name)
            except ImportError:
                continue


def _wait(pid: int) -> int:
    """The status of a child, negative for a signal; also reaps all other children that end meanwhile."""
    while True:
        ended, status = os.waitpid(-1, 0)
        if ended == pid:
            return os.waitstatus_to_exitcode(status)


def _run(job: dict[str, Any], begun: int) -> int:
    os.setsid()
    for number, name in ((0, os.devnull), (1, job["stdout"]), (2, job["stderr"])):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644), number)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    for number in _SIGNALS - {signal.SIGINT}:
        signal.signal(number, signal.SIG_DFL)
    verb, *rest = job["argv"]
    if job["real"]:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.write(begun, b".")
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        os.execve(sys.executable, [sys.executable, "-m", f"gptjax.{verb}", *rest], job["env"])
    tempfile.tempdir = None
    sys.argv = ["gptjax", verb, *rest]
    if job["env"].get("TORTURE_ROOT"):
        import sitecustomize

        sitecustomize.install()
    from gptjax import cli, interrupts

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for background processes
    interrupts.install()  # as in the gptjax command
    os.write(begun, b".")
    os.close(begun)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
