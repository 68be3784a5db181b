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
from gptjax.generation import decoding, reading, sampling
from gptjax.generation.events import Event
from gptjax.generation.model import Model, check_draft, check_prompt, platform
from gptjax.generation.params import SamplingParams
from gptjax.generation.request import Constraint, Request
from gptjax.generation.slots import Slots
from gptjax.parallel import partition

SLOTS = 32
MIN_CAPACITY = 64  # a smaller one would take longer to compile than it saves
# The fewest rows that a GPU multiplies with its matrix units. With fewer rows, XLA uses other kernels, and a step takes
# twice as long (124M parameters, one H200: 1.22 ms for one row, 0.54 ms for eight).
GPU_SLOTS = 8
GROUP = 4  # prompts that are read at once while not all slots are free
CHUNK = 256  # tokens of a prompt that are read at once; other slots wait no longer than that


class Busy(RunError):
    """The queue of an engine is full; try again later."""


@dataclasses.dataclass
class Statistics:
    """Counts since the engine was made: generated tokens, passes of the model, tokens that the draft proposed."""

    tokens: int = 0
    passes: int = 0
    proposed: int = 0

    @property
    def accepted(self) -> int:
        """Number of proposals of the draft that were kept."""
        return self.tokens - self.passes


class Engine:
    """Generates for many requests at once.

    `submit` and `cancel` may be called from any thread; `step` from one. Compiled programs are shared by all engines
    of the same model shape: there is one decode program per number of slots and power of two of the capacity. For
    reading prompts there is one per power of two of their length and group size: 1, 4, or the number of slots.

    An engine of fixed capacity, for a server, has few programs, which `warm_up` compiles. It reads prompts one by one,
    so that the same program computes a result whatever other requests there are.
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
          capacity: the largest number of tokens of a prompt and its completion; longer requests are refused. Default:
            the context length, with caches only as large as the current requests need.
          chunk: a longer prompt is read in chunks of so many tokens, a power of two; other slots decode in between.
          max_waiting: requests that may wait for a slot; `submit` refuses more.
          rounds: tokens per call of the device. Fewer show text sooner, more take less time in all.
          mesh: slots are split over its data, fsdp and expert axes, heads over tensor; the parameters must be on it.
          draft: a small model with the same vocabulary that proposes `draft_tokens` tokens at a time. It changes the
            speed, not the tokens.

        Raises:
          UserError: the draft does not fit the model.
        """
        # Checked first, so that an engine never exists with a draft that cannot serve its model.
        if draft is not None:
            check_draft(model, draft, draft_tokens)
        self.statistics = Statistics()
        models = (model,) if draft is None else (model, draft)
        self._architectures = tuple(model.architecture for model in models)
        self._params = tuple(model.params for model in models)
        self._draft_tokens = draft_tokens if draft else 0
        self._tokenizer = tokenizer
        self._end_ids = tuple(end_ids)
        self._mesh = mesh
        # First the minimum, then rounding up: the number of slots must be a multiple of the shards.
        shards = partition.row_shards(mesh) if mesh else 1
        slots = max(slots, GPU_SLOTS) if platform(model.params) == "gpu" else slots
        self._slots = Slots(-(-slots // shards) * shards, chunk)
        # Caches of a given capacity are made once; others start empty and grow with the requests.
        self._limit = min(capacity or model.architecture.context_length, model.architecture.context_length)
        self._capacity = self._limit if capacity else 0
        self._fixed = capacity is not None
        self._chunk = chunk
        self._lengths = reading.few_lengths(chunk) if self._fixed else None
        self._rounds = min(rounds, decoding.ROUNDS)
        self._state: decoding.State | None = None
        self._group: tuple[Request, ...] = ()  # requests whose prompts are being read
        # `submit` and `cancel` change these from other threads: use them only under the lock of `_changed`.
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
          index: gives equal prompts with equal seeds different samples.
          end_ids: tokens that end this text; default: the `end_ids` of the engine.
          top: how many of the most probable tokens are returned with each token, at most 20.
          score_prompt: whether to return log-probabilities of the prompt, which is then read without reuse of a cache.
          constraint: which tokens may come next.

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
            raise UserError(f"top is {top}; at most the {sampling.TOP} most probable tokens can be returned")
        if constraint and self._draft_tokens:
            raise UserError("a request with a constraint cannot use a draft model; leave out the draft")
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
        """Compiles all programs of an engine of fixed capacity, so that none is compiled while users wait.

        Raises the error of a program that cannot be compiled, or does not fit in memory.
        """
        lengths = [read + size for read in (0, self._chunk) for size in self._lengths or ()]
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
        """Ends the requests in slots. Drops the state, which may be half written, or its buffers donated.

        Requests of which nothing was read yet wait again.
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
        """Makes or grows the caches for `length` tokens."""
        context = self._architectures[0].context_length
        capacity = self._capacity if self._fixed else min(reading.bucket(length, MIN_CAPACITY), context)
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
        """Reads all prompts in slots, the oldest first; while other slots decode, only about one chunk of tokens."""
        others_write, tokens = any(request.writing for _, request in self._slots), 0
        while (group := self._next_to_read()) and not (others_write and tokens >= self._chunk):
            tokens += len(group) * self._shape(group[0][1])[0]
            self._insert(group)

    def _next_to_read(self) -> list[tuple[int, Request]]:
        """Slots and requests whose next chunks are read together: the oldest one, and others of the same shape."""
        waiting = [(slot, request) for slot, request in self._slots if not request.writing]
        alike = [pair for pair in waiting if self._shape(pair[1]) == self._shape(waiting[0][1])]
        most = 1 if self._fixed else GROUP if alike and alike[0][1].scored else len(self._slots)
        sizes = [size for size in (1, GROUP, len(self._slots)) if size <= min(len(alike), most)]
        return alike[: max(sizes, default=0)]

    def _shape(self, request: Request) -> reading.Shape:
        return reading.shape(request, self._chunk, self._lengths)

    def _insert(self, group: list[tuple[int, Request]]) -> None:
        """Reads the next chunks of these requests."""
        slots, requests = zip(*group, strict=True)
        self._group = requests
        shape = self._shape(requests[0])
        length = min(shape.length, self._capacity)
        prompts, starts = reading.chunks(slots, requests, length, self._chunk)
        targets = np.stack([r.targets(r.read, length) for r in requests]) if shape.scored else None
        self._state, scores = decoding.insert(
            self._architectures, self._params, self._state, prompts, None if shape.first else starts, targets
        )
        scores = jax.device_get(scores)
        if jax.default_backend() == "cpu":  # two programs with collectives at the same time can deadlock there
            jax.block_until_ready(self._state)
        for row, (slot, request) in enumerate(group):
            count = int(prompts.lengths[row])
            if scores is not None:
                request.score(jax.tree.map(lambda x, row=row, count=count: x[row, :count], scores))
            request.read += count
            self._slots.has_read(slot, request)
        self._group = ()

    def _decode(self) -> None:
        """Decodes a few tokens in the slots whose prompts have been read."""
        writing = [(slot, request) for slot, request in self._slots if request.writing]
        remaining = np.zeros(len(self._slots), np.int32)
        for slot, request in writing:
            remaining[slot] = request.remaining
        allowed = self._allowed(writing)
        top = any(request.top for _, request in writing)
        # While a prompt is not fully read, only one token is decoded between two chunks.
        unread = any(not request.writing for _, request in self._slots)
        rounds = 1 if unread or allowed is not None else self._rounds
        self._state, written = decoding.decode(
            self._architectures,
            self._params,
            self._state,
            remaining,
            np.int32(rounds),
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
        """The tokens that each slot may write next; None if no slot has a constraint."""
        if not any(request.constraint for _, request in writing):
            return None
        allowed = np.ones((len(self._slots), self._architectures[0].padded_vocab_size), bool)
        for slot, request in writing:
            if request.constraint:
                allowed[slot] = request.constraint.allowed(allowed.shape[1])
                # If the text may end, all its end tokens are allowed: a chat model writes the end of its turn.
                allowed[slot, list(request.end_ids)] = allowed[slot, self._tokenizer.eot_id]
        return allowed


class _Anything:
    """A constraint that allows all tokens, to compile the program for constraints."""

    def allowed(self, vocab: int) -> np.ndarray:
        return np.ones(vocab, bool)

    def advance(self, token: int) -> None:
        pass
