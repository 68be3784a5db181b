"""Dialogues in the formats in which they are published, read as documents with `messages`.

    messages    {"messages": [{"role": "user", "content": "..."}, ...]}                        OpenAI
    sharegpt    {"conversations": [{"from": "human", "value": "..."}, ...]}
    alpaca      {"instruction": "...", "input": "...", "output": "...", "history": [["q", "a"], ...]}
    pairs       {"prompt": "...", "response": "..."}, {"question": "...", "answer": "..."}, or CSV columns
    chatterbot  YAML with conversations: [["statement", "response", ...], ...]
    kdconv      {"messages": [{"message": "..."}, ...]}, speakers by turns

A `system` or `system_prompt` beside the turns is a system turn before them. `"weight": 0`, or `"train"`, `"training"`
or `"loss": false`, on an assistant's turn leaves it out of the loss. Other keys are in `gptjax.data.sources.schemas`.

JSON files hold an array of such objects, JSONL files one object per line.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gptjax.data.documents import Document, Message
from gptjax.data.sources import schemas, tool_turns
from gptjax.data.sources.base import Faults, Reading
from gptjax.data.sources.record import Damaged, Record
from gptjax.data.sources.records import read_records, shown_names
from gptjax.errors import UserError
from gptjax.foreign import check
from gptjax.json_text import show

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
    ("prompt", "answer"),
    ("query", "response"),
)
_ADVICE = "correct it, or leave it out with --config.data.on_error=skip"
_SYSTEM = ("system", "system_prompt")
_HALF_PAIR = re.compile("[\ud800-\udfff]")


def read_dialogues(
    path: str | Path,
    format: str,
    *,
    source: str,
    name: str | None = None,
    fields: Sequence[str] | None = None,
    faults: Faults | None = None,
    reading: Reading = Reading(),  # noqa: B008 (frozen)
    open_file: Callable[[str | Path], Any] | None = None,
) -> Iterator[Document]:
    """The dialogues of one file, in its order.

    A document has `messages`, `id` NAME:NUMBER (the line in JSONL, otherwise the place in the file from 1),
    `source`, and `split_key`, its words up to the first answer, so that the same question never falls into
    two splits. Documents of `pairs` also have `prompt` and `references`.

    Args:
      path: the file; its name without .gz, .zst and the like ends in .csv, .tsv, .parquet, .yml,
        .yaml, .json or .jsonl.
      format: one of `FORMATS`.
      source: the spec, for the field `source` of documents.
      name: the beginning of ids; default: the name of the file.
      fields: for `pairs`, the two fields of an object or columns of a CSV file.
      faults: decides whether a bad dialogue raises or is left out and counted.
      reading: how to treat tool calls, and two turns of one speaker in a row.
      open_file: as for `read_records`.

    Raises:
      UserError: the file cannot be opened; unless `faults` skips, also at the first bad dialogue, with file
        and line: not JSON or YAML, a missing field, an unknown role, an empty turn, no assistant turn, two
        turns of one speaker in a row.
    """
    if format not in FORMATS:
        raise UserError(f"dialogue format {format!r}: expected one of {', '.join(FORMATS)}")
    faults = faults or Faults()
    name = name if name is not None else Path(path).name
    reader = DialogueReader(format, fields, reading, faults)
    key = "conversations" if format == "chatterbot" else None
    for record in read_records(path, open_file, key, delimiter=reading.delimiter, has_option=True, faults=faults):
        try:
            document = reader.document(record)
        except (Damaged, UserError) as problem:  # a UserError names the place itself
            faults.skip(advised(problem, record, faults))
            continue
        yield {**document, "id": f"{name}:{record.number}", "source": source}


def advised(problem: Damaged | UserError, record: Record, faults: Faults) -> UserError:
    """The error for a bad record: its place, what is wrong, and what to do. A UserError names its place itself."""
    place = f"{record.place}: " if isinstance(problem, Damaged) else ""
    advice = f"; {_ADVICE}" if faults.on_error == "raise" else ""
    return UserError(f"{place}{problem}{advice}")


def check_messages(messages: Sequence[Message]) -> None:
    """Raises `Damaged` unless speakers alternate, each turn has text or a tool call, and an answer is trained on."""
    for number, (message, previous) in enumerate(zip(messages, [None, *messages], strict=False), start=1):
        role, content = message["role"], message["content"]
        if role not in (*ROLES, "tool"):
            raise Damaged(f"turn {number} has the role {role[:60]!r}; expected {', '.join(ROLES)}")
        if not content.strip() and not message.get("tool_calls") and role != "tool":
            raise Damaged(f"turn {number} ({role}) is empty")
        if _HALF_PAIR.search(content):
            raise Damaged(f"turn {number} ({role}) has half a surrogate pair")
        if previous is not None and role == previous["role"] != "tool":
            raise Damaged(
                f"turns {number - 1} and {number} are both of the {role}; --config.data.same_speaker=join merges them"
            )
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise Damaged("the dialogue has no assistant turn, so there is nothing to train on")
    if not any(answer.get("train", True) for answer in answers):
        raise Damaged("all turns of the assistant are left out of the loss, so there is nothing to train on")


class DialogueReader:
    """Reads one record."""

    def __init__(self, format: str, fields: Sequence[str] | None, reading: Reading, faults: Faults):
        self._format = format
        self._fields = fields
        self._reading = reading
        self._faults = faults

    def document(self, record: Record) -> dict[str, Any]:
        """A document without `id` and `source`. Raises `Damaged`, or UserError that names the place."""
        value = record.value
        if isinstance(value, Damaged):
            raise value
        if self._format != "chatterbot" and not isinstance(value, Mapping):
            raise Damaged(f"expected a JSON object, not {show(value)}")
        tools: list[dict[str, Any]] = []
        if self._format in ("messages", "sharegpt"):
            messages, tools = self._named_turns(value, record.place)
        else:
            messages = getattr(self, f"_{self._format}")(value, record.place)
        if self._reading.assistant_turns == "last":
            messages = _last_alone(messages)
        check_messages(messages)
        return {**_about(messages, self._format), **({"tools": tools} if tools else {})}

    def _chatterbot(self, value: Any, place: str) -> list[Message]:
        if not isinstance(value, list):
            raise Damaged(f"a conversation must be a list of statements, not {show(value)}")
        return _by_turns(value)

    def _kdconv(self, value: Any, place: str) -> list[Message]:
        entry = check(schemas.KdDialogue, value, place)
        entry.check_keys("", self._faults)
        for number, turn in enumerate(entry.messages, start=1):
            turn.check_keys(f"turn {number}: ", self._faults)
        system = _system(entry.system, entry.system_prompt)
        return system + _by_turns([turn.message for turn in entry.messages])

    def _alpaca(self, value: Any, place: str) -> list[Message]:
        entry = check(schemas.Alpaca, value, place)
        entry.check_keys("", self._faults)
        statements = [statement for pair in entry.history or [] for statement in pair]
        instruction = f"{entry.instruction}\n{entry.input}" if entry.input else entry.instruction
        return _system(entry.system, entry.system_prompt) + _by_turns([*statements, instruction, entry.output])

    def _pairs(self, value: Mapping[str, Any], place: str) -> list[Message]:
        prompt, response = self._fields or _pair_fields(value)
        system: list[Message] = []
        others = {name: entry for name, entry in value.items() if name not in (prompt, response)}
        if self._fields:  # the user chose two fields, so the others are only noted
            for name in others:
                if name not in schemas.ABOUT:
                    self._faults.note(f"field {name[:60]!r} of records, which was not asked for")
        else:
            system = _system(*(_string(others.pop(name), name) for name in _SYSTEM if others.get(name)))
            check(schemas.Pair, others, place).check_keys("", self._faults)
        return system + _by_turns([_text(value, prompt), _text(value, response)])

    def _named_turns(self, value: Any, place: str) -> tuple[list[Message], list[dict[str, Any]]]:
        if not any(isinstance(value.get(name), list) for name in ("messages", "conversations")):
            raise Damaged(f"no list 'messages' or 'conversations'; fields: {shown_names(value)}")
        entry = check(schemas.Dialogue, value, place)
        entry.check_keys("", self._faults)
        if entry.messages and entry.conversations:
            raise Damaged("both 'messages' and 'conversations' hold turns; one of them would be lost")
        turns = entry.messages or entry.conversations or []
        system = _system(entry.system, entry.system_prompt)
        if system and turns and _role(turns[0]) == "system":
            raise Damaged("there are two system texts: in a field of its own, and as the first turn")
        messages = self.messages(turns)
        return system + messages, self.tools(entry)

    def messages(self, turns: Sequence[schemas.Turn]) -> list[Message]:
        """Turns with named speakers as messages; tool turns and repeated speakers are treated as `Reading` says."""
        messages = [self._message(turn, number) for number, turn in enumerate(turns, start=1)]
        if self._reading.tool_turns == "reject":
            for number, message in enumerate(messages, start=1):
                if _of_tools(message):
                    raise Damaged(f"turn {number} ({message['role']}) is a tool call or result: {tool_turns.ADVICE}")
        if self._reading.tool_turns == "leave_out":
            messages = tool_turns.without(messages, self._faults)
        return self._joined(messages)

    def tools(self, entry: schemas.Dialogue | schemas.Preference) -> list[dict[str, Any]]:
        """The tool descriptions of a record, unless they are left out. Raises `Damaged` if they are refused."""
        tools = tool_turns.tools_of(entry.tools, "tools") or tool_turns.tools_of(entry.functions, "functions")
        if tools and self._reading.tool_turns == "reject":
            raise Damaged(f"the record describes tools: {tool_turns.ADVICE}")
        if tools and self._reading.tool_turns == "leave_out":
            self._faults.note("tool descriptions, which were left out", len(tools))
            return []
        return tools

    def _message(self, turn: schemas.Turn, number: int) -> Message:
        turn.check_keys(f"turn {number}: ", self._faults)
        role = _role(turn)
        if role is None:
            raise Damaged(f"turn {number} has no field 'role' or 'from'")
        content = turn.content if turn.content is not None else turn.value
        if isinstance(content, list):
            content = "".join(_part(part, number, self._faults) for part in content)
        calls, content = tool_turns.calls_of(turn, role, content or "")
        if content == "" and not calls and turn.content is None and turn.value is None:
            raise Damaged(f"turn {number} ({role[:60]}): content is null, but must be text or a list")
        if calls:
            role = "assistant" if role == "function_call" else role
        if role in tool_turns.RESULTS:
            role = "tool"
        message: Message = {"role": role, "content": content}
        if calls and role != "assistant":
            raise Damaged(f"turn {number} ({role[:60]}) calls a tool, which only the assistant does")
        try:
            learnt = turn.learnt
        except Damaged as problem:
            raise Damaged(f"turn {number}: {problem}") from None
        if learnt and role != "assistant":
            raise Damaged(
                f"turn {number} ({role[:60]}) is marked for the loss; only turns of the assistant are trained on"
            )
        if learnt is False and role == "assistant":
            message["train"] = False
        if calls:
            message["tool_calls"] = calls
        if turn.name and role != "tool":
            self._faults.note("key 'name' of records, which is not used")
        if role == "tool":
            message |= {key: value for key in ("name", "tool_call_id") if (value := getattr(turn, key))}  # type: ignore
        return message

    def _joined(self, messages: list[Message]) -> list[Message]:
        if self._reading.same_speaker == "reject":
            return messages
        joined: list[Message] = []
        for message in messages:
            if joined and joined[-1]["role"] == message["role"] != "tool":
                joined[-1] = tool_turns.joined(joined[-1], message)
                self._faults.note("turns merged with the turn before them, of the same speaker")
            else:
                joined.append(message)
        return joined


def _last_alone(messages: list[Message]) -> list[Message]:
    """The dialogue in which only the last of the assistant's turns counts in the loss."""
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
    return [
        {**message, "train": False} if message["role"] == "assistant" and i != last else message
        for i, message in enumerate(messages)
    ]


