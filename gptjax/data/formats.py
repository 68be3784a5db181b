"""The sources that are files: text, web pages, records and dialogues. Where they are cut depends on the files
alone."""

import hashlib
import io
import itertools
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from gptjax.data.decoding import Utf8Decoder, decode_all
from gptjax.data.documents import PART_CHARACTERS, Document, in_parts
from gptjax.data.files import (
    ByteRange,
    File,
    check_version,
    find_files,
    is_compressed,
    named_damage,
    open_bytes,
)
from gptjax.data.ranges import cut_lines, cut_text
from gptjax.data.sources import PIECE_BYTES, Faults, Piece, Source
from gptjax.errors import UserError

MAX_PAGE_BYTES = 1 << 26
_READ_BYTES = 1 << 20
_PIECE_FILES = 500
_COMPRESSION = 4  # how much larger a compressed text is thought to be
_PAGE_WEIGHT = 8  # a web page takes longer than a text of its size
_PARQUET_ROWS = 256


class Span(NamedTuple):
    """A file, or a share of it: the bytes or row groups from `begin` to `end`, -1 for the end of the file.

    `first` counts what comes before, in the units in which the format numbers its documents.
    """

    path: str
    name: str
    version: str
    begin: int = 0
    end: int = -1
    first: int = 0


def open_files(spec: str, decode_errors: str, faults: Faults) -> "Files":
    """The source of a spec SCHEME:GLOB[#FIELD], whose scheme is one of those below or a format of
    dialogues."""
    scheme, _, rest = spec.partition(":")
    kind = {
        "text": TextFiles,
        "html": HtmlFiles,
        "jsonl": JsonLines,
        "csv": CsvFiles,
        "parquet": ParquetFiles,
    }.get(scheme, DialogueFiles)
    pattern, _, field = rest.partition("#") if kind.has_fields else (rest, "", "")
    return kind(spec, scheme, field, find_files(spec, pattern), decode_errors, faults)


class Files(Source):
    """Files in the order of their paths. Small ones share a piece; a large one is cut where the format allows
    it."""

    has_fields = False
    weight = 1

    def __init__(self, spec: str, scheme: str, field: str, files: list[File], decode_errors: str, faults: Faults):
        self.spec = spec
        self.scheme = scheme
        self.field = field
        self.files = files
        self.decode_errors = decode_errors
        self.faults = faults

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "files": []}  # a piece names its own, and there may be millions

    def key(self) -> str:
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(f"{file.path}\0{file.size}\0{file.version}\n".encode())
        return f"{self.spec} decode_errors={self.decode_errors} files={digest.hexdigest()}"

    def pieces(self) -> list[Piece]:
        pieces: list[Piece] = []
        group: list[Span] = []
        group_bytes = 0
        for file in self.files:
            num_bytes = file.size * self.weight * (_COMPRESSION if is_compressed(file.path) else 1)
            with named_damage(file.path):
                spans = self._cut(file) if num_bytes > PIECE_BYTES else [_whole(file)]
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

    def _cut(self, file: File) -> list[Span]:
        return [_whole(file)]

    def _documents(self, span: Span) -> Iterator[Document]:
        raise NotImplementedError

    def _open(self, span: Span) -> io.IOBase:
        file = open_bytes(span.path, span.begin)
        return file if span.end < 0 else io.BufferedReader(ByteRange(file, span.end - span.begin), _READ_BYTES)


def _whole(file: File) -> Span:
    return Span(file.path, file.name, file.version)


def _piece(spans: list[Span], num_bytes: int) -> Piece:
    first, last = spans[0], spans[-1]
    name = f"{first.name} from {first.begin}" if first.begin else first.name
    return Piece(name if first == last else f"{name} to {last.name}", num_bytes, [list(span) for span in spans])


