"""Tool calls and their results in dialogues: passed to the chat template, or left out."""

import contextlib
import json
from collections.abc import Mapping
from typing import Any

from gptjax.data.documents import Message
from gptjax.data.sources.base import Faults
from gptjax.data.sources.record import Damaged
from gptjax.data.sources.schemas import Turn
from gptjax.json_text import show

RESULTS = ("tool", "function", "observation")  # roles of tool results
_CALL = "function_call"  # ShareGPT's role of a turn that calls a tool
ADVICE = (
    "--config.data.tool_turns=template lets the tokenizer's chat template write them, "
    "--config.data.tool_turns=leave_out drops and counts them"
)


def calls_of(turn: Turn, role: str, content: str) -> tuple[list[dict[str, Any]], str]:
    """(the tool calls of a turn, in the form that transformers' templates read; the rest of its content)."""
    calls = [_call(call.get("function", call)) for call in turn.tool_calls or []]
    if turn.function_call:
        calls.append(_call(turn.function_call))
    if role == _CALL:
        try:
            found = json.loads(content)
        except (ValueError, RecursionError):
            found = None
        calls += [_call(call) for call in (found if isinstance(found, list) else [found])]
        content = ""
    return calls, content


def _call(call: Any) -> dict[str, Any]:
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
        raise Damaged(f'a tool call is {show(call)}, but must be {{"name": ..., "arguments": ...}}')
    arguments = call.get("arguments", {})
    if isinstance(arguments, str):  # OpenAI writes the arguments as JSON in a text
        with contextlib.suppress(ValueError, RecursionError):
            arguments = json.loads(arguments)
    return {"type": "function", "function": {"name": call["name"], "arguments": arguments}}


def tools_of(value: Any, name: str) -> list[dict[str, Any]]:
    """The tool descriptions of a record, which may be JSON in a text."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise Damaged(f"{name} is {show(value)}, but must be a list of tools") from None
        value = [value] if isinstance(value, dict) else value
    if value and not (isinstance(value, list) and all(isinstance(tool, dict) for tool in value)):
        raise Damaged(f"{name} is {show(value)}, but must be a list of tools")
    return value or []


def without(messages: list[Message], faults: Faults) -> list[Message]:
    """The messages without tool calls and results; answers that then follow each other are merged."""
    left: list[Message] = []
    dropped = gap = 0
    for message in messages:
        if message["role"] == "tool":
            dropped, gap = dropped + 1, 1
            continue
        if calls := message.get("tool_calls"):
            dropped, gap = dropped + len(calls), 1
            message = {name: value for name, value in message.items() if name != "tool_calls"}  # type: ignore
            if not message["content"].strip():
                continue
        if gap and left and left[-1]["role"] == message["role"] == "assistant":
            left[-1] = joined(left[-1], message)
        else:
            left.append(message)
        gap = 0
    if dropped:
        faults.note("tool calls and their results, which were left out", dropped)
    return left


def joined(first: Message, second: Message) -> Message:
    """Merges two turns of one speaker. Raises `Damaged` if only one of them counts in the loss."""
    if first.get("train", True) != second.get("train", True):
        raise Damaged(f"two turns of the {first['role']} would be merged, but only one of them counts in the loss")
    calls = first.get("tool_calls", []) + second.get("tool_calls", [])
    text = "\n\n".join(text for text in (first["content"], second["content"]) if text)
    return {**first, "content": text, **({"tool_calls": calls} if calls else {})}  # type: ignore
