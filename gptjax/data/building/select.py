"""Second stage of a build, in one process: which documents stay, and which split each of them goes to.

Only the extents and signatures of the cleaned pieces are read, in the order of the pieces.
"""

import contextlib
import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gptjax.data.building.clean import EXTENTS, SIGNATURES, read_documents
from gptjax.data.building.deduplication import EXACT_KEY_BYTES, Deduplicator
from gptjax.data.building.splits import Census, Extent, Fractions, Segment, Splitter
from gptjax.data.documents import content


@dataclass
class Duplicate:
    """A document that repeats an earlier one, with the split that each of them falls into."""

    id: str
    kept_id: str
    kind: str = ""  # exact or near
    split: str = ""
    kept_split: str = ""


@dataclass
class Selection:
    """What was decided about a corpus.

    Attributes:
      method: how it was split, see `Splitter`.
      documents: how many are kept.
      characters: of the documents that are kept.
      duplicates: the documents that are left out, in the order of the corpus.
      split_documents: documents that begin in each split.
      lengths: how many documents have from 2^i to 2^(i+1) - 1 characters.
      has_dialogues: whether any is a dialogue.
      groups: different split keys (the words; in a dialogue, those before the first answer).
      repeated: documents that share their split key with others, and therefore the split.
      largest_group: documents that have the most frequent split key.
    """

    method: str = ""
    documents: int = 0
    characters: int = 0
    duplicates: list[Duplicate] = field(default_factory=list)
    split_documents: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    has_dialogues: bool = False
    groups: int = 0
    repeated: int = 0
    largest_group: int = 0


def select(
    cleaned: Sequence[Path],
    segments: Sequence[Path],
    *,
    deduplicate: str,
    near_threshold: float,
    split_by: str,
    fractions: Fractions,
) -> Selection:
    """Decides about the documents of all cleaned pieces, in order.

    Args:
      cleaned: the directories of the pieces.
      segments: files to write, one per piece. Each document of the piece, or part of one, gets a line with the segments
        of its text that go to a split; a document that is left out has none.

    Raises:
      UserError: an option or the split of a document is wrong.
    """
    selection = Selection()
    census = Census()
    deduplicator = Deduplicator(deduplicate, threshold=near_threshold)
    removed: dict[int, Duplicate] = {}
    shares = array("d")
    for number, document in enumerate(_documents(cleaned)):
        first = document[0].extent
        if deduplicate != "none":
            kept_id = deduplicator.duplicate_of(first.id, *_fingerprints(document))
            if kept_id is not None:
                removed[number] = Duplicate(first.id, kept_id)
                continue
        for entry in document:
            census.add(entry.extent)
        characters = sum(entry.extent.characters for entry in document)
        selection.lengths[characters.bit_length() - 1] += 1
        selection.documents += 1
        selection.characters += characters
        selection.has_dialogues |= first.whole
        shares.append(first.share)
    counts = np.unique(np.frombuffer(shares, np.float64), return_counts=True)[1]
    selection.groups = len(counts)
    selection.repeated = int(counts[counts > 1].sum())
    selection.largest_group = int(counts.max(initial=0))
    splitter = Splitter(split_by, fractions, census)
    selection.method = splitter.method
    selection.duplicates = list(removed.values())
    selection.split_documents = _deal(cleaned, segments, splitter, removed)
    return selection


def _deal(
    cleaned: Sequence[Path], segments: Sequence[Path], splitter: Splitter, removed: dict[int, Duplicate]
) -> Counter[str]:
    """Writes the segments and completes the entries of `removed`; returns how many documents begin in each split."""
    begun: Counter[str] = Counter()
    kept_ids = {duplicate.kept_id for duplicate in removed.values()}
    kept: dict[str, tuple[str, bytes | None]] = {}
    with _writers(segments) as write:
        for number, document in enumerate(_documents(cleaned)):
            first, duplicate = document[0].extent, removed.get(number)
            split = splitter.split_of(first) if duplicate or first.id in kept_ids else ""
            exact = _fingerprints(document)[0] if split else None
            if duplicate:
                kept_split, kept_exact = kept[duplicate.kept_id]
                duplicate.kind = "exact" if exact == kept_exact else "near"
                duplicate.split, duplicate.kept_split = split, kept_split
            elif split:
                kept.setdefault(first.id, (split, exact))
            for entry in document:
                dealt = [] if duplicate else splitter.deal(entry.extent)
                begun.update(segment.split for segment in dealt if segment.starts)
                write(entry.piece, json.dumps(dealt) + "\n")
    return begun


@contextlib.contextmanager
def _writers(paths: Sequence[Path]) -> Iterator[Callable[[int, str], None]]:
    """write(number of a path, text), called with numbers that do not decrease; all other files are empty."""
    for path in paths:
        path.write_bytes(b"")
    last, file = -1, None

    def write(number: int, text: str) -> None:
        nonlocal last, file
        if number != last:
            if file:
                file.close()
            last, file = number, paths[number].open("w", encoding="utf-8")
        file.write(text)

    try:
        yield write
    finally:
        if file:
            file.close()


def read_segments(path: Path) -> Iterator[list[Segment]]:
    """For each document or part of a piece, where its text goes."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield [Segment(*values) for values in json.loads(line)]


class Selected(NamedTuple):
    """A cleaned piece, the file that says which of its text goes to which split, and the sha256 of that file."""

    cleaned: Path
    segments: Path
    sha256: str


def selected_texts(pieces: Sequence[Selected]) -> Iterator[str]:
    """The texts of the documents that stay, in order."""
    for piece in pieces:
        for document, segments in zip(read_documents(piece.cleaned), read_segments(piece.segments), strict=True):
            if segments:
                yield content(document)


class _Entry(NamedTuple):
    """A document, or a part of one, as the cleaned pieces describe it."""

    piece: int
    extent: Extent
    exact: bytes | None
    signature: np.ndarray | None


def _documents(cleaned: Sequence[Path]) -> Iterator[list[_Entry]]:
    """The entries of each document: one per part. The parts of a document may be in several pieces."""
    document: list[_Entry] = []
    for entry in _entries(cleaned):
        if document and entry.extent.starts:
            yield document
            document = []
        if document:
            extent = entry.extent._replace(share=document[0].extent.share)
            entry = entry._replace(extent=extent)
        document.append(entry)
    if document:
        yield document


def _entries(cleaned: Sequence[Path]) -> Iterator[_Entry]:
    last_id = None
    for piece, directory in enumerate(cleaned):
        path = directory / SIGNATURES
        signatures = np.load(path, mmap_mode="r") if path.exists() else None
        with (directory / EXTENTS).open(encoding="utf-8", errors="surrogatepass") as file:
            for number, line in enumerate(file):
                about = json.loads(line)
                part, exact = about.pop("part"), about.pop("exact", None)
                starts = part == 0 or about["id"] != last_id  # the first part may have been removed
                last_id = about["id"]
                yield _Entry(
                    piece,
                    Extent(starts=starts, **about),
                    exact and bytes.fromhex(exact),
                    signatures[number] if signatures is not None else None,
                )


def _fingerprints(document: list[_Entry]) -> tuple[bytes | None, np.ndarray | None]:
    """Exact key and signature of a document in parts: MinHash of a union is the minimum over its parts."""
    if len(document) == 1:
        return document[0].exact, document[0].signature
    keys = [entry.exact for entry in document]
    signatures = [entry.signature for entry in document]
    exact = hashlib.blake2b(b"".join(keys), digest_size=EXACT_KEY_BYTES).digest() if keys[0] else None
    return exact, np.min(signatures, axis=0) if signatures[0] is not None else None
