"""Hashes of the n-grams of a text: the words of alphabetic scripts, the characters of Han and kana."""

import functools
import re
from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Int64, UInt8, UInt64

from gptjax.data.scripts import UNSPACED

_MULTIPLIER = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
_INVERSE = pow(_MULTIPLIER, -1, 1 << 64)
_GRAM_MULTIPLIER = np.uint64(0xD6E8FEB86659FD93)
_ONE, _HALF = np.uint64(1), np.uint64(33)
_MIX_1, _MIX_2 = np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)
_MIN_POWERS = 1 << 16

_IN_WORD, _ALONE = 1, 2  # 0 is between words


def word_hashes(
    text: str,
) -> tuple[UInt64[np.ndarray, " words"], Int64[np.ndarray, " words"], Int64[np.ndarray, " words"]]:
    """(hash, start, end) of each word of a lower-case text; start and end count characters.

    A word is a run of letters and digits, or one character of a script without spaces. Case, punctuation and
    white space have no influence if `text` is lower-case. About 60 MB/s on one core.
    """
    codepoints = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    classes = _character_classes()[codepoints]
    in_word = np.zeros(len(classes) + 2, np.bool_)
    np.equal(classes, _IN_WORD, out=in_word[1:-1])
    alone = classes == _ALONE
    starts = np.flatnonzero(alone | (in_word[1:-1] > in_word[:-2]))
    ends = np.flatnonzero(alone | (in_word[1:-1] > in_word[2:])) + 1
    # The polynomial hash of every word at once, from one running sum of the whole text (Karp and Rabin 1987).
    powers, inverses = _powers(max(_MIN_POWERS, 1 << len(codepoints).bit_length()))
    sums = np.zeros(len(codepoints) + 1, np.uint64)
    np.cumsum((codepoints + _ONE) * powers[: len(codepoints)], out=sums[1:])
    return mix((sums[ends] - sums[starts]) * inverses[starts]), starts, ends


def ngram_hashes(words: UInt64[np.ndarray, " words"], n: int) -> UInt64[np.ndarray, " ngrams"]:
    """The hash of each run of `n` words, or of the whole text if it has fewer; empty if it has no word."""
    n = min(n, len(words))
    return next(hashes for _, hashes in ngram_hashes_of_sizes(words, [n])) if n else words


def ngram_hashes_of_sizes(
    words: UInt64[np.ndarray, " words"], sizes: Iterable[int]
) -> Iterator[tuple[int, UInt64[np.ndarray, " ngrams"]]]:
    """(n, hash of each run of n words) for each of the increasing `sizes`, up to the number of words."""
    hashes, done = np.zeros(len(words) + 1, np.uint64), 0
    for n in sizes:
        if n > len(words):
            return
        for i in range(done, n):
            hashes = hashes[:-1] * _GRAM_MULTIPLIER
            hashes += words[i:]
        done = n
        yield n, mix(hashes)


def mix(hashes: UInt64[np.ndarray, " *shape"]) -> UInt64[np.ndarray, " *shape"]:
    """A bijection after which every bit depends on every bit: the 64-bit finalizer of MurmurHash3."""
    hashes = (hashes ^ (hashes >> _HALF)) * _MIX_1
    hashes = (hashes ^ (hashes >> _HALF)) * _MIX_2
    return hashes ^ (hashes >> _HALF)


@functools.cache
def _character_classes() -> UInt8[np.ndarray, " codepoints"]:
    """For each code point: 0 between words, _IN_WORD as a part of a word, _ALONE as a word by itself."""
    classes = np.zeros(0x110000, np.uint8)
    everything = "".join(map(chr, range(0x110000)))
    for pattern, name in ((re.compile(r"[^\W_]+"), _IN_WORD), (re.compile(f"[{UNSPACED}]+"), _ALONE)):
        for match in pattern.finditer(everything):
            classes[match.start() : match.end()] = name
    return classes


@functools.lru_cache(maxsize=2)
def _powers(count: int) -> tuple[UInt64[np.ndarray, " count"], UInt64[np.ndarray, " count"]]:
    def powers_of(base: int) -> np.ndarray:
        factors = np.full(count, base, np.uint64)
        factors[0] = 1
        return np.cumprod(factors)

    return powers_of(_MULTIPLIER), powers_of(_INVERSE)
