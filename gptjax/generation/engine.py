"""Prompts to completions: batching, stop texts, streaming."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from gptjax.data.templates import ChatTemplate
from gptjax.data.tokenizers import Tokenizer
from gptjax.errors import UserError
from gptjax.generation import decoding, sampling
from gptjax.generation.detokenizer import Detokenizer
from gptjax.generation.params import SamplingParams
from gptjax.model import gpt
from gptjax.model.architecture import Architecture
from gptjax.training.checkpoints import Trained

OnText = Callable[[int, str], None]

BATCH_SIZE = 32
STREAMING_STEPS = 4  # tokens between two pieces of text shown to a person
# The smallest compiled lengths: shorter ones would save less time than they take to compile.
MIN_PREFILL_LENGTH = 16
MIN_CAPACITY = 64


@dataclasses.dataclass(frozen=True)
class Completion:
    """What was generated for one prompt.

    Attributes:
      text: ends before the stop text; special tokens are left out.
      tokens: int32 [num_tokens], with the token that ends it or the tokens of the stop text, if any.
      log_probabilities: float32 [num_tokens], nats, under the model's own distribution: temperature 1,
        nothing removed or penalised.
      finish_reason: "stop" at the end of the text or turn or at a stop text, "length" at max_new_tokens or where the
        context is full.
      stop: the stop text that was found, or None.
    """

    text: str
    tokens: np.ndarray
    log_probabilities: np.ndarray
    finish_reason: str
    stop: str | None = None


class Generator:
    """Completes prompts with a model.

    Compiled programs are shared by all generators of the same model shape. There is one for each power of two
    that bounds the number of rows, the prompt length, and the length of prompt and completion together.

    Attributes:
      params: may be replaced, by those of a later training step for instance.
    """

    def __init__(
        self,
        architecture: Architecture,
        graphdef: nnx.GraphDef,
        params: gpt.Params | None,
        tokenizer: Tokenizer,
        template: ChatTemplate | None = None,
        mesh: Mesh | None = None,
        batch_size: int = BATCH_SIZE,
    ):
        """With a template, a text is a user's message, and a completion the assistant's turn.

        With a mesh, rows are split over its data and fsdp axes; `params` are expected on it.
        """
        self.architecture = architecture
        self.params = params
        self.tokenizer = tokenizer
        self.template = template
        self._end_id = tokenizer.special_tokens[template.end_of_turn] if template else tokenizer.eot_id
        self._graphdef = graphdef
        self._mesh = mesh
        self._batch_size = batch_size

    @classmethod
    def from_trained(cls, trained: Trained, **options) -> "Generator":
        """A generator for a checkpoint."""
        return cls(
            trained.architecture, trained.graphdef, trained.params, trained.tokenizer, trained.template, **options
        )

    def complete(
        self,
        prompts: Sequence[str],
        params: SamplingParams,
        *,
        on_text: OnText | None = None,
        indices: Sequence[int] | None = None,
    ) -> list[Completion]:
        """`complete_tokens` for texts, each as the beginning of a document: after an end-of-text token."""
        begin = np.array([self.tokenizer.eot_id], np.int32)
        if self.template is None:
            encoded = self.tokenizer.encode_batch(prompts)
        else:
            questions = [[{"role": "user", "content": prompt}] for prompt in prompts]
            encoded = [self.template.encode_prompt(messages, self.tokenizer) for messages in questions]
        tokens = [np.concatenate([begin, ids]) for ids in encoded]
        return self.complete_tokens(tokens, params, on_text=on_text, indices=indices)

    def complete_tokens(
        self,
        prompts: Sequence[np.ndarray],
        params: SamplingParams,
        *,
        on_text: OnText | None = None,
        indices: Sequence[int] | None = None,
    ) -> list[Completion]:
        """Continues each prompt, exactly as given, until it ends or the context is full.

        What a prompt gets depends on its tokens, its index and `params`, not on the other prompts.

        Args:
          prompts: token ids.
          params: how to draw, and where to end.
          on_text: called with a prompt's place in `prompts` and a new piece of its text, as soon as that is
            final: joined, the pieces are the completion's text, and none has half a character.
          indices: tell the draws of equal prompts apart; default: places in `prompts`.

        Raises:
          UserError: `params` are out of range; a prompt is empty, longer than the context, or has an id that
            is not in the vocabulary.
        """
        params.validate()
        self._check(prompts)
        if not len(prompts):
            return []
        indices = range(len(prompts)) if indices is None else indices
        rows = [
            _Row(place, index, np.asarray(prompt), params, self.tokenizer, self.architecture.context_length)
            for place, (index, prompt) in enumerate(zip(indices, prompts, strict=True))
        ]
        batch_size = self._rows_of_a_batch(len(rows))
        capacity = max(len(row.prompt) + row.remaining for row in rows)
        capacity = min(_bucket(capacity, MIN_CAPACITY), self.architecture.context_length)
        # Neighbours of similar length waste little padding; the longest first, so that what does not fit in
        # memory fails at once.
        by_length = sorted(rows, key=lambda row: -len(row.prompt))
        for start in range(0, len(rows), batch_size):
            self._complete_batch(by_length[start : start + batch_size], batch_size, capacity, params, on_text)
        return [row.completion() for row in rows]

    def _complete_batch(
        self,
        rows: list["_Row"],
        batch_size: int,
        capacity: int,
        params: SamplingParams,
        on_text: OnText | None,
    ) -> None:
        state = self._prefill(rows, batch_size, capacity, params.seed)
        controls = sampling.controls(params)
        end_id = decoding.NO_TOKEN if params.ignore_eos else self._end_id
        num_steps = STREAMING_STEPS if on_text else decoding.DECODE_STEPS
        remaining = np.zeros(batch_size, np.int32)
        while any(row.remaining for row in rows):
            remaining[: len(rows)] = [row.remaining for row in rows]
            placed = decoding.place({"remaining": remaining}, self._mesh)
            state, tokens, log_probabilities = decoding.decode(
                self._graphdef,
                self.params,
                state,
                controls,
                placed["remaining"],
                end_id,
                num_steps,
                mesh=self._mesh,
            )
            tokens, log_probabilities = jax.device_get((tokens, log_probabilities))
            for i, row in enumerate(rows):
                if row.remaining:
                    new = tokens[i] != decoding.NO_TOKEN
                    text = row.extend(tokens[i][new], log_probabilities[i][new], end_id)
                    if on_text and text:
                        on_text(row.place, text)

    def _prefill(self, rows: list["_Row"], batch_size: int, capacity: int, seed: int) -> decoding.State:
        length = min(_bucket(max(len(row.prompt) for row in rows), MIN_PREFILL_LENGTH), capacity)
        inputs = {
            "tokens": np.zeros((batch_size, length), np.int32),
            "lengths": np.zeros(batch_size, np.int32),
            "indices": np.zeros(batch_size, np.int32),
        }
        for i, row in enumerate(rows):
            inputs["tokens"][i, : len(row.prompt)] = row.prompt
            inputs["lengths"][i] = len(row.prompt)
            inputs["indices"][i] = row.index
        return decoding.prefill(
            self._graphdef,
            self.params,
            **decoding.place(inputs, self._mesh),
            seed=np.uint32(seed),
            capacity=capacity,
            mesh=self._mesh,
        )

    def _rows_of_a_batch(self, num_prompts: int) -> int:
        shards = self._mesh.shape["data"] * self._mesh.shape["fsdp"] if self._mesh else 1
        rows = min(_bucket(num_prompts, 1), self._batch_size)
        return -(-rows // shards) * shards

    def _check(self, prompts: Sequence[np.ndarray]) -> None:
        context, vocab = self.architecture.context_length, self.architecture.vocab_size
        for i, prompt in enumerate(prompts):
            if not len(prompt):
                raise UserError(f"prompt {i} is empty; a document begins with token {self.tokenizer.eot_id}")
            if len(prompt) > context:
                raise UserError(
                    f"prompt {i} has {len(prompt)} tokens, more than the model's context_length {context}; shorten it"
                )
            if np.min(prompt) < 0 or np.max(prompt) >= vocab:
                raise UserError(f"prompt {i} has a token id outside 0 to {vocab - 1}, the model's vocabulary")


class _Row:
    """One prompt and what has been generated for it. `remaining` is 0 when it has ended."""

    def __init__(
        self,
        place: int,
        index: int,
        prompt: np.ndarray,
        params: SamplingParams,
        tokenizer: Tokenizer,
        context_length: int,
    ):
        self.place, self.index, self.prompt = place, index, prompt
        self.remaining = min(params.max_new_tokens, context_length - len(prompt))
        self._detokenizer = Detokenizer(tokenizer, prompt, params.stop)
        self._log_probabilities: list[float] = []
        self._finish_reason = "length"

    def extend(self, tokens: np.ndarray, log_probabilities: np.ndarray, end_id: int) -> str:
        """Adds generated tokens; returns the text that is new and final."""
        text = self._detokenizer.push(tokens)
        self._log_probabilities += log_probabilities.tolist()
        self.remaining -= len(tokens)
        ended = self._detokenizer.stop is not None or tokens[-1] == end_id
        if ended:
            self._finish_reason, self.remaining = "stop", 0
        if not self.remaining:
            text += self._detokenizer.finish(cut=not ended)
        return text

    def completion(self) -> Completion:
        tokens = self._detokenizer.tokens
        return Completion(
            text=self._detokenizer.text,
            tokens=np.array(tokens, np.int32),
            log_probabilities=np.array(self._log_probabilities[: len(tokens)], np.float32),
            finish_reason=self._finish_reason,
            stop=self._detokenizer.stop,
        )


def _bucket(size: int, smallest: int) -> int:
    """The smallest power of two that is at least `size` and `smallest`."""
    return max(smallest, 1 << (size - 1).bit_length())
