"""Log-likelihoods of given tokens: batches of rows in, sums by owner out."""

from collections.abc import Iterable

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int, Int32

from gptjax.evaluation.metrics import Progress
from gptjax.model import gpt, sharding
from gptjax.model.architecture import Architecture
from gptjax.objectives.cross_entropy import score_tokens
from gptjax.parallel import partition

LOGITS_TOKENS = 2048  # most tokens per device, over all rows, whose logits are in memory at once
LOGITS_BYTES = 128 << 20  # most bytes of these logits in float32; XLA keeps up to three copies
CPU_BYTES = 768 << 20  # most bytes of a batch beside the parameters, in the memory of a machine
DEVICE_BYTES = 8 << 30  # the same on each device with its own memory

Batch = dict[str, Int32[np.ndarray, "rows length"]]
Owners = Int[np.ndarray, "rows length"]  # the index of the sum that a prediction is added to; -1: none


class TokenScorer:
    """Scores tokens with one compiled program for each shape of a batch.

    Memory depends on the number of tokens in a batch, not on how many rows they are in, up to `max_rows`. It has a
    bound whatever the vocabulary, the context and the requested batch size.
    """

    def __init__(self, architecture: Architecture, mesh: Mesh):
        self._architecture, self._mesh = architecture.for_inference(), mesh
        self._shards = partition.row_shards(mesh)
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        self._limit = CPU_BYTES // self._shards if on_cpu else DEVICE_BYTES
        logits = min(LOGITS_TOKENS, LOGITS_BYTES // (4 * architecture.vocab_size * (self._shards if on_cpu else 1)))
        self.max_rows = max(logits, 16) * self._shards
        self.program = jax.jit(self._token_scores, out_shardings=partition.replicated(mesh))

    def rows(self, wanted: int, length: int) -> int:
        """Rows of a batch of this length: `wanted`, lowered to the memory limits, then raised to a multiple of the
        row shards."""
        per_row = self.peak_bytes(1, length) - self.peak_bytes(0, length)
        room = max((self._limit - self.peak_bytes(0, length)) // per_row, 1) * self._shards
        return -(-min(max(wanted, 1), self.max_rows, room) // self._shards) * self._shards

    def peak_bytes(self, rows: int, length: int) -> int:
        """Estimated bytes per device of a batch with `rows` rows there, beside the parameters: attention scores and
        their softmax, the hidden states of a layer, and the logits in memory at once."""
        a = self._architecture
        scores = 2 * a.num_heads * length * length
        states = length * (8 * a.embed_dim + 3 * a.mlp_dim)
        logits = 3 * min(self.max_rows // self._shards, LOGITS_TOKENS) * a.vocab_size
        return 4 * (rows * (scores + states) + logits)

    def sums(
        self,
        params: gpt.Params,
        batches: Iterable[tuple[Batch, Owners]],
        num_owners: int,
        progress: Progress | None = None,
    ) -> Float[np.ndarray, "3 owners"]:
        """For each owner: nats of its targets, how many targets are the most probable token, number of targets.

        Args:
          batches: from `empty_batch` and `put`; the owners are numbered in the order of the batches.
          progress: called with the number of owners that are done, and with `num_owners`.
        """
        sums = np.zeros((3, num_owners))

        def add(scores: tuple[jax.Array, jax.Array], owners: Owners) -> None:
            scored = owners >= 0
            for total, values in zip(sums, (*scores, scored), strict=True):
                np.add.at(total, owners[scored], np.asarray(values, np.float64)[scored])

        pending = None  # fetched while the device works on the next batch
        with jax.set_mesh(self._mesh):
            for batch, owners in batches:
                scores = self.program(params, partition.to_device(batch, self._mesh))
                if pending:
                    add(*pending)
                pending = scores, owners
                if progress and owners.max() + 1 < num_owners:
                    progress(int(owners.max()) + 1, num_owners)
        if pending:
            add(*pending)
        if progress:
            progress(num_owners, num_owners)
        return sums

    def _token_scores(self, params: gpt.Params, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """(nats, whether the target is the most probable token), each [rows, length], of every target."""
        model = gpt.bind(self._architecture, params)
        hidden, _ = model.hidden(batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"])
        chunk = max(self.max_rows // batch["tokens"].shape[0], sharding.axis_size("context", "tensor"))
        scores = score_tokens(model.architecture, hidden, model.table(), batch["targets"], chunk=chunk)
        return scores.nll, scores.correct


def empty_batch(rows: int, length: int) -> tuple[Batch, Owners]:
    """A batch of padding, in which nothing is scored."""
    names = ("tokens", "targets", "segment_ids", "positions")
    batch = {name: np.zeros((rows, length), np.int32) for name in names}
    return batch, np.full((rows, length), -1, np.int64)


def put(batch: Batch, row: int, column: int, text: Int[np.ndarray, " tokens"], *, segment: int = 1) -> None:
    """Writes text[:-1] as tokens and text[1:] as targets into a row, starting at a column."""
    place = np.s_[row, column : column + len(text) - 1]
    batch["tokens"][place], batch["targets"][place] = text[:-1], text[1:]
    batch["segment_ids"][place] = segment
    batch["positions"][place] = np.arange(len(text) - 1)
