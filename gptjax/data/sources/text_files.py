"""Sources of files with one text each, or with dialogues, and the base class of all sources of files."""

import abc
import hashlib
import io
import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from gptjax.data.documents import PART_CHARACTERS, Document, in_parts
from gptjax.data.sources.base import PIECE_BYTES, Faults, Piece, Reading, Source
from gptjax.data.sources.cuts import cut_text
from gptjax.data.sources.encodings import as_utf8, encoding_of
from gptjax.data.sources.files import (
    ByteRange,
    File,
    check_version,
    is_compressed,
    named_damage,
    open_bytes,
)
from gptjax.data.sources.utf8 import Utf8Decoder
from gptjax.errors import UserError

MAX_PAGE_BYTES = 1 << 26
READ_BYTES = 1 << 20
_PIECE_FILES = 500
_COMPRESSION = 4  # assumed size of a text / its compressed size
_PAGE_WEIGHT = 8  # a web page takes longer than a text of its size


class Span(NamedTuple):
    """A file, or a share of it: the bytes or row groups from `begin` to `end`, -1 for the end of the file.

    `first`: how much comes before it, in the units by which the format numbers its documents (lines, rows, parts).
    """

    path: str
    name: str
    version: str
    begin: int = 0
    end: int = -1
    first: int = 0


class Files(Source):
    """Files in the order of their paths. Small ones share a piece; a large one is cut if its format allows it.

    The pieces depend on the files alone.
    """

    has_fields = False
    is_text = True
    weight = 1

    def __init__(self, spec: str, scheme: str, field: str, files: list[File], reading: Reading, faults: Faults):
        self.spec = spec
        self.scheme = scheme
        self.field = field
        self.files = files
        self.reading = reading
        self.faults = faults

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "files": []}  # a piece names its own files, and there may be millions in all

    def key(self) -> str:
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(f"{file.path}\0{file.size}\0{file.version}\n".encode("utf-8", "surrogateescape"))
        return f"{self.spec} {self.reading.key} files={digest.hexdigest()}"

    def pieces(self) -> list[Piece]:
        pieces: list[Piece] = []
        group: list[Span] = []
        group_bytes = 0
        for file in self.files:
            num_bytes = file.size * self.weight * (_COMPRESSION if is_compressed(file.path) else 1)
            with named_damage(file.path):
                large = num_bytes > PIECE_BYTES and self._can_be_cut(file)
                spans = self._cut(file, PIECE_BYTES) if large else [whole(file)]
            if group and (group_bytes + num_bytes > PIECE_BYTES or len(group) == _PIECE_FILES):
                pieces.append(_piece(group, group_bytes))
                group, group_bytes = [], 0
            if len(spans) > 1:
                pieces.extend(_piece([span], num_bytes // len(spans)) for span in spans)
            else:
                group.extend(spans)
                group_bytes += num_bytes
        if group:
            pieces.append(_piece(group, group_bytes))
        return pieces

    def read(self, piece: Piece) -> Iterator[Document]:
        for span in itertools.starmap(Span, piece.content):
            check_version(span.path, span.version)
            try:
                with named_damage(span.path):
                    yield from self._documents(span)
            except UserError as error:
                self.faults.skip(error)
            check_version(span.path, span.version)

    def _cut(self, file: File, size: int) -> list[Span]:
        """The shares of about `size` bytes into which a large file is cut."""
        return [whole(file)]

    def _can_be_cut(self, file: File) -> bool:
        """Whether a text is UTF-8, where alone the beginning of a character can be found from any byte."""
        if not self.is_text:
            return True
        with open_bytes(file.path) as opened:
            return encoding_of(opened, self.reading.encoding) == "utf-8"

    @abc.abstractmethod
    def _documents(self, span: Span) -> Iterator[Document]:
        """The documents of a share of a file."""

    def _open(self, span: Span) -> io.IOBase:
        file = open_bytes(span.path, span.begin)
        return file if span.end < 0 else io.BufferedReader(ByteRange(file, span.end - span.begin), READ_BYTES)

    def _open_utf8(self, span: Span) -> io.IOBase:
        """The bytes of the span in UTF-8; with decode_errors "replace", U+FFFD for wrong bytes."""
        file, reading = self._open(span), self.reading
        if span.begin:  # only the beginning of a file has a mark, and only UTF-8 files are cut
            reading = replace(reading, encoding="utf-8")
        return as_utf8(file, reading.encoding, reading.decode_errors, span.path, self.faults)


def whole(file: File) -> Span:
    """All of a file."""
    return Span(file.path, file.name, file.version)


def _piece(spans: list[Span], num_bytes: int) -> Piece:
    first, last = spans[0], spans[-1]
    name = f"{first.name} from {first.begin}" if first.begin else first.name
    return Piece(name if first == last else f"{name} to {last.name}", num_bytes, [list(span) for span in spans])


class TextFiles(Files):
    """`text:GLOB`: each file is one document; its id is the path below the fixed start of the glob."""

    def _cut(self, file: File, size: int) -> list[Span]:
        if is_compressed(file.path):
            return [whole(file)]
        borders = cut_text(file, size)
        return [
            whole(file)._replace(begin=begin, end=end, first=-(-begin // PART_CHARACTERS))
            for begin, end in itertools.pairwise(borders)
        ]

    def _documents(self, span: Span) -> Iterator[Document]:
        yield from in_parts(
            {"id": span.name, "source": self.spec},
            self._text(span),
            number=None if span.end < 0 else span.first,
        )

    def _text(self, span: Span) -> Iterator[str]:
        decoder = Utf8Decoder("reject", span.path, offset=span.begin)
        with self._open_utf8(span) as file:
            while data := file.read(READ_BYTES):
                yield decoder.decode(data)
        yield decoder.decode(b"", final=True)


class HtmlFiles(Files):
    """`html:GLOB`: each file is one document, whose text is the page as it is; the profile `web` extracts the text."""

    weight = _PAGE_WEIGHT

    def _documents(self, span: Span) -> Iterator[Document]:
        with self._open_utf8(span) as file:
            data = file.read(MAX_PAGE_BYTES + 1)
        if len(data) > MAX_PAGE_BYTES:
            raise UserError(f"{span.path}: a page of more than {MAX_PAGE_BYTES:,} bytes; leave it out of the glob")
        text = Utf8Decoder("reject", span.path).decode(data, final=True)
        yield {"text": text, "id": span.name, "source": self.spec}


class DialogueFiles(Files):
    """`messages:GLOB` and the other formats of `gptjax.data.sources.dialogues`; `pairs:GLOB#A,B` names two fields."""

    has_fields = True

    def _documents(self, span: Span) -> Iterator[Document]:
        from gptjax.data.sources.dialogues import read_dialogues

        yield from read_dialogues(
            span.path,
            self.scheme,
            source=self.spec,
            name=span.name,
            fields=self.field.split(",") if self.field else None,
            faults=self.faults,
            reading=self.reading,
            open_file=lambda _: self._open_utf8(span),
        )


class PreferenceFiles(Files):
    """`preference:GLOB`: pairs, rankings and judgements of answers, in the formats of `sources.preferences`."""

    def _documents(self, span: Span) -> Iterator[Document]:
        from gptjax.data.sources.preferences import read_preferences

        yield from read_preferences(
            span.path,
            source=self.spec,
            name=span.name,
            faults=self.faults,
            reading=self.reading,
            open_file=lambda _: self._open_utf8(span),
        )
