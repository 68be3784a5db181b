"""Texts that must match a JSON schema or a regular expression, by llguidance (pip install 'gptjax[serve]').

After each token, the library gives the tokens that may come next; all others are removed before one is sampled. A text
ends where the grammar ends.
"""

import functools
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool

from gptjax.data.tokenization.tokenizer import Tokenizer
from gptjax.errors import UserError

_SPACES = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammar:
    """A grammar that texts must match; `start` follows one text."""

    def __init__(self, tokenizer: Tokenizer, grammar: str):
        """`grammar` is llguidance's own description. Raises UserError for one that it refuses."""
        self._tokenizer, self._grammar = tokenizer, grammar
        self.start()

    @classmethod
    def of_schema(cls, tokenizer: Tokenizer, schema: Mapping[str, Any] | bool) -> "Grammar":
        """JSON values that match a schema. Raises UserError for an invalid or unsupported schema.

        White space is that of `json.dumps`: if more were allowed, a weak model could write nothing else.
        """
        text = json.dumps(schema)
        return cls(tokenizer, _written(lambda matcher: matcher.grammar_from_json_schema(text, overrides=_SPACES)))

    @classmethod
    def of_regex(cls, tokenizer: Tokenizer, pattern: str) -> "Grammar":
        """Texts that a regular expression matches as a whole. Raises UserError for an invalid expression."""
        return cls(tokenizer, _written(lambda matcher: matcher.grammar_from_regex(pattern)))

    def start(self) -> "Follower":
        """The state before the first token of a text."""
        import llguidance

        matcher = llguidance.LLMatcher(_library_tokenizer(self._tokenizer), self._grammar, log_level=0)
        if error := matcher.get_error():
            raise UserError(f"the grammar of the answer is refused: {_short(error)}")
        return Follower(matcher, self._tokenizer)


class Follower:
    """Follows one text through a grammar."""

    def __init__(self, matcher: Any, tokenizer: Tokenizer):
        self._matcher, self._size, self._end_id = matcher, tokenizer.vocab_size, tokenizer.eot_id

    def allowed(self, vocab: int) -> Bool[np.ndarray, " vocab"]:
        """Which tokens may come next; only the end-of-text token where the grammar ends."""
        import llguidance.numpy

        allowed = np.zeros(vocab, bool)
        if self._matcher.is_stopped():
            allowed[self._end_id] = True
            return allowed
        mask = llguidance.numpy.allocate_token_bitmask(1, self._size)
        llguidance.numpy.fill_next_token_bitmask(self._matcher, mask, 0)
        bits = np.unpackbits(mask.view(np.uint8), bitorder="little")[: self._size]
        allowed[: self._size] = bits
        if not allowed.any():
            raise RuntimeError(f"no token can follow in the grammar of the answer: {_short(self._matcher.get_error())}")
        return allowed

    def advance(self, token: int) -> None:
        """Takes the next token."""
        self._matcher.consume_token(token)


def _written(write: Any) -> str:
    try:
        import llguidance
    except ModuleNotFoundError:
        raise UserError("an answer in a given form needs llguidance: pip install 'gptjax[serve]'") from None
    try:
        return write(llguidance.LLMatcher)
    except ValueError as error:
        raise UserError(f"the grammar of the answer is refused: {_short(str(error))}") from None


@functools.lru_cache(maxsize=8)
def _library_tokenizer(tokenizer: Tokenizer) -> Any:
    """The vocabulary for the library. A kind of tokenizer that it does not know is given token by token."""
    import llguidance

    try:
        return llguidance.LLTokenizer(tokenizer.to_str(), n_vocab=tokenizer.vocab_size, eos_token=tokenizer.eot_id)
    except ValueError:
        return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Vocabulary(tokenizer)))


class _Vocabulary:
    """The attributes of a tokenizer that llguidance reads."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        special = set(tokenizer.special_tokens.values())
        self.special_token_ids = sorted(special)
        self.bos_token_id, self.eos_token_id = None, tokenizer.eot_id
        self.tokens = [
            b"" if token in special else tokenizer.decode([token]).encode() for token in range(tokenizer.vocab_size)
        ]

    def __call__(self, text: str | bytes) -> list[int]:
        text = text.decode(errors="replace") if isinstance(text, bytes) else text
        try:
            return self._tokenizer.encode(text).tolist()
        except UserError:  # a character that the vocabulary lacks
            return []


def _short(error: str) -> str:
    return " ".join(error.split())[:300]
