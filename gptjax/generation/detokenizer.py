"""Generated tokens to text. Text that a later token may still change is never shown."""

from collections.abc import Sequence

import numpy as np

from gptjax.data.tokenization.tokenizer import Tokenizer

HALF_CHARACTER = "\ufffd"  # decoders replace bytes that are not UTF-8 by it
CONTEXT_TOKENS = 8
MAX_OPEN_TOKENS = 4 * CONTEXT_TOKENS


class Detokenizer:
    """The text of one completion while its tokens arrive, up to the first stop text.

    Each time, the last few tokens are decoded together with some tokens before them, because a character may be spread
    over several tokens, and some vocabularies write a word differently at the start of a text.

    Attributes:
      tokens: the tokens that are kept. Those after the token that completes a stop text are dropped.
      stop: the stop text that was found, or None.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] | np.ndarray = (), stop: Sequence[str] = ()):
        self.tokens: list[int] = []
        self.stop: str | None = None
        self._tokenizer = tokenizer
        self._stops = tuple(stop)
        self._invisible = frozenset(tokenizer.special_tokens.values())
        self._context, self._prefix = self._end_of([int(token) for token in prompt[-CONTEXT_TOKENS:]])
        self._open: list[int] = []  # tokens after the context; decoded again at each push
        self._held = ""  # text before the open tokens that is not shown yet
        self._shown = 0  # characters of the held and the open text that are shown

    def push(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Adds tokens; returns the new text that is final. Tokens after a stop text are ignored.

        The end of the text is held back if it is half a character or may be the beginning of a stop text.
        """
        if self.stop is not None:
            return ""
        tokens = [int(token) for token in tokens]
        new = [token for token in tokens if token not in self._invisible]
        open_text = self._decode([*self._open, *new])
        text = self._held + open_text
        found = [(text.index(stop, self._shown), stop) for stop in self._stops if stop in text[self._shown :]]
        if found and len(tokens) > 1:  # one by one: the same result as from single pushes
            return "".join(self.push([token]) for token in tokens)
        self.tokens += tokens
        self._open += new
        if found:
            end, self.stop = min(found)
            return self._show(text[:end])
        final = text.rstrip(HALF_CHARACTER)
        piece = self._show(final[: len(final) - self._unfinished_stop(final)])
        self._settle(open_text)
        return piece

    def finish(self, *, cut: bool) -> str:
        """The text that was held back; with `cut`, without half a character at its end."""
        if self.stop is not None:
            return ""
        text = self._held + self._decode(self._open)
        return self._show(text.rstrip(HALF_CHARACTER) if cut else text)

    def _show(self, text: str) -> str:
        new = text[self._shown :]
        self._shown += len(new)
        return new

    def _settle(self, text: str) -> None:
        """Closes the open tokens once later ones cannot change their `text`, so that they are not decoded again."""
        counts: Sequence[int] = ()
        if len(self._open) >= CONTEXT_TOKENS and not text.endswith(HALF_CHARACTER):
            counts = (len(self._open),)
        elif len(self._open) >= MAX_OPEN_TOKENS:  # the bytes are no text, since a character has at most four
            last = len(self._open) - CONTEXT_TOKENS
            counts = range(last, last - 4, -1)
        for count in counts:
            settled = self._decode(self._open[:count])
            if text.startswith(settled):
                before = self._held + settled
                self._held, self._shown = before[self._shown :], max(self._shown - len(before), 0)
                self._context, self._prefix = self._end_of([*self._context, *self._open[:count]])
                self._open = self._open[count:]
                return

    def _end_of(self, tokens: list[int]) -> tuple[list[int], str]:
        """The last few tokens and their text. They begin with a whole character if possible, since some decoders do
        not decode bytes after half a character."""
        ends = (tokens[-count:] for count in range(CONTEXT_TOKENS, CONTEXT_TOKENS - 4, -1))
        texts = [(end, self._tokenizer.decode(end)) for end in ends]
        return next((pair for pair in texts if not pair[1].startswith(HALF_CHARACTER)), texts[0])

    def _decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens after the context."""
        text = self._tokenizer.decode([*self._context, *tokens])
        if text.startswith(self._prefix):
            return text[len(self._prefix) :]
        # The prompt ended in half a character, and the completion has the other half.
        return text[len(self._prefix.rstrip(HALF_CHARACTER)) :]

    def _unfinished_stop(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop text begins."""
        lengths = range(min(len(text), max(map(len, self._stops), default=1) - 1), 0, -1)
        return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in self._stops)), 0)
