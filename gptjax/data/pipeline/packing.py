"""The batches of a run over a split with loss masks: whole dialogues, packed into rows."""

import numpy as np
from jaxtyping import Int32, Int64

from gptjax.data.pipeline.augmentation import Augmentation
from gptjax.data.pipeline.batches import Batch, BatchSource
from gptjax.data.pipeline.randomness import shuffled_epochs
from gptjax.data.pipeline.row_plans import MaskedSplit, plan_split
from gptjax.errors import UserError


class PackedBatches(BatchSource):
    """Rows of whole dialogues.

    Cell i of a document is its token i as input and its token i + 1 as target, so a document of n tokens
    takes n - 1 cells. If a document is cut, its next piece begins with the last target: every token but the
    first of a document is a target once in an epoch. Rows are the same in every epoch; their order differs.

    A batch has, with B rows of this process and T = context_length:
      tokens: int32 [B, T], 0 where a row is not filled.
      targets: int32 [B, T], the next token of the document.
      weights: float32 [B, T], 1 where the target counts in the loss, else 0.
      segment_ids: int32 [B, T], number of the document within the row, from 1; 0 where it is not filled.
      positions: int32 [B, T], from 0 at the start of each piece.
    With `isolate_documents` off there are no segment_ids and positions count through the row.

    Attributes:
      plan: the rows with at least one target that counts in the loss.
      rows_left_out: how many planned rows have no such target and are left out.
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
                f"the {split.name} split has no loss mask, so its documents are not dialogues; "
                "read it in windows, or prepare it from a source of dialogues"
            )
        self.split = split
        self.context_length = context_length
        self.seed = seed
        self.isolate_documents = isolate_documents
        self.augmentation = augmentation
        plan, trained = plan_split(split, context_length)
        self.plan = plan.with_rows(trained > 0)
        self.rows_left_out = plan.num_rows - self.plan.num_rows
        self._piece_starts = self.plan.starts(split.document_starts)
        self._first_piece = np.searchsorted(self.plan.row, np.arange(self.plan.num_rows + 1))
        if self.plan.num_rows < batch_size:
            raise UserError(
                f"the {split.name} split is too small for one batch: its {split.num_documents} dialogues "
                f"fill {self.plan.num_rows} rows of context_length={context_length}, fewer than "
                f"batch_size={batch_size}; use more dialogues, a smaller batch, or a shorter context"
            )
        self._filled = np.bincount(self.plan.row, self.plan.length, self.plan.num_rows).astype(np.int64)
        super().__init__(self.plan.num_rows, batch_size=batch_size, rows=rows)

    @property
    def notes(self) -> list[str]:
        notes = [f"the rows of the {self.split.name} split are filled to {self.plan.efficiency:.1%}"]
        if left_out := self.rows_left_out:
            has, are = ("has", "is") if left_out == 1 else ("have", "are")
            rows = f"{left_out:,} of {left_out + self.plan.num_rows:,} rows of the {self.split.name} split"
            notes.append(f"{rows} {has} no token to train on and {are} left out")
        return notes

    def tokens_before(self, row: int) -> int:
        epochs, rest = divmod(row, self.rows_per_epoch)
        _, numbers = shuffled_epochs(np.arange(row - rest, row), self.rows_per_epoch, self.seed)
        return epochs * int(self._filled.sum()) + int(self._filled[numbers].sum())

    def read_rows(self, rows: Int64[np.ndarray, " rows"]) -> Batch:
        epochs, numbers = shuffled_epochs(rows, self.rows_per_epoch, self.seed)
        first, counts = self._first_piece[numbers], self._first_piece[numbers + 1] - self._first_piece[numbers]
        inner = _ranges(counts)
        pieces = np.repeat(first, counts) + inner
        starts, lengths = self._piece_starts[pieces], self.plan.length[pieces]
        # The pieces of a row follow each other from column 0 without gaps.
        filled = self._filled[numbers]
        is_filled = np.arange(self.context_length) < filled[:, None]
        positions = _ranges(lengths if self.isolate_documents else filled)

        # A piece of n cells has n + 1 tokens: all but the last are inputs, all but the first are targets.
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
