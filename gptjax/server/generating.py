"""From the settings of a request to engine streams, and from their events to the answer."""

import asyncio
import contextlib
import dataclasses
import logging
import math
import secrets
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np

from gptjax.errors import UserError
from gptjax.generation.constraints import Grammar
from gptjax.generation.events import Event, TopTokens
from gptjax.generation.params import SamplingParams
from gptjax.generation.pump import Pump, Stream
from gptjax.server.errors import ApiError
from gptjax.server.limits import Limits
from gptjax.server.schemas import ResponseFormat, Sampling
from gptjax.server.served import Served

log = logging.getLogger("gptjax.server")

WORST = -9999.0  # OpenAI's log-probability for impossible tokens; JSON has no infinity


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the engine needs besides the prompt."""

    params: SamplingParams
    n: int = 1
    top: int = 0
    score_prompt: bool = False
    grammar: Grammar | None = None


def settings(
    model: Served,
    body: Sampling,
    *,
    max_tokens: int | None,
    top: int = 0,
    score_prompt: bool = False,
) -> Settings:
    """The settings of a request. Missing ones are the model's published values, else OpenAI's defaults.

    A request without a seed gets a random one. `max_tokens` None: all that the context leaves.

    Raises:
      ApiError, UserError: a value is out of range.
    """
    given: dict[str, Any] = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": None if body.top_k is None else max(body.top_k, 0),  # -1 is vLLM's "all"
        "min_p": body.min_p,
        "repetition_penalty": body.repetition_penalty,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "ignore_eos": body.ignore_eos,
        "logit_bias": None if body.logit_bias is None else _biases(body.logit_bias),
        "stop": (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        "seed": secrets.randbits(32) if body.seed is None else body.seed % 2**32,
    }
    given = {name: value for name, value in given.items() if value is not None}
    most = min(max_tokens or model.context_length, model.context_length)
    if len(given["stop"]) > 64:
        raise ApiError(f"stop has {len(given['stop'])} texts; at most 64 are allowed", param="stop")
    params = SamplingParams(**{**model.published, **given, "max_new_tokens": most})
    try:
        params.validate()
    except UserError as error:
        name = str(error).split(" ", 1)[0]
        raise ApiError(str(error), param=name, code="invalid_value") from None
    return Settings(params, body.n or 1, top, score_prompt, grammar(model, body))


def _biases(biases: dict[str, float]) -> tuple[tuple[int, float], ...]:
    if wrong := [key for key in biases if not (key.isascii() and key.isdecimal() and len(key) < 10)]:
        raise ApiError(f"logit_bias has the key {wrong[0][:60]!r}; keys are token ids", param="logit_bias")
    return tuple((int(key), value) for key, value in biases.items())


def grammar(model: Served, body: Sampling) -> Grammar | None:
    """The grammar of the answer, if one is asked for."""
    if body.guided_regex is not None:
        return Grammar.of_regex(model.tokenizer, body.guided_regex)
    if body.guided_json is not None:
        return Grammar.of_schema(model.tokenizer, body.guided_json)
    return grammar_of_format(model, body.response_format, "response_format")


def grammar_of_format(model: Served, wanted: ResponseFormat | None, param: str) -> Grammar | None:
    """The grammar of {"type": "text" | "json_object" | "json_schema", ...}. Raises ApiError."""
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return Grammar.of_schema(model.tokenizer, {"type": "object"})
    schema = (wanted.json_schema or {}).get("schema")
    if wanted.type != "json_schema" or not isinstance(schema, dict | bool):
        raise ApiError(
            f"{param}.type is {wanted.type[:60]!r}; choose text, json_object, or json_schema with "
            '"json_schema": {"schema": {...}}',
            param=param,
        )
    try:
        return Grammar.of_schema(model.tokenizer, schema)
    except UserError as error:
        raise ApiError(str(error), param=param, code="invalid_json_schema") from None


class Running:
    """The streams of one request: `n` for each prompt, in this order. Leaving the context cancels unfinished ones."""

    def __init__(
        self,
        model: Served,
        prompts: Sequence[np.ndarray],
        wanted: Settings,
        limits: Limits,
        texts: Sequence[str] = (),
    ):
        """`texts`: the prompts that came as text.

        Raises what `Pump.submit` raises; the streams submitted until then are cancelled.
        """
        most = min(limits.prompts, model.max_waiting)  # more would always meet a full queue
        if len(prompts) * wanted.n > most:
            raise ApiError(
                f"{len(prompts)} prompts with {wanted.n} answers each are too many; at most {most} answers fit in "
                "one request",
                param="n",
            )
        if limits.log_prompts:
            log.info("prompts of %s: %s", model.name, [model.tokenizer.decode(prompt) for prompt in prompts])
        unknown = model.tokenizer.unknown_id
        if unknown is not None and (count := sum(np.count_nonzero(prompt == unknown) for prompt in prompts)):
            which = model.tokenizer.lacking(texts) if limits.log_prompts else ""  # nobody's words without that
            told = f"the vocabulary lacks {count} pieces of a prompt, which --log_prompts names: the model reads"
            log.warning("%s: %s", model.name, which or f"{told} {model.tokenizer.unknown_token} there")
        self.model, self.prompts, self.wanted = model, prompts, wanted
        self.streams: list[Stream] = []
        try:
            with model.pumping() as pump:
                for prompt in prompts:
                    for index in range(wanted.n):
                        self.streams.append(self._submit(pump, prompt, index, limits))
        except BaseException:
            self.cancel()
            raise

    def _submit(self, pump: Pump, prompt: np.ndarray, index: int, limits: Limits) -> Stream:
        return pump.submit(
            prompt,
            self.wanted.params,
            seconds=limits.seconds,
            index=index,
            end_ids=self.model.end_ids,
            top=self.wanted.top,
            score_prompt=self.wanted.score_prompt,
            constraint=self.wanted.grammar and self.wanted.grammar.start(),
        )

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def cancel(self) -> None:
        for stream in self.streams:
            stream.cancel()

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """(index of the stream, event) as they arrive, until all streams have ended. Raises ApiError if one fails."""
        queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

        async def read(place: int, stream: Stream) -> None:
            async for event in stream:
                queue.put_nowait((place, event))

        tasks = [asyncio.ensure_future(read(place, stream)) for place, stream in enumerate(self.streams)]
        try:
            left = len(tasks)
            while left:
                place, event = await queue.get()
                check(event, self.streams[place])
                yield place, event
                left -= event.finish_reason is not None
        finally:
            for task in tasks:
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(*tasks, return_exceptions=True)

    async def collect(self) -> list[list[Event]]:
        """All events of each stream."""
        events: list[list[Event]] = [[] for _ in self.streams]
        async for place, event in self.events():
            events[place].append(event)
        return events

    def usage(self) -> dict[str, Any]:
        """Token counts so far, in OpenAI's fields. A prompt with several answers counts once."""
        prompt = sum(map(len, self.prompts))
        written = sum(stream.completion_tokens for stream in self.streams)
        cached = sum(stream.cached_tokens for stream in self.streams[:: self.wanted.n])
        return {
            "prompt_tokens": prompt,
            "completion_tokens": written,
            "total_tokens": prompt + written,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {"reasoning_tokens": 0},
        }


def check(event: Event, stream: Stream) -> None:
    """Raises ApiError if a request did not end normally."""
    if event.finish_reason == "error":
        assert event.error is not None
        raise event.error
    if event.finish_reason != "cancelled":
        return
    if stream.expired:
        raise ApiError("the answer took too long; ask for less", status=408, code="request_timeout")
    raise ApiError("the server is shutting down", status=503, kind="server_error", code="shutting_down")


def finite(value: float) -> float:
    """A log-probability that JSON can represent."""
    return max(value, WORST) if math.isfinite(value) else WORST


def with_chosen(top: TopTokens, token: int, value: float, count: int) -> list[tuple[int, float]]:
    """The `count` most probable tokens, plus the chosen one if it is not among them."""
    best = list(top[:count])
    return best if token in dict(best) else [*best, (token, value)]
