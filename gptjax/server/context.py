"""What all endpoints share: models, limits, metrics."""

import dataclasses
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import StreamingResponse

from gptjax.generation.events import Event
from gptjax.server import streams
from gptjax.server.generating import Running
from gptjax.server.limits import Limits, read_body, until_disconnect
from gptjax.server.metrics import Metrics
from gptjax.server.models import Models


@dataclasses.dataclass(frozen=True)
class Context:
    """The state of a server. It is the same object in all requests."""

    models: Models
    limits: Limits
    metrics: Metrics
    preferences: Path | None = None  # the file for choices between two answers

    async def body(self, request: Request) -> bytes:
        return await read_body(request, self.limits)

    async def collect(self, request: Request, running: Running) -> list[list[Event]]:
        """All events. If the client disconnects, the streams are cancelled."""
        with running:
            events = await until_disconnect(request, running.collect())
            self.metrics.answered(running)
            return events

    def stream(self, frames: AsyncIterator[str], running: Running, **options: Any) -> StreamingResponse:
        """The frames of an answer. If the client disconnects, the streams are cancelled."""

        async def until_end() -> AsyncIterator[str]:
            with running:
                async for frame in frames:
                    yield frame
                self.metrics.answered(running)

        return Cancelling(streams.stream(until_end(), on_error=self.metrics.failed, **options), running.cancel)


class Cancelling(StreamingResponse):
    """A response that cancels its streams at the end, even if no part of it was ever read."""

    def __init__(self, response: StreamingResponse, cancel: Callable[[], None]):
        self.__dict__.update(response.__dict__)
        self._cancel = cancel

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._cancel()


def context_of(request: Request) -> Context:
    return request.app.state.context
