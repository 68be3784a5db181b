"""What a source of documents is.

A source is a list of pieces that are read independently, so that any number of workers can share it. The pieces
depend on the data alone.
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
      name: for messages and progress.
      num_bytes: its approximate size.
      content: JSON values by which the source finds it; they change with the data.
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
        """decode_errors, and the options that differ from their defaults, as text."""
        changed = [name for name in READING if getattr(self, name) != getattr(Reading, name)]
        return " ".join(f"{name}={getattr(self, name)}" for name in dict.fromkeys(["decode_errors", *changed]))


READING = tuple(one.name for one in fields(Reading))


@dataclass
class Faults:
    """What was wrong with the data since `clear` was called.

    Attributes:
      on_error: "raise" at the first thing that cannot be read, or "skip" it and continue.
      replaced: U+FFFD written for bytes that are not UTF-8; 0 unless decode_errors is "replace".
      skipped: how many lines, documents or ends of files were left out.
      messages: what was wrong, for the first hundred.
      notes: what was not read on purpose, such as an unused key of records, and how often.
    """

    on_error: str = "raise"
    replaced: int = 0
    skipped: int = 0
    messages: list[str] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)

    def clear(self) -> None:
        self.replaced, self.skipped, self.messages, self.notes = 0, 0, [], Counter()

    def note(self, what: str, count: int = 1) -> None:
        """Counts something that is not read."""
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
      faults: what was wrong with the data.
    """

    spec: str
    faults: Faults

    @abc.abstractmethod
    def pieces(self) -> list[Piece]:
        """The pieces; the same as long as the data is."""

    @abc.abstractmethod
    def read(self, piece: Piece) -> Iterator[Document]:
        """The documents of one piece, in order. Raises UserError at one that cannot be read, unless `faults` skips."""

    @abc.abstractmethod
    def key(self) -> str:
        """A text that changes whenever the documents may have changed; computed without reading them."""

    def documents(self) -> Iterator[Document]:
        """The documents of all pieces, in order."""
        self.faults.clear()
        for piece in self.pieces():
            yield from self.read(piece)
