"""Parses tool calls in an answer, as Hermes and Qwen write them: <tool_call>{"name", "arguments"}</tool_call>."""

import json
import uuid
from typing import Any

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class ToolCalls:
    """Splits an answer into text and calls while it arrives. Anything that is not a complete call stays text.

    Attributes:
      calls: those found so far, in OpenAI's form.
    """

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self._held = ""  # the possible beginning of a call

    def push(self, text: str) -> tuple[str, list[dict[str, Any]]]:
        """(text outside calls, calls that are complete now)."""
        self._held += text
        shown, found = "", []
        while True:
            before, opened, rest = self._held.partition(OPEN)
            if not opened:
                keep = _beginning(self._held)
                shown, self._held = shown + self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
                break
            inner, closed, after = rest.partition(CLOSE)
            if not closed:
                text = before.rstrip()
                shown, self._held = shown + text, self._held[len(text) :]
                break
            call = _parsed(inner)
            if call is None:
                shown += before + opened + inner + closed
            else:
                shown += before.rstrip()
                found.append(call)
            self._held = after.lstrip() if call else after
        self.calls += found
        return shown, found

    def finish(self) -> str:
        """The rest of the text that did not become a call."""
        held, self._held = self._held, ""
        return held


def _beginning(text: str) -> int:
    """Length of the longest suffix of `text` that could begin a call, with the white space before it."""
    longest = next((n for n in range(min(len(OPEN) - 1, len(text)), 0, -1) if OPEN.startswith(text[-n:])), 0)
    body = text[: len(text) - longest]
    return longest + len(body) - len(body.rstrip())


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", call.get("parameters", {}))
    arguments = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    function = {"name": call["name"], "arguments": arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
