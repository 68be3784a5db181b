"""Dialogues in the formats in which they are published, read as documents with `messages`.

    messages    {"messages": [{"role": "user", "content": "..."}, ...]}                        OpenAI
    sharegpt    {"conversations": [{"from": "human", "value": "..."}, ...]}
    alpaca      {"instruction": "...", "input": "...", "output": "...", "history": [["q", "a"], ...]}
    pairs       {"prompt": "...", "response": "..."}, {"question": "...", "answer": "..."}, or CSV columns
    chatterbot  YAML with conversations: [["statement", "response", ...], ...]
    kdconv      {"messages": [{"message": "..."}, ...]}, speakers by turns

JSON files hold an array of such objects, JSONL files one object per line.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gptjax.data.documents import Document, Message
from gptjax.data.sources.base import Faults
from gptjax.data.sources.records import Damaged, Record, read_records
from gptjax.errors import UserError

FORMATS = ("messages", "sharegpt", "alpaca", "pairs", "chatterbot", "kdconv")
ROLES = ("system", "user", "assistant")

_ROLE_NAMES = {
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
}
_PAIR_FIELDS = (
    ("prompt", "response"),
    ("question", "answer"),
    ("prompt", "completion"),
    ("query", "response"),
)
_HALF_PAIR = re.compile("[\ud800-\udfff]")


def read_dialogues(
    path: str | Path,
    format: str,
    *,
    source: str,
    name: str | None = None,
    fields: Sequence[str] | None = None,
    faults: Faults | None = None,
) -> Iterator[Document]:
    """The dialogues of one file, in its order.

    A document has `messages`, `id` NAME:NUMBER (the line in JSONL, otherwise the place in the file from 1),
    `source`, and `split_key`, its words up to the first answer, so that the same question never falls into
    two splits. Documents of `pairs` also have `prompt` and `references`.

    Args:
      path: the file; its name without .gz, .zst and the like ends in .csv, .tsv, .parquet, .yml,
        .yaml, .json or .jsonl.
      format: one of `FORMATS`.
      source: the spec that the documents name.
      name: what ids begin with; the name of the file where it is left out.
      fields: for `pairs`, the two fields of an object or columns of a CSV file.
      faults: says whether a bad dialogue raises or is left out and counted.

    Raises:
      UserError: the file cannot be opened; unless `faults` skips, also at the first bad dialogue, with file
        and line: not JSON or YAML, a missing field, an unknown role, an empty turn, no assistant turn, two
        turns of one speaker in a row.
    """
    if format not in FORMATS:
        raise UserError(f"dialogue format {format!r}: expected one of {', '.join(FORMATS)}")
    faults = faults or Faults()
    name = name if name is not None else Path(path).name
    for record in read_records(path, yaml_key="conversations" if format == "chatterbot" else None):
        try:
            messages = _messages(record, format, fields)
            check_messages(messages)
        except Damaged as problem:
            advice = "; correct it, or leave it out with on_error=skip" if faults.on_error == "raise" else ""
            faults.skip(UserError(f"{record.place}: {problem}{advice}"))
            continue
        yield _document(messages, format, id=f"{name}:{record.number}", source=source)


def check_messages(messages: Sequence[Message]) -> None:
    """Raises `Damaged` unless the speakers alternate, every turn has text, and the assistant speaks."""
    for number, (message, previous) in enumerate(zip(messages, [None, *messages], strict=False), start=1):
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise Damaged(f"turn {number} has the role {role!r}; expected {', '.join(ROLES)}")
        if not content.strip():
            raise Damaged(f"turn {number} ({role}) is empty")
        if _HALF_PAIR.search(content):
            raise Damaged(f"turn {number} ({role}) has half a surrogate pair")
        if previous is not None and role == previous["role"]:
            raise Damaged(f"turns {number - 1} and {number} are both of the {role}")
    if not any(message["role"] == "assistant" for message in messages):
        raise Damaged("the dialogue has no assistant turn, so there is nothing to learn")


def _document(messages: list[Message], format: str, *, id: str, source: str) -> Document:
    first_answer = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
    opening = messages[:first_answer] or messages[:1]
    document: Document = {
        "messages": messages,
        "id": id,
        "source": source,
        "split_key": "\n".join(message["content"] for message in opening),
    }
    if format == "pairs":
        document |= {"prompt": messages[0]["content"], "references": [messages[1]["content"]]}
    return document


def _messages(record: Record, format: str, fields: Sequence[str] | None) -> list[Message]:
    value = record.value
    if isinstance(value, Damaged):
        raise value
    if format == "chatterbot":
        if not isinstance(value, list):
            raise Damaged(f"a conversation must be a list of statements, not {_shown(value)}")
        return _by_turns(value)
    if not isinstance(value, Mapping):
        raise Damaged(f"expected a JSON object, not {_shown(value)}")
    if format == "kdconv":
        return _by_turns([_text(turn, "message") for turn in _turns(value)])
    if format in ("messages", "sharegpt"):
        return _named_turns(value)
    if format == "alpaca":
        return _alpaca(value)
    prompt, response = fields or _pair_fields(value)
    return _by_turns([_text(value, prompt), _text(value, response)])


def _named_turns(entry: Mapping[str, Any]) -> list[Message]:
    messages = []
    for turn in _turns(entry):
        role = _text(turn, "role" if "role" in turn else "from")
        content = turn.get("content", turn.get("value"))
        if isinstance(content, list):  # the OpenAI API's list of parts
            content = "".join(_text(part, "text") for part in content)
        messages.append({"role": _ROLE_NAMES.get(role, role), "content": _string(content, "content")})
    return messages


def _alpaca(entry: Mapping[str, Any]) -> list[Message]:
    messages = [{"role": "system", "content": entry["system"]}] if entry.get("system") else []
    statements = []
    for turn in entry.get("history") or []:
        if not isinstance(turn, list) or len(turn) != 2:
            raise Damaged(f"history must be [question, answer] pairs, not {_shown(turn)}")
        statements += turn
    instruction = _text(entry, "instruction")
    if entry.get("input"):
        instruction = f"{instruction}\n{_text(entry, 'input')}"
    return messages + _by_turns([*statements, instruction, _text(entry, "output")])


def _by_turns(statements: Sequence[Any]) -> list[Message]:
    """The user begins."""
    return [
        {"role": "assistant" if i % 2 else "user", "content": _string(statement, f"turn {i + 1}")}
        for i, statement in enumerate(statements)
    ]


def _turns(entry: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    field_name = next((name for name in ("messages", "conversations") if name in entry), None)
    turns = entry.get(field_name)
    if not isinstance(turns, list):
        there = ", ".join(map(repr, entry)) or "none"
        raise Damaged(f"no list 'messages' or 'conversations'; fields: {there}")
    for turn in turns:
        if not isinstance(turn, Mapping):
            raise Damaged(f"a turn must be an object, not {_shown(turn)}")
    return turns


def _pair_fields(entry: Mapping[str, Any]) -> tuple[str, str]:
    for names in _PAIR_FIELDS:
        if all(name in entry for name in names):
            return names
    there = ", ".join(map(repr, entry)) or "none"
    raise Damaged(f"no prompt and response among the fields {there}; name them: pairs:GLOB#A,B")


def _text(entry: Any, name: str) -> str:
    if not isinstance(entry, Mapping) or name not in entry:
        there = ", ".join(map(repr, entry)) if isinstance(entry, Mapping) else _shown(entry)
        raise Damaged(f"no field {name!r}; there is {there or 'nothing'}")
    return _string(entry[name], name)


def _string(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise Damaged(f"{name} must be text, not {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:60]!r}"
