"""The roll call at the start of a run of several processes, and the connections that it leaves."""

import json
import selectors
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any

from gptjax.errors import RunError, UserError
from gptjax.processes.cluster import Cluster

Message = dict[str, Any]
HELLO_BYTES = 1024  # more than the first message of a process has


class Connection:
    """JSON messages over TCP, one per line. The kernel notices within 30 s when the other machine is gone."""

    def __init__(self, sock: socket.socket):
        sock.settimeout(None)
        options = ("TCP_NODELAY", 1), ("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (*options, ("TCP_USER_TIMEOUT", 30_000)):
            with suppress(AttributeError, OSError):  # not every system has these options
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self.socket = sock
        self._reader = sock.makefile("rb")
        self._lock = threading.Lock()

    def send(self, message: Message) -> None:
        with self._lock, suppress(OSError):  # a broken connection shows in `receive`
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, timeout: float | None = None) -> Message | None:
        """The next message; None where the connection has ended or the line is not a message."""
        self.socket.settimeout(timeout)
        try:
            return _parse(self._reader.readline())
        except OSError:
            return None


def _parse(line: bytes) -> Message | None:
    try:
        message = json.loads(line)
    except ValueError:
        return None
    return message if isinstance(message, dict) else None


def roll_call(cluster: Cluster, timeout: float) -> dict[int, Connection]:
    """Waits for all processes. Returns {process: connection}: process 0 has all others, each other has process 0."""
    call = _call_members if cluster.process_id == 0 else _answer
    return call(cluster, timeout, time.monotonic() + timeout)


def _call_members(cluster: Cluster, timeout: float, deadline: float) -> dict[int, Connection]:
    port = int(cluster.address.rpartition(":")[2])
    there: dict[int, Connection] = {}
    problem = ""
    with ExitStack() as stack:
        try:
            server = stack.enter_context(_listen(port))
        except OSError as error:
            raise UserError(f"process 0 cannot listen on port {port}: {error.strerror}; use another port") from None
        callers = _callers(stack, server, deadline)
        while len(there) < cluster.num_processes - 1 and not problem:
            caller = next(callers, None)
            if caller is None:
                break
            process, size, sock = caller
            if process in there or size != cluster.num_processes or not 0 < process < size:
                problem = (
                    f"a process joined as number {process} of {size}, but this run has {cluster.num_processes} "
                    "processes with different numbers; check --num_processes and --process_id"
                )
            there[process] = Connection(sock)
    absent = [process for process in range(1, cluster.num_processes) if process not in there]
    if absent and not problem:
        names = ", ".join(cluster.describe(process) for process in absent[:16])
        problem = (
            f"{len(absent)} of {cluster.num_processes} processes did not show up within {timeout:g} s: {names}"
            f"{', ...' if len(absent) > 16 else ''}. See what they printed, and whether they reach {cluster.address}"
        )
    for connection in there.values():
        connection.send({"problem": problem})
    if problem:
        raise RunError(problem)
    return there


def _callers(stack: ExitStack, server: socket.socket, deadline: float) -> Iterator[tuple[int, int, socket.socket]]:
    """(number, size of its run, connection) of each process that connects before the deadline.

    All connections are read at the same time: a foreign one that sends nothing does not delay the others.
    """
    selector = stack.enter_context(selectors.DefaultSelector())
    server.setblocking(False)
    selector.register(server, selectors.EVENT_READ)
    heard: dict[socket.socket, bytes] = {}
    stack.callback(lambda: [sock.close() for sock in heard])
    while (left := deadline - time.monotonic()) > 0:
        for key, _ in selector.select(left):
            sock = key.fileobj
            if sock is server:
                with suppress(OSError):  # the caller may have closed the connection
                    caller = server.accept()[0]
                    heard[caller] = b""
                    caller.setblocking(False)
                    selector.register(caller, selectors.EVENT_READ)
                continue
            try:
                received = sock.recv(HELLO_BYTES)
            except BlockingIOError:
                continue
            except OSError:
                received = b""
            heard[sock] += received
            if received and b"\n" not in heard[sock] and len(heard[sock]) < HELLO_BYTES:
                continue
            selector.unregister(sock)
            match _parse(heard.pop(sock)):
                case {"process": int(process), "size": int(size)}:
                    yield process, size, sock
                case _:  # not a process of this run
                    sock.close()


def _listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        with suppress(OSError):  # IPv6 is compiled in, but the machine has none
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", port), backlog=1024)


def _answer(cluster: Cluster, timeout: float, deadline: float) -> dict[int, Connection]:
    host, _, port = cluster.address.rpartition(":")
    while True:
        try:
            connection = Connection(socket.create_connection((host.strip("[]"), int(port)), timeout=5))
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise RunError(
                    f"process 0 did not answer at {cluster.address} within {timeout:g} s ({error}). See what it "
                    f"printed, and whether this machine reaches it"
                ) from None
            time.sleep(0.2)
    connection.send({"process": cluster.process_id, "size": cluster.num_processes})
    reply = connection.receive(timeout=timeout + 5)
    if reply is None:
        raise RunError(f"process 0 at {cluster.address} ended before all processes were there; see what it printed")
    if reply["problem"]:
        raise RunError(reply["problem"])
    return {0: connection}
