"""Values of JSON files as text, and tables of them as HTML."""

import html
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from gptjax.reporting import charts


def as_object(value: Any) -> dict[str, Any]:
    """The value if it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}


def as_number(value: Any) -> float:
    """A JSON number that a float can hold, or NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return float(value) if abs(value) <= sys.float_info.max else math.nan


def flat(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """("section.option", text) of a nested object."""
    for key, entry in value.items():
        if isinstance(entry, dict) and entry:
            yield from flat(entry, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", cell(entry)


def table(columns: dict[str, str], rows: Iterable[Sequence[str]]) -> str:
    """A table of texts; `columns` maps the heading of a column to its class."""
    classes = list(columns.values())
    head = "".join(f'<th class="{kind}">{html.escape(heading)}</th>' for heading, kind in columns.items())
    body = "\n".join(
        "<tr>"
        + "".join(f'<td class="{kind}">{html.escape(text)}</td>' for kind, text in zip(classes, row, strict=True))
        + "</tr>"
        for row in rows
    )
    return f"<table>\n<tr>{head}</tr>\n{body}\n</table>"


def cell(value: Any) -> str:
    """A JSON value as text: a string as it is, null as the empty text."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def significant(value: float) -> str:
    """A number with five significant digits, zeros included: 14.300, 0.41230, 123,457."""
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:#.5g}"


def short(count: float) -> str:
    """A number with up to four significant digits and a suffix: 18.2M."""
    return charts.tick_text(float(f"{count:.4g}"))


def duration(seconds: float) -> str:
    """Seconds as a text such as 1h 02m, 3m 20s or 12s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,}h {minutes:02}m"
    return f"{minutes}m {rest:02}s" if minutes else f"{rest}s"
