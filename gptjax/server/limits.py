"""Access control: allowed hosts and keys, and the limits of a request."""

import asyncio
import dataclasses
import hmac
import ipaddress
import re
import stat
import uuid
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptjax import files
from gptjax.errors import UserError
from gptjax.server.errors import ApiError, error_response

LOOPBACK = ("localhost",)
OPEN_PATHS = ("/", "/health", "/ready")  # for browsers and load balancers, which have no key
_REQUEST_ID = re.compile(r"[\w.:-]{1,128}")


@dataclasses.dataclass(frozen=True)
class Limits:
    """The limits of one request.

    Attributes:
      body_bytes: largest body.
      body_seconds: time to receive the body.
      seconds: time to answer.
      prompts: most answers of one request: its texts times the answers to each.
      shutdown_seconds: time that running requests have after the server was told to stop.
      log_prompts: whether prompts are written to the log.
    """

    body_bytes: int = 8 << 20
    body_seconds: float = 30.0
    seconds: float = 600.0
    prompts: int = 128
    shutdown_seconds: float = 30.0
    log_prompts: bool = False


def read_keys(path: str | Path) -> tuple[str, ...]:
    """The keys in a file, one per line; # starts a comment. Raises UserError, also if others can read the file."""
    path = files.regular(files.expand(path))
    if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UserError(f"--api_keys={path} can be read by others; chmod 600 {path}")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--api_keys={path} cannot be read: {error}") from None
    keys = tuple(line.strip() for line in lines if line.strip() and not line.strip().startswith("#"))
    if not keys:
        raise UserError(
            f"--api_keys={path} has no key; write one per line, such as the output of `openssl rand -hex 32`"
        )
    return keys


class Door:
    """ASGI middleware for all paths: request ids, Host, keys, CORS.

    The Host header must name this server. Otherwise any web page could read a server on loopback through a domain
    name of its own that resolves to 127.0.0.1 (DNS rebinding). An IP address as Host is safe from that.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Sequence[str] = (),
        hosts: Sequence[str] = LOOPBACK,
        origins: Sequence[str] = (),
        is_open: Callable[[str], bool] = lambda path: path in OPEN_PATHS,
        on_error: Callable[[ApiError], None] = lambda error: None,
    ):
        """
        Args:
          hosts: accepted names in the Host header; "*" accepts all.
          origins: other web origins that may call the server (CORS).
          is_open: whether a path needs no key.
          on_error: called with every error that the middleware returns.
        """
        self._app, self._hosts, self._origins, self._on_error = app, tuple(hosts), tuple(origins), on_error
        self._is_open = is_open
        self._keys = tuple(key.encode() for key in keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        asked = headers.get(b"x-request-id", "")
        request_id = asked if _REQUEST_ID.fullmatch(asked) else f"req_{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id
        extra = [(b"x-request-id", request_id.encode()), *self._cors(headers)]

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *extra]}
            await send(message)

        try:
            self._check_host(headers.get(b"host", ""))
            if scope["method"] == "OPTIONS" and self._cors(headers):
                await send_with_id({"type": "http.response.start", "status": 204, "headers": []})
                await send_with_id({"type": "http.response.body", "body": b""})
                return
            if not self._is_open(scope["path"]):
                self._check_key(headers.get(b"authorization", ""))
            await self._app(scope, receive, send_with_id)
        except ApiError as error:
            self._on_error(error)
            await error_response(error)(scope, receive, send_with_id)

    def _check_host(self, host: str) -> None:
        name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        if "*" not in self._hosts and name.lower() not in self._hosts and not _is_address(name):
            raise ApiError(
                f"{name[:100]!r} is not an allowed host; start the server with --allowed_hosts to add names",
                status=403,
                kind="permission_error",
                code="host_not_allowed",
            )

    def _check_key(self, authorization: str) -> None:
        if not self._keys:
            return
        kind, _, given = authorization.partition(" ")
        given = given.strip().encode() if kind.lower() == "bearer" else b""
        # Compares with every key in constant time, so that the time tells nothing about a key.
        if not sum(hmac.compare_digest(given, key) for key in self._keys):
            raise ApiError(
                "the API key is missing or wrong: Authorization: Bearer KEY",
                status=401,
                kind="authentication_error",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )

    def _cors(self, headers: dict[bytes, str]) -> list[tuple[bytes, bytes]]:
        origin = headers.get(b"origin", "")
        if not origin or (origin not in self._origins and "*" not in self._origins):
            return []
        return [
            (b"access-control-allow-origin", origin.encode("latin-1") if origin in self._origins else b"*"),
            (b"access-control-allow-methods", b"GET, POST"),
            (b"access-control-allow-headers", b"authorization, content-type"),
            (b"vary", b"Origin"),
        ]


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


async def read_body(request: Request, limits: Limits) -> bytes:
    """The body of a request. Raises ApiError where it is too large, or too slow."""
    too_large = ApiError(f"the body has more than {limits.body_bytes} bytes", status=413, code="request_too_large")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and (len(length) > 15 or int(length) > limits.body_bytes):
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for piece in request.stream():
                body += piece
                if len(body) > limits.body_bytes:
                    raise too_large
    except TimeoutError:
        raise ApiError("the body did not come in time", status=408, code="request_timeout") from None
    return bytes(body)


async def until_disconnect(request: Request, work: Awaitable[Any]) -> Any:
    """The result of `work`, which is cancelled where the client goes away. Raises ClientDisconnect."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)