def _about(messages: list[Message], format: str) -> dict[str, Any]:
    first_answer = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
    opening = messages[:first_answer] or messages[:1]
    document = {"messages": messages, "split_key": "\n".join(message["content"] for message in opening)}
    if format == "pairs":
        document |= {"prompt": messages[-2]["content"], "references": [messages[-1]["content"]]}
    return document


def _of_tools(message: Message) -> bool:
    return message["role"] == "tool" or "tool_calls" in message


def _role(turn: schemas.Turn) -> str | None:
    role = turn.role if turn.role is not None else turn.speaker
    return _ROLE_NAMES.get(role, role) if role is not None else None


def _part(part: schemas.Part, number: int, faults: Faults) -> str:
    if part.type not in ("text", "input_text", "output_text"):
        raise Damaged(f"turn {number} has a part of the type {part.type[:60]!r}; only text is read")
    part.check_keys(f"turn {number}: ", faults)
    if part.text is None:
        raise Damaged(f"turn {number} has a part without the field 'text'")
    return part.text


def _system(*texts: str | None) -> list[Message]:
    return [{"role": "system", "content": text} for text in dict.fromkeys(texts) if text]


def _by_turns(statements: Sequence[Any]) -> list[Message]:
    """Statements as messages of user and assistant in turn; the user begins."""
    return [
        {"role": "assistant" if i % 2 else "user", "content": _string(statement, f"turn {i + 1}")}
        for i, statement in enumerate(statements)
    ]


def _pair_fields(entry: Mapping[str, Any]) -> tuple[str, str]:
    for names in _PAIR_FIELDS:
        if all(name in entry for name in names):
            return names
    names = shown_names(entry)
    raise Damaged(f"no prompt and response among the fields {names}; name them: pairs:GLOB#A,B")


def _text(entry: Mapping[str, Any], name: str) -> str:
    if name not in entry:
        raise Damaged(f"no field {name!r}; there is {shown_names(entry)}")
    return _string(entry[name], name)


def _string(value: Any, name: str) -> str:
    if isinstance(value, Damaged):
        raise Damaged(f"{name}: {value}")
    if not isinstance(value, str):
        raise Damaged(f"{name} is {show(value)}, but must be text")
    return value
