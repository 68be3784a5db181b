"""The rows of CSV and TSV files."""

import csv
import io
from collections.abc import Iterator

from gptjax.data.sources.record import MAX_BYTES, Damaged, Record

_DELIMITERS = {"comma": ",", "semicolon": ";", "tab": "\t", "pipe": "|"}


def read_csv(path: str, file: io.IOBase, delimiter: str = "auto") -> Iterator[Record]:
    """The rows as {column: value}; the first row names the columns. A record has the line in which its row begins.

    A row with another number of columns is `Damaged`, and so is one whose quote is not closed at the end of a field:
    the lines below that quote are then read again as rows.
    """
    csv.field_size_limit(MAX_BYTES)
    lines = _Lines(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""))
    separator = _DELIMITERS.get(delimiter) or _found_delimiter(lines)
    names: list[str] | None = None
    number = 1
    reader = csv.reader(lines, delimiter=separator)
    while True:
        first = lines.number + 1
        lines.taken.clear()
        problem = None
        try:
            row = next(reader, None)
        except csv.Error as error:
            row, problem = [""], Damaged(f"not CSV ({error})")
        if row is None:
            return
        if row and (len(lines.taken) > 1 or lines.ended):
            problem = problem or _open_quote(lines.taken, separator, first)
            if problem:
                lines.again()
                reader = csv.reader(lines, delimiter=separator)
        if not row:
            continue
        if names is None and not problem:
            names = row
            continue
        if not problem and len(row) != len(names):
            problem = Damaged(f"expected {len(names)} columns: {', '.join(names)[:500]}; there are {len(row)}")
        value = problem or _named(names, row)
        yield Record(f"{path}, line {first}", number, value)
        if problem and names is None:
            return
        number += 1


class _Lines(Iterator[str]):
    """The lines of a file; the last ones can be read again.

    Attributes:
      number: of the last line that was taken.
      taken: the lines since this list was cleared.
      ended: whether the end of the file was reached.
    """

    def __init__(self, stream: io.TextIOBase):
        self._stream = stream
        self._next: list[str] = []
        self.number = 0
        self.taken: list[str] = []
        self.ended = False

    def __next__(self) -> str:
        line = self._next.pop() if self._next else self._stream.readline()
        if not line:
            self.ended = True
            raise StopIteration
        self.number += 1
        self.taken.append(line)
        return line

    def again(self, kept: int = 1) -> None:
        """Lets all taken lines be read again, except the first `kept`."""
        back = self.taken[kept:]
        self.number -= len(back)
        self._next.extend(reversed(back))
        self.taken.clear()
        self.ended = False


def _found_delimiter(lines: _Lines) -> str:
    """A comma if the first line has one outside quotes, else the most frequent of semicolon, tab and pipe."""
    head = next((line for line in lines if line.strip()), "")
    lines.again(0)
    outside = "".join(head.split('"')[::2])
    if "," in outside:
        return ","
    return max(",;\t|", key=outside.count)


def _open_quote(taken: list[str], separator: str, first: int) -> Damaged | None:
    """What is wrong with a row of several lines, or with the last one, whose first quote may never be closed."""
    try:
        for _ in csv.reader(iter(taken), delimiter=separator, strict=True):
            pass
    except csv.Error:
        quotes, line = 0, first
        for offset, text in enumerate(taken):
            if quotes % 2 == 0:
                line = first + offset
            quotes += text.count('"')
        if quotes % 2:
            return Damaged(f"the quote that opens in line {line} is not closed up to the end of the file")
        return Damaged(f"the quote that opens in line {first} is closed within a field, {len(taken)} lines further")
    return None


def _named(names: list[str], row: list[str]) -> dict[str, object]:
    record: dict[str, object] = dict(zip(names, row, strict=True))
    if len(record) < len(names):
        for name in names:
            if names.count(name) > 1:
                record[name] = Damaged(f"the column {name[:60]!r} occurs {names.count(name)} times in the first line")
    return record
