"""One prompt in an engine: how far it is read, what was generated, and its events."""

import dataclasses
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int

from gptjax.data.tokenization.tokenizer import Tokenizer
from gptjax.generation import sampling
from gptjax.generation.detokenizer import Detokenizer
from gptjax.generation.events import Event, PromptScores, TopTokens
from gptjax.generation.params import SamplingParams


@runtime_checkable
class Constraint(Protocol):
    """Follows a text token by token and says which tokens may come next (`gptjax.generation.constraints`)."""

    def allowed(self, vocab: int) -> Bool[np.ndarray, " vocab"]:
        """Which tokens may come next."""

    def advance(self, token: int) -> None:
        """Takes the next token."""


@dataclasses.dataclass(eq=False)
class Request:
    """A prompt and the tokens generated for it.

    Attributes:
      top: how many of the most probable tokens are returned with each token.
      scored: whether the log-probabilities of the prompt are returned.
      read: tokens of the prompt that are in the cache.
      cached: tokens of the prompt that were in the cache of the slot already.
      remaining: tokens that may still be generated; 0 when the text has ended.
    """

    handle: int
    index: int
    prompt: np.ndarray
    params: SamplingParams
    end_ids: tuple[int, ...]
    tokenizer: Tokenizer
    limit: dataclasses.InitVar[int]
    top: int = 0
    scored: bool = False
    constraint: Constraint | None = None

    def __post_init__(self, limit: int):
        # After a prompt that fills the context, one token can be sampled, but no more.
        room = max(limit - len(self.prompt), int(self.scored))
        self.remaining = min(self.params.max_new_tokens, room)
        self.length = min(len(self.prompt) + self.remaining, limit)
        self.read = self.cached = 0
        self._scores: list[sampling.Drawn] = []
        self._told = False
        self._detokenizer = Detokenizer(self.tokenizer, self.prompt, self.params.stop)

    @property
    def writing(self) -> bool:
        """Whether the whole prompt has been read."""
        return self.read == len(self.prompt)

    def targets(self, start: int, length: int) -> Int[np.ndarray, " length"]:
        """prompt[start + 1 : start + 1 + length], filled up with 0."""
        targets = np.zeros(length, np.int32)
        following = self.prompt[start + 1 : start + 1 + length]
        targets[: len(following)] = following
        return targets

    def score(self, scores: sampling.Drawn) -> None:
        """Adds the log-probabilities after a chunk of the prompt: arrays [length, ...] of `targets`."""
        self._scores.append(scores)

    def extend(self, drawn: sampling.Drawn) -> Event:
        """Adds generated tokens, arrays [count, ...]; tokens after a stop text are dropped."""
        before = len(self._detokenizer.tokens)
        text = self._detokenizer.push(drawn.tokens)
        kept = self._detokenizer.tokens[before:]
        self.remaining -= len(kept)
        stop = self._detokenizer.stop
        ended = stop is not None or kept[-1] in self.end_ids
        if ended:
            self.remaining = 0
        if self.constraint and self.remaining:
            for token in kept:
                self.constraint.advance(token)
        if not self.remaining:
            text += self._detokenizer.finish(cut=not ended)
        first, self._told = not self._told, True
        return Event(
            self.handle,
            text,
            tuple(kept),
            tuple(drawn.log_probabilities[: len(kept)].tolist()),
            None if self.remaining else "stop" if ended else "length",
            stop,
            top=self._top(drawn, len(kept)) if self.top else (),
            cached_tokens=self.cached if first else 0,
            prompt_scores=self._prompt_scores() if first and self.scored else None,
        )

    def _top(self, drawn: sampling.Drawn, count: int) -> tuple[TopTokens, ...]:
        # The vocabulary's padding has the score -1e30.
        rows = zip(drawn.top_ids[:count, : self.top], drawn.top_values[:count, : self.top], strict=True)
        return tuple(
            tuple((token, value) for token, value in zip(ids.tolist(), values.tolist(), strict=True) if value > -1e29)
            for ids, values in rows
        )

    def _prompt_scores(self) -> PromptScores:
        """Scores of prompt[1:]; the first token has none."""
        count = len(self.prompt) - 1
        together = sampling.Drawn(*(np.concatenate(parts)[:count] for parts in zip(*self._scores, strict=True)))
        values: Float[np.ndarray, " tokens"] = together.log_probabilities
        return PromptScores(tuple(values.tolist()), self._top(together, count) if self.top else ())