class TextFiles(Files):
    """`text:GLOB`: each file is one document; its id is the path below the fixed start of the glob."""

    def _cut(self, file: File) -> list[Span]:
        if is_compressed(file.path):
            return [_whole(file)]
        borders = cut_text(file, PIECE_BYTES)
        return [
            _whole(file)._replace(begin=begin, end=end, first=-(-begin // PART_CHARACTERS))
            for begin, end in itertools.pairwise(borders)
        ]

    def _documents(self, span: Span) -> Iterator[Document]:
        yield from in_parts(
            {"id": span.name, "source": self.spec},
            self._text(span),
            number=None if span.end < 0 else span.first,
        )

    def _text(self, span: Span) -> Iterator[str]:
        decoder = Utf8Decoder(self.decode_errors, span.path, offset=span.begin)
        with self._open(span) as file:
            while data := file.read(_READ_BYTES):
                yield decoder.decode(data)
        yield decoder.decode(b"", final=True)
        self.faults.replaced += decoder.replaced


class HtmlFiles(Files):
    """`html:GLOB`: each file is one document, whose text is the page as it is; the profile `web` extracts the
    text."""

    weight = _PAGE_WEIGHT

    def _documents(self, span: Span) -> Iterator[Document]:
        with self._open(span) as file:
            data = file.read(MAX_PAGE_BYTES + 1)
        if len(data) > MAX_PAGE_BYTES:
            raise UserError(f"{span.path}: a page of more than {MAX_PAGE_BYTES:,} bytes; leave it out of the glob")
        text, replaced = decode_all(data, self.decode_errors, span.path)
        self.faults.replaced += replaced
        yield {"text": text, "id": span.name, "source": self.spec}


class JsonLines(Files):
    """`jsonl:GLOB#FIELD`: each line is an object whose FIELD is one document; blank lines are skipped.

    A file that begins with `[` is read as a JSON list of such objects.
    """

    has_fields = True

    def _cut(self, file: File) -> list[Span]:
        if is_compressed(file.path) or self._is_list(file.path):
            return [_whole(file)]
        borders = cut_lines(file, PIECE_BYTES)
        return [
            _whole(file)._replace(begin=begin, end=end, first=line)
            for (begin, line), (end, _) in itertools.pairwise(borders)
        ]

    @staticmethod
    def _is_list(path: str) -> bool:
        with open_bytes(path) as file:
            return file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["

    def _documents(self, span: Span) -> Iterator[Document]:
        from gptjax.data.records import Damaged, read_records

        for record in read_records(span.path, lambda _: self._open_text(span)):
            number = span.first + record.number
            place = f"{span.path}, line {number}" if span.first else record.place
            try:
                if isinstance(record.value, Damaged):
                    raise UserError(f"{place}: {record.value}")
                yield from self._record(record.value, f"{span.name}:{number}", place)
            except UserError as error:
                self.faults.skip(error)

    def _open_text(self, span: Span) -> io.IOBase:
        """The bytes of the span; where asked for, with U+FFFD for those that are not UTF-8."""
        file = self._open(span)
        if self.decode_errors == "reject":
            return file
        return io.BufferedReader(_Repaired(file, self.faults), _READ_BYTES)

    def _record(self, record: Any, document_id: str, place: str) -> Iterator[Document]:
        text, replaced = field_text(record, self.field or "text", self.decode_errors, place)
        self.faults.replaced += replaced
        yield from in_parts({"text": text, "id": document_id, "source": self.spec})


class _Repaired(io.RawIOBase):
    """A file with U+FFFD for bytes that are not UTF-8."""

    def __init__(self, file: io.IOBase, faults: Faults):
        self._file = file
        self._faults = faults
        self._decoder = Utf8Decoder("replace", "")
        self._repaired = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        final = False
        while not self._repaired and not final:
            data = self._file.read(_READ_BYTES)
            final = not data
            self._repaired = self._decoder.decode(data, final=final).encode()
        data, self._repaired = self._repaired[: len(buffer)], self._repaired[len(buffer) :]
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._faults.replaced += self._decoder.replaced
            self._file.close()
        super().close()


class CsvFiles(JsonLines):
    """`csv:GLOB#FIELD`: the first row names the columns; the column FIELD of each further row is one
    document."""

    def _cut(self, file: File) -> list[Span]:
        return [_whole(file)]  # a line end may be within a field


def field_text(record: Any, field: str, decode_errors: str, place: str) -> tuple[str, int]:
    """The text of FIELD, or of A and B for `A+B`, with a line end between them; so are the strings of a list
    joined.

    Returns:
      The text, and how many half surrogate pairs were replaced in it.

    Raises:
      UserError: the record has no such field, or it is not text.
    """
    if not isinstance(record, dict):
        raise UserError(f"{place}: a JSON {type(record).__name__}; each line must be one JSON object")
    lines: list[str] = []
    for name in [field] if field in record else field.split("+"):
        if name not in record:
            there = ", ".join(map(repr, record)) or "none"
            raise UserError(f"{place}: no field {name!r}; fields: {there}. Choose one with SCHEME:GLOB#FIELD")
        value = record[name]
        if isinstance(value, list) and all(isinstance(line, str) for line in value):
            lines.extend(value)
        elif isinstance(value, str):
            lines.append(value)
        else:
            raise UserError(f"{place}: field {name!r} is a {type(value).__name__}; expected a string")
    # JSON can escape half a surrogate pair, which no UTF-8 text can contain.
    text, count = re.subn("[\ud800-\udfff]", "\ufffd", "\n".join(lines))
    if count and decode_errors == "reject":
        raise UserError(
            f"{place}: field {field!r} has half a surrogate pair (\\ud800 to \\udfff); "
            "data.decode_errors=replace continues with U+FFFD in its place"
        )
    return text, count


class ParquetFiles(JsonLines):
    """`parquet:GLOB#FIELD`: the column FIELD of each row is one document."""

    def _cut(self, file: File) -> list[Span]:
        with open_bytes(file.path) as opened:
            metadata = _parquet_file(file.path, opened).metadata
            groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        spans = [_whole(file)._replace(end=0)]
        num_bytes = 0
        for number, group in enumerate(groups):
            if num_bytes + group.total_byte_size > PIECE_BYTES and num_bytes:
                rows = sum(group.num_rows for group in groups[spans[-1].begin : number])
                spans.append(_whole(file)._replace(begin=number, first=spans[-1].first + rows))
                num_bytes = 0
            spans[-1] = spans[-1]._replace(end=number + 1)
            num_bytes += group.total_byte_size
        return spans

    def _documents(self, span: Span) -> Iterator[Document]:
        with open_bytes(span.path) as file:
            table = _parquet_file(span.path, file)
            names = table.schema_arrow.names
            field = self.field or "text"
            columns = [field] if field in names else field.split("+")
            if missing := [name for name in columns if name not in names]:
                raise UserError(
                    f"{span.path}: no column {missing[0]!r}; columns: {', '.join(names)}. Choose one with #FIELD"
                )
            groups = list(range(span.begin, span.end if span.end >= 0 else table.num_row_groups))
            batches = table.iter_batches(_PARQUET_ROWS, row_groups=groups, columns=columns)
            records = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
            for number, record in enumerate(records, start=span.first + 1):
                try:
                    yield from self._record(record, f"{span.name}:{number}", f"{span.path}, row {number}")
                except UserError as error:
                    self.faults.skip(error)


def _parquet_file(path: str, file: io.IOBase) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path} is not a Parquet file: {error}") from None


class DialogueFiles(Files):
    """`messages:GLOB` and the other formats of `gptjax.data.dialogues`; `pairs:GLOB#A,B` names the two
    fields."""

    has_fields = True

    def _documents(self, span: Span) -> Iterator[Document]:
        from gptjax.data.dialogues import Skipped, read_dialogues

        skipped = Skipped()
        yield from read_dialogues(
            span.path,
            self.scheme,
            source=self.spec,
            name=span.name,
            fields=self.field.split(",") if self.field else None,
            on_error=self.faults.on_error,
            skipped=skipped,
            open_file=open_bytes,
        )
        self.faults.skipped += sum(skipped.counts.values())
        self.faults.messages += [example for examples in skipped.examples.values() for example in examples]
