"""Records which of two answers users of the page prefer, for `--config.data.source=preference:FILE`."""

import asyncio
import json
import os
import time
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from gptjax import files
from gptjax.buckets import is_url
from gptjax.errors import UserError
from gptjax.server import messages, schemas
from gptjax.server.context import context_of
from gptjax.server.errors import JSON, ApiError


async def preferences(request: Request) -> Response:
    """POST /preferences: {"prompt", "chosen", "rejected": messages, "models"} is appended to the file as one line."""
    context = context_of(request)
    body = schemas.read(schemas.Preference, await context.body(request))
    if context.preferences is None:
        raise ApiError("this server records no choices; start it with --preferences=FILE.jsonl", status=404)
    sides = {name: messages.normal(getattr(body, name)) for name in ("prompt", "chosen", "rejected")}
    if sides["chosen"] == sides["rejected"]:
        raise ApiError("chosen and rejected are equal", param="rejected")
    record = {**sides, "models": body.models, "time": int(time.time())}
    await asyncio.to_thread(_append, context.preferences, json.dumps(record, ensure_ascii=False) + "\n")
    return JSON({"recorded": True})


def _append(path: Path, line: str) -> None:
    """A single write at the end of the file, so that lines of parallel requests never mix."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, line.encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check(path: str | Path) -> Path:
    """The file of --preferences. Raises UserError if it cannot be written."""
    if is_url(path):
        raise UserError(f"--preferences={path}: lines cannot be appended to an object in a bucket; give a local file")
    path = files.expand(path)
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600))
    except OSError as error:
        if files.disk_fails(error):
            raise
        raise UserError(f"--preferences={path} cannot be written: {files.words(error)}") from None
    return path
