"""batch = pipeline(seed, step): batches of token windows, each computed from its number alone.

Nothing is carried from one batch to the next, so a run resumes at any step without replay, and the global
batch is the same whatever the number of processes.
"""

import itertools
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64

from gptjax.data.pipeline.augmentation import Augmentation
from gptjax.data.pipeline.randomness import epoch_words, shuffled_epochs
from gptjax.data.store.shards import TokenSplit
from gptjax.errors import UserError

_ENDLESS = sys.maxsize // 2

Batch = dict[str, np.ndarray]


class BatchSource(ABC):
    """The batches of a training run, indexed by step; a random-access source for Grain.

    Row r of step k is row k * batch_size + r of an endless sequence of rows.

    Attributes:
      rows_per_epoch: the number of rows in which all data are read once.
      batch_size: rows of the global batch.
      rows: which rows of the global batch this process reads.
    """

    def __init__(self, rows_per_epoch: int, *, batch_size: int, rows: slice | np.ndarray | None = None):
        self.rows_per_epoch = rows_per_epoch
        self.batch_size = batch_size
        self.rows = np.arange(batch_size)[rows if rows is not None else slice(None)]

    @abstractmethod
    def read_rows(self, rows: Int64[np.ndarray, " rows"]) -> Batch:
        """The rows with these numbers in the sequence."""

    @abstractmethod
    def tokens_before(self, row: int) -> int:
        """Tokens in the rows before this one; cells that are not filled do not count."""

    def num_tokens(self, start: int, stop: int) -> int:
        """Tokens in the global batches of the steps from `start` up to `stop`."""
        return self.tokens_before(stop * self.batch_size) - self.tokens_before(start * self.batch_size)

    @property
    def notes(self) -> list[str]:
        """What the user should know of the data before the run: what is left out, how full the rows are."""
        return []

    @property
    def models(self) -> dict[str, Any]:
        """The parameters of models that batches depend on beside the data, by the option that names them."""
        return {}

    @property
    def steps_per_epoch(self) -> float:
        return self.rows_per_epoch / self.batch_size

    def epoch(self, step: int) -> float:
        """Epochs done before `step`."""
        return step / self.steps_per_epoch

    def epochs(self, step: int) -> dict[str, float]:
        """Epochs of each source done before `step`, where there are several."""
        return {}

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, step: int) -> Batch:
        return self.read_rows(step * self.batch_size + self.rows)


class Batches(BatchSource):
    """Windows of text.

    An epoch is W windows of `context_length` + 1 tokens that begin `context_length` apart, so that every
    token is a target at most once; where the first begins, and the order, differ between epochs.

    A batch has, with B rows of this process and T = context_length:
      tokens: int32 [B, T].
      targets: int32 [B, T], the next token at each position.
      weights: float32 [B, T], 1: every target counts.
      segment_ids: int32 [B, T], number of the document within the row, from 1.
      positions: int32 [B, T], from 0 at the start of each row and each document.
    With `isolate_documents` off a row is one segment: there are no segment_ids and positions count through the row.
    """

    def __init__(
        self,
        split: TokenSplit,
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
          UserError: the split is too small for one batch of different windows.
        """
        self.split = split
        self.context_length = context_length
        self.seed = seed
        self.isolate_documents = isolate_documents
        self.augmentation = augmentation
        windows_per_epoch = max((split.num_tokens - context_length) // context_length, 0)
        if split.num_tokens > context_length:
            windows_per_epoch = max(windows_per_epoch, 1)
        if windows_per_epoch < batch_size:
            raise UserError(
                f"the {split.name} split is too small for one batch: its {split.num_tokens} tokens make "
                f"{windows_per_epoch} windows of context_length={context_length}, fewer than "
                f"batch_size={batch_size}; use more text, a smaller batch, or a shorter context"
            )
        super().__init__(windows_per_epoch, batch_size=batch_size, rows=rows)

    def read_rows(self, rows: Int64[np.ndarray, " rows"]) -> Batch:
        epochs, starts = self.windows(rows)
        inputs = text = self.split.read_windows(starts, self.context_length + 1)
        if self.augmentation is not None:
            places = starts[:, None] + np.arange(self.context_length + 1)
            inputs, text = self.augmentation(text, places, np.broadcast_to(epochs[:, None], text.shape))
        shape = (len(starts), self.context_length)
        batch = {
            "tokens": np.ascontiguousarray(inputs[:, :-1]),
            "targets": np.ascontiguousarray(text[:, 1:]),
            "weights": np.ones(shape, np.float32),
        }
        if self.isolate_documents:
            segment_ids, positions = document_segments(self.split.document_starts, starts, self.context_length)
            return batch | {"segment_ids": segment_ids, "positions": positions}
        return batch | {"positions": np.tile(np.arange(self.context_length, dtype=np.int32), (len(starts), 1))}

    def tokens_before(self, row: int) -> int:
        return row * self.context_length

    def windows(
        self, rows: Int64[np.ndarray, " rows"]
    ) -> tuple[Int64[np.ndarray, " rows"], Int64[np.ndarray, " rows"]]:
        """(epoch, offset in the split of the first token) of each row."""
        epochs, windows = shuffled_epochs(rows, self.rows_per_epoch, self.seed)
        # The last window must end within the split; only a split of less than two windows leaves less room than T.
        room = min(self.context_length, self.split.num_tokens - self.rows_per_epoch * self.context_length)
        shifts = {epoch: epoch_words(self.seed, epoch)[0] % room for epoch in np.unique(epochs).tolist()}
        return epochs, windows * self.context_length + np.array([shifts[epoch] for epoch in epochs.tolist()])


def document_segments(
    document_starts: Int64[np.ndarray, " documents"], starts: Int64[np.ndarray, " windows"], length: int
) -> tuple[Int32[np.ndarray, "windows length"], Int32[np.ndarray, "windows length"]]:
    """Which document of its window each token belongs to, and where in it.

    Args:
      document_starts: offset of the first token of each document, increasing from 0.
      starts: offset of the first token of each window.
      length: tokens in a window.

    Returns:
      segment_ids, from 1 in each window, and positions, from 0 at the start of each window and document.
    """
    first = np.searchsorted(document_starts, starts, side="right") - 1
    last = np.searchsorted(document_starts, starts + length - 1, side="right") - 1
    counts = last - first + 1
    window = np.repeat(np.arange(len(starts)), counts)
    segment = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    column = np.maximum(document_starts[first[window] + segment] - starts[window], 0)
    begins = window * length + column
    lengths = np.diff(begins, append=len(starts) * length)
    segment_ids = np.repeat((segment + 1).astype(np.int32), lengths)
    positions = np.arange(len(starts) * length, dtype=np.int32) - np.repeat(begins.astype(np.int32), lengths)
    return segment_ids.reshape(-1, length), positions.reshape(-1, length)


def iterate(batches: BatchSource, start_step: int, *, prefetch: int = 2) -> Iterator[tuple[int, Batch]]:
    """(step, batch) from `start_step` on without end, `prefetch` batches ahead in threads.

    Closing the iterator (`close()`, or leaving it to the garbage collector) stops the threads.
    """
    import grain

    options = grain.ReadOptions(num_threads=prefetch, prefetch_buffer_size=prefetch)
    batch_iterator = iter(grain.MapDataset.source(batches)[start_step:].to_iter_dataset(options))
    try:
        yield from zip(itertools.count(start_step), batch_iterator)
    finally:
        batch_iterator.close()
