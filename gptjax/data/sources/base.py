"""What a source of documents is.

A source is a list of pieces that are read independently of each other, so that any number of workers can share
it, and always the same: the pieces depend on the data alone.
"""

import abc
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from gptjax.config import OPTIONS
from gptjax.data.documents import Document
from gptjax.errors import UserError

ON_ERROR = OPTIONS["data"]["on_error"].choices
PIECE_BYTES = 1 << 22

_MAX_FAULT_EXAMPLES = 100


class Piece(NamedTuple):
    """A share of a source that is read by itself.

    Attributes:
      name: says which, for messages and for progress.
      num_bytes: about how much it is.
      content: what the source needs to find it, made of JSON values; changes when the data does.
    """

    name: str
    num_bytes: int
    content: Any

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps([self.name, self.content]).encode()).hexdigest()


@dataclass(frozen=True)
class Reading:
    """How the texts of files are read: the options of the same names in the section data of a config."""

    decode_errors: str = "reject"
    encoding: str = "utf-8"
    delimiter: str = "auto"
    null_fields: str = "reject"
    tool_turns: str = "reject"
    same_speaker: str = "reject"
    assistant_turns: str = "all"

    def __post_init__(self) -> None:
        for name in READING:
            choices = OPTIONS["data"][name].choices
            if choices and getattr(self, name) not in choices:
                raise UserError(f"data.{name}={getattr(self, name)!r}: expected one of {', '.join(choices)}")

    @property
    def key(self) -> str:
        """The values that are not the defaults, except decode_errors, which is always there."""
        changed = [name for name in READING if getattr(self, name) != getattr(Reading, name)]
        return " ".join(f"{name}={getattr(self, name)}" for name in dict.fromkeys(["decode_errors", *changed]))


READING = tuple(one.name for one in fields(Reading))


@dataclass
class Faults:
    """What was wrong with the data in the latest reading.

    Attributes:
      on_error: "raise" at the first thing that cannot be read, or "skip" it and go on.
      replaced: U+FFFD written for bytes that are not UTF-8; 0 unless decode_errors is "replace".
      skipped: how many lines, documents or ends of files were left out.
      messages: what was wrong, for the first hundred.
      notes: what was left unread on purpose, such as a key of records that nothing reads, and how often.
    """

    on_error: str = "raise"
    replaced: int = 0
    skipped: int = 0
    messages: list[str] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)

    def clear(self) -> None:
        self.replaced, self.skipped, self.messages, self.notes = 0, 0, [], Counter()

    def note(self, what: str, count: int = 1) -> None:
        """Counts what is left unread."""
        if what in self.notes or len(self.notes) < _MAX_FAULT_EXAMPLES:
            self.notes[what] += count

    def skip(self, error: UserError) -> None:
        """Counts the error. Raises it unless on_error is "skip"."""
        if self.on_error == "raise":
            raise error
        self.skipped += 1
        if len(self.messages) < _MAX_FAULT_EXAMPLES:
            self.messages.append(str(error))


class Source(abc.ABC):
    """A corpus that can be read any number of times, in pieces; it pickles, so that worker processes read it.

    Attributes:
      spec: the text it was opened with.
      faults: what was wrong with the data read since it was cleared.
    """

    spec: str
    faults: Faults

    @abc.abstractmethod
    def pieces(self) -> list[Piece]:
        """The pieces, always the same while the data is the same."""

    @abc.abstractmethod
    def read(self, piece: Piece) -> Iterator[Document]:
        """The documents of one piece, in order. Raises UserError at one that cannot be read, unless told to skip."""

    @abc.abstractmethod
    def key(self) -> str:
        """Changes whenever the documents may have changed; found without reading the texts."""

    def documents(self) -> Iterator[Document]:
        """The documents of all pieces, in order."""
        self.faults.clear()
        for piece in self.pieces():
            yield from self.read(piece)
