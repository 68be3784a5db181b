"""How whole dialogues are packed into rows, planned once for a split and a context length."""

import contextlib
import dataclasses
import zipfile
import zlib
from bisect import bisect_left, insort
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int32, Int64

from gptjax.files import whole_file

_VERSION = 1  # of the algorithm; plans of another version are not used
_MASK_TOKENS = 1 << 24  # read at once
_DAMAGE = (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile, zlib.error)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which piece of which document goes where, in the order of rows and columns.

    Attributes:
      row_length: cells in a row.
      document: [pieces] number of the document.
      offset: [pieces] where in the document the piece begins.
      length: [pieces] cells it takes, at least 1.
      row: [pieces] its row, from 0, increasing.
      column: [pieces] where in the row it begins.
      num_rows: rows; each has at least one piece.
    """

    row_length: int
    document: Int64[np.ndarray, " pieces"]
    offset: Int64[np.ndarray, " pieces"]
    length: Int64[np.ndarray, " pieces"]
    row: Int64[np.ndarray, " pieces"]
    column: Int64[np.ndarray, " pieces"]
    num_rows: int

    @property
    def efficiency(self) -> float:
        """Share of the cells that are filled."""
        return float(self.length.sum()) / max(self.num_rows * self.row_length, 1)

    def starts(self, document_starts: Int64[np.ndarray, " documents"]) -> Int64[np.ndarray, " pieces"]:
        """Where in the split each piece begins."""
        return document_starts[self.document] + self.offset

    def with_rows(self, kept: Bool[np.ndarray, " rows"]) -> "Plan":
        """The plan with only the rows in `kept`, renumbered from 0."""
        pieces = kept[self.row]
        numbers = np.cumsum(kept) - 1
        arrays = (self.document, self.offset, self.length, numbers[self.row], self.column)
        return Plan(self.row_length, *(array[pieces] for array in arrays), int(kept.sum()))


_ARRAYS = [field.name for field in dataclasses.fields(Plan) if field.name not in ("row_length", "num_rows")]


def plan_rows(lengths: Int64[np.ndarray, " documents"], row_length: int) -> Plan:
    """Best-fit decreasing packing (Ding et al. 2024): each document goes where it leaves the least room.

    A document longer than a row is cut into whole rows and a remainder; no other is cut, and no cell of any
    is lost. Documents of one length keep their order. A million documents take about a second.

    Args:
      lengths: cells that each document takes; a document of length 0 gets no piece.
      row_length: cells in a row.
    """
    pieces_of = -(-lengths // row_length)
    document = np.repeat(np.arange(len(lengths)), pieces_of)
    first_piece = np.cumsum(pieces_of) - pieces_of
    offset = (np.arange(len(document)) - first_piece[document]) * row_length
    length = np.minimum(lengths[document] - offset, row_length)
    row, column, num_rows = _best_fit(length, row_length)
    order = np.lexsort((column, row))
    return Plan(row_length, *(array[order] for array in (document, offset, length, row, column)), num_rows)


def _best_fit(
    lengths: Int64[np.ndarray, " pieces"], row_length: int
) -> tuple[Int64[np.ndarray, " pieces"], Int64[np.ndarray, " pieces"], int]:
    """(row, column, number of rows), from the longest piece to the shortest.

    Pieces of one length and rows with one room are interchangeable, so a step places as many as possible.
    Once a row is the best fit, it stays so for pieces of this length as long as it has room for one.
    """
    row, column = np.empty_like(lengths), np.empty_like(lengths)
    order = np.argsort(-lengths, kind="stable")
    sizes, counts = np.unique(lengths, return_counts=True)
    rows_with: dict[int, list[int]] = {}  # by room
    rooms: list[int] = []  # its keys, increasing
    num_rows = placed = 0
    for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            index = bisect_left(rooms, size)
            is_new = index == len(rooms)
            room = row_length if is_new else rooms[index]
            each = room // size
            if is_new:
                rows = range(num_rows, num_rows - (-count // each))
                num_rows = rows.stop
            else:
                available = rows_with[room]
                rows = available[count // -each :]
                del available[count // -each :]
                if not available:
                    del rows_with[room], rooms[index]
            number = min(count, len(rows) * each)
            pieces = order[placed : placed + number]
            row[pieces] = np.repeat(np.array(rows), each)[:number]
            column[pieces] = row_length - room + np.arange(number) % each * size
            full = number // each
            for some, left in ((rows[:full], room - each * size), (rows[full:], room - number % each * size)):
                if some and left:
                    if left not in rows_with:
                        rows_with[left] = []
                        insort(rooms, left)
                    rows_with[left].extend(some)
            placed += number
            count -= number
    return row, column, num_rows


@runtime_checkable
class MaskedSplit(Protocol):
    """The part of a `TokenSplit` with loss masks that packing reads.

    Attributes:
      directory: where it is, and where the plan of its rows is cached; None if it is only in memory.
      fingerprint: changes with the tokens and the flags.
      has_mask: whether each token has a flag that says if it counts in the loss as a target.
      document_is_worse: documents that get no row, if the split has preferences.
    """

    name: str
    directory: Path | None
    fingerprint: str
    has_mask: bool
    has_preferences: bool
    num_tokens: int
    num_documents: int
    document_starts: Int64[np.ndarray, " documents"]
    document_is_worse: Bool[np.ndarray, " documents"]

    def read_mask(self, start: int, length: int) -> Bool[np.ndarray, " length"]:
        """The flags of the tokens from `start` to `start + length`."""
        ...

    def read_ranges(
        self, starts: Int64[np.ndarray, " ranges"], lengths: Int64[np.ndarray, " ranges"]
    ) -> Int32[np.ndarray, " tokens"]:
        """The tokens of all ranges, one range after another."""
        ...

    def read_mask_ranges(
        self, starts: Int64[np.ndarray, " ranges"], lengths: Int64[np.ndarray, " ranges"]
    ) -> Bool[np.ndarray, " tokens"]:
        """The flags of all ranges, one range after another."""
        ...


def plan_split(split: MaskedSplit, row_length: int) -> tuple[Plan, Int64[np.ndarray, " rows"]]:
    """(the rows of a split, how many targets of each row count in the loss).

    They are cached in the directory of the split, if it can be written, so that only the first start plans all
    documents and reads all flags. A file that is damaged, or was made for other tokens or by another version, is
    replaced.
    """
    file = split.directory / f"rows-of-{row_length}.npz" if split.directory else None
    identity = f"version={_VERSION} row_length={row_length} split={split.fingerprint}"
    if file and (kept := _read_plan(file, identity, row_length)):
        return kept
    tokens = np.diff(split.document_starts, append=split.num_tokens)
    if split.has_preferences:
        tokens[split.document_is_worse] = 0
    plan = plan_rows(np.maximum(tokens - 1, 0), row_length)
    trained = np.zeros(plan.num_rows, np.int64)
    np.add.at(trained, plan.row, _trained_targets(split, plan.starts(split.document_starts), plan.length))
    if file:
        arrays = {name: getattr(plan, name) for name in _ARRAYS}
        with contextlib.suppress(OSError), whole_file(file) as opened:
            np.savez(opened, identity=np.array(identity), trained=trained, **arrays)
    return plan, trained


def _read_plan(file: Path, identity: str, row_length: int) -> tuple[Plan, Int64[np.ndarray, " rows"]] | None:
    try:
        with np.load(file) as kept:
            if str(kept["identity"]) != identity:
                return None
            trained = kept["trained"]
            return Plan(row_length, *(kept[name] for name in _ARRAYS), len(trained)), trained
    except _DAMAGE:
        return None


def _trained_targets(
    split: MaskedSplit, starts: Int64[np.ndarray, " pieces"], lengths: Int64[np.ndarray, " pieces"]
) -> Int64[np.ndarray, " pieces"]:
    """How many targets of each piece count in the loss. Reads all flags of the split."""
    borders = np.stack([starts + 1, starts + 1 + lengths])
    before = np.zeros(borders.shape, np.int64)  # tokens before each border that count in the loss
    total = 0
    for start in range(0, split.num_tokens, _MASK_TOKENS):
        mask = split.read_mask(start, min(_MASK_TOKENS, split.num_tokens - start))
        counts = np.concatenate([[0], np.cumsum(mask)]) + total
        here = (borders > start) & (borders <= start + len(mask))
        before[here] = counts[borders[here] - start]
        total = int(counts[-1])
    return before[1] - before[0]
