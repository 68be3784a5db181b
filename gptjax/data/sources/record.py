"""A record of a file, or what is wrong with it."""

from typing import Any, NamedTuple

MAX_BYTES = 64 << 20  # of one record


class Damaged(Exception):
    """A record that cannot be used; the message says what is wrong."""


class Record(NamedTuple):
    """A record of a file.

    Attributes:
      place: file and line, for messages.
      number: the line in JSONL, otherwise the place in the file, from 1.
      value: the value in JSON or YAML, {column: value} in CSV, TSV and Parquet; or `Damaged`.
    """

    place: str
    number: int
    value: Any
