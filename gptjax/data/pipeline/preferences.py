"""The batches of a run over preferences: each row is a pair of texts with one prompt.

In a pair, the two sides have the better and the worse answer. In a judgement (KTO), they have the judged answer and an
unrelated answer after the same prompt: that of the next example of the split with another prompt (the first example
follows the last). So the rows depend on the data alone, and so do their log-probabilities under a reference model.
"""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float32, Int64

from gptjax.data.documents import WORSE, Kind
from gptjax.data.pipeline.batches import Batch, BatchSource
from gptjax.data.pipeline.randomness import shuffled_epochs
from gptjax.data.store.shards import TokenSplit
from gptjax.errors import UserError

_VERSION = 1  # of the rules below; cached log-probabilities of another version are not used

Ranges = Int64[np.ndarray, "examples pair"]


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """The pairs, or the judged answers, of a split, as ranges of its tokens.

    A side is the prompt, then the answer up to its last token that counts in the loss. If a side is longer than the
    context, both sides lose the same number of tokens at the beginning of the prompt; an example is left out if an
    answer leaves no room for a token of the prompt.

    Attributes:
      prompt_starts, prompt_lengths, answer_starts, answer_lengths: of each side.
      desirable: whether a judged answer is good; true for pairs.
      reference: the log-probabilities of both answers under the initial model; NaN until they are written here.
      left_out: how many examples were left out.
      shortened: how many lost a part of their prompt.
    """

    split: TokenSplit
    context_length: int
    judged: bool
    prompt_starts: Ranges
    prompt_lengths: Ranges
    answer_starts: Ranges
    answer_lengths: Ranges
    desirable: Bool[np.ndarray, " examples"]
    reference: Float32[np.ndarray, "examples pair"]
    left_out: int
    shortened: int

    @classmethod
    def of(cls, split: TokenSplit, context_length: int, *, judged: bool) -> "Examples":
        """Reads the loss masks of the whole split.

        Args:
          judged: whether to read single answers, good or bad (a pair gives one of each), and not pairs.

        Raises:
          UserError: the split has none.
        """
        kinds = split.document_kinds
        firsts = np.flatnonzero(kinds) if judged else np.flatnonzero(kinds == Kind.CHOSEN)
        if not len(firsts):
            has = "single judgements, for --config.objective.preference_loss=kto" if kinds.any() else "no preferences"
            raise UserError(f"the {split.name} split has no pairs of answers: it has {has}; use preference:GLOB")
        starts, lengths = _spans(split)  # [documents, (prompt, answer)]
        kept = np.arange(len(firsts))
        if judged:
            kept = kept[lengths[firsts, 1] < context_length]
            documents = firsts[kept]
            foreign = documents[_next_with_another(_prompt_numbers(split, starts[documents, 0], lengths[documents, 0]))]
            prompts, answers = np.stack([documents, documents], 1), np.stack([documents, foreign], 1)
        else:
            prompts = answers = np.stack([firsts, firsts + 1], 1)
            kept = kept[lengths[answers, 1].max(1) < context_length]
            prompts = answers = answers[kept]
        cut = np.maximum((lengths[prompts, 0] + lengths[answers, 1]).max(1, initial=0) - context_length, 0)[:, None]
        return cls(
            split,
            context_length,
            judged,
            starts[prompts, 0] + cut,
            lengths[prompts, 0] - cut,
            starts[answers, 1],
            lengths[answers, 1],
            ~np.isin(kinds[prompts[:, 0]], WORSE),
            np.full(prompts.shape, np.nan, np.float32),
            len(firsts) - len(kept),
            int((cut > 0).sum()),
        )

    def __len__(self) -> int:
        return len(self.desirable)

    @property
    def fingerprint(self) -> str:
        """Changes with the text of any example and with their order."""
        identity = f"{_VERSION} {self.split.fingerprint} {self.context_length} {self.judged}"
        return hashlib.sha256(identity.encode()).hexdigest()

    @property
    def prompts(self) -> Int64[np.ndarray, " examples"]:
        """A number for each prompt, without what the context cuts off; equal prompts have equal numbers."""
        return _prompt_numbers(self.split, self.prompt_starts[:, 0], self.prompt_lengths[:, 0])

    @property
    def lengths(self) -> Int64[np.ndarray, " examples"]:
        """Tokens of both sides together."""
        return (self.prompt_lengths + self.answer_lengths).sum(1)

    @property
    def notes(self) -> list[str]:
        what = "judged answers" if self.judged else "pairs"
        notes = [f"{len(self):,} {what} in the {self.split.name} split"]
        if self.left_out:
            notes.append(f"{self.left_out:,} more are left out: an answer is as long as the context or longer")
        if self.shortened:
            notes.append(f"{self.shortened:,} lose the beginning of a prompt that is too long for the context")
        return notes

    def read(self, numbers: Int64[np.ndarray, " rows"]) -> Batch:
        """A batch of these examples, with the fields of `PreferenceBatches`."""
        prompts, answers = self.prompt_lengths[numbers], self.answer_lengths[numbers]
        starts = np.stack([self.prompt_starts[numbers], self.answer_starts[numbers]], -1).ravel()
        lengths = np.stack([prompts, answers], -1).ravel()
        filled = np.arange(self.context_length) < (prompts + answers)[..., None]

        def in_rows(values: np.ndarray) -> np.ndarray:
            cells = np.zeros(filled.shape, values.dtype)
            cells[filled] = values
            return cells

        def following(cells: np.ndarray) -> np.ndarray:
            return np.concatenate([cells[..., 1:], np.zeros_like(cells[..., :1])], axis=-1)

        tokens = in_rows(self.split.read_ranges(starts, lengths))
        learnt = in_rows(self.split.read_mask_ranges(starts, lengths)) & (
            np.arange(self.context_length) >= prompts[..., None]
        )
        return {
            "tokens": tokens,
            "targets": following(tokens),
            "weights": following(learnt).astype(np.float32),
            "desirable": self.desirable[numbers].astype(np.float32),
            "reference": self.reference[numbers],
        }


