"""The likelihood of a continuation after a context, for many pairs, in batches of similar length."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int32

from gptjax.data.tokenization.tokenizer import Tokenizer
from gptjax.evaluation.likelihood import token_scores
from gptjax.model import gpt
from gptjax.parallel import partition

SHORTEST = 16  # tokens of the smallest compiled program

Tokens = Int32[np.ndarray, "_"]
Pair = tuple[Tokens, Tokens]  # context (one token or more) and continuation (one token or more)


@dataclasses.dataclass(frozen=True)
class Scores:
    """One entry a pair.

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

    def __init__(self, graphdef: nnx.GraphDef, params: gpt.Params, mesh: Mesh, *, context_length: int, batch_size: int):
        """`batch_size` is rows of `context_length` tokens; shorter programs have as many tokens in more rows."""
        self.context_length = context_length
        self._params, self._mesh, self._batch_size = params, mesh, batch_size
        self._token_scores = jax.jit(partial(token_scores, graphdef), out_shardings=partition.replicated(mesh))

    def score(self, pairs: Sequence[Pair], progress: Callable[[int, int], None] | None = None) -> Scores:
        """The likelihood of each continuation after its context.

        Of a pair that is longer than the model's context, the beginning of the context is cut off. A continuation
        that alone is longer is scored in pieces of half a context, each after the tokens before it that fit.
        """
        for number, (context, continuation) in enumerate(pairs):
            if not len(context) or not len(continuation):
                raise ValueError(f"pair {number} has {len(context)} and {len(continuation)} tokens; both need one")
        split = [_pieces(*pair, self.context_length) for pair in pairs]
        pieces = list(itertools.chain.from_iterable(split))
        pair_of = np.array([number for number, some in enumerate(split) for _ in some] + [-1], np.int64)
        log_likelihood, correct = np.zeros(len(pairs)), np.zeros(len(pairs))
        pending: tuple | None = None
        done = 0
        for batch, owner in self._batches(pieces):
            scores = self._token_scores(self._params, partition.to_device(batch, self._mesh))
            if pending:
                _accumulate(log_likelihood, correct, *pending)
            pending = scores, pair_of[owner]  # -1, where nothing is scored, stays -1
            done += int((np.unique(owner) >= 0).sum())
            if progress:
                progress(done, len(pieces))
        if pending:
            _accumulate(log_likelihood, correct, *pending)
        num_tokens = np.array([len(continuation) for _, continuation in pairs], np.float64)
        truncated = np.array([len(a) + len(b) > self.context_length + 1 for a, b in pairs], np.bool_)
        return Scores(log_likelihood, num_tokens, correct == num_tokens, truncated)

    def _batches(self, pairs: Sequence[Pair]) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
        """(batch, owner), the longest first; owner [rows, length] is the pair scored there or -1."""
        lengths = [min(len(context) + len(continuation) - 1, self.context_length) for context, continuation in pairs]
        buckets = np.array([self._bucket(length) for length in lengths], np.int64)
        order = np.argsort(-np.array(lengths), kind="stable")
        for bucket in np.unique(buckets)[::-1].tolist():
            members = order[buckets[order] == bucket]
            rows = self._rows(bucket)
            for start in range(0, len(members), rows):
                yield self._batch(pairs, members[start : start + rows], (rows, bucket))

    def _batch(
        self, pairs: Sequence[Pair], members: np.ndarray, shape: tuple[int, int]
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "targets", "segment_ids", "positions")}
        owner = np.full(shape, -1, np.int64)
        for row, member in enumerate(members.tolist()):
            context, continuation = pairs[member]
            window = np.concatenate([context, continuation])[-(self.context_length + 1) :]
            length = len(window) - 1
            batch["tokens"][row, :length] = window[:-1]
            batch["targets"][row, :length] = window[1:]
            batch["segment_ids"][row, :length] = 1
            batch["positions"][row, :length] = np.arange(length)
            owner[row, length - len(continuation) : length] = member
        return batch, owner

    def _bucket(self, length: int) -> int:
        return min(max(SHORTEST, 1 << (length - 1).bit_length()), self.context_length)

    def _rows(self, bucket: int) -> int:
        shards = partition.row_shards(self._mesh)
        rows = max(1, self._batch_size * self.context_length // bucket)
        return -(-rows // shards) * shards


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Pair:
    """The tokens of a context, as the beginning of a document, and of its continuation.

    As lm-eval does it: white space at the end of the context belongs to the continuation, and the continuation is
    what it adds to the tokens of the context when both are encoded as one text.
    """
    stripped = context.rstrip()
    whole, known = tokenizer.encode_batch([context + continuation, stripped])
    begin = np.array(tokenizer.begin_ids, np.int32)
    return np.concatenate([begin, known]), whole[len(known) :]


def _pieces(context: Tokens, continuation: Tokens, context_length: int) -> list[Pair]:
    if len(continuation) <= context_length:
        return [(context, continuation)]
    whole, step = np.concatenate([context, continuation]), max(context_length // 2, 1)
    starts = range(len(context), len(whole), step)
    return [(whole[:start], whole[start : start + step]) for start in starts]


def _accumulate(
    log_likelihood: np.ndarray, correct: np.ndarray, scores: tuple[jax.Array, jax.Array], owner: np.ndarray
) -> None:
    nll, is_correct = (np.asarray(s, np.float64) for s in scores)
    scored = owner >= 0
    np.subtract.at(log_likelihood, owner[scored], nll[scored])
    np.add.at(correct, owner[scored], is_correct[scored])
