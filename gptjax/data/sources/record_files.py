"""The sources that are files of records with named fields: JSON, CSV and Parquet."""

import itertools
import re
from collections.abc import Iterator
from typing import Any

from gptjax.data.documents import Document, in_parts
from gptjax.data.sources.base import Reading
from gptjax.data.sources.cuts import cut_lines
from gptjax.data.sources.files import File, is_compressed, open_bytes
from gptjax.data.sources.records import Damaged, parquet_file, read_records, shown_names
from gptjax.data.sources.text_files import Files, Span, whole
from gptjax.errors import UserError
from gptjax.json_text import show

_PARQUET_ROWS = 256


class JsonLines(Files):
    """`jsonl:GLOB#FIELD`: each line is an object whose FIELD is one document; blank lines are skipped.

    A file that begins with `[` is read as a JSON list of such objects.
    """

    has_fields = True

    def _cut(self, file: File, size: int) -> list[Span]:
        if is_compressed(file.path) or self._is_list(file.path):
            return [whole(file)]
        borders = cut_lines(file, size)
        return [
            whole(file)._replace(begin=begin, end=end, first=line)
            for (begin, line), (end, _) in itertools.pairwise(borders)
        ]

    @staticmethod
    def _is_list(path: str) -> bool:
        with open_bytes(path) as file:
            return file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["

    def _documents(self, span: Span) -> Iterator[Document]:
        options = {"delimiter": self.reading.delimiter, "has_option": True}
        records = read_records(span.path, lambda _: self._open_utf8(span), **options)
        for record in records:
            number = span.first + record.number
            place = f"{span.path}, line {number}" if span.first else record.place
            try:
                if isinstance(record.value, Damaged):
                    raise UserError(f"{place}: {record.value}")
                yield from self._record(record.value, f"{span.name}:{number}", place)
            except UserError as error:
                self.faults.skip(error)

    def _record(self, record: Any, document_id: str, place: str) -> Iterator[Document]:
        text, replaced = field_text(record, self.field or "text", self.reading, place)
        self.faults.replaced += replaced
        yield from in_parts({"text": text, "id": document_id, "source": self.spec})


class CsvFiles(JsonLines):
    """`csv:GLOB#FIELD`: the first row names the columns; the column FIELD of each further row is one document."""

    def _cut(self, file: File, size: int) -> list[Span]:
        return [whole(file)]  # a line end may be within a field


def field_text(record: Any, field: str, reading: Reading, place: str) -> tuple[str, int]:
    """The text of FIELD, or of A and B for `A+B`; fields, and the strings of a list, are joined with line ends.

    Returns:
      The text, and how many half surrogate pairs were replaced in it.

    Raises:
      UserError: the record has no such field, or it is not text.
    """
    if not isinstance(record, dict):
        raise UserError(f"{place} holds {_kind(record)}; each line must be one JSON object")
    lines: list[str] = []
    for name in [field] if field in record else field.split("+"):
        if name not in record:
            there = shown_names(record)
            raise UserError(f"{place}: no field {name!r}; fields: {there}. Choose one with SCHEME:GLOB#FIELD")
        value = record[name]
        if isinstance(value, str):
            lines.append(value)
        elif isinstance(value, list) and all(isinstance(line, str) for line in value):
            lines.extend(value)
        elif isinstance(value, Damaged):
            raise UserError(f"{place}: {value}")
        elif value is None and reading.null_fields == "empty":
            lines.append("")
        else:
            advice = "; --config.data.null_fields=empty reads null as an empty text" if value is None else ""
            raise UserError(f"{place}: field {name!r} is {show(value)}, but must be text or a list of texts{advice}")
    # JSON can escape half a surrogate pair, which no UTF-8 text can contain.
    text, count = re.subn("[\ud800-\udfff]", "\ufffd", "\n".join(lines))
    if count and reading.decode_errors == "reject":
        raise UserError(
            f"{place}: field {field!r} has half a surrogate pair (\\ud800 to \\udfff); "
            "--config.data.decode_errors=replace continues with U+FFFD in its place"
        )
    return text, count


def _kind(value: Any) -> str:
    return "a JSON list" if isinstance(value, list) else show(value)


class ParquetFiles(JsonLines):
    """`parquet:GLOB#FIELD`: the column FIELD of each row is one document."""

    is_text = False

    def _cut(self, file: File, size: int) -> list[Span]:
        with open_bytes(file.path) as opened:
            metadata = parquet_file(file.path, opened).metadata
            groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        spans = [whole(file)._replace(end=0)]
        num_bytes = 0
        for number, group in enumerate(groups):
            if num_bytes + group.total_byte_size > size and num_bytes:
                rows = sum(group.num_rows for group in groups[spans[-1].begin : number])
                spans.append(whole(file)._replace(begin=number, first=spans[-1].first + rows))
                num_bytes = 0
            spans[-1] = spans[-1]._replace(end=number + 1)
            num_bytes += group.total_byte_size
        return spans

    def _documents(self, span: Span) -> Iterator[Document]:
        with open_bytes(span.path) as file:
            table = parquet_file(span.path, file)
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
