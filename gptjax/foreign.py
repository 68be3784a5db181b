"""Reads JSON files of other programs: within limits, checked against a schema, with errors in plain words.

A schema is a subclass of `Schema`, beside the code that reads the file. A key that it does not name is either in its
IGNORED, because it changes neither numbers nor text, or returned by `unknown()`, so that the reader refuses or warns.
"""

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pydantic

from gptjax.errors import UserError
from gptjax.json_text import read_json, show, too_deep

S = TypeVar("S", bound="Schema")


class Schema(pydantic.BaseModel):
    """The fields of a foreign file, with their types and limits: "12", true and NaN are not numbers.

    Attributes:
      IGNORED: known keys that are not read, since they change neither numbers nor text.
    """

    model_config = pydantic.ConfigDict(
        strict=True, extra="allow", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )
    IGNORED: ClassVar[frozenset[str]] = frozenset()

    def unknown(self) -> list[str]:
        """Keys of the file that the schema neither names nor ignores, sorted; null counts as absent."""
        extra = self.model_extra or {}
        return sorted(key for key in extra if key not in self.IGNORED and extra[key] is not None)


@functools.lru_cache(maxsize=1000)
def warn(text: str) -> None:
    """Tells on stderr what is odd in a file, once in a process: a command may read the same file several times."""
    print(f"warning: {text}", file=sys.stderr)


def read(schema: type[S], path: Path) -> S:
    """A JSON file as its schema. Raises UserError with the file, the field, its value and what it must be."""
    return check(schema, read_json(path), path)


def check(schema: type[S], value: Any, where: object) -> S:
    """A value as its schema; `where` names the file, or the file and the line. Raises UserError."""
    if not isinstance(value, dict):
        raise UserError(f"{where} holds {show(value)}, but must be an object: {{...}}")
    try:
        return schema.model_validate(value)
    except pydantic.ValidationError as error:
        raise UserError("; ".join(_problems(error, value, where))) from None
    except RecursionError:
        raise UserError(too_deep(where)) from None


def _problems(error: pydantic.ValidationError, value: Any, where: object, most: int = 3) -> list[str]:
    """A sentence for each field that is wrong. The types of a union are joined: "text or a list"."""
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
    """The path of a field as text: rope_scaling.factors[3]."""
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
    "extra_forbidden": "left out: no field of that name is known",
    "recursion_loop": "a value that does not contain itself",
}


def _expected(problem: dict[str, Any]) -> str:
    template = _EXPECTED.get(problem["type"])
    return template.format(**problem.get("ctx", {})) if template else str(problem["msg"])
