"""Continuous batching: requests join and leave while others decode. Each has its own slot."""

import contextlib
import dataclasses
import itertools
import threading
from collections import deque
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from gptjax.data.tokenization.tokenizer import Tokenizer
from gptjax.errors import RunError, UserError
from gptjax.generation import decoding, sampling
from gptjax.generation.detokenizer import Detokenizer
from gptjax.generation.events import Event
from gptjax.generation.params import SamplingParams
from gptjax.model import gpt
from gptjax.model.architecture import Architecture
from gptjax.parallel import partition

SLOTS = 32
# The smallest compiled lengths. Shorter ones would take longer to compile than they save.
MIN_PREFILL_LENGTH = 16
MIN_CAPACITY = 64
# The fewest rows that a GPU multiplies with its matrix units. With fewer rows, XLA uses other kernels, and a step takes
# twice as long (124M parameters, one H200: 1.22 ms for one row, 0.54 ms for eight).
GPU_SLOTS = 8
GROUP = 4  # prompts that are read at once while not all slots are free


class Busy(RunError):
    """The queue of an engine is full; try again later."""


@dataclasses.dataclass(frozen=True)
class Model:
    """A model in the form that decoding reads; made by `Model.prepare`.

    Attributes:
      params: from `decoding.prepare`.
      name: how messages call the model.
    """

    architecture: Architecture
    params: gpt.Params
    name: str = "the model"

    @classmethod
    def prepare(cls, architecture: Architecture, params: gpt.Params, name: str = "the model") -> "Model":
        """A model for decoding. On a CPU it computes in float32.

        On a CPU, XLA has no fast bfloat16 product of a few rows with a matrix: a 124M model takes 3 times as long at
        batch 1, 2 times at batch 8.
        """
        architecture = architecture.for_inference()
        if _platform(params) == "cpu" and architecture.compute_dtype != "float32":
            architecture = dataclasses.replace(architecture, compute_dtype="float32")
        return cls(architecture, decoding.prepare(params, architecture=architecture), name)


def _platform(params: gpt.Params) -> str:
    (device, *_) = jax.tree.leaves(params)[0].sharding.device_set
    return device.platform


@dataclasses.dataclass
class Statistics:
    """Counts since the engine was made: generated tokens, passes of the model, tokens that the draft proposed."""

    tokens: int = 0
    passes: int = 0
    proposed: int = 0

    @property
    def accepted(self) -> int:
        """Number of proposals of the draft that the model took."""
        return self.tokens - self.passes


