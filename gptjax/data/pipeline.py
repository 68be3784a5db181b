"""batch = pipeline(seed, step): batches of token windows, each computed from its number alone.

Nothing is carried from one batch to the next, so a run resumes at any step without replay, and the global
batch is the same whatever the number of processes.
"""

import itertools
import sys
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int32, Int64

from gptjax.data.shards import TokenSplit
from gptjax.errors import UserError

_SHUFFLE_ROUNDS = 4  # of the block cipher that stands in for a stored permutation
_ENDLESS = sys.maxsize // 2

Batch = dict[str, np.ndarray]


class Batches:
    """The batches of a training run over one split, indexed by step; a random-access source for Grain.

    An epoch is W windows of `context_length` + 1 tokens that begin `context_length` apart, so that every
    token is a target at most once; where the first begins, and the order, differ between epochs. Row r of
    step k is row k * batch_size + r of the endless sequence of epochs.

    A batch has, with B rows of this process and T = context_length:
      tokens: int32 [B, T].
      targets: int32 [B, T], the next token at each position.
      weights: float32 [B, T], 1: every target counts.
      segment_ids: int32 [B, T], number of the document within the row, from 1.
      positions: int32 [B, T], from 0 at the start of each row and each document.
    With `isolate_documents` off a row is one segment: segment_ids are 1 and positions count through the row.
    """

    def __init__(
        self,
        split: TokenSplit,
        *,
        context_length: int,
        batch_size: int,
        seed: int,
        isolate_documents: bool = True,
        rows: slice | None = None,
    ):
        """`batch_size` counts the rows of the global batch; `rows` are those of this process (default: all).

        Raises:
          UserError: the split is too small for one batch of different windows.
        """
        self.split = split
        self.context_length = context_length
        self.batch_size = batch_size
        self.seed = seed
        self.isolate_documents = isolate_documents
        self.rows = np.arange(batch_size)[rows if rows is not None else slice(None)]
        self.windows_per_epoch = max((split.num_tokens - context_length) // context_length, 0)
        if split.num_tokens > context_length:
            self.windows_per_epoch = max(self.windows_per_epoch, 1)
        if self.windows_per_epoch < batch_size:
            raise UserError(
                f"the {split.name} split is too small for one batch: its {split.num_tokens} tokens make "
                f"{self.windows_per_epoch} windows of context_length={context_length}, fewer than "
                f"batch_size={batch_size}; use more text, a smaller batch, or a shorter context"
            )

    @property
    def steps_per_epoch(self) -> float:
        return self.windows_per_epoch / self.batch_size

    def epoch(self, step: int) -> float:
        """Epochs done before `step`."""
        return step / self.steps_per_epoch

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, step: int) -> Batch:
        starts = self.window_starts(step)
        windows = self.split.read_windows(starts, self.context_length + 1)
        shape = (len(starts), self.context_length)
        if self.isolate_documents:
            segment_ids, positions = document_segments(self.split.document_starts, starts, self.context_length)
        else:
            segment_ids = np.ones(shape, np.int32)
            positions = np.tile(np.arange(self.context_length, dtype=np.int32), (len(starts), 1))
        return {
            "tokens": np.ascontiguousarray(windows[:, :-1]),
            "targets": np.ascontiguousarray(windows[:, 1:]),
            "weights": np.ones(shape, np.float32),
            "segment_ids": segment_ids,
            "positions": positions,
        }

    def window_starts(self, step: int) -> Int64[np.ndarray, " windows"]:
        """Offset in the split of the first token of each of this process's rows of `step`."""
        from grain.experimental import index_shuffle

        epochs, windows = np.divmod(step * self.batch_size + self.rows, self.windows_per_epoch)
        starts = np.empty(len(epochs), np.int64)
        for epoch in np.unique(epochs):
            shift, order_seed = self._epoch_shift_and_seed(int(epoch))
            for row in np.flatnonzero(epochs == epoch):
                window = index_shuffle(int(windows[row]), self.windows_per_epoch - 1, order_seed, _SHUFFLE_ROUNDS)
                starts[row] = shift + window * self.context_length
        return starts

    def _epoch_shift_and_seed(self, epoch: int) -> tuple[int, int]:
        shift, order_seed = np.random.SeedSequence([self.seed, epoch]).generate_state(2).tolist()
        # The last window ends within the split; only a split of less than two windows has less room than T.
        room = self.split.num_tokens - self.windows_per_epoch * self.context_length
        return shift % min(self.context_length, room), order_seed


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


def iterate(batches: Batches, start_step: int, *, prefetch: int = 2) -> Iterator[tuple[int, Batch]]:
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
