"""The records of JSON, JSONL, CSV, TSV, Parquet and YAML files, with their places."""

import io
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from gptjax.data.sources.base import Faults
from gptjax.data.sources.encodings import as_utf8
from gptjax.data.sources.files import COMPRESSED, DAMAGE, damage, is_compressed, is_remote, open_bytes
from gptjax.data.sources.record import MAX_BYTES, Damaged, Record
from gptjax.data.sources.tables import read_csv
from gptjax.data.sources.utf8 import other_encoding
from gptjax.data.sources.yaml_files import read_yaml
from gptjax.errors import UserError
from gptjax.files import expand, regular
from gptjax.json_text import of_parser

MAX_LINE_BYTES = MAX_BYTES
_PARQUET_ROWS = 256
_WHITE_SPACE = re.compile(r"[\s,]*")


def open_utf8(path: str | Path) -> io.IOBase:
    """A text file, decompressed; with a byte-order mark, converted to UTF-8. Raises UserError if it never ends."""
    if not is_remote(str(path)):
        path = expand(path).absolute()
        path = regular(path) if path.exists() else path
    file = open_bytes(path)
    return as_utf8(file, "utf-8", "reject", str(path), Faults())


def read_records(
    path: str | Path,
    open_file: Callable[[str | Path], io.IOBase] | None = None,
    yaml_key: str | None = None,
    *,
    delimiter: str = "auto",
    lines: bool = False,
    has_option: bool = False,
    faults: Faults | None = None,
) -> Iterator[Record]:
    """The records of a file, by `suffix`: .csv, .tsv, .parquet, .yml or .yaml, otherwise JSON or JSONL.

    A bad record has `Damaged` as its value. If the rest of the file cannot be read (it is cut off, it is not YAML),
    a last record has `Damaged` as its value.

    Args:
      path: the file.
      open_file: opens it for reading bytes, decompressed and in UTF-8; default: `open_utf8`, for Parquet `open_bytes`.
      yaml_key: in YAML, the key whose list has the records; scalars in it are text.
      delimiter: of CSV; see the option data.delimiter.
      lines: whether each line of a .txt file that is not blank is a record {"text": LINE}.
      has_option: whether data.encoding applies to the file, for the advice about bytes that are not UTF-8.
      faults: collects the keys of a YAML file that are not read.

    Raises:
      UserError: the file cannot be opened.
    """
    try:
        file = (open_file or (open_bytes if suffix(path) == ".parquet" else open_utf8))(path)
    except DAMAGE as error:
        if isinstance(error, OSError) and error.errno:
            raise UserError(f"cannot open {path}: {error.strerror}; check the path") from None
        yield _damaged(path, 1, f"the file cannot be read further ({damage(error)})")
        return
    number = 0
    with file:
        try:
            for record in _reader(path, yaml_key, delimiter, lines, has_option, faults or Faults())(str(path), file):
                number = record.number
                yield record
        except DAMAGE as error:
            yield _damaged(path, number + 1, f"the file cannot be read further ({damage(error)})")
        except UnicodeDecodeError as error:
            advice = other_encoding(error.object[error.start :], has_option=has_option)
            byte = f"byte {error.object[error.start]:#04x} is not UTF-8; {advice}"
            yield _damaged(path, number + 1, f"the rest of the file cannot be read: {byte}")


def suffix(path: str | Path) -> str:
    """The suffix of the name of a file without compression: ".csv" of words.csv.gz."""
    return next((s for s in reversed(Path(path).suffixes) if s not in COMPRESSED), "")


def _damaged(path: str | Path, number: int, problem: str) -> Record:
    return Record(f"{path}, from record {number} on", number, Damaged(problem))


def _reader(
    path: str | Path, yaml_key: str | None, delimiter: str, lines: bool, has_option: bool, faults: Faults
) -> Callable[[str, io.IOBase], Iterator[Record]]:
    readers = {
        ".csv": partial(read_csv, delimiter=delimiter),
        ".tsv": partial(read_csv, delimiter="tab" if delimiter == "auto" else delimiter),
        ".parquet": _parquet,
        ".yml": partial(read_yaml, key=yaml_key, faults=faults),
        ".yaml": partial(read_yaml, key=yaml_key, faults=faults),
        **({".txt": _text_lines} if lines else {}),
    }
    return readers.get(suffix(path), partial(_json, has_option=has_option))


def _lines(file: io.IOBase) -> Iterator[bytes]:
    return iter(lambda: file.readline(MAX_LINE_BYTES), b"")


