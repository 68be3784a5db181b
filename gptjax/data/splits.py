"""Which split each document, or each character, of a corpus falls into."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from gptjax.data.documents import Document
from gptjax.errors import UserError

SPLITS = ("train", "validation", "test")
SPLIT_BY = ("auto", "document", "position")
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


@dataclass
class Census:
    """What must be known about a corpus before it is split: its size, by the split that the source fixes.

    Attributes:
      documents: number of documents for each split, "" for those that have none.
      characters: the same for characters.
    """

    documents: dict[str, int] = field(default_factory=dict)
    characters: dict[str, int] = field(default_factory=dict)

    def add(self, document: Document) -> None:
        split = document.get("split", "")
        if split not in (*SPLITS, ""):
            raise UserError(
                f"document {document['id']!r} has split {split!r}: expected one of {', '.join(SPLITS)}"
            )
        self.documents[split] = self.documents.get(split, 0) + (document.get("part", 0) == 0)
        self.characters[split] = self.characters.get(split, 0) + len(document["text"])


@dataclass(frozen=True)
class Segment:
    """Text that goes to one split, either the start of a document or more of the last document there."""

    split: str
    starts_document: bool
    text: str


class Splitter:
    """Deals the documents of a corpus to train, validation and test.

    Attributes:
      method: what `auto` came to: "document" (by a hash of each document), "position" (by the order of the
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
        self._train_end = int((1 - held_out) * num_characters)
        self._validation_end = int((1 - fractions.test) * num_characters)

    def segments(self, documents: Iterable[Document]) -> Iterator[Segment]:
        """The text of all documents in their order, cut where a border between splits falls within one."""
        position = 0
        split = ""
        for document in documents:
            text = document["text"]
            starts = document.get("part", 0) == 0
            own = document.get("split", "")
            if own in self._fixed:
                yield Segment(own, starts, text)
            elif self._hashes:
                if starts:
                    split = hashed_split(document.get("split_key", text), self._fractions)
                yield Segment(split, starts, text)
            else:
                for name, piece in self._cut(text, position):
                    yield Segment(name, starts or name != split, piece)
                    split, starts = name, False
                position += len(text)

    def _cut(self, text: str, position: int) -> Iterator[tuple[str, str]]:
        borders = (0, self._train_end, self._validation_end, position + len(text))
        for name, begin, end in zip(SPLITS, borders, borders[1:], strict=False):
            piece = text[max(begin - position, 0) : max(end - position, 0)]
            if piece:
                yield name, piece


def hashed_split(key: str, fractions: Fractions) -> str:
    """The split of a document by a hash of its text (or `split_key`): the same in every corpus it is part of."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    share = int.from_bytes(digest, "big") / 2**64
    if share < fractions.test:
        return "test"
    return "validation" if share < fractions.test + fractions.validation else "train"
