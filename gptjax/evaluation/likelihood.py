"""Exact likelihood of a whole split: every token scored once, whatever the batch size.

A document of n tokens is scored as n + 1 predictions: its tokens, the first from the end-of-text token before it,
and the end-of-text token that closes it. Documents longer than the context are covered by windows that start
every `stride` tokens; a window scores only the tokens that the one before it has not. Windows of several documents
share a row and do not see each other. In dialogues only the tokens with training loss are scored; in preference data
only the better answers.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int64

from gptjax.data.store.store import TokenSplit
from gptjax.errors import UserError
from gptjax.evaluation.metrics import Metric, Progress, ratio_metric
from gptjax.evaluation.token_scorer import Batch, Owners, TokenScorer, empty_batch, put
from gptjax.model import gpt
from gptjax.model.architecture import Architecture

MIN_DOCUMENTS = 20  # with fewer, intervals resample windows instead of documents
MAX_UNITS = 20_000  # with more documents, intervals resample runs of them, so that cost and files stay bounded


@dataclasses.dataclass(frozen=True)
class Windows:
    """Pieces of documents to score, one entry per window (all int64 [windows])."""

    document: np.ndarray
    start: np.ndarray  # of the inputs, in tokens of the split
    length: np.ndarray  # inputs = predictions
    skip: np.ndarray  # predictions at the beginning that an earlier window has scored

    @property
    def columns(self) -> tuple[np.ndarray, ...]:
        return self.document, self.start, self.length, self.skip


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """Sums by window: negative log-likelihood in nats, tokens scored, tokens predicted right, bytes of text.

    `end_nll` is the part of `nll` from the end-of-text tokens that close documents.
    """

    document: np.ndarray
    nll: np.ndarray
    tokens: np.ndarray
    correct: np.ndarray
    num_bytes: np.ndarray
    end_nll: np.ndarray
    signature: str

    @classmethod
    def joined(cls, parts: "list[Likelihood]") -> "Likelihood":
        """Several splits as one, in which every token counts the same."""
        before = np.cumsum([0, *(int(part.document.max(initial=-1)) + 1 for part in parts)])
        documents = [part.document + first for part, first in zip(parts, before, strict=False)]
        names = ("nll", "tokens", "correct", "num_bytes", "end_nll")
        sums = (np.concatenate([getattr(part, name) for part in parts]) for name in names)
        return cls(np.concatenate(documents), *sums, " + ".join(part.signature for part in parts))

    @property
    def loss(self) -> float:
        """Nats per token over the whole split: sum of losses / sum of tokens."""
        return float(self.nll.sum() / self.tokens.sum())

    @property
    def bits_per_byte(self) -> float:
        return float(self.nll.sum() / (np.log(2) * self.num_bytes.sum()))

    @property
    def accuracy(self) -> float:
        return float(self.correct.sum() / self.tokens.sum())

    def estimates(
        self,
        identity: str = "",
        *,
        seed: int = 0,
        tokenizer: str = "",
        words: Int64[np.ndarray, " documents"] | None = None,
    ) -> dict[str, Metric]:
        """perplexity, nll, bits_per_byte and accuracy with 95 % intervals over documents (or windows, if few).

        n is the number of tokens scored.

        Args:
          identity: of the data, in the signature and in the ids of documents.
          tokenizer: its identity; two models are compared per token only where it is the same.
          words: number of words of each document; adds `word_perplexity`.
        """
        # Units of resampling: whole documents, since windows of one document are not independent. Many documents are
        # joined to at most MAX_UNITS units; with fewer than MIN_DOCUMENTS, windows are drawn instead.
        documents = np.unique(self.document)
        if len(documents) >= MIN_DOCUMENTS:
            size = -(-len(documents) // MAX_UNITS)
            unit = "document" if size == 1 else f"{size}-documents"
            groups = np.searchsorted(documents, self.document) // size
            ids = [f"{identity}|{unit}:{number}" for number in documents[::size]]
        else:
            unit, groups = "window", np.arange(len(self.document))
            ids = [f"{identity}|{tokenizer}|{self.signature}|window:{number}" for number in groups]
        nll, tokens, correct, num_bytes = (
            np.bincount(groups, values) for values in (self.nll, self.tokens, self.correct, self.num_bytes)
        )

        # All metrics are ratios of sums over the same units: each replicate divides sums, it never averages ratios.
        interval = f"ci:bootstrap-{unit}-1000"

        def metric(numerators, denominators, formula="ratio", of=tokenizer, lower_is_better=True, note=""):
            return ratio_metric(
                ids,
                numerators,
                denominators,
                signature="|".join(filter(None, [tokenizer, identity, self.signature + note, interval])),
                formula=formula,
                unit=of,
                lower_is_better=lower_is_better,
                n=int(self.tokens.sum()),
                seed=seed,
            )

        metrics = {
            "perplexity": metric(nll, tokens, "exp"),
            "nll": metric(nll, tokens),
            "bits_per_byte": metric(nll / np.log(2), num_bytes, of="bytes"),
            "accuracy": metric(correct, tokens, lower_is_better=False),
        }
        if words is not None:
            # Words are known per document; a window gets a share in proportion to its tokens.
            share = self.tokens / np.bincount(self.document, self.tokens)[self.document]
            counted = np.bincount(groups, words[self.document] * share)
            # As in lm-eval, the end-of-text token does not count for the perplexity per word.
            of_words = nll - np.bincount(groups, self.end_nll)
            note = f"|words:{int(words.sum())}|nats:without-the-last-eot"
            metrics["word_perplexity"] = metric(of_words, counted, "exp", of="words", note=note)
        return metrics


class Scorer:
    """Scores splits in batches of `batch_size` rows of the model's context length."""

    def __init__(self, architecture: Architecture, mesh: Mesh, *, batch_size: int):
        self.context_length = architecture.context_length
        self._scorer = TokenScorer(architecture, mesh)
        self.batch_size = self._scorer.rows(batch_size, architecture.context_length)

    def score(
        self,
        params: gpt.Params,
        split: TokenSplit,
        *,
        eot_id: int,
        stride: int = 0,
        max_tokens: int = 0,
        progress: Progress | None = None,
    ) -> Likelihood:
        """The likelihood of a split (its first `max_tokens` tokens, 0 = all). stride 0 = context_length."""
        stride = stride or self.context_length
        if not 0 < stride <= self.context_length:
            raise UserError(f"stride {stride} must be between 1 and the context length {self.context_length}")
        end = min(split.num_tokens, max_tokens or split.num_tokens)
        windows = plan_windows(split.document_starts, end, self.context_length, stride)
        if split.has_preferences:  # worse answers are not scored
            windows = Windows(*(column[~split.document_is_worse[windows.document]] for column in windows.columns))
        batches = _batches(split, windows, self.context_length, self.batch_size, eot_id)
        # Two sums for each window: its tokens, and the end-of-text token that closes its document.
        sums = self._scorer.sums(params, batches, 2 * len(windows.start), progress)
        (nll, correct, tokens), end_nll = sums[:, ::2] + sums[:, 1::2], sums[0, 1::2]
        num_bytes = _bytes(split, windows, tokens)
        signature = (
            f"context:{self.context_length}|stride:{stride}|tokens:{int(tokens.sum())}|"
            f"bytes:{round(num_bytes.sum())}|{'scored:assistant' if split.has_mask else 'eot:scored'}"
        )
        return Likelihood(windows.document, nll, tokens, correct, num_bytes, end_nll, signature)


