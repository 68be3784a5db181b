"""Generated tokens to text, without ever showing what a later token may take back."""

from collections.abc import Sequence

import numpy as np

from gptjax.data.tokenization.tokenizer import Tokenizer

HALF_CHARACTER = "\ufffd"  # what decoders put in the place of bytes that are not UTF-8
CONTEXT_TOKENS = 8


class Detokenizer:
    """The text of one completion as its tokens come in, up to the first stop text.

    All tokens so far are decoded each time, together with the end of the prompt: a character may be spread
    over several tokens, and some vocabularies write a word differently at the start of a text.

    Attributes:
      tokens: the tokens kept. What follows the token that completes a stop text is dropped.
      stop: the stop text that was found, or None.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] | np.ndarray = (), stop: Sequence[str] = ()):
        self.tokens: list[int] = []
        self.stop: str | None = None
        self._tokenizer = tokenizer
        self._stops = tuple(stop)
        self._context = [int(token) for token in prompt[-CONTEXT_TOKENS:]]
        self._prefix = tokenizer.decode(self._context)
        self._shown = ""

    @property
    def text(self) -> str:
        """What `push` and `finish` have returned so far."""
        return self._shown

    def push(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Adds tokens; returns the new text that is final. After a stop text, nothing more is taken.

        Held back are an unfinished character and an end that may be the beginning of a stop text.
        """
        if self.stop is not None:
            return ""
        old, self.tokens = self.tokens, [*self.tokens, *map(int, tokens)]
        text = self._decode(self.tokens)
        if not any(stop in text for stop in self._stops):
            text = text.rstrip(HALF_CHARACTER)
            return self._show(text[: len(text) - self._unfinished_stop(text)])
        # One token at a time, so that the result does not depend on how many came at once.
        for count in range(len(old) + 1, len(self.tokens) + 1):
            text = self._decode(self.tokens[:count])
            found = [(text.index(stop), stop) for stop in self._stops if stop in text]
            if found:
                self.tokens = self.tokens[:count]
                end, self.stop = min(found)
                return self._show(text[:end])
        raise AssertionError("a stop text is in the whole but in no part of it")

    def finish(self, *, cut: bool) -> str:
        """The text that was held back. `cut`: the end is arbitrary; half a character there is left out."""
        if self.stop is not None:
            return ""
        text = self._decode(self.tokens)
        return self._show(text.rstrip(HALF_CHARACTER) if cut else text)

    def _decode(self, tokens: Sequence[int]) -> str:
        text = self._tokenizer.decode([*self._context, *tokens])
        if text.startswith(self._prefix):
            return text[len(self._prefix) :]
        # The prompt ended in half a character, which the completion has completed.
        return text[len(self._prefix.rstrip(HALF_CHARACTER)) :]

    def _show(self, text: str) -> str:
        new = text[len(self._shown) :]
        self._shown += new
        return new

    def _unfinished_stop(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop text."""
        lengths = range(min(len(text), max(map(len, self._stops), default=1) - 1), 0, -1)
        return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in self._stops)), 0)
