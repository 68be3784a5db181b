"""The paths of the server."""

import logging
import mimetypes
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from gptjax.server import preferences as choices
from gptjax.server import tokens
from gptjax.server.chat import chat
from gptjax.server.completions import completions
from gptjax.server.context import Context, context_of
from gptjax.server.errors import JSON, as_api_error, error_response, on_http_exception
from gptjax.server.limits import LOOPBACK, OPEN_PATHS, Door, Limits
from gptjax.server.metrics import Metrics
from gptjax.server.models import Models
from gptjax.server.openapi import openapi
from gptjax.server.responses import responses

log = logging.getLogger("gptjax.server")

Endpoint = Callable[[Request], Awaitable[Response]]

PAGE = Path(__file__).parent / "page"
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def make(
    models: Models,
    limits: Limits,
    *,
    keys: Sequence[str] = (),
    hosts: Sequence[str] = LOOPBACK,
    origins: Sequence[str] = (),
    preferences: Path | None = None,
) -> Door:
    """The ASGI application. The models must be started. Other arguments: see `Door`.

    `preferences`: the file for choices between two answers; None: such requests are refused.
    """
    metrics = Metrics(models)
    posts = {
        "/v1/chat/completions": chat,
        "/v1/completions": completions,
        "/v1/responses": responses,
        "/v1/embeddings": tokens.embeddings,
        "/tokenize": tokens.tokenize,
        "/detokenize": tokens.detokenize,
        "/apply-template": tokens.apply_template,
        "/preferences": choices.preferences,
    }
    gets = {
        "/v1/models": tokens.models,
        "/v1/models/{name:path}": tokens.models,
        "/tokenizer_info": tokens.tokenizer_info,
        "/health": health,
        "/ready": ready,
        "/metrics": prometheus,
        "/openapi.json": openapi,
        "/": page,
        "/{file}": page,
    }
    routes = [Route(path, _guarded(answer, metrics), methods=["POST"]) for path, answer in posts.items()]
    routes += [Route(path, _guarded(answer, metrics), methods=["GET"]) for path, answer in gets.items()]
    app = Starlette(routes=routes, exception_handlers={HTTPException: on_http_exception})
    app.state.context = Context(models, limits, metrics, preferences)
    return Door(app, keys=keys, hosts=hosts, origins=origins, is_open=_is_open, on_error=metrics.failed)


def _guarded(answer: Endpoint, metrics: Metrics) -> Endpoint:
    """The same endpoint, with exceptions turned into OpenAI's error responses."""

    async def guarded(request: Request) -> Response:
        try:
            return await answer(request)
        except HTTPException:
            raise
        except ClientDisconnect:
            return Response(status_code=499)  # the client is gone
        except Exception as error:
            told = as_api_error(error)
            metrics.failed(told)
            if told.status >= 500:
                log.exception("%s %s failed (%s)", request.method, request.url.path, request.state.request_id)
            return error_response(told)

    return guarded


async def health(request: Request) -> Response:
    """Whether the process is alive."""
    return JSON({"status": "ok"})


async def ready(request: Request) -> Response:
    """Whether all models accept requests."""
    waiting = [model.name for model in context_of(request).models if model.pump is None or not model.pump.alive]
    return JSON({"status": "unavailable" if waiting else "ok", "not_ready": waiting}, 503 if waiting else 200)


async def prometheus(request: Request) -> Response:
    return Response(context_of(request).metrics.text(), media_type="text/plain; version=0.0.4")


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or _page_file(path.removeprefix("/")) is not None


def _page_file(name: str) -> Path | None:
    path = PAGE / name
    return path if path.parent == PAGE and path.is_file() else None


async def page(request: Request) -> Response:
    """The files of the page. Its headers forbid loading from other hosts and being framed."""
    name = request.path_params.get("file", "index.html")
    path = _page_file(name)
    if path is None:
        raise HTTPException(404)
    headers = {
        "content-security-policy": CONTENT_SECURITY_POLICY,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
    return Response(path.read_bytes(), media_type=mimetypes.guess_type(name)[0], headers=headers)
