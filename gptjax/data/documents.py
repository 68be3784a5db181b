"""What a document is, and how a long one is split into parts."""

import enum
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, NotRequired, TypedDict

PART_CHARACTERS = 1_000_000


class Message(TypedDict):
    """One turn of a dialogue: who speaks, and what."""

    role: str  # system, user, assistant or tool
    content: str
    train: NotRequired[bool]  # False: an answer that is not trained on
    tool_calls: NotRequired[list[dict[str, Any]]]  # as transformers' chat templates read them
    name: NotRequired[str]  # of the tool that answers
    tool_call_id: NotRequired[str]


class Kind(enum.IntEnum):
    """How the answer in a document of a store is judged. A pair is two successive documents: CHOSEN, then REJECTED."""

    PLAIN = 0  # not judged
    CHOSEN = 1
    REJECTED = 2
    DESIRABLE = 3
    UNDESIRABLE = 4


WORSE = (Kind.REJECTED, Kind.UNDESIRABLE)  # answers that preference training makes less probable


class Document(TypedDict):
    """One text or one dialogue of a corpus, or one part of a text that is too long to be in memory at once.

    It has `text` or `messages`. The parts of a text follow each other and differ only in `text` and in the increasing
    number `part`: 0 for the first, then about one more for each million characters.
    """

    text: NotRequired[str]
    messages: NotRequired[list[Message]]
    tools: NotRequired[list[dict[str, Any]]]  # described to the model before a dialogue
    id: str
    source: str
    part: NotRequired[int]
    split: NotRequired[str]  # train, validation or test, where the source itself fixes it
    split_key: NotRequired[str]  # its hash decides the split; default: the text
    prompt: NotRequired[str]
    references: NotRequired[list[str]]
    rejected: NotRequired[list[Message]]  # `messages` with a worse answer: the two are a pair
    label: NotRequired[bool]  # whether the last turn of `messages` is a good answer


def content(document: Document) -> str:
    """The text of a document; for a dialogue its messages with empty lines between them, for a pair both sides."""
    if "messages" in document:
        return said([*document["messages"], *document.get("rejected", [])])
    return document["text"]


def said(messages: Iterable[Message]) -> str:
    """The contents of messages with empty lines between them."""
    return "\n\n".join(map(_said, messages))


def _said(message: Message) -> str:
    if calls := message.get("tool_calls"):
        return message["content"] + json.dumps(calls, ensure_ascii=False)
    return message["content"]


# A byte-level BPE never merges across these borders, so a text cut here keeps its token ids. The first two
# hold for the pre-tokenisation of every GPT-2 descendant, the third for GPT-2's own.
_CUTS = (
    re.compile(r"(?s:.*)\S(?= \S)"),
    re.compile(r"(?s:.*)\S\n(?=\S)"),
    re.compile(r"(?s:.*)\S(?=\s)"),
)


def split_text(pieces: Iterable[str], size: int) -> Iterator[str]:
    """Joins `pieces` and cuts the result into parts of at most `size` characters.

    A part ends before the last space between two words; in text without such a space, at a line end; in text
    without white space, after exactly `size` characters. The parts joined are the pieces joined. An empty text
    gives one empty part.

    Args:
      pieces: consecutive pieces of one text, each small enough to be held in memory.
      size: the most characters in a part.
    """
    buffer = ""
    delivered = False
    for piece in pieces:
        buffer += piece
        while len(buffer) > size:
            cut = last_cut(buffer, size)
            yield buffer[:cut]
            buffer, delivered = buffer[cut:], True
    if buffer or not delivered:
        yield buffer


def last_cut(text: str, size: int) -> int:
    """Length of the longest beginning of `text`, of at most `size` characters, after which it may be cut."""
    for pattern in _CUTS:
        # The pattern looks at up to two characters after the cut.
        if (match := pattern.match(text, 0, size + 2)) and match.end() <= size:
            return match.end()
    return size


def in_parts(
    document: Document, pieces: Iterable[str] | None = None, *, number: int | None = None
) -> Iterator[Document]:
    """Yields `document`, whose text is `pieces` joined (default: its own text), as one or more parts.

    `number`: of the first part, if `pieces` are only a share of the text.
    """
    if pieces is None:
        text = document["text"]
        if len(text) <= PART_CHARACTERS:
            yield document
            return
        pieces = (text[i : i + PART_CHARACTERS] for i in range(0, len(text), PART_CHARACTERS))
    parts = split_text(pieces, PART_CHARACTERS)
    first = next(parts)
    second = next(parts, None)
    if second is None and number is None:
        yield {**document, "text": first}
        return
    number = number or 0
    yield {**document, "text": first, "part": number}
    rest = itertools.chain([second], parts) if second is not None else ()
    for following, part in enumerate(rest, start=number + 1):
        yield {**document, "text": part, "part": following}
