"""The likelihood of a continuation after a context, for many pairs, in batches of similar length."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int32

from gptjax.data.tokenization.tokenizer import Tokenizer
from gptjax.evaluation.metrics import Progress
from gptjax.evaluation.token_scorer import Batch, Owners, TokenScorer, empty_batch, put
from gptjax.model import gpt
from gptjax.model.architecture import Architecture

SHORTEST = 16  # tokens of the smallest compiled program

Tokens = Int32[np.ndarray, "_"]
Pair = tuple[Tokens, Tokens]  # context (one token or more) and continuation (one token or more)


@dataclasses.dataclass(frozen=True)
class Scores:
    """One entry per pair.

    Attributes:
      log_likelihood: nats, the sum over the continuation's tokens.
      num_tokens: of the continuation.
      is_greedy: whether every token is the most probable one at its place.
      truncated: whether the beginning of the context was cut off, to fit the model.
    """

    log_likelihood: Float[np.ndarray, " pairs"]
    num_tokens: Float[np.ndarray, " pairs"]
    is_greedy: Bool[np.ndarray, " pairs"]
    truncated: Bool[np.ndarray, " pairs"]


class ContinuationScorer:
    """Scores pairs with one compiled program for each power of two that bounds their length."""

    def __init__(self, architecture: Architecture, params: gpt.Params, mesh: Mesh, *, batch_size: int):
        """`batch_size`: rows of the context length. Programs for shorter pairs have more rows, with as many tokens."""
        self.context_length = architecture.context_length
        self._params, self._batch_size = params, batch_size
        self._scorer = TokenScorer(architecture, mesh)

    def score(self, pairs: Sequence[Pair], progress: Progress | None = None) -> Scores:
        """The likelihood of each continuation after its context.

        If a pair is longer than the model's context, the beginning of its context is cut off. A continuation that is
        longer by itself is scored in pieces of half a context, each after as many of the tokens before it as fit.
        """
        for number, (context, continuation) in enumerate(pairs):
            if not len(context) or not len(continuation):
                raise ValueError(f"pair {number} has {len(context)} and {len(continuation)} tokens; both need one")
        pieces = [
            (number, context, continuation)
            for number, pair in enumerate(pairs)
            for context, continuation in _pieces(*pair, self.context_length)
        ]
        pieces.sort(key=lambda piece: -self._length(piece[1:]))  # the longest first
        batches = self._batches([piece[1:] for piece in pieces])
        nll, correct, num_tokens = totals = np.zeros((3, len(pairs)))
        of_pieces = self._scorer.sums(self._params, batches, len(pieces), progress)
        for (number, *_), sums in zip(pieces, of_pieces.T, strict=True):
            totals[:, number] += sums
        truncated = np.array([len(a) + len(b) > self.context_length + 1 for a, b in pairs], np.bool_)
        return Scores(-nll, num_tokens, correct == num_tokens, truncated)

    def _batches(self, pairs: Sequence[Pair]) -> Iterator[tuple[Batch, Owners]]:
        """Batches of pairs, the longest first, one pair per row. The owner of a prediction is its pair."""
        numbered = list(enumerate(pairs))
        for bucket, same in itertools.groupby(numbered, lambda one: self._bucket(one[1])):
            members = list(same)
            rows = self._scorer.rows(self._batch_size * self.context_length // bucket, bucket)
            while len(members) <= (fewer := self._scorer.rows(rows // 4, bucket)) < rows:
                rows = fewer  # divided by four, not less, so that few programs are compiled
            for first in range(0, len(members), rows):
                batch, owners = empty_batch(rows, bucket)
                for row, (number, (context, continuation)) in enumerate(members[first : first + rows]):
                    text = np.concatenate([context, continuation])[-(self.context_length + 1) :]
                    put(batch, row, 0, text)
                    owners[row, len(text) - 1 - len(continuation) : len(text) - 1] = number
                yield batch, owners

    def _length(self, pair: Pair) -> int:
        """Predictions from the first token of a pair to its last, as far as they fit into the context."""
        return min(sum(map(len, pair)) - 1, self.context_length)

    def _bucket(self, pair: Pair) -> int:
        return min(max(SHORTEST, 1 << (self._length(pair) - 1).bit_length()), self.context_length)


class Encoded(NamedTuple):
    """A pair in tokens; `alone`: the continuation was encoded without its context."""

    context: Tokens
    continuation: Tokens
    alone: bool


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str, begin: Sequence[int] = ()) -> Encoded:
    """The tokens of a context after `begin`, and of its continuation.

    As in lm-eval, white space at the end of the context belongs to the continuation. Both are encoded as one text;
    what follows the context's own tokens is the continuation. If a token spans the border, the continuation is
    encoded alone, since it would lose its start. An empty context becomes the token that begins a text.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    first = np.array(begin, np.int32)
    if not stripped:
        (added,) = tokenizer.encode_batch([continuation])
        first = first if len(first) else np.array(tokenizer.begin_ids[-1:], np.int32)
        return Encoded(first, added, False)
    whole, known = tokenizer.encode_batch([stripped + continuation, stripped])
    melted = len(whole) <= len(known) or not np.array_equal(whole[: len(known)], known)
    added = tokenizer.encode_batch([continuation])[0] if melted else whole[len(known) :]
    known = np.concatenate([first, known]).astype(np.int32)
    # A context has no token if it is white space, or letters that the tokenizer does not know.
    return Encoded(known if len(known) else np.array(tokenizer.begin_ids[-1:], np.int32), added, melted)


def _pieces(context: Tokens, continuation: Tokens, context_length: int) -> list[Pair]:
    if len(continuation) <= context_length:
        return [(context, continuation)]
    whole, step = np.concatenate([context, continuation]), max(context_length // 2, 1)
    starts = range(len(context), len(whole), step)
    return [(whole[:start], whole[start : start + step]) for start in starts]
