"""The models that a server has, each with an engine of its own."""

import asyncio
import dataclasses
import functools
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gptjax.artifacts import models
from gptjax.artifacts.loading import Trained
from gptjax.data.tokenization.vocabularies import BYTE_SYMBOLS
from gptjax.errors import UserError
from gptjax.generation import decoding
from gptjax.generation.completion import Generator
from gptjax.generation.engine import Engine
from gptjax.generation.model import Model
from gptjax.generation.params import SamplingParams
from gptjax.generation.pump import Pump
from gptjax.model import gpt
from gptjax.model.architecture import Architecture
from gptjax.server.errors import ApiError, too_long

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """How the engine of each model is made; see `Engine`.

    Attributes:
      context_length: the most tokens of prompt and answer together; 0 is the model's own.
    """

    slots: int = 8
    context_length: int = 0
    chunk: int = 256
    max_waiting: int = 256
    rounds: int = 4


class Served:
    """A model under a name: its tokenizer, its template, its pump."""

    def __init__(self, name: str, trained: Trained, options: EngineOptions = EngineOptions()):
        self.name, self.created = name, int(time.time())
        self._generator = Generator.from_trained(trained)
        self.model: Model = self._generator.model
        self.tokenizer, self.template = trained.tokenizer, trained.template
        self.begin_ids, self.end_ids = self._generator.begin_ids, self._generator.end_ids
        names = {field.name for field in dataclasses.fields(SamplingParams)}
        self.published = {key: value for key, value in trained.generation.items() if key in names}
        context = self.model.architecture.context_length
        engine = self._generator.engine(
            slots=options.slots,
            capacity=min(options.context_length or context, context),
            chunk=options.chunk,
            max_waiting=options.max_waiting,
            rounds=options.rounds,
        )
        self.context_length, self.max_waiting = engine.capacity, options.max_waiting
        self.engine: Engine = engine
        self.pump: Pump | None = None
        self._names = {number: text for text, number in self.tokenizer.special_tokens.items()}

    def start(self, *, warm_up: bool = True) -> None:
        """Compiles the programs and begins to serve."""
        if warm_up:
            self.engine.warm_up()
            for length in self._lengths():
                self.embed(np.zeros(length, np.int32))
        self.pump = Pump(self.engine, self.name)

    def close(self, seconds: float) -> None:
        if self.pump is not None:
            self.pump.close(seconds)

    async def stop(self, seconds: float) -> None:
        await asyncio.to_thread(self.close, seconds)

    def check_length(self, prompt: np.ndarray, param: str, *, scored: bool = False) -> None:
        """Raises ApiError where a prompt leaves no room for an answer."""
        if len(prompt) > self.context_length - (not scored):
            raise too_long(len(prompt), self.context_length, param)

    def encode(self, text: str) -> np.ndarray:
        """The tokens of a text as the beginning of a document."""
        ids = np.concatenate([np.array(self.begin_ids, np.int32), self.tokenizer.encode(text)]).astype(np.int32)
        return ids if len(ids) else np.array([self.tokenizer.eot_id], np.int32)

    def token_text(self, token: int) -> str:
        """A token by itself; one that is no UTF-8 as bytes:\\xNN, so that no two have the same name."""
        if token in self._names:
            return self._names[token]
        raw = self.token_bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes that a token stands for; those of its name for a special token."""
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
        """The mean of the final states over the tokens of a prompt, of length 1."""
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


class Models:
    """The models by name, the first of which answers where a request names none."""

    def __init__(self, served: Sequence[Served]):
        self._served = {model.name: model for model in served}

    def __iter__(self):
        return iter(self._served.values())

    def find(self, name: str | None) -> Served:
        """Raises ApiError for a name that is not served."""
        if not name:
            return next(iter(self._served.values()))
        if name not in self._served:
            known = ", ".join(self._served)
            raise ApiError(
                f"the model {name[:100]!r} is not served here; choose from {known}",
                status=404,
                param="model",
                code="model_not_found",
            )
        return self._served[name]


def parse(text: str) -> tuple[str, str]:
    """(name, directory) of --model=NAME=DIR or --model=DIR, whose name is that of the directory. Raises UserError."""
    name, equals, directory = text.partition("=")
    if not equals:
        name, directory = Path(text.removeprefix("hf:")).name, text
    if not name or not directory:
        raise UserError(f"--model={text}: expected NAME=DIR, such as --model=mine=runs/quickstart")
    return name, directory


def load(texts: Sequence[str], options: EngineOptions, memory_limit: float) -> Models:
    """Loads models by their flags. `memory_limit`: GiB of all together; 0 is no limit. Raises UserError."""
    pairs = [parse(text) for text in texts]
    names = [name for name, _ in pairs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"--model: two models are called {twice[0]}; give each a name: --model=NAME=DIR")
    found = [(name, models.find(directory)) for name, directory in pairs]  # all before one is read
    served, taken = [], 0
    for name, location in found:
        model = Served(name, location.load(), options)
        taken += memory(model, options)
        if memory_limit and taken > memory_limit * GIB:
            raise UserError(
                f"--memory_limit={memory_limit:g}: the models up to {name} need {taken / GIB:.2f} GiB for weights and "
                "caches; raise it, or serve fewer models, --slots or a smaller --context_length"
            )
        served.append(model)
    return Models(served)


def memory(model: Served, options: EngineOptions) -> int:
    """Bytes of the parameters and of the state of the engine."""
    state = jax.eval_shape(
        lambda: decoding.new_state(
            architectures=(model.model.architecture,), slots=model.engine.load[2], capacity=model.context_length
        )
    )
    leaves = [*jax.tree.leaves(model.model.params), *jax.tree.leaves(state)]
    return sum(math.prod(leaf.shape) * _itemsize(leaf.dtype) for leaf in leaves)


def _itemsize(dtype: Any) -> int:
    return 8 if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key) else dtype.itemsize