def _text_lines(path: str, file: io.IOBase) -> Iterator[Record]:
    for number, line in enumerate(_lines(file), start=1):
        if text := line.decode("utf-8-sig" if number == 1 else "utf-8").strip():
            yield Record(f"{path}, line {number}", number, {"text": text})


def _json(path: str, file: io.IOBase, *, has_option: bool) -> Iterator[Record]:
    head = file.readline(MAX_LINE_BYTES).removeprefix(b"\xef\xbb\xbf")
    if head.lstrip()[:1] != b"[":
        return _json_lines(path, file, [head], has_option)
    following = list(_to_text(file))
    # If the first line is a complete list and more lines follow, the file has JSON lines; else it is one list.
    if following and following[-1].strip() and not isinstance(_json_value(head, has_option), Damaged):
        return _json_lines(path, file, [head, *following], has_option)
    text = b"".join([head, *following, file.read()])
    return _json_array(path, text.decode())


def _to_text(file: io.IOBase) -> Iterator[bytes]:
    """The next lines up to the first that is not blank."""
    for line in _lines(file):
        yield line
        if line.strip():
            return


def _json_array(path: str, text: str) -> Iterator[Record]:
    position = text.index("[") + 1
    line, counted, number = 1, 0, 1
    while (position := _WHITE_SPACE.match(text, position).end()) < len(text) and text[position] != "]":
        line, counted = line + text.count("\n", counted, position), position
        place = f"{path}, entry {number} (line {line})"
        try:
            value, position = _DECODER.raw_decode(text, position)
        except Damaged as problem:
            yield Record(place, number, Damaged(f"{problem}, so the rest of the file cannot be read"))
            return
        except (ValueError, RecursionError) as error:
            problem = Damaged(f"not JSON ({_json_problem(error)}), so the rest of the file cannot be read")
            yield Record(place, number, problem)
            return
        yield Record(place, number, value)
        number += 1
    if position == len(text):
        yield _damaged(path, number, "the array does not end with ]; the file is cut off")
    elif text[position + 1 :].strip():
        line += text.count("\n", counted, position)
        problem = Damaged(f"the list ends with ] in line {line}; the text after it cannot be read")
        yield Record(f"{path}, from record {number} on", number, problem)


def _json_lines(path: str, file: io.IOBase, first: list[bytes], has_option: bool) -> Iterator[Record]:
    for number, line in enumerate(itertools.chain(first, _lines(file)), start=1):
        place = f"{path}, line {number}"
        if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
            while (rest := file.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                pass
            problem = Damaged(f"a line of more than {MAX_LINE_BYTES >> 20} MiB is not a record")
            yield Record(place, number, problem)
        elif stripped := line.strip():
            yield Record(place, number, _json_value(stripped, has_option))


def _json_value(line: bytes, has_option: bool) -> Any:
    try:
        return _DECODER.decode(line.decode())
    except UnicodeDecodeError as error:
        byte = f"byte {line[error.start]:#04x} at {error.start} of the line is not UTF-8"
        return Damaged(f"{byte}; {other_encoding(line[error.start :], has_option=has_option)}")
    except Damaged as problem:
        return problem
    except (ValueError, RecursionError) as error:
        return Damaged(f"not JSON ({_json_problem(error)}); each line must be one JSON object")


def _json_problem(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "lists or objects are too deep inside each other"
    if isinstance(error, json.JSONDecodeError):
        return f"column {error.colno}: {of_parser(error, error.doc)}"
    return "a whole number with thousands of digits"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object. Raises `Damaged` if a key occurs twice, since its first value would be lost."""
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise Damaged(f"the key {twice[:60]!r} occurs twice in one object")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def shown_names(record: Mapping[str, Any], most: int = 20) -> str:
    """The names of the fields of a record, for a message."""
    names = [repr(name[:40]) for name in itertools.islice(map(str, record), most)]
    return ", ".join([*names, *([f"and {len(record) - most} more"] if len(record) > most else [])]) or "none"


def _parquet(path: str, file: io.IOBase) -> Iterator[Record]:
    batches = parquet_file(path, file).iter_batches(_PARQUET_ROWS)
    rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
    for number, row in enumerate(rows, start=1):
        yield Record(f"{path}, row {number}", number, row)


def parquet_file(path: str, file: io.IOBase) -> Any:
    """Opens a `pyarrow.parquet.ParquetFile`. Raises UserError if it is not one."""
    import pyarrow
    import pyarrow.parquet

    try:
        # Parquet has its metadata at the end, and a compressed file cannot be read from there.
        return pyarrow.parquet.ParquetFile(io.BytesIO(file.read()) if is_compressed(path) else file)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a Parquet file: {str(error)[:200]}") from None
