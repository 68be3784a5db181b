"""Several processes as one run: start together, agree, end together.

Beside JAX's own connections, every process holds one to process 0 for the whole run. It carries the roll call at the
start, small values that all need, requests to stop, and the last message of a process. When a process dies, its
connection breaks at once, while a collective of JAX would wait, or abort without a reason.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, ClassVar

from absl import flags

from gptjax.errors import RunError, UserError
from gptjax.processes import cluster as cluster_lib
from gptjax.processes.cluster import Cluster
from gptjax.processes.rollcall import Connection, Message, roll_call

GRACE = 10.0  # seconds in which a process must end by itself after another one has ended
LEADER_GRACE = 1.0  # JAX aborts soon after process 0 is gone, and its noise should come first

Describe = Callable[[BaseException], tuple[int, str]]


class Group:
    """The processes of a run. This class is for a run of one process, `_Members` for several.

    Attributes:
      index: number of this process.
      size: number of processes.
      advice: returns a hint for the user if another process ends the run: where the run can be continued.
    """

    index, size = 0, 1
    advice: Callable[[], str] = staticmethod(lambda: "")

    def gather(self, value: Any = None) -> list[Any]:
        """The values (JSON) of all processes, in order of index. A barrier: all must call it equally often."""
        return [value]

    def first(self, make: Callable[[], Any] = lambda: None) -> Any:
        """The result of make() in process 0, given to all processes."""
        return self.gather(make() if self.index == 0 else None)[0]

    @contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """Other processes run the body after process 0, so that they find its files on a shared disk."""
        if self.index:
            self.gather()
        yield
        if not self.index:
            self.gather()

    def same(self, name: str, values: dict[str, Any]) -> None:
        """Raises UserError unless all processes have the same values; values are JSON."""
        first, *others = self.gather(values)
        for process, other in enumerate(others, 1):
            differ = [key for key in first | other if first.get(key) != other.get(key)]
            if differ:
                pairs = ", ".join(f"{key} is {other.get(key)!r}, not {first.get(key)!r}" for key in differ)
                raise UserError(f"process {process} has another {name} than process 0: {pairs}")

    def stops_at(self, step: int, received: str) -> str:
        """The signal that stops the run before `step`, or "": the same answer in every process.

        Call it once before each step, with the signal that this process has received or "".
        """
        return received


_current = Group()


def current() -> Group:
    """The group that this process belongs to."""
    return _current


@contextmanager
def join(options: flags.FlagValues, describe: Describe) -> Iterator[Group]:
    """Joins the other processes of the run, if flags, Slurm or Cloud TPU say that there are any.

    An error in the body ends all processes. With several processes, this function does not raise the error but ends the
    process, which could otherwise wait forever for a peer in a collective.

    Args:
      describe: makes (exit status, last line) of an error.

    Raises:
      UserError: the flags do not fit, or the port is taken.
      RunError: a process did not connect in time; the message names it.
    """
    global _current
    cluster = cluster_lib.find(options)
    if cluster is None:
        yield _current
        return
    _current = group = _Members(cluster, roll_call(cluster, options.join_timeout))
    try:
        _start_jax(cluster, options.join_timeout)
        yield group
        group.part()
    except BaseException as error:
        group.fail(error, describe)
    finally:
        _current = Group()


def _start_jax(cluster: Cluster, timeout: float) -> None:
    import jax

    # JAX's handler of SIGTERM would hide the signal; `stops_at` decides where all processes stop.
    jax.config.update("jax_enable_preemption_service", False)
    host, _, port = cluster.address.rpartition(":")
    jax.distributed.initialize(
        f"{host}:{int(port) + 1}",
        cluster.num_processes,
        cluster.process_id,
        local_device_ids=cluster.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=max(int(timeout), 1),
        shutdown_timeout_seconds=60,
    )


class _PeerEnded(Exception):
    """Another process has ended, so its answer will never come."""


class _Members(Group):
    """Several processes. Process 0 collects and distributes messages; each connection has a listening thread."""

    def __init__(self, cluster: Cluster, connections: dict[int, Connection]):
        self.index, self.size = cluster.process_id, cluster.num_processes
        self._cluster, self._connections = cluster, connections
        self._changed = threading.Condition()
        self._round = 0
        self._gathered: dict[int, list[Any]] = {}
        self._parts: dict[tuple[str, int], dict[int, Any]] = {}  # in process 0: the answers to each question so far
        self._ended: Message | None = None  # the first process that ended
        self._finished = False
        self._step, self._signal, self._stop_step = -1, "", None
        for process, connection in connections.items():
            threading.Thread(target=self._listen, args=(process, connection), daemon=True).start()
        self._catch_abort()

    def gather(self, value: Any = None) -> list[Any]:
        self._round += 1
        self._tell({"kind": "gather", "round": self._round, "value": value})
        with self._changed:
            self._changed.wait_for(lambda: self._round in self._gathered or self._ended)
            if self._round not in self._gathered:
                raise _PeerEnded
            return self._gathered.pop(self._round)

    def stops_at(self, step: int, received: str) -> str:
        """When process 0 announces a signal, each process answers with its next step; all stop at the latest of these.

        Without a signal nothing is exchanged, and no process waits for another. After answering, a process waits only
        at the first step at which it might have to stop.
        """
        with self._changed:
            self._step = step
            ask = received and not self._signal
        if ask:
            self._tell({"kind": "signal", "signal": received})
        with self._changed:
            if self._signal:
                self._changed.wait_for(lambda: self._stop_step is not None or self._ended)
            return self._signal if self._signal and step >= (self._stop_step or 0) else ""

    def part(self) -> None:
        """The normal end: after it, the end of another process is no failure."""
        import jax

        self.gather()
        with self._changed:
            self._finished = True
        jax.distributed.shutdown()

    def fail(self, error: BaseException, describe: Describe) -> None:
        """Tells the others why, prints it, and ends this process. If another process ended first, its reason counts."""
        with self._changed:
            if not isinstance(error, UserError):  # a collective may have failed because a process is gone
                wait = 1.0 if isinstance(error, RunError | KeyboardInterrupt) else 5.0
                self._changed.wait_for(lambda: self._ended, timeout=wait)
            ended = self._ended
        if ended and not (ended["line"] and isinstance(error, RunError | UserError)):
            self._end(ended)
        status, line = describe(error)
        self._tell({"kind": "ended", "process": self.index, "status": status, "line": line})
        time.sleep(0.1)  # lets the message leave before the connection breaks
        _exit(status, line)

    def _tell(self, message: Message) -> None:
        if self.index == 0:
            self._receive(0, message)
        else:
            self._connections[0].send(message)

    def _tell_all(self, message: Message) -> None:
        """Sends a message from process 0 to every process, itself included."""
        for connection in self._connections.values():
            connection.send(message)
        self._receive(0, message)

    def _listen(self, process: int, connection: Connection) -> None:
        while (message := connection.receive()) is not None:
            self._receive(process, message)
        self._receive(process, {"kind": "ended", "process": process, "status": 1, "line": ""})

    def _receive(self, sender: int, message: Message) -> None:
        kind = message.get("kind")
        handler = self._HANDLERS.get(kind) if isinstance(kind, str) else None
        if handler:
            handler(self, sender, message)
        else:  # perhaps from another version of gptjax
            print(f"warning: {self._cluster.describe(sender)} sent a message of unknown kind {kind!r}", file=sys.stderr)

    def _on_gather(self, sender: int, message: Message) -> None:
        if values := self._collect("gather", message["round"], sender, message["value"]):
            self._tell_all({"kind": "gathered", "round": message["round"], "values": values})

    def _on_gathered(self, sender: int, message: Message) -> None:
        with self._changed:
            self._gathered[message["round"]] = message["values"]
            self._changed.notify_all()

    def _on_signal(self, sender: int, message: Message) -> None:
        """In process 0: some process received a signal. Only the first signal counts."""
        with self._changed:
            known, self._signal = self._signal, self._signal or message["signal"]
        if not known:
            self._tell_all({"kind": "asked", "signal": message["signal"]})

    def _on_asked(self, sender: int, message: Message) -> None:
        with self._changed:
            self._signal = message["signal"]
            coming = self._step + 1
        self._tell({"kind": "coming", "step": coming})

    def _on_coming(self, sender: int, message: Message) -> None:
        if steps := self._collect("coming", 0, sender, message["step"]):
            self._tell_all({"kind": "stop", "step": max(steps)})

    def _on_stop(self, sender: int, message: Message) -> None:
        with self._changed:
            self._stop_step = message["step"]
            self._changed.notify_all()

    def _on_ended(self, sender: int, message: Message) -> None:
        # Send to the others first: once `_ended` is set, the main thread may end this process at any moment.
        if self.index == 0 and sender == message["process"]:
            for process, connection in self._connections.items():
                if process != sender:
                    connection.send(message)
        with self._changed:
            if self._ended or self._finished or message["process"] == self.index:
                known = True
            else:
                known, self._ended = False, message
                self._changed.notify_all()
        if not known:
            wait = LEADER_GRACE if message["process"] == 0 and not message["line"] else GRACE
            threading.Thread(target=lambda: (time.sleep(wait), self._end(message)), daemon=True).start()

    _HANDLERS: ClassVar[dict[str, Callable[["_Members", int, Message], None]]] = {
        "gather": _on_gather,
        "gathered": _on_gathered,
        "signal": _on_signal,
        "asked": _on_asked,
        "coming": _on_coming,
        "stop": _on_stop,
        "ended": _on_ended,
    }

    def _collect(self, question: str, number: int, sender: int, value: Any) -> list[Any] | None:
        """All answers to a question once the last one has come, else None."""
        with self._changed:
            answers = self._parts.setdefault((question, number), {})
            answers[sender] = value
            if len(answers) < self.size:
                return None
            del self._parts[question, number]
            return [answers[process] for process in range(self.size)]

    def _end(self, ended: Message) -> None:
        """Ends this process because another one has ended."""
        _exit(*self._last_words(ended))

    def _last_words(self, ended: Message | None) -> tuple[int, str]:
        """The exit status and the last line of a process that ends because of `ended`, or because of JAX if None."""
        if ended and ended["line"]:
            return ended["status"], f"{ended['line']} (reported by {self._cluster.describe(ended['process'])})"
        if ended:
            name = self._cluster.describe(ended["process"])
            what = f"{name} of {self.size} was killed or crashed, and the run cannot go on without it"
        else:
            # For example, a peer hangs: JAX waits 100 s for its heartbeat.
            what = "JAX aborted this process; the lines above say why"
        advice = self.advice()
        return 1, f"failed: {what}; {advice}" if advice else f"failed: {what}"

    def _catch_abort(self) -> None:
        """Prints a last line when JAX aborts a process whose coordinator is gone; Python's handlers run too late."""

        def handler(_: int) -> None:
            # Uses no lock and no Python stream, since the aborting thread may hold them.
            deadline = time.monotonic() + 2
            while not self._ended and time.monotonic() < deadline:
                time.sleep(0.02)
            _abort(*self._last_words(self._ended))

        self._abort_handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(handler)  # a reference keeps the handler alive
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).signal(int(signal.SIGABRT), self._abort_handler)


_exiting = threading.Lock()


def _exit(status: int, line: str) -> None:
    """Prints `line` and ends the process at once; only the first thread that calls it prints."""
    _exiting.acquire()
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        print(line, file=sys.stderr, flush=True)
    os._exit(status)


def _abort(status: int, line: str) -> None:
    """`_exit` for the handler of a signal, which must not wait for a lock that another thread holds."""
    if not _exiting.acquire(blocking=False):
        time.sleep(1)  # another thread prints the last line
        os._exit(status)
    with suppress(OSError):
        os.write(2, f"{line}\n".encode(errors="replace"))
    os._exit(status)
