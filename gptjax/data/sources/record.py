"""A record of a file, or what is wrong with it."""

from typing import Any, NamedTuple

MAX_BYTES = 64 << 20  # of one record


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
