"""Reward functions of users, called in processes of their own, which are ended if they hang."""

import collections
import contextlib
import json
import math
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptjax.errors import RunError, UserError
from gptjax.files import expand

_WORKER = Path(__file__).with_name("worker.py")
_START_SECONDS = 120.0  # for the imports of the user's file


class Item(NamedTuple):
    """What a reward is computed from.

    Attributes:
      prompt, completion, reference: texts; special tokens of the prompt are spelled out.
      tokens: those of the prompt, then of the completion, for a reward model.
    """

    prompt: str
    completion: str
    reference: str
    tokens: Sequence[int] | np.ndarray = ()


class Verdict(NamedTuple):
    """The result of a reward: a finite number, or NaN and what went wrong."""

    value: float
    error: str = ""


class UserFunction:
    """FILE.py:function, called as function(prompt, completion, reference) -> float."""

    def __init__(self, spec: str, *, seconds: float, workers: int, option: str = "objective.reward"):
        """Starts one process, which imports the file; the others start when they are needed.

        `option` names the reward in messages. Raises UserError where there is no such file or function.
        """
        path, _, name = spec.rpartition(":")
        self.spec, self._seconds, self._option = spec, seconds, option
        self._path, self._name = expand(path).absolute(), name
        if not self._path.is_file():
            raise UserError(f"{option}={spec!r}: {self._path} is not a file")
        self._processes: list[_Process | None] = [None] * workers
        self._processes[0] = self._start()

    def _start(self) -> "_Process":
        process = _Process([sys.executable, "-P", str(_WORKER), str(self._path), self._name])
        reply = process.reply(_START_SECONDS)
        if reply is None or "ready" not in reply:
            process.end()
            why = (reply or {}).get("error") or f"it ended, or was not imported within {_START_SECONDS:.0f} s"
            raise UserError(f"{self._option}={self.spec!r} cannot be loaded: {why}")
        return process

    def __call__(self, items: Sequence[Item]) -> list[Verdict]:
        """The verdict on each item. A process that hangs is ended, and its item fails."""
        waiting = collections.deque(enumerate(items))
        verdicts: list[Verdict | None] = [None] * len(items)
        failures: list[BaseException] = []

        def work(number: int) -> None:
            try:
                while not failures:
                    try:
                        place, item = waiting.popleft()
                    except IndexError:
                        return
                    verdicts[place] = self._ask(number, item)
            except BaseException as error:
                failures.append(error)

        count = min(len(self._processes), len(items))
        threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        return [verdict for verdict in verdicts if verdict is not None]

    def _ask(self, number: int, item: Item) -> Verdict:
        process = self._processes[number]
        if process is None:
            try:
                process = self._processes[number] = self._start()
            except UserError as error:
                raise RunError(str(error)) from None
        texts = dict(zip(Item._fields, item[:3], strict=False))
        reply = process.ask({**texts, "seconds": self._seconds}, self._seconds)
        if reply is None or not isinstance(reply.get("value", 0.0), float):
            self._processes[number] = None
            ended = process.end()
            return Verdict(math.nan, f"took more than {self._seconds:g} s" if ended is None else f"ended ({ended})")
        return Verdict(reply.get("value", math.nan), reply.get("error", ""))

    def close(self) -> None:
        for number, process in enumerate(self._processes):
            if process is not None:
                process.end()
            self._processes[number] = None


class _Process:
    """A worker and its two pipes."""

    def __init__(self, command: list[str]):
        # A session of its own: Ctrl-C reaches only the run, which ends its workers itself.
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        self._rest = b""
        self._gone = False  # it has closed its pipes

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any] | None:
        try:
            self._process.stdin.write((json.dumps(request) + "\n").encode())
            self._process.stdin.flush()
        except OSError:
            self._gone = True
            return None
        return self.reply(seconds)

    def reply(self, seconds: float) -> dict[str, Any] | None:
        """The next line; None if none comes in time, or the process has ended."""
        end, out = time.monotonic() + seconds, self._process.stdout
        while b"\n" not in self._rest:
            if not select.select([out], [], [], max(end - time.monotonic(), 0))[0]:
                return None
            data = os.read(out.fileno(), 1 << 16)
            if not data:
                self._gone = True
                return None
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        try:
            value = json.loads(line)
        except ValueError:
            return None
        return value if isinstance(value, dict) else None

    def end(self) -> str | None:
        """Ends the process. If it had already ended by itself, returns how, else None."""
        status = None
        if self._gone:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = self._process.wait(5)
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # what it did not read
                pipe.close()
        return None if status is None else f"signal {-status}" if status < 0 else f"exit status {status}"
