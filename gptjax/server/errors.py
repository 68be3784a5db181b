"""Errors in OpenAI's form: {"error": {"message", "type", "param", "code"}}."""

import json
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from gptjax.errors import UserError
from gptjax.generation.engine import Busy
from gptjax.generation.pump import Closed

RETRY_SECONDS = 1  # retry-after of a full queue


class ApiError(Exception):
    """A request that gets an error.

    Attributes:
      status: of HTTP.
      kind: OpenAI's `type`: invalid_request_error, authentication_error, rate_limit_error, server_error, ...
      param: the part of the request that is wrong.
      headers: such as retry-after.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.kind, self.param, self.code = status, kind, param, code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


def too_long(tokens: int, limit: int, param: str) -> ApiError:
    return ApiError(
        f"This model's maximum context length is {limit} tokens, and the prompt has {tokens}, which leaves no room for "
        "an answer; shorten it",
        param=param,
        code="context_length_exceeded",
    )


def as_api_error(error: BaseException) -> ApiError:
    """The error that a client sees for an exception. For internal errors the text is hidden."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Busy):
        headers = {"retry-after": str(RETRY_SECONDS)}
        return ApiError(str(error), status=429, kind="rate_limit_error", code="queue_full", headers=headers)
    if isinstance(error, Closed):
        headers = {"retry-after": str(RETRY_SECONDS)}
        return ApiError(str(error), status=503, kind="server_error", code="shutting_down", headers=headers)
    if isinstance(error, UserError):
        return ApiError(str(error))
    if "RESOURCE_EXHAUSTED" in str(error):  # XLA's error for memory
        return ApiError("the device is out of memory; try again", status=503, kind="server_error", code="out_of_memory")
    return ApiError("the server failed; its log says why", status=500, kind="server_error", code="internal_error")


class JSON(Response):
    """A JSON answer. Half a surrogate pair, which UTF-8 cannot write, is written as JSON's escape."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content).encode()


def to_json(content: Any) -> str:
    """One line of JSON that is UTF-8. Raises ValueError for NaN and infinities."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace").decode()


def error_response(error: ApiError) -> JSON:
    return JSON(error.body(), status_code=error.status, headers=error.headers)


async def on_http_exception(_: Request, error: Exception) -> JSON:
    """Starlette's own: a path that does not exist, a method that is not allowed."""
    status = getattr(error, "status_code", 500)
    messages = {404: "there is no such path; see /v1/models", 405: "this path does not allow this method"}
    codes = {404: "unknown_url", 405: "method_not_allowed"}
    message = messages.get(status, str(getattr(error, "detail", error)))
    headers = dict(getattr(error, "headers", None) or {})
    return error_response(ApiError(message, status=status, code=codes.get(status), headers=headers))
