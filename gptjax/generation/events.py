"""The results of a request: events while it is served, which together are a completion."""

import dataclasses
from collections.abc import Sequence

import numpy as np

TopTokens = tuple[tuple[int, float], ...]  # (token id, log-probability), the most probable first


@dataclasses.dataclass(frozen=True)
class PromptScores:
    """Log-probabilities of the tokens of a prompt from the second on, in nats.

    Attributes:
      top: the most probable tokens at the position of each; empty if they were not requested.
    """

    log_probabilities: tuple[float, ...]
    top: tuple[TopTokens, ...] = ()


@dataclasses.dataclass(frozen=True)
class Event:
    """New results of one request.

    Attributes:
      handle: what `submit` returned.
      text: new text that is final. It never ends in half a character or in the beginning of a stop text.
      tokens: new tokens; the last event includes the token that ends the text, or the tokens of the stop text.
      log_probabilities: of these tokens, in nats, under the model's own distribution: temperature 1, no token
        removed or penalised.
      finish_reason: None before the last event; "stop" at the end of the text or turn or at a stop text, "length" at
        max_new_tokens or where the context is full, "cancelled", or "error".
      stop: the stop text that was found, or None.
      error: the exception that was raised while the request was in a slot, if the reason is "error".
      top: the most probable tokens at the position of each token, if they were requested.
      cached_tokens: in the first event, tokens of the prompt that did not have to be read.
      prompt_scores: in the first event, if they were requested.
    """

    handle: int
    text: str
    tokens: tuple[int, ...]
    log_probabilities: tuple[float, ...]
    finish_reason: str | None = None
    stop: str | None = None
    error: BaseException | None = None
    top: tuple[TopTokens, ...] = ()
    cached_tokens: int = 0
    prompt_scores: PromptScores | None = None


@dataclasses.dataclass(frozen=True)
class Completion:
    """All events of one request together, with the attributes of `Event`.

    Attributes:
      tokens: int32 [num_tokens].
      log_probabilities: float32 [num_tokens].
    """

    text: str
    tokens: np.ndarray
    log_probabilities: np.ndarray
    finish_reason: str
    stop: str | None = None

    @classmethod
    def of(cls, events: Sequence[Event]) -> "Completion":
        """The completion of a request that has ended."""
        return cls(
            text="".join(event.text for event in events),
            tokens=np.array([token for event in events for token in event.tokens], np.int32),
            log_probabilities=np.array([value for event in events for value in event.log_probabilities], np.float32),
            finish_reason=events[-1].finish_reason,
            stop=events[-1].stop,
        )
