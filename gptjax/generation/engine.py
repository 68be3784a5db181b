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
from gptjax.generation.events import Event
from gptjax.generation.params import SamplingParams
from gptjax.generation.request import Constraint, Request, chunk_end, fill_end_ids
from gptjax.generation.slots import Slots
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
CHUNK = 256  # tokens of a prompt that are read at once; those who write wait for no more


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

    An engine of fixed capacity, for a server, has few programs, which `warm_up` compiles. It reads prompts one by one:
    each number is computed by the same program whoever else is there.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        *,
        end_ids: Sequence[int] = (),
        slots: int = SLOTS,
        capacity: int | None = None,
        chunk: int = CHUNK,
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
          chunk: a longer prompt is read in chunks of so many tokens, between which others write; a power of two.
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
        self._slots = Slots(-(-slots // shards) * shards, chunk)
        # Caches of a given capacity are made once; otherwise they start empty and grow with the requests.
        self._limit = min(capacity or model.architecture.context_length, model.architecture.context_length)
        self._capacity = self._limit if capacity else 0
        self._fixed = capacity is not None
        self._chunk = chunk
        self._rounds = min(rounds, decoding.ROUNDS)
        self._state: decoding.State | None = None
        self._group: tuple[Request, ...] = ()  # those that are being read
        # What `submit` and `cancel` touch from other threads: only under the lock of `_changed`.
        self._max_waiting = max_waiting
        self._waiting: deque[Request] = deque()
        self._cancelled: set[int] = set()
        self._events: list[Event] = []  # those that `step` has not returned yet
        self._handles = itertools.count()
        self._changed = threading.Condition()

    @property
    def capacity(self) -> int:
        """Tokens that a prompt and its completion may have together."""
        return self._limit

    @property
    def load(self) -> tuple[int, int, int]:
        """Requests that wait, slots in use, slots."""
        return len(self._waiting), len(self._slots) - self._slots.requests.count(None), len(self._slots)

    def submit(
        self,
        prompt: Sequence[int] | np.ndarray,
        params: SamplingParams,
        *,
        index: int = 0,
        end_ids: Sequence[int] | None = None,
        top: int = 0,
        score_prompt: bool = False,
        constraint: Constraint | None = None,
    ) -> int:
        """Queues a prompt; returns the handle of its events.

        The completion depends on the tokens, `params` and `index`, but not on other requests or on the time.

        Args:
          prompt: token ids, continued exactly as given.
          index: gives equal prompts with equal seeds different draws.
          end_ids: tokens that end this text; default: the `end_ids` of the engine.
          top: how many of the most probable tokens are told beside each token, at most 20.
          score_prompt: whether the log-probabilities of the prompt are told; its whole context is read.
          constraint: what the text must look like.

        Raises:
          UserError: `params` are out of range; the prompt is empty, too long or not of this vocabulary.
          Busy: `max_waiting` requests are already waiting.
        """
        params.validate()
        prompt = np.asarray(prompt, np.int32)
        vocab = self._architectures[0].vocab_size
        check_prompt("the prompt", prompt, self._architectures[0])
        if len(prompt) > self._limit:
            raise UserError(f"the prompt has {len(prompt)} tokens, more than the {self._limit} of this engine")
        if wrong := [token for token, _ in params.logit_bias if token >= vocab]:
            raise UserError(f"logit_bias has the token id {wrong[0]}, outside 0 to {vocab - 1}, the model's vocabulary")
        if not 0 <= top <= sampling.TOP:
            raise UserError(f"top is {top}; the {sampling.TOP} most probable tokens can be told at most")
        if constraint and self._draft_tokens:
            raise UserError("a text with a constraint cannot be drafted; leave the draft out")
        ends = self._end_ids if end_ids is None else tuple(end_ids)
        ends = () if params.ignore_eos else ends
        if len(ends) > decoding.MAX_END_IDS:
            raise UserError(f"{len(ends)} tokens may end a text; at most {decoding.MAX_END_IDS} can")
        asked = {"top": top, "scored": score_prompt, "constraint": constraint}
        with self._changed:
            if len(self._waiting) >= self._max_waiting:
                raise Busy(f"{self._max_waiting} requests are waiting; try again later")
            request = Request(next(self._handles), index, prompt, params, ends, self._tokenizer, self._limit, **asked)
            self._waiting.append(request)
            self._changed.notify_all()
        return request.handle

    def warm_up(self) -> None:
        """Compiles all programs of an engine of fixed capacity, so that none is compiled while people wait.

        Raises the error of a program that cannot be compiled, or has no room.
        """
        lengths = [length for read in (0, self._chunk) for length in (read + size for size in self._lengths())]
        prompts = [np.zeros(min(length, max(self._limit - 1, 1)), np.int32) for length in lengths]
        requests = [(prompt, {"score_prompt": scored}) for scored in (False, True) for prompt in prompts]
        for prompt, options in [*requests, (prompts[0], {"constraint": _Anything()})]:
            self.submit(prompt, SamplingParams(max_new_tokens=1), **options)
            while self.busy:
                for event in self.step():
                    if event.error is not None:
                        raise event.error
        self._slots.forget()
        self.statistics = Statistics()

    def cancel(self, handle: int) -> None:
        """Ends a request at the next step. Nothing happens if it has ended."""
        with self._changed:
            self._cancelled.add(handle)
            self._changed.notify_all()

    @property
    def busy(self) -> bool:
        """Whether `step` has something to do."""
        return bool(self._waiting or any(self._slots.requests) or self._events)

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
                self._read()
                if any(request.writing for _, request in self._slots):
                    self._decode()
            except BaseException as error:
                self._fail(error)
                if not isinstance(error, Exception):
                    raise
        events, self._events = self._events, []
        return events

    def _fail(self, error: BaseException) -> None:
        """Ends the requests in slots. The state may be half written, or its buffers donated, so it is made anew.

        Those of which nothing was read yet wait again.
        """
        self._state = None
        lost = self._slots.forget()
        unread = [request for request in lost if request.read == request.cached and request not in self._group]
        self._events += [Event(r.handle, "", (), (), "error", error=error) for r in lost if r not in unread]
        for request in unread:
            request.read = request.cached = 0
        with self._changed:
            self._waiting.extendleft(reversed(unread))

    def _leave(self) -> None:
        """Ends the cancelled requests."""
        with self._changed:
            cancelled, self._cancelled = self._cancelled, set()
            ended = [request for request in self._waiting if request.handle in cancelled]
            self._waiting = deque(request for request in self._waiting if request.handle not in cancelled)
        for slot, request in self._slots:
            if request.handle in cancelled:
                self._slots.leave(slot)
                ended.append(request)
        self._events += [Event(r.handle, "", (), (), "cancelled") for r in sorted(ended, key=lambda r: r.handle)]

    def _join(self) -> None:
        """Moves waiting prompts into the free slots."""
        while self._slots.free:
            with self._changed:
                if not self._waiting:
                    break
                request = self._waiting.popleft()
            if request.remaining:
                self._slots.put(request)
            else:  # the prompt fills the context
                self._events.append(Event(request.handle, "", (), (), "length"))
        if length := max((request.length for _, request in self._slots), default=0):
            self._provide(length)

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

    def _read(self) -> None:
        """Reads all prompts in slots; or while others write, a chunk of the oldest ones that are not read yet."""
        others_write = any(request.writing for _, request in self._slots)
        while group := self._next_to_read():
            self._insert(group)
            if others_write:
                break

    def _next_to_read(self) -> list[tuple[int, Request]]:
        """Slots and requests whose next chunks are read together: the oldest one, and others of similar length."""
        waiting = [(slot, request) for slot, request in self._slots if not request.writing]
        alike = [pair for pair in waiting if self._shape(pair[1]) == self._shape(waiting[0][1])]
        most = 1 if self._fixed else GROUP if alike and alike[0][1].scored else len(self._slots)
        sizes = [size for size in (1, GROUP, len(self._slots)) if size <= min(len(alike), most)]
        return alike[: max(sizes, default=0)]

    def _shape(self, request: Request) -> tuple[int, bool, bool]:
        """What chunks must have in common to be read together: padded length, whether they are first, or scored."""
        end = chunk_end(request.read, len(request.prompt), self._chunk)
        smallest = MIN_PREFILL_LENGTH
        length = _bucket(end - request.read, smallest)
        if self._fixed:  # a quarter of the lengths, for fewer programs
            length = next(size for size in self._lengths() if size >= length)
        return min(length, max(self._chunk, smallest)), request.read == 0, request.scored

    def _lengths(self) -> list[int]:
        """The padded lengths of chunks in an engine of fixed capacity."""
        lengths = [MIN_PREFILL_LENGTH]
        while lengths[-1] < self._chunk:
            lengths.append(min(4 * lengths[-1], self._chunk))
        return lengths

    def _insert(self, group: list[tuple[int, Request]]) -> None:
        """Reads the next chunks of these requests."""
        slots, requests = zip(*group, strict=True)
        self._group = requests
        length, first, scored = self._shape(requests[0])
        length = min(length, self._capacity)
        starts = [request.read for request in requests]
        ends = [chunk_end(r.read, len(r.prompt), self._chunk) for r in requests]
        tokens = np.zeros((len(group), length), np.int32)
        for row, request in enumerate(requests):
            tokens[row, : ends[row] - starts[row]] = request.prompt[starts[row] : ends[row]]
        prompts = decoding.Prompts(
            tokens=tokens,
            lengths=np.array(ends, np.int32) - np.array(starts, np.int32),
            slots=np.array(slots, np.int32),
            seeds=np.array([request.params.seed for request in requests], np.uint32),
            indices=np.array([request.index for request in requests], np.int32),
            controls=sampling.controls([request.params for request in requests]),
            biases=sampling.bias([request.params for request in requests]),
            end_ids=fill_end_ids(list(requests)),
        )
        targets = np.stack([r.targets(r.read, length) for r in requests]) if scored else None
        self._state, scores = decoding.insert(
            self._architectures,
            self._params,
            self._state,
            prompts,
            None if first else np.array(starts, np.int32),
            targets,
        )
        scores = jax.device_get(scores)
        for row, (slot, request) in enumerate(group):
            if scores is not None:
                request.score(jax.tree.map(lambda x, row=row: x[row, : ends[row] - starts[row]], scores))
            request.read = ends[row]
            self._slots.has_read(slot, request)
        self._group = ()

    def _decode(self) -> None:
        """Writes a few tokens in the slots whose prompts are read."""
        writing = [(slot, request) for slot, request in self._slots if request.writing]
        remaining = np.zeros(len(self._slots), np.int32)
        for slot, request in writing:
            remaining[slot] = request.remaining
        allowed = self._allowed(writing)
        top = any(request.top for _, request in writing)
        self._state, written = decoding.decode(
            self._architectures,
            self._params,
            self._state,
            remaining,
            np.int32(self._rounds if allowed is None else 1),
            np.bool_(len(self._waiting) > 0),
            allowed=allowed,
            top=np.bool_(top),
            draft_tokens=self._draft_tokens,
        )
        if not top:
            nothing = np.zeros((*written.drawn.tokens.shape, 0))
            written = written._replace(drawn=written.drawn._replace(top_ids=nothing, top_values=nothing))
        drawn, rounds = jax.device_get(written)
        self.statistics.passes += int(rounds.sum())
        self.statistics.proposed += int(rounds.sum()) * self._draft_tokens
        self.statistics.tokens += int((drawn.tokens != decoding.NO_TOKEN).sum())
        for slot, request in writing:
            new = drawn.tokens[slot] != decoding.NO_TOKEN
            event = request.extend(jax.tree.map(lambda x, slot=slot, new=new: x[slot][new], drawn))
            self._events.append(event)
            if event.finish_reason:
                self._slots.leave(slot)

    def _allowed(self, writing: list[tuple[int, Request]]) -> np.ndarray | None:
        """The tokens that each slot may write next; None where all may write all."""
        if not any(request.constraint for _, request in writing):
            return None
        allowed = np.ones((len(self._slots), self._architectures[0].padded_vocab_size), bool)
        for slot, request in writing:
            if request.constraint:
                allowed[slot] = request.constraint.allowed(allowed.shape[1])
                # Where the text may end, it may end in each of its ways: a chat model writes the end of its turn.
                allowed[slot, list(request.end_ids)] = allowed[slot, self._tokenizer.eot_id]
        return allowed


class _Anything:
    """A constraint that allows all tokens, to compile the program for those that do not."""

    def allowed(self, vocab: int) -> np.ndarray:
        return np.ones(vocab, bool)

    def advance(self, token: int) -> None:
        pass


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
