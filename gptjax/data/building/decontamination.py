"""Documents with a piece of an evaluation set, found by n-gram overlap (Brown et al. 2020, appendix C)."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64, UInt64

from gptjax.data.building.ngrams import ngram_hashes, ngram_hashes_of_sizes, word_hashes
from gptjax.data.sources.records import Damaged, read_records
from gptjax.errors import UserError

MIN_WORDS = 8
_PROMPT_FIELDS = ("query", "question", "prompt", "instruction", "goal", "context")
_EXCERPT_CHARACTERS = 160
_FILTER_FACTOR = 16  # places in the filter for each n-gram


class Contamination(NamedTuple):
    """A piece that a document shares with an evaluation set.

    Attributes:
      file: path of the evaluation file.
      line: its line, from 1.
      ngrams: n-grams of the document that occur in any evaluation text.
      excerpt: the first such piece of the document, lower-case.
    """

    file: str
    line: int
    ngrams: int
    excerpt: str


class Decontaminator:
    """The n-grams of evaluation texts, to be looked up in documents. Pickles; about 40 bytes for each n-gram.

    A word is a run of letters and digits, or one Han character. A text of `MIN_WORDS` to `ngram` - 1 words
    counts as a whole; a shorter one is too common to prove anything.
    """

    def __init__(self, texts: Sequence[tuple[str, int, str]], ngram: int = 13):
        """`texts` are (file, line, text); if an n-gram is in several, the first is reported."""
        if ngram < MIN_WORDS:
            raise UserError(f"decontamination of {ngram}-grams: fewer than {MIN_WORDS} words prove nothing; take 13")
        self.ngram = ngram
        self._places = [(file, line) for file, line, _ in texts]
        hashes: dict[int, list[np.ndarray]] = {}
        numbers: dict[int, list[np.ndarray]] = {}
        for number, (_, _, text) in enumerate(texts):
            words = word_hashes(text.lower())[0]
            size = min(len(words), ngram)
            if size >= MIN_WORDS:
                hashes.setdefault(size, []).append(ngram_hashes(words, size))
                numbers.setdefault(size, []).append(np.full(len(hashes[size][-1]), number))
        self._tables = {
            size: _Table(np.concatenate(hashes[size]), np.concatenate(numbers[size])) for size in sorted(hashes)
        }

    @classmethod
    def from_files(cls, paths: Sequence[str | Path], ngram: int = 13) -> "Decontaminator":
        """Reads evaluation items from JSONL, JSON or CSV files, plain or compressed.

        Every string in an item counts, in lists and objects too, and so does the question followed by each of
        the others, so that a short question is found with its answer.

        Raises:
          UserError: a file cannot be read, an item is not JSON, or no text is long enough.
        """
        texts = [
            (str(path), line, text) for path in paths for line, item in _items(Path(path)) for text in _texts_of(item)
        ]
        decontaminator = cls(texts, ngram)
        if paths and not decontaminator._tables:
            raise UserError(
                f"decontamination: no text of {', '.join(map(str, paths))} has {MIN_WORDS} words; check the files"
            )
        return decontaminator

    def overlap(self, text: str) -> Contamination | None:
        """The first piece of `text` that is in an evaluation text, or None."""
        text = text.lower()
        words, starts, ends = word_hashes(text)
        found: list[tuple[int, int, int]] = []  # first word, words, number of the evaluation text
        ngrams = 0
        for size, hashes in ngram_hashes_of_sizes(words, self._tables):
            positions, numbers = self._tables[size].find(hashes)
            ngrams += len(positions)
            if len(positions):
                found.append((int(positions[0]), size, int(numbers[0])))
        if not found:
            return None
        first, size, number = min(found)
        file, line = self._places[number]
        excerpt = text[starts[first] : ends[first + size - 1]][:_EXCERPT_CHARACTERS]
        return Contamination(file, line, ngrams, excerpt)


class _Table:
    """The sorted hashes of n-grams of one size, behind a filter of one hash function (Bloom 1970)."""

    def __init__(self, hashes: UInt64[np.ndarray, " ngrams"], numbers: Int64[np.ndarray, " ngrams"]):
        self.hashes, first = np.unique(hashes, return_index=True)
        self.numbers = numbers[first]
        bits = (len(self.hashes) * _FILTER_FACTOR).bit_length()
        self.shift = np.uint64(64 - bits)
        self.filter = np.zeros(1 << bits, np.bool_)
        self.filter[self.hashes >> self.shift] = True

    def find(
        self, hashes: UInt64[np.ndarray, " ngrams"]
    ) -> tuple[Int64[np.ndarray, " found"], Int64[np.ndarray, " found"]]:
        """(positions in `hashes`, numbers) of those that are in the table."""
        positions = np.flatnonzero(self.filter[hashes >> self.shift])
        entries = np.minimum(np.searchsorted(self.hashes, hashes[positions]), len(self.hashes) - 1)
        equal = self.hashes[entries] == hashes[positions]
        return positions[equal], self.numbers[entries[equal]]


def _items(path: Path) -> Iterator[tuple[int, Any]]:
    for record in read_records(path):
        if isinstance(record.value, Damaged):
            raise UserError(f"decontamination: {record.place}: {record.value}")
        yield record.number, record.value


def _texts_of(item: Any) -> list[str]:
    strings = list(_strings(item))
    if isinstance(item, Mapping):
        prompt = next((item[name] for name in _PROMPT_FIELDS if isinstance(item.get(name), str)), None)
        if prompt is not None:
            strings += [f"{prompt}\n{other}" for other in strings if other != prompt]
    return strings


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(part)
