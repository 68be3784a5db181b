"""POST /v1/completions, with echo and log-probabilities, which lm-eval needs for scoring."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from gptjax.generation.events import Event, TopTokens
from gptjax.server import generating, schemas
from gptjax.server.context import context_of
from gptjax.server.errors import JSON, ApiError
from gptjax.server.generating import Running, Settings, finite, with_chosen
from gptjax.server.served import Served
from gptjax.server.streams import Frame, frame


async def completions(request: Request) -> Response:
    context = context_of(request)
    body = schemas.read(schemas.Completion, await context.body(request))
    model = context.models.find(body.model)
    prompts, wanted = await asyncio.to_thread(_prepare, model, body)
    answer = Answer(model, body, prompts)
    texts = [body.prompt] if isinstance(body.prompt, str) else [one for one in body.prompt if isinstance(one, str)]
    running = Running(model, prompts, wanted, context.limits, texts)
    if body.stream:
        return context.stream(answer.frames(running), running)
    return JSON(answer.whole(await context.collect(request, running), running))


def _prepare(model: Served, body: schemas.Completion) -> tuple[list[np.ndarray], Settings]:
    """The prompts and the settings. Raises ApiError, UserError."""
    if body.suffix:
        raise ApiError("suffix: these models cannot insert text before a suffix", param="suffix")
    if body.best_of not in (None, body.n or 1):
        raise ApiError("best_of: all answers are returned; leave it out, or set n to the same value", param="best_of")
    scored = bool(body.echo) and body.logprobs is not None
    prompts = encode(model, body.prompt, "prompt")
    for prompt in prompts:
        model.check_length(prompt, "prompt", scored=scored)
    options = {"max_tokens": body.max_tokens, "top": body.logprobs or 0, "score_prompt": scored}
    return prompts, generating.settings(model, body, **options)


def encode(model: Served, prompt: str | list, param: str) -> list[np.ndarray]:
    """The tokens of a text, a list of texts, a list of ids, or a list of such lists. Raises ApiError."""
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        prompt = [prompt]
    encoded = [model.encode(one) if isinstance(one, str) else np.array(one, np.int32) for one in prompt]
    if not encoded or not all(map(len, encoded)):
        raise ApiError(f"{param} is empty", param=param)
    return encoded


class Answer:
    """The completions of some prompts: choice i x n + j is answer j to prompt i."""

    def __init__(self, model: Served, body: schemas.Completion, prompts: Sequence[np.ndarray]):
        self._model, self._body, self._prompts = model, body, prompts
        self._id, self._created = f"cmpl-{uuid.uuid4().hex}", int(time.time())

    def whole(self, events: Sequence[Sequence[Event]], running: Running) -> dict[str, Any]:
        choices = []
        for place, own in enumerate(events):
            choice = Choice(self._model, self._body, self._prompts[place // running.wanted.n], place)
            choices.append(choice.part(own))
        return self._envelope(choices) | {"usage": running.usage()}

    async def frames(self, running: Running) -> AsyncIterator[str]:
        include_usage = bool(self._body.stream_options and self._body.stream_options.include_usage)

        def chunk(choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> str:
            return frame(self._envelope(choices) | ({"usage": usage} if include_usage else {}))

        n = running.wanted.n
        parts = [Choice(self._model, self._body, self._prompts[i // n], i) for i in range(len(running.streams))]
        async for place, event in running.events():
            part = parts[place].part([event])
            if part["text"] or part["finish_reason"] or part["logprobs"]:
                yield chunk([part])
        if include_usage:
            yield chunk([], running.usage())

    def _envelope(self, choices: list[dict[str, Any]]) -> Frame:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._model.name,
            "choices": choices,
            "system_fingerprint": None,
        }


class Choice:
    """One completion, in one part or several."""

    def __init__(self, model: Served, body: schemas.Completion, prompt: np.ndarray, index: int):
        self._model, self._body, self._index = model, body, index
        self._prompt: list[int] | None = prompt.tolist() if body.echo else None  # until the first part was sent
        self._offset = 0

    def part(self, events: Sequence[Event]) -> dict[str, Any]:
        """The part for the next events; the first part starts with the prompt if echo is set."""
        text = "".join(event.text for event in events)
        rows: list[tuple[int, float | None, TopTokens]] = []
        if self._prompt is not None:
            text = self._model.tokenizer.decode(self._prompt) + text
            rows += self._prompt_rows(events[0])
            self._prompt = None
        for event in events:
            tops = event.top or ((),) * len(event.tokens)
            rows += zip(event.tokens, event.log_probabilities, tops, strict=True)
        return {
            "index": self._index,
            "text": text,
            "logprobs": self._logprobs(rows) if self._body.logprobs is not None else None,
            "finish_reason": events[-1].finish_reason,
        }

    def _prompt_rows(self, first: Event) -> list[tuple[int, float | None, TopTokens]]:
        """(token, log-probability, most probable tokens) of the prompt; the first token has no log-probability."""
        scores = first.prompt_scores
        if scores is None or self._prompt is None:
            return []
        tops = scores.top or ((),) * len(scores.log_probabilities)
        values = zip(self._prompt[1:], scores.log_probabilities, tops, strict=True)
        return [(self._prompt[0], None, ()), *values]

    def _logprobs(self, rows: Sequence[tuple[int, float | None, TopTokens]]) -> dict[str, Any] | None:
        tokens, values, tops, offsets = [], [], [], []
        for token, value, top in rows:
            tokens.append(self._model.token_text(token))
            values.append(None if value is None else finite(value))
            told = None
            if value is not None:
                best = with_chosen(top, token, value, self._body.logprobs or 0)
                told = {self._model.token_text(other): finite(number) for other, number in best}
            tops.append(told)
            offsets.append(self._offset)
            self._offset += len(tokens[-1])
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}
