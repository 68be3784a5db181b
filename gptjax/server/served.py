"""A model of the server, with its own engine."""

import asyncio
import contextlib
import dataclasses
import functools
import json
import threading
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gptjax.artifacts.loading import Trained
from gptjax.data.tokenization.vocabularies import BYTE_SYMBOLS
from gptjax.errors import UserError
from gptjax.generation.completion import Generator
from gptjax.generation.engine import Engine
from gptjax.generation.model import Model
from gptjax.generation.params import SamplingParams
from gptjax.generation.pump import Pump
from gptjax.model import gpt
from gptjax.model.architecture import Architecture
from gptjax.server import memory
from gptjax.server.errors import too_long


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """Settings of the engine of each model; see `Engine`.

    Attributes:
      context_length: most tokens of prompt and answer together; 0: the model's own context length.
    """

    slots: int = 8
    context_length: int = 0
    chunk: int = 256
    max_waiting: int = 256
    rounds: int = 4


class Served:
    """A model with its name, tokenizer, template and pump.

    Attributes:
      path: of the checkpoint whose parameters answer.
    """

    def __init__(
        self,
        name: str,
        trained: Trained,
        options: EngineOptions = EngineOptions(),
        *,
        others: Sequence["Served"] = (),
    ):
        """`others`: models with which equal arrays are shared."""
        self.name, self._options, self._same = name, options, self._identity(trained)
        self.tokenizer, self.template = trained.tokenizer, trained.template
        generator = self._take(trained, others)
        self.begin_ids, self.end_ids = generator.begin_ids, generator.end_ids
        names = {field.name for field in dataclasses.fields(SamplingParams)}
        self.published = {key: value for key, value in trained.generation.items() if key in names}
        self.context_length, self.max_waiting = self.engine.capacity, options.max_waiting
        self.pump: Pump | None = None
        self._before: Pump | None = None  # pump of the old parameters, while its last requests finish
        self._closed = False
        self._replacing = threading.Lock()  # held while a request chooses its pump
        self._names = {number: text for text, number in self.tokenizer.special_tokens.items()}

    @staticmethod
    def _identity(trained: Trained) -> tuple:
        """Everything that all checkpoints of one model have in common."""
        template = trained.template and trained.template.to_json()
        return trained.architecture, trained.tokenizer.to_str(), template, trained.generation

    def _take(self, trained: Trained, others: Sequence["Served"]) -> Generator:
        """Makes an engine for the parameters of `trained`, with empty caches."""
        generator = Generator.from_trained(trained)
        params = memory.share(generator.model.params, [other.model.params for other in others])
        self.model: Model = dataclasses.replace(generator.model, params=params)
        generator.model = self.model
        context, options = self.model.architecture.context_length, self._options
        self.engine: Engine = generator.engine(
            slots=options.slots,
            capacity=min(options.context_length or context, context),
            chunk=options.chunk,
            max_waiting=options.max_waiting,
            rounds=options.rounds,
        )
        self.path, self.created = trained.path, int(time.time())
        return generator

    def start(self, *, warm_up: bool = True) -> None:
        """Compiles the programs and begins to serve."""
        if warm_up:
            self.engine.warm_up()
            for length in self._lengths():
                self.embed(np.zeros(length, np.int32))
        self.pump = Pump(self.engine, self.name)

    @contextlib.contextmanager
    def pumping(self) -> Iterator[Pump]:
        """One pump for all parts of a request, which is not replaced or closed meanwhile."""
        with self._replacing:
            assert self.pump is not None, f"{self.name} is not started"
            yield self.pump

    @property
    def load(self) -> tuple[int, int, int]:
        """(waiting requests, used slots, slots); includes requests that still finish with the old parameters."""
        waiting, used, slots = self.engine.load
        before = self._before
        if before is None:
            return waiting, used, slots
        return waiting + before.engine.load[0], used + before.engine.load[1], slots

    def replace(self, trained: Trained, seconds: float, *, others: Sequence["Served"] = ()) -> None:
        """Switches to another checkpoint of the same model, with an empty prefix cache.

        Running and waiting requests finish with the old parameters. Until then, at most for `seconds`, both are in
        memory. Nothing is compiled: engines of the same shapes share their programs.

        Raises:
          UserError: the checkpoint is of another model.
        """
        if self._identity(trained) != self._same:
            raise UserError(f"{trained.path} belongs to another model than {self.path}; restart the server")
        before = self.pump
        with self._replacing:
            if self._closed:
                return
            self._take(trained, others)
            self.pump, self._before = Pump(self.engine, self.name), before
        if before is not None:
            before.close(seconds)
            self._before = None

    def close(self, seconds: float) -> None:
        with self._replacing:
            self._closed = True
        end = time.monotonic() + seconds
        for pump in (self.pump, self._before):
            if pump is not None:
                pump.close(max(end - time.monotonic(), 0))

    async def stop(self, seconds: float) -> None:
        await asyncio.to_thread(self.close, seconds)

    def check_length(self, prompt: np.ndarray, param: str, *, scored: bool = False) -> None:
        """Raises ApiError if a prompt leaves no room for an answer."""
        if len(prompt) > self.context_length - (not scored):
            raise too_long(len(prompt), self.context_length, param)

    def encode(self, text: str) -> np.ndarray:
        """The tokens of a text as the beginning of a document."""
        ids = np.concatenate([np.array(self.begin_ids, np.int32), self.tokenizer.encode(text)]).astype(np.int32)
        return ids if len(ids) else np.array([self.tokenizer.eot_id], np.int32)

    def token_text(self, token: int) -> str:
        """The text of a token; bytes:\\xNN if it is not UTF-8, so that all names differ."""
        if token in self._names:
            return self._names[token]
        raw = self.token_bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes of a token; for a special token those of its name."""
        symbols = self._symbols.get(token)
        if symbols is not None:
            return symbols
        return self._names.get(token, self.tokenizer.decode([token])).encode()

    @functools.cached_property
    def _symbols(self) -> dict[int, bytes]:
        """The bytes of each token of a byte-level vocabulary."""
        description = json.loads(self.tokenizer.to_str())
        if (description["decoder"] or {}).get("type") != "ByteLevel":
            return {}
        bytes_of = {symbol: value for value, symbol in enumerate(BYTE_SYMBOLS)}
        vocabulary = description["model"]["vocab"].items()
        return {
            number: bytes(bytes_of[symbol] for symbol in token)
            for token, number in vocabulary
            if number not in self._names and all(symbol in bytes_of for symbol in token)
        }

    def embed(self, prompt: np.ndarray) -> Float[np.ndarray, " embed"]:
        """The mean of the final hidden states over the tokens of a prompt, normalised to length 1."""
        length = next(length for length in self._lengths() if length >= len(prompt))
        tokens = np.zeros((1, length), np.int32)
        tokens[0, : len(prompt)] = prompt
        return np.asarray(_embed(self.model.architecture, self.model.params, tokens, np.int32(len(prompt))))

    def _lengths(self) -> list[int]:
        """The lengths to which a text is padded before it is embedded."""
        powers = [1 << power for power in range(6, 40, 2)]
        return [*(power for power in powers if power < self.context_length), self.context_length]


@functools.partial(jax.jit, static_argnums=0)
def _embed(
    architecture: Architecture, params: gpt.Params, tokens: Int[Array, "1 length"], count: Int[Array, ""]
) -> Float[Array, "embed"]:
    places = jnp.arange(tokens.shape[1])[None]
    layers = params["blocks"]
    model = gpt.bind(architecture, {**params, "blocks": layers[0]})
    hidden, _ = model.hidden(tokens, positions=places, new_cache=True, layers=layers)
    kept = jnp.where((places < count)[..., None], hidden.astype(jnp.float32), 0)
    mean = kept.sum(axis=(0, 1)) / count
    return mean / jnp.maximum(jnp.linalg.norm(mean), 1e-12)
