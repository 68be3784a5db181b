"""Quality filters: each returns the reason why a text should not be in the corpus, or "".

The measures of repetition are those of Gopher (Rae et al. 2021, https://arxiv.org/abs/2112.11446, table A1).
"""

import functools
import re
import unicodedata
from collections import Counter

import numpy as np
from jaxtyping import Int, UInt

from gptjax.data.scripts import UNSPACED
from gptjax.errors import UserError


def length(characters: int, minimum: int, maximum: int) -> str:
    """Rejects fewer than `minimum` or more than `maximum` characters; 0 = no limit."""
    if characters < minimum:
        return f"{characters} characters, fewer than {minimum}"
    if maximum and characters > maximum:
        return f"{characters} characters, more than {maximum}"
    return ""


def symbols(text: str, limit: float) -> str:
    """Rejects if a larger share than `limit` of the visible characters is punctuation or symbols."""
    ratio = symbol_ratio(text)
    return f"{ratio:.2f} of the characters are symbols, more than {limit}" if ratio > limit else ""


def symbol_ratio(text: str) -> float:
    """The characters of the Unicode categories P and S, divided by the characters that are not white space."""
    counts = Counter(text)
    visible = sum(count for character, count in counts.items() if not character.isspace())
    found = sum(count for character, count in counts.items() if unicodedata.category(character)[0] in "PS")
    return found / visible if visible else 0.0


def repeated_lines(text: str, limit: float) -> str:
    """Rejects if a larger share than `limit` of the characters is in lines that occurred before in the text."""
    ratio = repeated_line_ratio(text)
    return f"{ratio:.2f} of the characters are in repeated lines, more than {limit}" if ratio > limit else ""


def repeated_line_ratio(text: str) -> float:
    """The characters of lines that occurred before, divided by those of all lines; ends of lines are stripped."""
    lines = [line.strip() for line in text.split("\n")]
    characters = sum(map(len, lines))
    return 1 - sum(map(len, set(lines))) / characters if characters else 0.0


def repeated_ngrams(text: str, top_limit: float, repeated_limit: float) -> str:
    """Rejects if too many characters are in one n-gram of 2 to 4 words, or in repeated n-grams of 5 to 10 words.

    As in Gopher, limits fall with n: `top_limit` holds for n = 2 and falls by 0.02 per word, `repeated_limit` for
    n = 5 and falls by 0.01.
    """
    ids, lengths, scale = _words(text)
    for n in range(2, 5):
        limit, ratio = top_limit - 0.02 * (n - 2), _top_ngram_ratio(ids, lengths, n * scale)
        if ratio > limit:
            return f"{ratio:.2f} of the characters are one {n}-gram, more than {limit:.2f}"
    for n in range(5, 11):
        limit, ratio = repeated_limit - 0.01 * (n - 5), _repeated_ngram_ratio(ids, lengths, n * scale)
        if ratio > limit:
            return f"{ratio:.2f} of the characters are in repeated {n}-grams, more than {limit:.2f}"
    return ""


def top_ngram_ratio(text: str, n: int) -> float:
    """The characters of all occurrences of the most frequent n-gram, divided by the characters of all words."""
    ids, lengths, scale = _words(text)
    return _top_ngram_ratio(ids, lengths, n * scale)


def repeated_ngram_ratio(text: str, n: int) -> float:
    """The characters in n-grams that occurred before, each counted once, divided by the characters of all words."""
    ids, lengths, scale = _words(text)
    return _repeated_ngram_ratio(ids, lengths, n * scale)


_WORD = re.compile(rf"(?P<unspaced>[{UNSPACED}])|[^\W{UNSPACED}]+")


def _words(text: str) -> tuple[Int[np.ndarray, " words"], Int[np.ndarray, " words"], int]:
    """(numbers of the words, their lengths, how many of them count as one English word).

    A letter of a language without spaces is a word; if most words are such letters, two count as one English word.
    """
    numbers: dict[str, int] = {}
    words, unspaced = [], 0
    for match in _WORD.finditer(text):
        words.append(match[0])
        unspaced += match["unspaced"] is not None
    ids = np.fromiter((numbers.setdefault(word, len(numbers)) for word in words), np.int64, len(words))
    lengths = np.fromiter(map(len, words), np.int64, len(words))
    return ids, lengths, 2 if unspaced > len(words) / 2 else 1


def _ngrams(ids: Int[np.ndarray, " words"], n: int) -> UInt[np.ndarray, " ngrams"]:
    """A number for the n-gram that begins at each word; equal n-grams have equal numbers."""
    count = len(ids) - n + 1
    numbers = np.zeros(count, np.uint64)
    for offset in range(n):  # a polynomial modulo 2^64
        numbers = numbers * np.uint64(0x9E3779B97F4A7C15) + ids[offset : offset + count].astype(np.uint64)
    return numbers


def _top_ngram_ratio(ids: Int[np.ndarray, " words"], lengths: Int[np.ndarray, " words"], n: int) -> float:
    if len(ids) < 2 * n:
        return 0.0
    _, first, counts = np.unique(_ngrams(ids, n), return_index=True, return_counts=True)
    top = counts.argmax()
    if counts[top] == 1:
        return 0.0
    share = counts[top] * lengths[first[top] : first[top] + n].sum() / lengths.sum()
    return min(float(share), 1.0)  # occurrences of "a a" overlap


def _repeated_ngram_ratio(ids: Int[np.ndarray, " words"], lengths: Int[np.ndarray, " words"], n: int) -> float:
    if len(ids) < 2 * n:
        return 0.0
    ngrams = _ngrams(ids, n)
    repeated = np.ones(len(ngrams), bool)
    repeated[np.unique(ngrams, return_index=True)[1]] = False
    begins = np.zeros(len(ids) + 1, np.int64)
    begins[: len(ngrams)] += repeated
    begins[n : n + len(ngrams)] -= repeated
    covered = np.cumsum(begins)[:-1] > 0
    return float(lengths[covered].sum() / lengths.sum())


_SAMPLE_CHARACTERS = 10_000


def language(text: str, languages: tuple[str, ...]) -> str:
    """Rejects if the language of the text is none of `languages` (ISO 639-1, such as "en"); () accepts all.

    py3langid (Lui and Baldwin 2012, langid.py) reads the first 10,000 characters.

    Raises:
      UserError: py3langid is not installed.
    """
    if not languages:
        return ""
    found = detect_language(text)
    return "" if found in languages else f"the language is {found}, not {' or '.join(languages)}"


def detect_language(text: str) -> str:
    """ISO 639-1 code of the language of the first 10,000 characters. Raises UserError without py3langid."""
    return _classifier()(text[:_SAMPLE_CHARACTERS].encode("utf-8", "replace").decode())[0]


@functools.cache
def _classifier():
    try:
        import py3langid
    except ImportError:
        raise UserError(
            "the cleaning step language needs py3langid, which is not installed: pip install 'gptjax[data]'"
        ) from None
    return py3langid.classify
