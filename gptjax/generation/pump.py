"""A thread that drives an engine, and for each request a stream of its events.

An error of the engine ends the requests that it hit, never the thread.
"""

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence

import numpy as np

from gptjax.errors import RunError
from gptjax.generation.engine import Engine
from gptjax.generation.events import Event
from gptjax.generation.params import SamplingParams

IDLE = 0.2  # seconds after which an idle thread checks deadlines


class Closed(RunError):
    """The pump takes no more requests: it is closing."""


class Stream:
    """The events of one request: `for event in stream` or `async for event in stream`, only once. The last one has a
    `finish_reason`.

    Attributes:
      prompt_tokens, completion_tokens, cached_tokens: counts so far.
      expired: whether the request was ended because its deadline had passed.
      first_token_at: time.monotonic() of the first event with a token, or None.
    """

    def __init__(self, cancel: Callable[["Stream"], None], prompt_tokens: int, deadline: float | None):
        self.prompt_tokens, self.completion_tokens, self.cached_tokens = prompt_tokens, 0, 0
        self.submitted_at, self.deadline = time.monotonic(), deadline
        self.first_token_at: float | None = None
        self.expired = self.ended = False
        self._cancel = cancel
        self._events: deque[Event] = deque()
        self._changed = threading.Condition()
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Future] | None = None

    def cancel(self) -> None:
        """Ends the request soon. Nothing happens if it has ended, or is ending."""
        self._cancel(self)

    def put(self, event: Event) -> None:
        """Delivers an event; called by the pump."""
        with self._changed:
            if event.tokens and self.first_token_at is None:
                self.first_token_at = time.monotonic()
            self.completion_tokens += len(event.tokens)
            self.cached_tokens += event.cached_tokens
            self.ended = self.ended or event.finish_reason is not None
            self._events.append(event)
            self._changed.notify_all()
            waiter, self._waiter = self._waiter, None
        if waiter:
            loop, future = waiter
            with contextlib.suppress(RuntimeError):  # the event loop is closed, so nobody waits
                loop.call_soon_threadsafe(_wake, future)

    def __iter__(self) -> Iterator[Event]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._events)
                event = self._events.popleft()
            yield event
            if event.finish_reason:
                return

    async def __aiter__(self) -> AsyncIterator[Event]:
        while True:
            with self._changed:
                event = self._events.popleft() if self._events else None
                if event is None:
                    loop = asyncio.get_running_loop()
                    future = loop.create_future()
                    self._waiter = loop, future
            if event is None:
                await future
                continue
            yield event
            if event.finish_reason:
                return


class Pump:
    """Drives an engine in a thread of its own. All methods may be called from any thread."""

    def __init__(self, engine: Engine, name: str = "engine"):
        self.engine = engine
        self._streams: dict[int, Stream] = {}
        self._handles: dict[Stream, int] = {}
        self._lock = threading.Lock()  # held by `submit` until the stream is registered, so that no event comes before
        self._closing = self._closed = False
        self._thread = threading.Thread(target=self._run, name=f"pump of {name}", daemon=True)
        self._thread.start()

    def submit(
        self, prompt: Sequence[int] | np.ndarray, params: SamplingParams, *, seconds: float | None = None, **options
    ) -> Stream:
        """Queues a prompt, which is cancelled after `seconds`. Options and errors: see `Engine.submit`.

        Raises:
          Closed: the pump is closing.
        """
        with self._lock:
            if self._closing:
                raise Closed("the model is shutting down")
            handle = self.engine.submit(prompt, params, **options)
            stream = Stream(self._cancel, len(prompt), None if seconds is None else time.monotonic() + seconds)
            self._streams[handle], self._handles[stream] = stream, handle
        return stream

    @property
    def alive(self) -> bool:
        """Whether the thread serves requests."""
        return self._thread.is_alive() and not self._closing

    def close(self, seconds: float = 0.0) -> None:
        """Refuses new requests, gives the present ones so many `seconds`, cancels the rest, and ends the thread."""
        with self._lock:
            self._closing = True
        end = time.monotonic() + seconds
        while self._streams and time.monotonic() < end and self._thread.is_alive():
            time.sleep(0.01)
        for stream in list(self._handles):
            stream.cancel()
        self._closed = True
        self._thread.join(timeout=60)

    def _cancel(self, stream: Stream) -> None:
        with self._lock:
            handle = self._handles.get(stream)
        if handle is not None:
            self.engine.cancel(handle)

    def _run(self) -> None:
        while not (self._closed and not self._streams):
            self._expire()
            if not self.engine.wait(IDLE):
                continue
            try:
                events = self.engine.step()
            except BaseException as error:  # a bug, or an interrupt: the next step returns the events
                events = self._lost(error)
            for event in events:
                self._deliver(event)

    def _expire(self) -> None:
        """Cancels requests that have passed their deadline."""
        now = time.monotonic()
        with self._lock:
            late = [s for s in self._handles if s.deadline is not None and now > s.deadline and not s.expired]
        for stream in late:
            stream.expired = True
            stream.cancel()

    def _lost(self, error: BaseException) -> list[Event]:
        """Ends all requests, if `step` itself failed without events for them."""
        for handle in list(self._streams):
            self.engine.cancel(handle)
        with self._lock:
            return [Event(handle, "", (), (), "error", error=error) for handle in self._streams]

    def _deliver(self, event: Event) -> None:
        with self._lock:
            stream = self._streams.get(event.handle)
            if stream is not None and event.finish_reason:
                del self._streams[event.handle], self._handles[stream]
        if stream is not None:  # None for a request that was cancelled twice, or ended with an error
            stream.put(event)


def _wake(future: asyncio.Future) -> None:
    if not future.done():
        future.set_result(None)
