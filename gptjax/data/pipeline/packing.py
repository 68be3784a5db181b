"""Whole dialogues packed into rows, and the batches of a run over a split with loss masks."""

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int32, Int64

from gptjax.data.pipeline.augmentation import Augmentation
from gptjax.data.pipeline.batches import Batch, BatchSource
from gptjax.data.pipeline.randomness import shuffled_epochs
from gptjax.errors import UserError

_MASK_TOKENS = 1 << 24  # read at once


@dataclass(frozen=True)
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

    def with_rows(self, kept: Bool[np.ndarray, " rows"]) -> "Plan":
        """The plan of the rows in `kept` alone, numbered anew."""
        pieces = kept[self.row]
        numbers = np.cumsum(kept) - 1
        arrays = (self.document, self.offset, self.length, numbers[self.row], self.column)
        return Plan(self.row_length, *(array[pieces] for array in arrays), int(kept.sum()))


def plan_rows(lengths: Int64[np.ndarray, " documents"], row_length: int) -> Plan:
    """Best-fit decreasing packing (Ding et al. 2024): each document where it leaves the least room.

    A document longer than a row is cut into whole rows and a remainder; no other is cut, and no cell of any
    is lost. Documents of one length keep their order. A million documents take about a second.

    Args:
      lengths: cells that each document takes; those of none get no piece.
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
    """What is read of a `TokenSplit` with loss masks.

    Attributes:
      has_mask: whether each token has a flag that says if it bears loss as a target.
    """

    name: str
    has_mask: bool
    num_tokens: int
    num_documents: int
    document_starts: Int64[np.ndarray, " documents"]

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


class PackedBatches(BatchSource):
    """Whole dialogues.

    Cell i of a document is its token i as input and its token i + 1 as target, so a document of n tokens
    takes n - 1 cells, and one that is cut is continued with the token that was the last target: every token
    but the first of a document is a target once in an epoch. Rows are the same in every epoch, their order is
    not.

    A batch has, with B rows of this process and T = context_length:
      tokens: int32 [B, T], 0 where a row is not filled.
      targets: int32 [B, T], the next token of the document.
      weights: float32 [B, T], 1 where the target bears loss, else 0.
      segment_ids: int32 [B, T], number of the document within the row, from 1; 0 where it is not filled.
      positions: int32 [B, T], from 0 at the start of each piece.
    With `isolate_documents` off there are no segment_ids and positions count through the row.

    Attributes:
      plan: the rows. Those in which no target bears loss are left out.
      rows_left_out: how many are.
    """

    def __init__(
        self,
        split: MaskedSplit,
        *,
        context_length: int,
        batch_size: int,
        seed: int,
        isolate_documents: bool = True,
        augmentation: Augmentation | None = None,
        rows: slice | np.ndarray | None = None,
    ):
        """`batch_size` counts the rows of the global batch; `rows` are those of this process (default: all).

        Raises:
          UserError: the split has no loss mask, or too few rows for one batch of different ones.
        """
        if not split.has_mask:
            raise UserError(
                f"the {split.name} split has no loss mask, so its documents are no dialogues; "
                "read it in windows, or prepare it from a source of dialogues"
            )
        self.split = split
        self.context_length = context_length
        self.seed = seed
        self.isolate_documents = isolate_documents
        self.augmentation = augmentation
        tokens = np.diff(split.document_starts, append=split.num_tokens)
        plan = plan_rows(np.maximum(tokens - 1, 0), context_length)
        trained = np.zeros(plan.num_rows, np.int64)
        np.add.at(trained, plan.row, _trained_targets(split, self._starts(plan), plan.length))
        self.plan = plan.with_rows(trained > 0)
        self.rows_left_out = plan.num_rows - self.plan.num_rows
        self._piece_starts = self._starts(self.plan)
        self._first_piece = np.searchsorted(self.plan.row, np.arange(self.plan.num_rows + 1))
        if self.plan.num_rows < batch_size:
            raise UserError(
                f"the {split.name} split is too small for one batch: its {split.num_documents} dialogues "
                f"fill {self.plan.num_rows} rows of context_length={context_length}, fewer than "
                f"batch_size={batch_size}; use more dialogues, a smaller batch, or a shorter context"
            )
        super().__init__(self.plan.num_rows, batch_size=batch_size, rows=rows)

    def _starts(self, plan: Plan) -> Int64[np.ndarray, " pieces"]:
        return self.split.document_starts[plan.document] + plan.offset

    def read_rows(self, rows: Int64[np.ndarray, " rows"]) -> Batch:
        epochs, numbers = shuffled_epochs(rows, self.rows_per_epoch, self.seed)
        first, counts = self._first_piece[numbers], self._first_piece[numbers + 1] - self._first_piece[numbers]
        inner = _ranges(counts)
        pieces = np.repeat(first, counts) + inner
        starts, lengths = self._piece_starts[pieces], self.plan.length[pieces]
        # The pieces of a row follow each other from column 0 without gaps.
        filled = np.diff(np.cumsum(lengths)[np.cumsum(counts) - 1], prepend=0)
        is_filled = np.arange(self.context_length) < filled[:, None]
        positions = _ranges(lengths if self.isolate_documents else filled)

        # Of each piece, one token more than it has cells: inputs are all but its last, targets all but its first.
        read = lengths + 1
        inputs = text = self.split.read_ranges(starts, read)
        trained = self.split.read_mask_ranges(starts, read)
        if self.augmentation is not None:
            places = np.repeat(starts, read) + _ranges(read)
            inputs, text = self.augmentation(text, places, np.repeat(np.repeat(epochs, counts), read), trained)
        is_target = np.ones(len(text), np.bool_)
        is_target[np.cumsum(read) - read] = False
        is_input = np.append(is_target[1:], False)

        def in_rows(values: np.ndarray, dtype: type) -> np.ndarray:
            values = values.astype(dtype, copy=False)
            if len(values) == is_filled.size:
                return values.reshape(is_filled.shape)
            cells = np.zeros(is_filled.shape, dtype)
            cells[is_filled] = values
            return cells

        batch = {
            "tokens": in_rows(inputs[is_input], np.int32),
            "targets": in_rows(text[is_target], np.int32),
            "weights": in_rows(trained[is_target], np.float32),
            "positions": in_rows(positions, np.int32),
        }
        if self.isolate_documents:
            batch["segment_ids"] = in_rows(np.repeat(inner + 1, lengths), np.int32)
        return batch


def _ranges(lengths: Int64[np.ndarray, " n"]) -> Int32[np.ndarray, " total"]:
    """0 to length - 1 for each length, one after another."""
    starts = (np.cumsum(lengths) - lengths).astype(np.int32)
    return np.arange(lengths.sum(), dtype=np.int32) - np.repeat(starts, lengths)


def _trained_targets(
    split: MaskedSplit, starts: Int64[np.ndarray, " pieces"], lengths: Int64[np.ndarray, " pieces"]
) -> Int64[np.ndarray, " pieces"]:
    """How many targets of each piece bear loss."""
    borders = np.stack([starts + 1, starts + 1 + lengths])
    before = np.zeros(borders.shape, np.int64)  # tokens of the split before each border that bear loss
    total = 0
    for start in range(0, split.num_tokens, _MASK_TOKENS):
        mask = split.read_mask(start, min(_MASK_TOKENS, split.num_tokens - start))
        counts = np.concatenate([[0], np.cumsum(mask)]) + total
        here = (borders > start) & (borders <= start + len(mask))
        before[here] = counts[borders[here] - start]
        total = int(counts[-1])
    return before[1] - before[0]
