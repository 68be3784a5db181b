"""How all tasks treat a text that is too long for the model."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int32

from gptjax.errors import UserError

TooLong = Literal["cut", "skip", "fail"]

Tokens = Int32[np.ndarray, "_"]


class Fitted(NamedTuple):
    """Prompts that fit.

    Attributes:
      places: indices of the kept prompts in the input.
      note: what was done, for signatures.
    """

    prompts: list[Tokens]
    places: list[int]
    note: str


def fit(
    prompts: Sequence[Tokens], context_length: int, new_tokens: int, too_long: TooLong, begin: Sequence[int] = ()
) -> Fitted:
    """Prompts that leave room for an answer: one that does not fit in the context is cut on the left, or left out.

    A prompt that is cut keeps `begin` and leaves room for the new tokens, at most half of the context. Raises UserError
    where nothing is left, or where too_long is "fail".
    """
    long = [place for place, prompt in enumerate(prompts) if len(prompt) > context_length]
    if long and too_long == "fail":
        raise UserError(
            f"prompt {long[0]} has {len(prompts[long[0]])} tokens, more than the model's context_length "
            f"{context_length} ({len(long)} of {len(prompts)} are too long); --too_long=cut cuts their beginnings "
            "off, --too_long=skip leaves them out"
        )
    if too_long == "skip":
        kept = [place for place in range(len(prompts)) if place not in set(long)]
        if not kept:
            raise UserError(f"no prompt fits in context_length {context_length}; --too_long=cut cuts their beginnings")
        return Fitted([prompts[place] for place in kept], kept, f"too-long-skipped:{len(long)}/{len(prompts)}")
    room = context_length - min(new_tokens, context_length // 2)
    first = np.array(begin, np.int32)[: room - 1]
    fitted = list(prompts)
    for place in long:
        tail = prompts[place][-(room - len(first)) :]
        fitted[place] = np.concatenate([first, tail]).astype(np.int32)
    return Fitted(fitted, list(range(len(prompts))), f"left-truncated:{len(long)}/{len(prompts)}")
