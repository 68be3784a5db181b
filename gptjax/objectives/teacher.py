"""The most probable next tokens of a teacher model, computed when a batch is read.

Nothing is kept on disk: windows of text begin elsewhere in every epoch, and augmentation changes them, so that a table
by position would be for other contexts than the student sees. This way a batch stays a function of seed and step, and
the teacher works while the step before is computed. The teacher must fit on one device.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int64

from gptjax import config as config_lib
from gptjax.artifacts import loading
from gptjax.config import Config
from gptjax.data.pipeline.batches import Batch, BatchSource
from gptjax.data.tokenization import huggingface as tokenizer_files
from gptjax.data.tokenization.tokenizer import Tokenizer
from gptjax.errors import UserError
from gptjax.model import gpt
from gptjax.model.architecture import Architecture
from gptjax.model.huggingface import files as huggingface_files
from gptjax.model.huggingface import weights as huggingface


def load(config: Config, tokenizer: Tokenizer) -> tuple[Architecture, gpt.Params]:
    """The model that `objective.teacher` names. Raises UserError where its vocabulary or its context does not fit."""
    name = config.objective.teacher
    theirs: Tokenizer | None = None
    if name.startswith("hf:"):
        directory = huggingface_files.locate(name.removeprefix("hf:"))
        model = config_lib.get_default().model
        model.update(huggingface.read_config(directory))
        model.compute_dtype = config.model.compute_dtype
        architecture = Architecture.from_config(model, 0).for_inference()
        params = huggingface.read_parameters(directory, architecture)
        if tokenizer_files.has_tokenizer(directory):
            theirs = tokenizer_files.read_tokenizer(directory)
    else:
        trained = loading.load(name)
        architecture, params, theirs = trained.architecture, trained.params, trained.tokenizer
    same = theirs.sha256 == tokenizer.sha256 if theirs else architecture.vocab_size == tokenizer.vocab_size
    if not same:
        raise UserError(
            f"objective.teacher={name} has another tokenizer than {config.data.source}; prepare the data with the "
            f"teacher's: --config.tokenizer=hf:DIR, or use another teacher"
        )
    if architecture.context_length < config.model.context_length:
        raise UserError(
            f"objective.teacher={name} has a context of {architecture.context_length} tokens, and "
            f"model.context_length is {config.model.context_length}; use at most that"
        )
    return architecture, params


class TaughtBatches(BatchSource):
    """The batches of a source, with the teacher's most probable next tokens at each position.

    Beside the fields of the source, with B rows of this process, T = context_length and k tokens:
      teacher_tokens: int32 [B, T, k], the k most probable next tokens, in falling order.
      teacher_log_probabilities: float32 [B, T, k], theirs at the temperature, normalised over the whole vocabulary.
    """

    def __init__(
        self,
        source: BatchSource,
        architecture: Architecture,
        params: gpt.Params,
        k: int,
        temperature: float,
        name: str = "",
    ):
        """`params` are copied to every device of this process, among which the rows are divided; `name` is theirs."""
        super().__init__(source.rows_per_epoch, batch_size=source.batch_size, rows=source.rows)
        self._source, self._name = source, name
        devices = jax.local_devices()
        self._parts = len(devices)
        mesh = jax.sharding.Mesh(np.array(devices), ("rows",))
        whole, self._split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("rows",)))
        self._params = jax.device_put(params, whole)

        @partial(jax.jit, in_shardings=(whole, self._split), out_shardings=self._split)
        def likeliest(params: gpt.Params, batch: dict[str, Array]) -> tuple[Array, Array]:
            model = gpt.bind(architecture, params)
            hidden, _ = model.hidden(
                batch["tokens"], positions=batch["positions"], segment_ids=batch.get("segment_ids")
            )
            scores = jax.nn.log_softmax(model.logits(hidden) / temperature)
            return tuple(reversed(jax.lax.top_k(scores, k)))

        self._likeliest = likeliest

    @property
    def notes(self) -> list[str]:
        return self._source.notes

    @property
    def models(self) -> dict[str, gpt.Params]:
        return {f"objective.teacher={self._name}": self._params}

    def epochs(self, step: int) -> dict[str, float]:
        return self._source.epochs(step)

    def tokens_before(self, row: int) -> int:
        return self._source.tokens_before(row)

    def read_rows(self, rows: Int64[np.ndarray, " rows"]) -> Batch:
        batch = self._source.read_rows(rows)
        missing = -len(rows) % self._parts
        inputs = {
            name: np.pad(batch[name], ((0, missing), (0, 0)))
            for name in ("tokens", "positions", "segment_ids")
            if name in batch
        }
        tokens, scores = self._likeliest(self._params, jax.device_put(inputs, self._split))
        return batch | {
            "teacher_tokens": np.asarray(tokens, np.int32)[: len(rows)],
            "teacher_log_probabilities": np.asarray(scores, np.float32)[: len(rows)],
        }


def divergence(teacher_log_probabilities: Array, student_log_probabilities: Array, *, whole: bool) -> Array:
    """KL(teacher || student) at each position [row, length], from log-probabilities of the teacher's tokens [..., k].

    The rest of the vocabulary counts as one more token, so that the value is a lower bound of the exact KL. It is exact
    if k is the `whole` vocabulary.
    """
    p, q = teacher_log_probabilities, student_log_probabilities
    kl = (jnp.exp(p) * (p - q)).sum(-1)
    if whole:
        return kl
    p_rest, q_rest = (jnp.log(jnp.maximum(1 - jnp.exp(x).sum(-1), 1e-7)) for x in (p, q))
    return kl + jnp.exp(p_rest) * (p_rest - q_rest)
