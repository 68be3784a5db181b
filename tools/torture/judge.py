"""Checks how a command ended."""

import re
from collections.abc import Collection

from tools.torture.processes import REPOSITORY, Command

_NEVER = ("this is a bug in gptjax", "Exception ignored", "Fatal Python error", "[Errno ", "core dumped")
_STARTS_PYTHON = "Fatal Python error: init_import_site"
_PYTHONS_WORDS = re.compile(
    r"NoneType|invalid literal|Expecting (value|property|',')|JSONDecodeError|KeyError|codec can't"
)
_OURS = re.compile(rf"{re.escape(str(REPOSITORY))}/gptjax/|multiprocessing|concurrent")
_LONGEST = 2000  # characters of the last line
_SPACE = re.compile(r"\b[KMGT]?i?B\b")
_TO_DO = re.compile(r"make room|free (some|up)|same command|another|elsewhere", re.IGNORECASE)


class Wrong(Exception):
    """A case did not end as required."""


def ended(command: Command, status: int, allowed: Collection[int]) -> None:
    """Raises Wrong for a status that is not allowed, a traceback, or a last line that is not understandable."""
    said = command.errors()
    if _STARTS_PYTHON in said and "KeyboardInterrupt" in said and status == 1:
        return  # Ctrl-C before the first line of gptjax: the message is Python's own
    for words in _NEVER:
        if words in said:
            raise Wrong(f"{_verb(command)} says {_line_with(said, words)!r} (status {status})")
    # After Ctrl-C before the first line of gptjax, Python itself prints a traceback.
    if "Traceback (most recent call last)" in said and _OURS.search(said):
        raise Wrong(f"{_verb(command)} ends in a traceback (status {status}): {command.last_line()}")
    if status not in allowed:
        raise Wrong(f"{_verb(command)} ends with status {status}, not {_or(allowed)}: {command.last_line()}")
    line = command.last_line()
    if status in (1, 2) and (not line.startswith(("failed: ", "error: ")) or _PYTHONS_WORDS.search(line)):
        raise Wrong(f"{_verb(command)} ends with status {status}, and its last line is not a sentence: {line}")
    if len(line) > _LONGEST:
        raise Wrong(f"the last line of {_verb(command)} has {len(line)} characters")


def names(command: Command, *paths: str) -> None:
    """Raises Wrong if the last line names none of the paths."""
    line = command.last_line()
    if not any(path in line for path in paths):
        raise Wrong(f"the last line of {_verb(command)} does not name {paths[0]}: {line}")


def warns(command: Command, name: str) -> bool:
    """Whether a warning contains the name."""
    return any("warning" in line and name in line for line in command.errors().splitlines())


def tells_of_the_disk(command: Command, place: str) -> None:
    """Raises Wrong if the last line lacks the path, the lack of space, or what to do."""
    line = command.last_line()
    lacks = [
        what
        for what, there in (
            (f"a path in {place}", place in line),
            ("the space", _SPACE.search(line)),
            ("what to do", _TO_DO.search(line)),
        )
        if not there
    ]
    if lacks:
        raise Wrong(f"the last line of {_verb(command)} lacks {' and '.join(lacks)}: {line}")


def _verb(command: Command) -> str:
    return f"gptjax {command.argv[0]}"


def _line_with(said: str, words: str) -> str:
    return next(line for line in said.splitlines() if words in line)[:300]


def _or(statuses: Collection[int]) -> str:
    return " or ".join(map(str, sorted(statuses, reverse=True)))
