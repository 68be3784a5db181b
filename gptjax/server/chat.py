"""POST /v1/chat/completions."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from gptjax.generation.events import Event
from gptjax.server import generating, messages, schemas
from gptjax.server.context import context_of
from gptjax.server.errors import JSON, ApiError
from gptjax.server.generating import Running, Settings, finite, with_chosen
from gptjax.server.served import Served
from gptjax.server.streams import Frame, frame
from gptjax.server.tools import ToolCalls


async def chat(request: Request) -> Response:
    context = context_of(request)
    body = schemas.read(schemas.Chat, await context.body(request))
    model = context.models.find(body.model)
    # in a thread: tokenizing a long text or compiling a grammar would block all other requests
    prompt, wanted, has_tools = await asyncio.to_thread(_prepare, model, body)
    answer = Answer(model, body, has_tools=has_tools)
    texts = [messages.text_of(message.content, "messages") for message in body.messages]
    running = Running(model, [prompt], wanted, context.limits, texts)
    if body.stream:
        return context.stream(answer.frames(running), running)
    return JSON(answer.whole(await context.collect(request, running), running))


def _prepare(model: Served, body: schemas.Chat) -> tuple[np.ndarray, Settings, bool]:
    """The prompt, the settings, and whether the prompt lists tools. Raises ApiError, UserError."""
    tools = chosen_tools(body.tools, body.tool_choice)
    if body.top_logprobs and not body.logprobs:
        raise ApiError("top_logprobs needs logprobs: true", param="top_logprobs")
    prompt = messages.encode(model, messages.normal(body.messages), tools)
    model.check_length(prompt, "messages")
    most = body.max_completion_tokens or body.max_tokens
    return prompt, generating.settings(model, body, max_tokens=most, top=body.top_logprobs or 0), bool(tools)


def chosen_tools(tools: Sequence[dict[str, Any]] | None, choice: str | dict[str, Any] | None) -> list[dict[str, Any]]:
    """The functions to list in the prompt. Raises ApiError for a choice that cannot be enforced."""
    if choice == "none":
        return []
    if choice not in (None, "auto"):
        raise ApiError("tool_choice: choose auto or none; a call cannot be forced", param="tool_choice")
    return messages.functions(tools)


class Answer:
    """The answers to one dialogue, whole or in chunks with the same id and time."""

    def __init__(self, model: Served, body: schemas.Chat, *, has_tools: bool):
        self._model, self._body, self._has_tools = model, body, has_tools
        self._id, self._created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())

    def whole(self, events: Sequence[Sequence[Event]], running: Running) -> dict[str, Any]:
        choices = [self._choice(index, own) for index, own in enumerate(events)]
        return self._envelope("chat.completion", choices) | {"usage": running.usage()}

    def _choice(self, index: int, events: Sequence[Event]) -> dict[str, Any]:
        text = "".join(event.text for event in events)
        parser = ToolCalls()
        if self._has_tools:
            text = parser.push(text)[0] + parser.finish()
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if parser.calls:
            message |= {"content": text or None, "tool_calls": parser.calls}
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(events),
            "finish_reason": _reason(events[-1], parser),
        }

    async def frames(self, running: Running) -> AsyncIterator[str]:
        include_usage = bool(self._body.stream_options and self._body.stream_options.include_usage)

        def chunk(choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> str:
            extra = {"usage": usage} if include_usage else {}
            return frame(self._envelope("chat.completion.chunk", choices) | extra)

        for index in range(running.wanted.n):
            yield chunk([_delta(index, {"role": "assistant", "content": ""})])
        parsers = [ToolCalls() for _ in range(running.wanted.n)]
        async for index, event in running.events():
            parser, text = parsers[index], event.text
            known, calls = len(parser.calls), []
            if self._has_tools:
                text, calls = parser.push(text)
                text += parser.finish() if event.finish_reason else ""
            logprobs = self._logprobs([event])
            if text or (logprobs and event.tokens):
                yield chunk([_delta(index, {"content": text}, logprobs=logprobs)])
            for place, call in enumerate(calls, start=known):
                yield chunk([_delta(index, {"tool_calls": [{"index": place, **call}]})])
            if event.finish_reason:
                yield chunk([_delta(index, {}, reason=_reason(event, parser))])
        if include_usage:
            yield chunk([], running.usage())

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> Frame:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model.name,
            "choices": choices,
            "system_fingerprint": None,
        }

    def _logprobs(self, events: Sequence[Event]) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        content = []
        for event in events:
            for place, (token, value) in enumerate(zip(event.tokens, event.log_probabilities, strict=True)):
                entry = self._entry(token, value)
                top = with_chosen(event.top[place], token, value, self._body.top_logprobs) if event.top else []
                content.append(entry | {"top_logprobs": [self._entry(*pair) for pair in top]})
        return {"content": content, "refusal": None}

    def _entry(self, token: int, value: float) -> dict[str, Any]:
        text, raw = self._model.token_text(token), self._model.token_bytes(token)
        return {"token": text, "logprob": finite(value), "bytes": list(raw)}


def _delta(
    index: int, delta: dict[str, Any], *, reason: str | None = None, logprobs: dict[str, Any] | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _reason(last: Event, parser: ToolCalls) -> str | None:
    return "tool_calls" if parser.calls and last.finish_reason == "stop" else last.finish_reason