class Engine:
    """Generates for many requests at once.

    `submit` and `cancel` may be called from any thread; `step` from one. Compiled programs are shared by all engines
    of the same model shape: there is one decode program per number of slots and power of two of the capacity. For
    reading prompts there is one per power of two of their length and group size: 1, 4, or the number of slots.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        *,
        end_ids: Sequence[int] = (),
        slots: int = SLOTS,
        capacity: int | None = None,
        max_waiting: int = 1024,
        rounds: int = decoding.ROUNDS,
        mesh: Mesh | None = None,
        draft: Model | None = None,
        draft_tokens: int = 4,
    ):
        """
        Args:
          end_ids: tokens that end a text.
          slots: requests that decode at the same time. At least 8 on a GPU; with a mesh, rounded up to a
            multiple of the parts into which rows are split.
          capacity: tokens that a prompt and its completion may have together; longer requests are refused. Default:
            the context length, with caches only as large as the present requests need.
          max_waiting: requests that may wait for a slot; `submit` refuses more.
          rounds: tokens between two looks of the host at the text. Fewer show text sooner, more cost less time.
          mesh: slots are split over its data, fsdp and expert axes, heads over tensor; the parameters must be on it.
          draft: a small model with the same vocabulary that proposes `draft_tokens` tokens at a time. It changes the
            speed, not the tokens.

        Raises:
          UserError: the draft does not fit the model.
        """
        # Checked first, so that an engine never exists with a draft that cannot serve its model.
        if draft is not None:
            _check_draft(model, draft, draft_tokens)
        self.statistics = Statistics()
        models = (model,) if draft is None else (model, draft)
        self._architectures = tuple(model.architecture for model in models)
        self._params = tuple(model.params for model in models)
        self._draft_tokens = draft_tokens if draft else 0
        self._tokenizer = tokenizer
        self._end_ids = tuple(end_ids)
        self._mesh = mesh
        # Raised first, rounded up second: the number of slots must remain a multiple of the shards.
        shards = partition.row_shards(mesh) if mesh else 1
        slots = max(slots, GPU_SLOTS) if _platform(model.params) == "gpu" else slots
        self._slots: list[_Request | None] = [None] * (-(-slots // shards) * shards)
        # Caches of a given capacity are made once; otherwise they start empty and grow with the requests.
        self._limit = min(capacity or model.architecture.context_length, model.architecture.context_length)
        self._capacity = self._limit if capacity else 0
        self._fixed = capacity is not None
        self._rounds = min(rounds, decoding.ROUNDS)
        self._state: decoding.State | None = None
        # What `submit` and `cancel` touch from other threads: only under the lock of `_changed`.
        self._max_waiting = max_waiting
        self._waiting: deque[_Request] = deque()
        self._cancelled: set[int] = set()
        self._events: list[Event] = []  # those that `step` has not returned yet
        self._handles = itertools.count()
        self._changed = threading.Condition()

    def submit(
        self,
        prompt: Sequence[int] | np.ndarray,
        params: SamplingParams,
        *,
        index: int = 0,
        end_ids: Sequence[int] | None = None,
    ) -> int:
        """Queues a prompt; returns the handle of its events.

        The completion depends on the tokens, `params` and `index`, but not on other requests or on the time.

        Args:
          prompt: token ids, continued exactly as given.
          index: gives equal prompts with equal seeds different draws.
          end_ids: tokens that end this text; default: the `end_ids` of the engine.

        Raises:
          UserError: `params` are out of range; the prompt is empty, too long or not of this vocabulary.
          Busy: `max_waiting` requests are already waiting.
        """
        params.validate()
        prompt = np.asarray(prompt, np.int32)
        check_prompt("the prompt", prompt, self._architectures[0])
        if len(prompt) > self._limit:
            raise UserError(f"the prompt has {len(prompt)} tokens, more than the {self._limit} of this engine")
        ends = self._end_ids if end_ids is None else tuple(end_ids)
        ends = () if params.ignore_eos else ends
        if len(ends) > decoding.MAX_END_IDS:
            raise UserError(f"{len(ends)} tokens may end a text; at most {decoding.MAX_END_IDS} can")
        with self._changed:
            if len(self._waiting) >= self._max_waiting:
                raise Busy(f"{self._max_waiting} requests are waiting; try again later")
            request = _Request(next(self._handles), index, prompt, params, ends, self._tokenizer, self._limit)
            self._waiting.append(request)
            self._changed.notify_all()
        return request.handle

    def cancel(self, handle: int) -> None:
        """Ends a request at the next step. Nothing happens if it has ended."""
        with self._changed:
            self._cancelled.add(handle)
            self._changed.notify_all()

    @property
    def busy(self) -> bool:
        """Whether `step` has something to do."""
        return bool(self._waiting or any(self._slots) or self._events)

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until `step` has something to do, or `timeout` seconds; returns whether it has."""
        with self._changed:
            return self._changed.wait_for(lambda: self.busy, timeout)

    def step(self) -> list[Event]:
        """Reads waiting prompts into free slots, decodes a few tokens in all slots, and returns the events.

        An exception, such as a device out of memory, ends the requests that are in slots: each gets an event with the
        reason "error". The next steps serve the waiting requests. KeyboardInterrupt and SystemExit are raised again;
        then the next step returns the events.
        """
        with jax.set_mesh(self._mesh) if self._mesh else contextlib.nullcontext():
            try:
                self._leave()
                self._join()
                if any(self._slots):
                    self._decode()
            except BaseException as error:
                self._fail(error)
                if not isinstance(error, Exception):
                    raise
        events, self._events = self._events, []
        return events

    def _fail(self, error: BaseException) -> None:
        """Ends all requests in slots. The state may be half written, or its buffers donated, so it is made anew."""
        self._state = None
        failed, self._slots = self._slots, [None] * len(self._slots)
        self._events += [Event(r.handle, "", (), (), "error", error=error) for r in failed if r]

    def _leave(self) -> None:
        """Ends the cancelled requests."""
        with self._changed:
            cancelled, self._cancelled = self._cancelled, set()
            ended = [r for r in (*self._slots, *self._waiting) if r and r.handle in cancelled]
            self._waiting = deque(r for r in self._waiting if r not in ended)
            self._slots = [None if r in ended else r for r in self._slots]
        self._events += [Event(request.handle, "", (), (), "cancelled") for request in ended]

    def _join(self) -> None:
        """Moves waiting prompts into the free slots; prompts of similar length are read together."""
        while free := [slot for slot, request in enumerate(self._slots) if request is None]:
            group: list[_Request] = []
            with self._changed:
                while self._waiting and len(group) < len(free):
                    request = self._waiting[0]
                    if group and request.bucket != group[0].bucket:
                        break
                    self._waiting.popleft()
                    if request.remaining:
                        group.append(request)
                    else:  # the prompt fills the context
                        self._events.append(Event(request.handle, "", (), (), "length"))
            if not group:
                break
            for slot, request in zip(free, group, strict=False):
                self._slots[slot] = request
            self._provide(max(r.length for r in self._slots if r))
            while group:
                size = max(size for size in (1, GROUP, len(self._slots)) if size <= len(group))
                self._insert(free[:size], group[:size])
                free, group = free[size:], group[size:]

    def _provide(self, length: int) -> None:
        """Caches that hold `length` tokens."""
        context = self._architectures[0].context_length
        capacity = self._capacity if self._fixed else min(_bucket(length, MIN_CAPACITY), context)
        if self._state is None:
            self._state = decoding.new_state(
                architectures=self._architectures,
                slots=len(self._slots),
                capacity=capacity,
            )
        elif capacity > self._capacity:
            self._state = self._state._replace(caches=decoding.grow(self._state.caches, capacity=capacity))
        else:
            return
        self._capacity = capacity

    def _insert(self, slots: list[int], requests: list["_Request"]) -> None:
        length = min(requests[0].bucket, self._capacity)
        tokens = np.zeros((len(requests), length), np.int32)
        end_ids = np.full((len(requests), decoding.MAX_END_IDS), decoding.NO_TOKEN, np.int32)
        for i, request in enumerate(requests):
            tokens[i, : len(request.prompt)] = request.prompt
            end_ids[i, : len(request.end_ids)] = request.end_ids
        prompts = decoding.Prompts(
            tokens=tokens,
            lengths=np.array([len(request.prompt) for request in requests], np.int32),
            slots=np.array(slots, np.int32),
            seeds=np.array([request.params.seed for request in requests], np.uint32),
            indices=np.array([request.index for request in requests], np.int32),
            controls=sampling.controls([request.params for request in requests]),
            end_ids=end_ids,
        )
        self._state = decoding.insert(self._architectures, self._params, self._state, prompts)

    def _decode(self) -> None:
        remaining = np.array([request.remaining if request else 0 for request in self._slots], np.int32)
        self._state, written = decoding.decode(
            self._architectures,
            self._params,
            self._state,
            remaining,
            np.int32(self._rounds),
            np.bool_(len(self._waiting) > 0),
            draft_tokens=self._draft_tokens,
        )
        tokens, log_probabilities, rounds = jax.device_get(written)
        self.statistics.passes += int(rounds.sum())
        self.statistics.proposed += int(rounds.sum()) * self._draft_tokens
        self.statistics.tokens += int((tokens != decoding.NO_TOKEN).sum())
        for slot, request in enumerate(self._slots):
            if request:
                new = tokens[slot] != decoding.NO_TOKEN
                event = request.extend(tokens[slot][new], log_probabilities[slot][new])
                self._events.append(event)
                if event.finish_reason:
                    self._slots[slot] = None


