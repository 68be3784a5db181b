"""Streamed answers: server-sent events."""

import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.responses import StreamingResponse

from gptjax.server.errors import ApiError, as_api_error, to_json

log = logging.getLogger("gptjax.server")

Frame = dict[str, Any]
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # tells proxies not to buffer the stream


def frame(data: Frame, event: str | None = None) -> str:
    """One event, whose data are one line of JSON."""
    return (f"event: {event}\n" if event else "") + f"data: {to_json(data)}\n\n"


def stream(
    frames: AsyncIterator[str],
    *,
    on_error: Callable[[ApiError], None],
    error_frame: Callable[[ApiError], str] = lambda error: frame(error.body()),
    end: str = "data: [DONE]\n\n",
) -> StreamingResponse:
    """A streaming response of frames. An exception becomes a frame with an error; then the stream ends as usual."""

    async def guarded() -> AsyncIterator[str]:
        try:
            async for one in frames:
                yield one
        except Exception as error:
            told = as_api_error(error)
            on_error(told)
            if told.status >= 500:
                log.exception("an answer failed while it was streamed")
            yield error_frame(told)
        yield end

    return StreamingResponse(guarded(), media_type="text/event-stream", headers=HEADERS)