class PreferenceBatches(BatchSource):
    """Rows of pairs, or of judged answers, in another order in each epoch.

    A batch has, with B rows of this process and T = context_length:
      tokens: int32 [B, 2, T], prompt and answer from column 0, then 0.
      targets: int32 [B, 2, T], the next token; 0 at the end.
      weights: float32 [B, 2, T], 1 where the target is a token of the answer that counts in the loss.
      desirable: float32 [B], see `Examples`.
      reference: float32 [B, 2], see `Examples`.
    """

    def __init__(self, examples: Examples, *, batch_size: int, seed: int, rows: slice | np.ndarray | None = None):
        """`batch_size` counts the rows of the global batch; `rows` are those of this process (default: all).

        Raises UserError if there are too few examples for one batch of different ones.
        """
        if len(examples) < batch_size:
            raise UserError(
                f"the {examples.split.name} split is too small for one batch: {', '.join(examples.notes)}, fewer than "
                f"batch_size={batch_size}; use more preferences, a smaller batch, or a longer context"
            )
        self.examples = examples
        self.seed = seed
        super().__init__(len(examples), batch_size=batch_size, rows=rows)

    @property
    def notes(self) -> list[str]:
        return self.examples.notes

    def read_rows(self, rows: Int64[np.ndarray, " rows"]) -> Batch:
        return self.examples.read(shuffled_epochs(rows, self.rows_per_epoch, self.seed)[1])

    def tokens_before(self, row: int) -> int:
        epochs, rest = divmod(row, self.rows_per_epoch)
        _, numbers = shuffled_epochs(np.arange(row - rest, row), self.rows_per_epoch, self.seed)
        lengths = self.examples.lengths
        return epochs * int(lengths.sum()) + int(lengths[numbers].sum())


class InOrder(BatchSource):
    """All examples once, in their order; the last batch is filled with rows of zeros, which have no loss."""

    def __init__(self, parts: Sequence[Examples], *, batch_size: int, rows: slice | np.ndarray | None = None):
        self.parts = list(parts)
        self._ends = np.cumsum([len(part) for part in parts])
        super().__init__(-(-int(self._ends[-1]) // batch_size) * batch_size, batch_size=batch_size, rows=rows)

    def read_rows(self, rows: Int64[np.ndarray, " rows"]) -> Batch:
        part_of = np.searchsorted(self._ends, rows, side="right")
        batch: Batch = {}
        for number, part in enumerate(self.parts):
            mine = part_of == number
            first = self._ends[number] - len(part)
            for name, values in part.read(rows[mine] - first).items():
                batch.setdefault(name, np.zeros((len(rows), *values.shape[1:]), values.dtype))[mine] = values
        return batch

    def tokens_before(self, row: int) -> int:
        return int(np.concatenate([part.lengths for part in self.parts])[:row].sum())


def _spans(split: TokenSplit) -> tuple[Int64[np.ndarray, "documents 2"], Int64[np.ndarray, "documents 2"]]:
    """(start, length) of prompt and answer of each document; both lengths are 0 if no token counts in the loss."""
    starts = split.document_starts
    learnt = np.append(np.flatnonzero(split.read_mask(0, split.num_tokens)), split.num_tokens)
    first = np.searchsorted(learnt, starts)
    last = np.searchsorted(learnt, np.append(starts[1:], split.num_tokens)) - 1
    empty = last < first
    begin, end = learnt[first], learnt[np.maximum(last, 0)] + 1
    begin, end = np.where(empty, starts, begin), np.where(empty, starts, end)
    return np.stack([starts, begin], 1), np.stack([begin - starts, end - begin], 1)


def _prompt_numbers(
    split: TokenSplit, starts: Int64[np.ndarray, " n"], lengths: Int64[np.ndarray, " n"]
) -> Int64[np.ndarray, " n"]:
    """A number for each prompt; equal prompts have equal numbers."""
    known: dict[bytes, int] = {}
    texts = (
        split.read(start, length).tobytes() for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)
    )
    return np.array([known.setdefault(text, len(known)) for text in texts], np.int64)


def _next_with_another(numbers: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    """For each index the next one with another number; the first follows the last. Raises UserError if all agree."""
    if len(numbers) and (numbers == numbers[0]).all():
        raise UserError(
            "all answers are to one prompt, but KTO compares with answers to other prompts; use more prompts"
        )
    n = len(numbers)
    following = np.zeros(n, np.int64)
    place = 0
    for i in range(2 * n - 1, -1, -1):  # two rounds: in the second, the next one is known
        if numbers[i % n] != numbers[(i + 1) % n]:
            place = (i + 1) % n
        following[i % n] = place
    return following
