"""POST /v1/responses. Nothing is stored: each request contains its whole dialogue."""

import asyncio
import dataclasses
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from gptjax.generation.events import Event
from gptjax.server import generating, messages, schemas
from gptjax.server.chat import chosen_tools
from gptjax.server.context import context_of
from gptjax.server.errors import JSON, ApiError
from gptjax.server.generating import Running, Settings
from gptjax.server.served import Served
from gptjax.server.streams import frame
from gptjax.server.tools import ToolCalls


async def responses(request: Request) -> Response:
    context = context_of(request)
    body = schemas.read(schemas.Responses, await context.body(request))
    model = context.models.find(body.model)
    prompt, wanted, tools = await asyncio.to_thread(_prepare, model, body)
    answer = Answer(model, body, tools)
    texts = [messages.text_of(message.content, "input") for message in read_input(body)]
    running = Running(model, [prompt], wanted, context.limits, texts)
    if body.stream:
        return context.stream(answer.frames(running), running, error_frame=answer.error_frame)
    (events,) = await context.collect(request, running)
    return JSON(answer.whole(events, running))


def _prepare(model: Served, body: schemas.Responses) -> tuple[np.ndarray, Settings, list[dict[str, Any]]]:
    """The prompt, the settings and the tools. Raises ApiError, UserError."""
    if body.previous_response_id:
        raise ApiError("responses are not stored; send the whole dialogue", param="previous_response_id")
    if body.background:
        raise ApiError("background is not supported; the answer comes at once or as a stream", param="background")
    tools = chosen_tools(body.tools, body.tool_choice)
    dialogue = messages.normal(read_input(body))
    if not dialogue:
        raise ApiError("input is empty", param="input")
    prompt = messages.encode(model, dialogue, tools)
    model.check_length(prompt, "input")
    sampling = schemas.Sampling(temperature=body.temperature, top_p=body.top_p, seed=body.seed)
    wanted = generating.settings(model, sampling, max_tokens=body.max_output_tokens)
    return prompt, dataclasses.replace(wanted, grammar=_grammar(model, body)), tools


def read_input(body: schemas.Responses) -> list[schemas.Message]:
    """The input items of a request as messages. Raises ApiError for items of an unknown type."""
    system = [schemas.Message(role="system", content=body.instructions)] if body.instructions else []
    if isinstance(body.input, str):
        return [*system, schemas.Message(role="user", content=body.input)]
    found: list[schemas.Message] = []
    for number, item in enumerate(body.input):
        kind = item.get("type", "message")
        if kind == "message":
            entry = {"role": item.get("role"), "content": item.get("content")}
        elif kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id", ""), "type": "function", "function": function}
            if found and found[-1].tool_calls:  # calls of one turn follow each other
                found[-1] = found[-1].model_copy(update={"tool_calls": [*found[-1].tool_calls, call]})
                continue
            entry = {"role": "assistant", "content": None, "tool_calls": [call]}
        elif kind == "function_call_output":
            output = item.get("output")
            entry = {"role": "tool", "content": output, "tool_call_id": item.get("call_id")}
        elif kind == "reasoning":
            continue
        else:
            raise ApiError(f"input[{number}] is of type {str(kind)[:60]!r}, which is not supported", param="input")
        found.append(schemas.foreign_message(entry, f"input[{number}]"))
    return [*system, *found]


def _grammar(model: Served, body: schemas.Responses) -> Any:
    given = (body.text or {}).get("format")
    if not isinstance(given, dict):
        return None
    wanted = schemas.ResponseFormat(type=str(given.get("type")), json_schema={"schema": given.get("schema")})
    return generating.grammar_of_format(model, wanted, "text.format")


