"""The door for files that others wrote: read within limits, checked against a schema, refused in plain words.

A schema is a subclass of `Schema`, beside the code that reads the file. What it does not name is either listed in its
IGNORED, because it can change neither numbers nor text, or reported by `unknown()`: the reader refuses or warns.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pydantic

from gptjax import files
from gptjax.errors import UserError

MAX_BYTES = 1 << 30  # of one JSON file
MAX_DEPTH = 100  # lists and objects inside each other

S = TypeVar("S", bound="Schema")


class Schema(pydantic.BaseModel):
    """The fields of a foreign file, with their types and limits: "12", true and NaN are no numbers.

    Attributes:
      IGNORED: keys that are known and read by nobody here, since they change neither numbers nor text.
    """

    model_config = pydantic.ConfigDict(
        strict=True, extra="allow", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )
    IGNORED: ClassVar[frozenset[str]] = frozenset()

    def unknown(self) -> list[str]:
        """Keys of the file that the schema neither names nor ignores, sorted; null counts as absent."""
        extra = self.model_extra or {}
        return sorted(key for key in extra if key not in self.IGNORED and extra[key] is not None)


def read(schema: type[S], path: Path) -> S:
    """A JSON file as its schema. Raises UserError: the file, the field, what it holds, what it must be."""
    return check(schema, read_json(path), path)


def read_json(path: Path) -> Any:
    """The value of a JSON file. Raises UserError: the file, the line, what is wrong."""
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
        if not text.strip():
            raise UserError(f"{where} is empty, and not JSON") from None
        place = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{where} is not JSON: {place}: {of_parser(error, text)}") from None
    except RecursionError:
        raise UserError(_too_deep(where)) from None
    except ValueError:  # Python's limit for the digits of a whole number
        raise UserError(f"{where} holds a whole number of thousands of digits") from None
    if text.count("[") + text.count("{") > MAX_DEPTH and _depth_exceeds(value, MAX_DEPTH):
        raise UserError(_too_deep(where))
    return value


def check(schema: type[S], value: Any, where: object) -> S:
    """A value as its schema; `where` names the file, or the file and the line. Raises UserError."""
    if not isinstance(value, dict):
        raise UserError(f"{where} holds {show(value)}, but must be an object: {{...}}")
    try:
        return schema.model_validate(value)
    except pydantic.ValidationError as error:
        raise UserError("; ".join(_problems(error, value, where))) from None
    except RecursionError:
        raise UserError(_too_deep(where)) from None


def show(value: Any, width: int = 60) -> str:
    """A value in JSON's words (null, true), not longer than `width`."""
    if isinstance(value, dict | list) and len(value) > width:
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)} entries"
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = repr(type(value).__name__)
    return text if len(text) <= width else text[:width] + "..."


def _problems(error: pydantic.ValidationError, value: Any, where: object, most: int = 3) -> list[str]:
    """A sentence for each field that is wrong. The branches of a union come together: "text or a list"."""
    fields: dict[tuple[str | int, ...], list[dict[str, Any]]] = {}
    for problem in error.errors(include_url=False):
        fields.setdefault(_place(problem["loc"], value, problem["type"]), []).append(dict(problem))
    inner = [place for place in fields if not any(other[: len(place)] == place != other for other in fields)]
    sentences = []
    for place in inner[:most]:
        name, problems = _name(place), fields[place]
        if problems[0]["type"] == "missing":
            sentences.append(f"{where}: {name} is missing")
            continue
        expected = " or ".join(dict.fromkeys(_expected(problem) for problem in problems))
        sentences.append(f"{where}: {name} is {show(problems[0]['input'])}, but must be {expected}")
    return [*sentences, *([f"and {len(inner) - most} more"] if len(inner) > most else [])]


def _place(loc: Sequence[str | int], value: Any, kind: str) -> tuple[str | int, ...]:
    """The path of a problem in the file: pydantic's without the names of a union's branches."""
    place: list[str | int] = []
    for i, part in enumerate(loc):
        known = part < len(value) if isinstance(value, list) and isinstance(part, int) else False
        if known or (isinstance(value, dict) and part in value):
            value = value[part]
        elif not (kind == "missing" and i == len(loc) - 1):
            continue
        place.append(part)
    return tuple(place)


def _name(place: Sequence[str | int]) -> str:
    """rope_scaling.factors[3]"""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".") or "it"


_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "none_required": "null",
    "greater_than": "above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "below {lt}",
    "less_than_equal": "at most {le}",
    "literal_error": "{expected}",
    "string_too_short": "a text of at least {min_length} characters",
    "string_too_long": "a text of at most {max_length} characters",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
    "value_error": "{error}",
    "extra_forbidden": "left out: nothing of that name is known",
    "recursion_loop": "no value that holds itself",
}


def _expected(problem: dict[str, Any]) -> str:
    template = _EXPECTED.get(problem["type"])
    return template.format(**problem.get("ctx", {})) if template else str(problem["msg"])


def of_parser(error: json.JSONDecodeError, text: str) -> str:
    """What the JSON parser met, in words."""
    rest = text[error.pos : error.pos + 20].splitlines()[:1]
    met = f"where {rest[0]!r} is" if rest and rest[0].strip() else "where the line ends"
    if error.pos >= len(text.rstrip()):
        return "the text ends before the value does"
    words = {
        "Expecting value": f"a value must stand {met}",
        "Extra data": f"one value is over {met}, and more follows",
        "Expecting ',' delimiter": f"a comma must stand {met}",
        "Expecting ':' delimiter": f"a colon must stand {met}",
        "Unterminated string starting at": "a text begins here and has no closing quote",
        "Invalid control character at": "a text holds a control character",
        "Expecting property name enclosed in double quotes": f"a name in double quotes must stand {met}",
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


def _too_deep(where: object) -> str:
    return f"{where} has lists or objects more than {MAX_DEPTH} deep inside each other"