class _Request:
    """One prompt and the tokens generated for it. `remaining` is 0 when the text has ended."""

    def __init__(
        self,
        handle: int,
        index: int,
        prompt: np.ndarray,
        params: SamplingParams,
        end_ids: tuple[int, ...],
        tokenizer: Tokenizer,
        limit: int,
    ):
        self.handle, self.index, self.prompt, self.params, self.end_ids = handle, index, prompt, params, end_ids
        self.remaining = min(params.max_new_tokens, limit - len(prompt))
        self.length = len(prompt) + self.remaining
        self.bucket = _bucket(len(prompt), MIN_PREFILL_LENGTH)
        self._detokenizer = Detokenizer(tokenizer, prompt, params.stop)

    def extend(self, tokens: np.ndarray, log_probabilities: np.ndarray) -> Event:
        """Adds generated tokens; tokens after a stop text are dropped."""
        before = len(self._detokenizer.tokens)
        text = self._detokenizer.push(tokens)
        kept = self._detokenizer.tokens[before:]
        self.remaining -= len(kept)
        stop = self._detokenizer.stop
        ended = stop is not None or kept[-1] in self.end_ids
        if ended:
            self.remaining = 0
        if not self.remaining:
            text += self._detokenizer.finish(cut=not ended)
        reason = None if self.remaining else "stop" if ended else "length"
        return Event(self.handle, text, tuple(kept), tuple(log_probabilities[: len(kept)].tolist()), reason, stop)


def check_prompt(name: str, prompt: np.ndarray, architecture: Architecture) -> None:
    """Raises UserError for token ids that the model cannot continue."""
    context, vocab = architecture.context_length, architecture.vocab_size
    if not len(prompt):
        raise UserError(f"{name} is empty; a document begins with the end-of-text token")
    if len(prompt) > context:
        raise UserError(f"{name} has {len(prompt)} tokens, more than the model's context_length {context}; shorten it")
    if np.min(prompt) < 0 or np.max(prompt) >= vocab:
        raise UserError(f"{name} has a token id outside 0 to {vocab - 1}, the model's vocabulary")


def _check_draft(model: Model, draft: Model, draft_tokens: int) -> None:
    if draft_tokens < 1:
        raise UserError(f"draft_tokens is {draft_tokens}; it must be at least 1")
    ours, theirs = model.architecture.vocab_size, draft.architecture.vocab_size
    if theirs != ours:
        raise UserError(
            f"{draft.name} has a vocabulary of {theirs} tokens and {model.name} one of {ours}; a draft needs the same"
        )
    ours, theirs = model.architecture.context_length, draft.architecture.context_length
    if theirs < ours:
        raise UserError(f"{draft.name} has a context_length of {theirs}, less than the {ours} of {model.name}")


def _bucket(size: int, smallest: int) -> int:
    """The smallest power of two that is at least `size` and `smallest`."""
    return max(smallest, 1 << (size - 1).bit_length())