def plan_windows(document_starts: np.ndarray, num_tokens: int, context_length: int, stride: int) -> Windows:
    """The windows that score every prediction of every document exactly once."""
    starts = document_starts[document_starts < num_tokens]
    lengths = np.diff(np.append(starts, num_tokens))
    counts = 1 + np.maximum(0, -(-(lengths - context_length) // stride))
    document = np.repeat(np.arange(len(starts)), counts)
    index = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    offset = index * stride
    length = np.minimum(context_length, lengths[document] - offset)
    skip = np.where(index == 0, 0, context_length - stride)
    return Windows(document, starts[document] + offset, length, skip)


def unigram_nll(train: TokenSplit, evaluated: TokenSplit, vocab_size: int) -> float:
    """Nats per token of `evaluated` under add-one-smoothed token frequencies of `train`: a baseline."""

    def counts(split):
        total = np.zeros(vocab_size, np.int64)
        for start in range(0, split.num_tokens, 1 << 20):
            tokens = split.read(start, min(1 << 20, split.num_tokens - start))
            total += np.bincount(tokens, minlength=vocab_size)
        return total

    frequencies = counts(train) + 1
    evaluated_counts = counts(evaluated)
    log_probabilities = np.log(frequencies) - np.log(frequencies.sum())
    return float(-(evaluated_counts * log_probabilities).sum() / evaluated_counts.sum())


def _batches(
    split: TokenSplit, windows: Windows, context_length: int, batch_size: int, eot_id: int
) -> Iterator[tuple[Batch, Owners]]:
    """Windows packed next-fit into rows. Owner of a prediction: 2 * window, of a closing token 2 * window + 1."""
    batch, owners = empty_batch(batch_size, context_length)
    row, column, segment = 0, 0, 0
    closes = np.isin(windows.start + windows.length, np.append(split.document_starts, split.num_tokens))
    places = zip(windows.start.tolist(), windows.length.tolist(), windows.skip.tolist(), strict=True)
    for index, (start, length, skip) in enumerate(places):
        if column + length > context_length:
            row, column, segment = row + 1, 0, 0
        if row == batch_size:
            yield batch, owners
            batch, owners = empty_batch(batch_size, context_length)
            row = 0
        segment += 1
        text = split.read(start, min(length + 1, split.num_tokens - start))
        text = text if len(text) > length else np.append(text, eot_id)
        put(batch, row, column, text, segment=segment)
        scored = _scored(split, start + skip, length - skip)
        owners[row, column + skip : column + length] = np.where(scored, 2 * index, -1)
        if scored[-1] and closes[index] and text[-1] == eot_id:
            owners[row, column + length - 1] = 2 * index + 1
        column += length
    yield batch, owners


def _scored(split: TokenSplit, start: int, length: int) -> np.ndarray:
    """Which of the predictions from these inputs count. In dialogues, the closing end-of-text token is not scored."""
    if not split.has_mask:
        return np.ones(length, np.bool_)
    known = min(length, split.num_tokens - start - 1)
    return np.append(split.read_mask(start + 1, known), np.zeros(length - known, np.bool_))


def _bytes(split: TokenSplit, windows: Windows, tokens: np.ndarray) -> np.ndarray:
    """Bytes of each window: those of its document, in proportion to the tokens scored."""
    full = np.diff(np.append(split.document_starts, split.num_tokens))
    share = tokens / full[windows.document]
    return split.document_bytes[windows.document] * share
