"""Reads JSON within limits of size and depth, with errors in plain words; needs no package."""

import json
from pathlib import Path
from typing import Any

from gptjax import files
from gptjax.errors import UserError

MAX_BYTES = 1 << 30  # of one JSON file
_POINTER = "version https://git-lfs"
MAX_DEPTH = 100  # lists and objects inside each other


def read_json(path: Path) -> Any:
    """The value of a JSON file. Raises UserError with the file, the line and what is wrong."""
    path = files.regular(path)
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise UserError(f"{path} has {size / 2**20:.0f} MiB; a JSON file has at most {MAX_BYTES >> 20}")
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {files.words(error)}") from None
    return parse_json(data, path)


def parse_json(text: bytes | str, where: object) -> Any:
    """The value of a JSON text; `where` names it in the message. Raises UserError."""
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = 1 + text.count(b"\n", 0, error.start)
            raise UserError(f"{where}, line {line}: byte {text[error.start]:#04x} is not UTF-8") from None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if text.startswith(_POINTER):
            raise UserError(_pointer(where)) from None
        if not text.strip():
            raise UserError(f"{where} is empty, and not JSON") from None
        place = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{where} is not JSON: {place}: {of_parser(error, text)}") from None
    except RecursionError:
        raise UserError(too_deep(where)) from None
    except ValueError:  # Python's limit for the digits of a whole number
        raise UserError(f"{where} has a whole number with thousands of digits") from None
    if text.count("[") + text.count("{") > MAX_DEPTH and _depth_exceeds(value, MAX_DEPTH):
        raise UserError(too_deep(where))
    return value


def refuse_pointer(path: Path) -> None:
    """Raises UserError if a file is a Git LFS pointer instead of the large file."""
    try:
        with path.open("rb") as file:
            begins = file.read(len(_POINTER)) == _POINTER.encode()
    except OSError:
        return
    if begins:
        raise UserError(_pointer(path))


def _pointer(where: object) -> str:
    return f"{where} is a Git LFS pointer, not the file itself; `git lfs pull` there fetches it"


def show(value: Any, width: int = 60) -> str:
    """A value as JSON (null, true), cut to `width` characters."""
    if isinstance(value, dict | list) and len(value) > width:
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)} entries"
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = repr(type(value).__name__)
    return text if len(text) <= width else text[:width] + "..."


def of_parser(error: json.JSONDecodeError, text: str) -> str:
    """The error of the JSON parser in plain words."""
    rest = text[error.pos : error.pos + 20].splitlines()[:1]
    met = f"where {rest[0]!r} is" if rest and rest[0].strip() else "where the line ends"
    if error.pos >= len(text.rstrip()):
        return "the text ends before the value does"
    words = {
        "Expecting value": f"a value is expected {met}",
        "Extra data": f"the value has ended {met}, and more follows",
        "Expecting ',' delimiter": f"a comma is expected {met}",
        "Expecting ':' delimiter": f"a colon is expected {met}",
        "Unterminated string starting at": "a text begins here and has no closing quote",
        "Invalid control character at": "a text holds a control character",
        "Expecting property name enclosed in double quotes": f"a name in double quotes is expected {met}",
        "Illegal trailing comma before end of object": "a comma before the closing bracket",
        "Illegal trailing comma before end of array": "a comma before the closing bracket",
    }
    return words.get(error.msg, error.msg[:1].lower() + error.msg[1:])


def _depth_exceeds(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit + 1):
        level = [one for one in level if isinstance(one, dict | list)]
        level = [entry for one in level for entry in (one.values() if isinstance(one, dict) else one)]
        if not level:
            return False
    return True


def too_deep(where: object) -> str:
    return f"{where} has lists or objects more than {MAX_DEPTH} deep inside each other"
