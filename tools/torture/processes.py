"""Starts commands, sends signals to them and waits for them."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).parents[2]
HOOK = Path(__file__).parent / "hook"
START_SECONDS = 600  # for the server, on a busy machine


class Hung(Exception):
    """A command did not end in time."""


class Command:
    """A command in its own session, which it leads."""

    def __init__(self, server: "Server", log: Path, argv: Sequence[str]):
        self.log, self.argv = log, argv
        self.begin = time.perf_counter()
        self._server = server
        self.pid: int = server.answer(START_SECONDS)["pid"]
        self.status: int | None = None

    def wait(self, seconds: float) -> int | None:
        """The exit status, negative for a signal; None if it has not ended within `seconds`."""
        if self.status is None and (answer := self._server.answer(seconds)):
            self.status = answer["status"]
        return self.status

    def finish(self, seconds: float) -> int:
        """The exit status. Kills a command that does not end in time, and raises Hung."""
        status = self.wait(seconds)
        if status is None:
            stacks = self.errors()[-200:]
            self.signal(signal.SIGKILL, "group")
            self.wait(60)
            raise Hung(f"gptjax {self.argv[0]} did not end within {seconds:.0f} s: {stacks}")
        return status

    def signal(self, number: int, whom: str) -> None:
        """Sends a signal to the "group", the "parent" or one "worker" (the parent if there is none)."""
        with contextlib.suppress(ProcessLookupError):
            if self.status is not None:
                return
            if whom == "group":
                os.killpg(self.pid, number)
            else:
                workers = [pid for pid in self.alive() if pid != self.pid] if whom == "worker" else []
                os.kill(workers[-1] if workers else self.pid, number)

    def alive(self) -> list[int]:
        """The living processes of its session."""
        pids = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if os.getsid(process.pid) == self.pid and process.status() != psutil.STATUS_ZOMBIE:
                    pids.append(process.pid)
        return pids

    def errors(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def last_line(self) -> str:
        lines = [line for line in self.errors().splitlines() if line.strip()]
        return lines[-1].strip() if lines else ""


class Server:
    """Starts commands one after the other, see `server.py`."""

    def __init__(self, environment: dict[str, str], log: Path):
        self._rest = b""
        self.environment, self._log = environment, log
        begin = time.perf_counter()
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tools.torture.server"],
                cwd=REPOSITORY,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,  # Ctrl-C goes to the harness, which then ends the server
            )
        if not self.answer(START_SECONDS):
            raise SystemExit(f"the server of commands did not start within {START_SECONDS} s")
        self.start_seconds = time.perf_counter() - begin
        self.running: Command | None = None

    def answer(self, seconds: float) -> dict | None:
        """The next line of the server, or None if there is none within `seconds`."""
        end = time.monotonic() + seconds
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self._process.stdout], [], [], max(end - time.monotonic(), 0))
            if not ready:
                return None
            if not (more := os.read(self._process.stdout.fileno(), 1 << 16)):
                raise SystemExit(f"the server of commands has died: {self._log.read_text()[-2000:]}")
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)

    def start(
        self, argv: Sequence[str], *, cwd: Path, log: Path, real: bool = False, **environment: str | None
    ) -> Command:
        """Starts `gptjax ARGV`. Environment variables that are None are removed."""
        env = {k: v for k, v in (self.environment | environment).items() if v is not None}
        log.parent.mkdir(parents=True, exist_ok=True)
        job = {"argv": list(argv), "env": env, "cwd": str(cwd), "real": real}
        job |= {"stderr": str(log), "stdout": str(log.with_suffix(".out"))}
        self._process.stdin.write(json.dumps(job).encode() + b"\n")
        self._process.stdin.flush()
        self.running = Command(self, log, argv)
        return self.running

    def close(self) -> None:
        if self.running and self.running.status is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.running.pid, signal.SIGKILL)
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def environment(programs: Path) -> dict[str, str]:
    """The environment of all commands: no variables of JAX, Slurm or the user, one shared compilation cache."""
    foreign = ("JAX_", "XLA_", "GPTJAX_", "SLURM_", "OMPI_", "TORTURE_", "PYTEST_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    kept |= {"PYTHONPATH": f"{HOOK}{os.pathsep}{REPOSITORY}", "COLUMNS": "200"}
    # Compiling takes longer than computing here, so all programs are cached.
    kept |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    return kept | {"JAX_COMPILATION_CACHE_DIR": str(programs), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
