"""Which split each document, or each character, of a corpus falls into."""

import hashlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from gptjax.config import OPTIONS
from gptjax.errors import UserError

SPLITS = ("train", "validation", "test")
SPLIT_BY = OPTIONS["data"]["split_by"].choices
MIN_HASHED_DOCUMENTS = 100


@dataclass(frozen=True)
class Fractions:
    """Shares of the corpus, of its documents or of its characters, that are held out."""

    validation: float
    test: float

    def __post_init__(self) -> None:
        if not (0 <= self.validation < 1 and 0 <= self.test < 1 and self.validation + self.test < 1):
            raise UserError(
                f"data.validation_fraction={self.validation}, data.test_fraction={self.test}: expected two "
                "numbers from 0 whose sum is below 1"
            )


class Extent(NamedTuple):
    """What must be known about a document, or a part of one, to put it into a split.

    Attributes:
      id: of the document.
      starts: whether it is the first part of its document.
      characters: of its text.
      share: `hashed_share` of the document.
      split: which the source itself fixes, or "".
      whole: a dialogue cannot be cut.
    """

    id: str
    starts: bool
    characters: int
    share: float
    split: str = ""
    whole: bool = False


@dataclass
class Census:
    """What must be known about a corpus before it is split: its size, by the split that the source fixes.

    Attributes:
      documents: number of documents for each split, "" for those that have none.
      characters: the same for characters.
    """

    documents: dict[str, int] = field(default_factory=dict)
    characters: dict[str, int] = field(default_factory=dict)

    def add(self, extent: Extent) -> None:
        if extent.split not in (*SPLITS, ""):
            raise UserError(f"document {extent.id!r} has split {extent.split!r}: expected one of {', '.join(SPLITS)}")
        self.documents[extent.split] = self.documents.get(extent.split, 0) + extent.starts
        self.characters[extent.split] = self.characters.get(extent.split, 0) + extent.characters


class Segment(NamedTuple):
    """Characters of a document that go to one split; `starts`: they begin a document there, else continue its last."""

    split: str
    starts: bool
    begin: int
    end: int


class Splitter:
    """Assigns the documents of a corpus, in order, to train, validation and test.

    Attributes:
      method: what `auto` has chosen: "document" (by a hash of each document), "position" (by the order of the
        characters) or "source" (as the source says; where it has no validation split, the held-out shares are
        taken from train).
    """

    def __init__(self, split_by: str, fractions: Fractions, census: Census):
        if split_by not in SPLIT_BY:
            raise UserError(f"data.split_by={split_by!r}: expected one of {', '.join(SPLIT_BY)}")
        own = {split for split in census.documents if split}
        self._fixed: frozenset[str] = frozenset()
        self.method = split_by
        if split_by == "auto" and own:
            self.method = "source"
            self._fixed = frozenset(own if "validation" in own else own - {"train"})
            if "test" in own:
                fractions = Fractions(fractions.validation, 0.0)
        free = [split for split in census.documents if split not in self._fixed]
        num_documents = sum(census.documents[split] for split in free)
        num_characters = sum(census.characters[split] for split in free)
        enough = num_documents >= MIN_HASHED_DOCUMENTS
        self._hashes = split_by == "document" or (split_by == "auto" and enough)
        if self.method == "auto":
            self.method = "document" if self._hashes else "position"
        self._fractions = fractions
        held_out = fractions.validation + fractions.test
        self._borders = (
            0,
            int((1 - held_out) * num_characters),
            int((1 - fractions.test) * num_characters),
            num_characters,
        )
        self._position = 0
        self._last = ""

    def split_of(self, extent: Extent) -> str:
        """The split in which the next document begins, without assigning it."""
        if extent.split in self._fixed:
            return extent.split
        if self._hashes:
            return split_of_share(extent.share, self._fractions)
        position = min(self._position, self._borders[-1] - 1)
        return next(split for split, end in zip(SPLITS, self._borders[1:], strict=True) if position < end)

    def deal(self, extent: Extent) -> list[Segment]:
        """The next document or part, cut where a border between splits falls within it."""
        if extent.split in self._fixed or self._hashes:
            return [Segment(self.split_of(extent), extent.starts, 0, extent.characters)]
        if extent.whole:
            segments = [Segment(self.split_of(extent), extent.starts, 0, extent.characters)]
        else:
            segments = list(self._cut(extent))
        self._position += extent.characters
        return segments

    def _cut(self, extent: Extent) -> Iterator[Segment]:
        starts = extent.starts
        position = self._position
        for split, (border, end) in zip(SPLITS, itertools.pairwise(self._borders), strict=True):
            begin, stop = max(border - position, 0), min(end - position, extent.characters)
            if begin < stop:
                yield Segment(split, starts or split != self._last, begin, stop)
                self._last, starts = split, False


def hashed_share(key: str) -> float:
    """A number from 0 to 1 from a hash of a document's text (or `split_key`): the same in every corpus."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def split_of_share(share: float, fractions: Fractions) -> str:
    """The split of a document whose `hashed_share` is `share`."""
    if share < fractions.test:
        return "test"
    return "validation" if share < fractions.test + fractions.validation else "train"


def split_of_key(about: Mapping[str, Any], key: str) -> str:
    """The split that a document went to, by its text (or `split_key`) alone.

    Args:
      about: the manifest of the store, or the data section of the config that it is built with: what has `split_by`,
        `validation_fraction` and `test_fraction`. "auto" stands for "document", as it does in a corpus of
        `MIN_HASHED_DOCUMENTS` or more.
      key: of the document.

    Raises:
      UserError: the store was not split by a hash of each document, so the text does not decide.
    """
    if about["split_by"] not in ("auto", "document"):
        raise UserError(
            f"data.split_by={about['split_by']}: which documents were held out depends on their place in the corpus, "
            "not on their text; use data.split_by=document, or prompts of your own: evaluation.prompts=FILE.jsonl"
        )
    return split_of_share(hashed_share(key), Fractions(about["validation_fraction"], about["test_fraction"]))
