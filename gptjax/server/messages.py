"""Converts dialogues of clients to the tokens of a prompt."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from gptjax.data.documents import Message
from gptjax.data.tokenization.templates import ChatTemplate
from gptjax.errors import UserError
from gptjax.server import schemas
from gptjax.server.errors import ApiError
from gptjax.server.served import Served

TEXTS = ("text", "input_text", "output_text", "refusal")  # types of message parts that are text


def normal(messages: Sequence[schemas.Message]) -> list[Message]:
    """Messages as templates need them: content is text, and there is one system message at the beginning at most.

    Raises ApiError for unknown roles and for contents that are not text.
    """
    system, rest = [], []
    for number, message in enumerate(messages):
        role = schemas.ROLES.get(message.role)
        if role is None:
            raise ApiError(
                f"messages[{number}].role is {message.role[:60]!r}; choose from {', '.join(schemas.ROLES)}",
                param="messages",
            )
        content = text_of(message.content, f"messages[{number}]")
        if role == "system":
            system.append(content)
            continue
        one: Message = {"role": role, "content": content}
        if message.tool_calls:
            one["tool_calls"] = [_call(call, f"messages[{number}]") for call in message.tool_calls]
        if role == "tool":
            if message.name is not None:
                one["name"] = message.name
            if message.tool_call_id is not None:
                one["tool_call_id"] = message.tool_call_id
        rest.append(one)
    first: list[Message] = [{"role": "system", "content": "\n\n".join(filter(None, system))}] if system else []
    return [*first, *rest]


def text_of(content: str | list[dict[str, Any]] | None, where: str) -> str:
    """Content as text: null is none, parts are joined. Raises ApiError for parts that are not text."""
    if not isinstance(content, list):
        return content or ""
    texts = []
    for part in content:
        kind = part.get("type")
        text = part.get("refusal" if kind == "refusal" else "text")
        if kind not in TEXTS or not isinstance(text, str):
            raise ApiError(f"{where} has a part of type {str(kind)[:60]!r}; models read only text", param="messages")
        texts.append(text)
    return "".join(texts)


def encode(model: Served, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None = None) -> np.ndarray:
    """The tokens up to the beginning of the answer; a last message of the assistant is continued.

    Raises ApiError if the model has no template, or its template refuses the dialogue.
    """
    template = _template(model)
    try:
        if messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1]:
            ids, mask = template.encode(messages, model.tokenizer, tools=tools)
            ids = ids[: np.flatnonzero(mask)[-1]]  # without its end-of-turn token
        else:
            ids = template.encode_prompt(messages, model.tokenizer, tools=tools)
    except UserError as error:
        raise ApiError(str(error), param="messages", code="template_refused") from None
    return np.concatenate([np.array(model.begin_ids, np.int32), ids]).astype(np.int32)


def render(model: Served, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None = None) -> str:
    """The text of a prompt. Raises ApiError."""
    try:
        return "".join(s.text for s in _template(model).render(messages, add_generation_prompt=True, tools=tools))
    except UserError as error:
        raise ApiError(str(error), param="messages", code="template_refused") from None


def functions(tools: Sequence[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """The tools of type function, in the form of templates; a provider's own tools are skipped.

    Two forms are read: {"type": "function", "function": {"name", ...}}, and that of /v1/responses, where the name is
    beside the type.
    """
    found = []
    for tool in tools or []:
        function = tool.get("function", {key: tool[key] for key in tool if key not in ("type", "strict")})
        if tool.get("type") == "function" and isinstance(function, dict) and isinstance(function.get("name"), str):
            found.append({"type": "function", "function": function})
    return found


def _template(model: Served) -> ChatTemplate:
    if model.template is None:
        raise ApiError(
            f"{model.name} was trained on text, not on dialogues; use /v1/completions",
            param="model",
            code="no_template",
        )
    return model.template


def _call(call: dict[str, Any], where: str) -> dict[str, Any]:
    """A tool call in the form of templates: its arguments are an object."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ApiError(f"{where}.tool_calls has a call without a function's name", param="messages")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            raise ApiError(f"{where}.tool_calls has arguments that are not JSON", param="messages") from None
    return {
        "type": "function",
        "id": str(call.get("id", "")),
        "function": {"name": function["name"], "arguments": arguments},
    }
