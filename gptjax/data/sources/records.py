"""The records of JSON, JSONL, CSV, TSV, Parquet and YAML files, with their places."""

import csv
import io
import itertools
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from gptjax.data.sources.files import COMPRESSED, DAMAGE, is_compressed, open_bytes
from gptjax.errors import UserError

MAX_LINE_BYTES = 64 << 20
_PARQUET_ROWS = 256
_WHITE_SPACE = re.compile(r"[\s,]*")


class Damaged(Exception):
    """A record that cannot be used; says what is wrong with it."""


class Record(NamedTuple):
    """A record of a file.

    Attributes:
      place: file and line, for messages.
      number: line in JSONL, otherwise the place in the file, from 1.
      value: what JSON or YAML says, for CSV, TSV and Parquet the columns by name; or `Damaged`.
    """

    place: str
    number: int
    value: Any


def read_records(
    path: str | Path, open_file: Callable[[str | Path], io.IOBase] = open_bytes, yaml_key: str | None = None
) -> Iterator[Record]:
    """The records of a file, by `suffix`: .csv, .tsv, .parquet, .yml or .yaml, otherwise JSON or JSONL.

    What is wrong with one record is its value. What is wrong with the file from some place on (it is cut off,
    it is not YAML) is the value of a last record.

    Args:
      path: the file.
      open_file: opens it for reading bytes, decompressed.
      yaml_key: in YAML, the key whose list has the records; scalars in it are text.

    Raises:
      UserError: the file cannot be opened.
    """
    try:
        file = open_file(path)
    except OSError as error:
        raise UserError(f"cannot open {path}: {error.strerror or error}; check the path") from None
    number = 0
    with file:
        try:
            for record in _reader(path, yaml_key)(str(path), file):
                number = record.number
                yield record
        except DAMAGE as error:
            yield _damaged(path, number + 1, f"the file cannot be read further ({error})")
        except UnicodeDecodeError as error:
            byte = f"byte {error.object[error.start]:#04x} is not UTF-8"
            yield _damaged(path, number + 1, f"{byte}, so the rest of the file cannot be read")


def suffix(path: str | Path) -> str:
    """The end of the name of a file once it is decompressed: ".csv" of words.csv.gz."""
    return next((s for s in reversed(Path(path).suffixes) if s not in COMPRESSED), "")


def _damaged(path: str | Path, number: int, problem: str) -> Record:
    return Record(f"{path}, from record {number} on", number, Damaged(problem))


def _reader(path: str | Path, yaml_key: str | None) -> Callable[[str, io.IOBase], Iterator[Record]]:
    readers = {
        ".csv": _csv,
        ".tsv": partial(_csv, delimiter="\t"),
        ".parquet": _parquet,
        ".yml": partial(_yaml, key=yaml_key),
        ".yaml": partial(_yaml, key=yaml_key),
    }
    return readers.get(suffix(path), _json)


def _json(path: str, file: io.IOBase) -> Iterator[Record]:
    head = file.readline(MAX_LINE_BYTES)
    if head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
        return _json_array(path, (head + file.read()).decode("utf-8-sig"))
    return _json_lines(path, file, head.removeprefix(b"\xef\xbb\xbf"))


def _json_array(path: str, text: str) -> Iterator[Record]:
    decode = json.JSONDecoder().raw_decode
    position = text.index("[") + 1
    line, counted, number = 1, 0, 1
    while (position := _WHITE_SPACE.match(text, position).end()) < len(text) and text[position] != "]":
        line, counted = line + text.count("\n", counted, position), position
        place = f"{path}, entry {number} (line {line})"
        try:
            value, position = decode(text, position)
        except (ValueError, RecursionError) as error:
            problem = Damaged(f"not JSON ({error}), so the rest of the file cannot be read")
            yield Record(place, number, problem)
            return
        yield Record(place, number, value)
        number += 1
    if position == len(text):
        yield _damaged(path, number, "the array does not end with ]; the file is cut off")


def _json_lines(path: str, file: io.IOBase, line: bytes) -> Iterator[Record]:
    number = 1
    while line:
        place = f"{path}, line {number}"
        if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
            while (rest := file.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                pass
            problem = Damaged(f"a line of more than {MAX_LINE_BYTES >> 20} MiB is not a record")
            yield Record(place, number, problem)
        elif stripped := line.strip():
            yield Record(place, number, _json_value(stripped))
        line, number = file.readline(MAX_LINE_BYTES), number + 1


def _json_value(line: bytes) -> Any:
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        return Damaged(f"byte {line[error.start]:#04x} at {error.start} of the line is not UTF-8")
    except (ValueError, RecursionError) as error:
        return Damaged(f"not JSON ({error}); each line must be one JSON object")


def _csv(path: str, file: io.IOBase, delimiter: str = ",") -> Iterator[Record]:
    csv.field_size_limit(MAX_LINE_BYTES)
    reader = csv.DictReader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), delimiter=delimiter)
    number = 1
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            row = Damaged(f"not CSV ({error})")
        if row is None:
            return
        if isinstance(row, dict) and (None in row or None in row.values()):
            row = Damaged(f"expected {len(reader.fieldnames)} columns: {', '.join(reader.fieldnames)}")
        yield Record(f"{path}, line {reader.line_num}", number, row)
        number += 1


def _parquet(path: str, file: io.IOBase) -> Iterator[Record]:
    batches = parquet_file(path, file).iter_batches(_PARQUET_ROWS)
    rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
    for number, row in enumerate(rows, start=1):
        yield Record(f"{path}, row {number}", number, row)


def parquet_file(path: str, file: io.IOBase) -> Any:
    """Opens a `pyarrow.parquet.ParquetFile`. Raises UserError where it is none."""
    import pyarrow
    import pyarrow.parquet

    try:
        # A compressed file cannot be read from its end, where Parquet has its table of contents.
        return pyarrow.parquet.ParquetFile(io.BytesIO(file.read()) if is_compressed(path) else file)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path} is not a Parquet file: {error}") from None


def _yaml(path: str, file: io.IOBase, key: str | None) -> Iterator[Record]:
    import yaml

    try:
        root = yaml.compose(file.read().decode("utf-8-sig"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, RecursionError) as error:
        yield Record(path, 1, Damaged(f"not YAML ({' '.join(str(error).split())})"))
        return
    pairs = root.value if isinstance(root, yaml.MappingNode) else []
    items = next((value for name, value in pairs if name.value == key), None)
    if not isinstance(items, yaml.SequenceNode):
        yield Record(path, 1, Damaged(f"no list {key!r} in the file"))
        return
    for number, node in enumerate(items.value, start=1):
        yield Record(f"{path}, line {node.start_mark.line + 1}", number, _yaml_value(node))


def _yaml_value(node: Any) -> Any:
    """Lists and text only: `Yes` and `42` in a dialogue are words."""
    if node.id == "sequence":
        return [_yaml_value(item) for item in node.value]
    return node.value if node.id == "scalar" else Damaged("a mapping where a statement should be")