class Answer:
    """One response, whole or as events."""

    def __init__(self, model: Served, body: schemas.Responses, tools: Sequence[dict[str, Any]]):
        self._model, self._body, self._tools = model, body, tools
        self._id, self._created = f"resp_{uuid.uuid4().hex}", int(time.time())
        self._message_id = f"msg_{uuid.uuid4().hex}"
        self._number = -1

    def whole(self, events: Sequence[Event], running: Running) -> dict[str, Any]:
        parser, text = ToolCalls(), "".join(event.text for event in events)
        if self._tools:
            text = parser.push(text)[0] + parser.finish()
        output = [self._message(text, "completed")] if text or not parser.calls else []
        output += [_call(call) for call in parser.calls]
        return self._response(_status(events[-1]), output, running)

    async def frames(self, running: Running) -> AsyncIterator[str]:
        """The events in OpenAI's order: the response, the text of its message, calls, the end."""
        yield self._event("response.created", response=self._response("in_progress", [], None))
        yield self._event("response.in_progress", response=self._response("in_progress", [], None))
        place = {"item_id": self._message_id, "output_index": 0, "content_index": 0}
        parser, text, began, last = ToolCalls(), "", False, None

        def begin() -> list[str]:
            item = self._message("", "in_progress") | {"content": []}
            return [
                self._event("response.output_item.added", output_index=0, item=item),
                self._event("response.content_part.added", **place, part=_part("")),
            ]

        async for _, event in running.events():
            piece = event.text
            if self._tools:
                piece = parser.push(piece)[0]
                piece += parser.finish() if event.finish_reason else ""
            if event.finish_reason:
                last = event
            if not began and (piece or (last and not parser.calls)):
                began = True
                for one in begin():
                    yield one
            if piece:
                text += piece
                yield self._event("response.output_text.delta", **place, delta=piece, logprobs=[])
        assert last is not None
        output = []
        if began:
            output = [self._message(text, "completed")]
            yield self._event("response.output_text.done", **place, text=text, logprobs=[])
            yield self._event("response.content_part.done", **place, part=_part(text))
            yield self._event("response.output_item.done", output_index=0, item=output[0])
        for call in map(_call, parser.calls):
            index = len(output)
            pieces = {"item_id": call["id"], "output_index": index}
            unsaid = call | {"arguments": "", "status": "in_progress"}
            yield self._event("response.output_item.added", output_index=index, item=unsaid)
            yield self._event("response.function_call_arguments.delta", **pieces, delta=call["arguments"])
            named = {"name": call["name"], "arguments": call["arguments"]}
            yield self._event("response.function_call_arguments.done", **pieces, **named)
            yield self._event("response.output_item.done", output_index=index, item=call)
            output.append(call)
        status = _status(last)
        # Also if the status is incomplete: the openai package waits for this event only.
        yield self._event("response.completed", response=self._response(status, output, running))

    def error_frame(self, error: ApiError) -> str:
        return self._event("error", **error.body()["error"], error=error.body()["error"])

    def _event(self, kind: str, **fields: Any) -> str:
        self._number += 1
        return frame({"type": kind, "sequence_number": self._number, **fields}, kind)

    def _message(self, text: str, status: str) -> dict[str, Any]:
        content = [_part(text)]
        return {"id": self._message_id, "type": "message", "status": status, "role": "assistant", "content": content}

    def _response(self, status: str, output: list[dict[str, Any]], running: Running | None) -> dict[str, Any]:
        body = self._body
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "model": self._model.name,
            "output": output,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "text": body.text or {"format": {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": [{"type": "function", "strict": False, **tool["function"]} for tool in self._tools],
            "truncation": "disabled",
            "metadata": body.metadata or {},
            "usage": _usage(running) if running else None,
        }


def _status(last: Event) -> str:
    return "incomplete" if last.finish_reason == "length" else "completed"


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _call(call: dict[str, Any]) -> dict[str, Any]:
    item = {"type": "function_call", "id": call["id"].replace("call_", "fc_"), "call_id": call["id"]}
    return {**item, **call["function"], "status": "completed"}


def _usage(running: Running) -> dict[str, Any]:
    usage = running.usage()
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": usage["prompt_tokens_details"],
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": usage["completion_tokens_details"],
        "total_tokens": usage["total_tokens"],
    }
