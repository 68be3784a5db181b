"""Sources of documents, each named by a spec such as `python_docs` or `text:books/**/*.txt`.

A source is a list of pieces that are read independently of each other, so that any number of workers can share
it, and always the same: the pieces depend on the data alone.
"""

import abc
import difflib
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from gptjax.data.decoding import DECODE_ERRORS
from gptjax.data.documents import Document
from gptjax.errors import UserError

SPECS = (
    "python_docs",
    "python_docs:questions",
    "text:GLOB",
    "html:GLOB",
    "jsonl:GLOB[#FIELD]",
    "csv:GLOB[#FIELD]",
    "parquet:GLOB[#FIELD]",
    "tfds:NAME[/CONFIG][:SPLIT][#FIELD]",
    "hf:NAME[/CONFIG][:SPLIT][#FIELD]",
    "messages:GLOB",
    "sharegpt:GLOB",
    "alpaca:GLOB",
    "pairs:GLOB",
    "chatterbot:GLOB",
    "kdconv:GLOB",
)
DIALOGUE_FORMATS = ("messages", "sharegpt", "alpaca", "pairs", "chatterbot", "kdconv")
ON_ERROR = ("raise", "skip")
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


@dataclass
class Faults:
    """What was wrong with the data in the latest reading.

    Attributes:
      on_error: "raise", or "skip" what cannot be read and go on.
      replaced: U+FFFD written for bytes that are not UTF-8; 0 unless decode_errors is "replace".
      skipped: how many lines, documents or ends of files were left out.
      messages: what was wrong with the first of them.
    """

    on_error: str = "raise"
    replaced: int = 0
    skipped: int = 0
    messages: list[str] = field(default_factory=list)

    def clear(self) -> None:
        self.replaced, self.skipped, self.messages = 0, 0, []

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
        """What says, without reading the texts, that the documents are still the same."""

    def documents(self) -> Iterator[Document]:
        """The documents of all pieces, in order."""
        self.faults.clear()
        for piece in self.pieces():
            yield from self.read(piece)


def open_source(spec: str, *, data_dir: str = "", decode_errors: str = "reject", on_error: str = "raise") -> Source:
    """Opens the source that `spec` names, one of `SPECS`.

    Args:
      spec: globs may contain `**` and begin with `gs://`, `s3://` or another protocol of fsspec; files may
        end with .gz or .zst. FIELD is `text` where it is left out; `A+B` joins two fields with a line end.
      data_dir: the directory of prepared TFDS datasets, with NAME[/CONFIG]/VERSION inside; empty for
        $TFDS_DATA_DIR or ~/tensorflow_datasets.
      decode_errors: "reject" bytes that are not UTF-8, or "replace" them with U+FFFD and count.
      on_error: "raise" at what cannot be read, or "skip" it and count.

    Raises:
      UserError: the spec is unknown, nothing matches the glob, or the dataset is not there.
    """
    for name, value, choices in (
        ("decode_errors", decode_errors, DECODE_ERRORS),
        ("on_error", on_error, ON_ERROR),
    ):
        if value not in choices:
            raise UserError(f"data.{name}={value!r}: expected one of {', '.join(choices)}")
    scheme, _, rest = spec.partition(":")
    faults = Faults(on_error)
    if spec in ("python_docs", "python_docs:questions"):
        from gptjax.data.python_docs import PythonDocs

        return PythonDocs(questions_only=bool(rest))
    if scheme == "tfds" and rest:
        from gptjax.data.catalogue import TfdsDataset

        return TfdsDataset(spec, data_dir, decode_errors, faults)
    if scheme == "hf" and rest:
        from gptjax.data.hub import HuggingFaceDataset

        return HuggingFaceDataset(spec, faults)
    if scheme in ("text", "html", "jsonl", "csv", "parquet", *DIALOGUE_FORMATS) and rest:
        from gptjax.data import formats

        return formats.open_files(spec, decode_errors, faults)
    raise UserError(f"unknown data source {spec!r}: expected one of {', '.join(SPECS)}.{_hint(spec, scheme)}")


def _hint(spec: str, scheme: str) -> str:
    if scheme in ("store", "tokens"):
        return " A token store holds tokens, not documents: only training and evaluation read it."
    if Path(spec).expanduser().exists():
        return f" Did you mean 'text:{spec}'?"
    near = difflib.get_close_matches(scheme, sorted({re.split("[:[]", known)[0] for known in SPECS}), n=1)
    return f" Did you mean {spec.replace(scheme, near[0], 1)!r}?" if near and near[0] != scheme else ""
