"""First stage of a build: a piece of the source becomes cleaned documents.

documents.zst     the kept documents: a line of JSON with the number of bytes of the text, then the text
extents.jsonl     a line for each of them: what decides its split
signatures.npy    uint32 [documents, permutations], for near duplicates only
summary.json      what was read, removed and skipped
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from gptjax.data.building.decontamination import Decontaminator
from gptjax.data.building.deduplication import MinHasher, exact_key
from gptjax.data.building.splits import Fractions, hashed_share, split_of_share
from gptjax.data.cleaning.cleaner import Cleaner, CleaningCounts
from gptjax.data.documents import Document, content
from gptjax.data.sources.base import Piece, Source
from gptjax.data.sources.files import open_bytes, zstd_writer
from gptjax.errors import UserError
from gptjax.files import save_array, whole_directory, write_json

CLEAN_DOCUMENTS = "documents.zst"
EXTENTS = "extents.jsonl"
SIGNATURES = "signatures.npy"
CLEAN_SUMMARY = "summary.json"

_KEPT = ("id", "part", "messages", "rejected", "label", "tools")


class CleanItem(NamedTuple):
    """A piece of the source, and the directory that its cleaned documents go to."""

    piece: Piece
    directory: Path


@dataclass
class CleanStage:
    """Reads, cleans and fingerprints the documents of a piece.

    Attributes:
      deduplicate: "none", "exact" or "near"; decides which keys of each document are computed.
      decontaminate: files of evaluation sets; a document that shares an n-gram with one of them is dropped.
      kept_raw: shares of the documents that are held out, by a hash of the uncleaned text, and are not cleaned; None:
        all are cleaned.
    """

    source: Source
    cleaner: Cleaner
    deduplicate: str = "none"
    decontaminate: tuple[str, ...] = ()
    kept_raw: Fractions | None = None

    @cached_property
    def decontaminator(self) -> Decontaminator | None:
        return Decontaminator.from_files(self.decontaminate) if self.decontaminate else None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "decontaminator"}

    def __call__(self, item: CleanItem) -> None:
        if item.directory.is_dir():
            return
        split = _SplitBefore(self.kept_raw) if self.kept_raw else None
        faults, counts = self.source.faults, CleaningCounts(self.cleaner.steps)
        faults.clear()
        documents = num_bytes = empty = 0
        contaminated: list[dict[str, Any]] = []
        with whole_directory(item.directory) as directory:
            with _Writer.opened(directory, self.deduplicate) as writer:
                for document in self.source.read(item.piece):
                    text = content(document)
                    documents += document.get("part", 0) == 0
                    num_bytes += len(text.encode("utf-8", "surrogatepass"))
                    if not text:
                        empty += 1
                    elif cleaned := self._clean(document, counts, contaminated, split):
                        writer.add(cleaned)
            summary = {
                "documents": documents,
                "bytes": num_bytes,
                "empty_documents": empty,
                "decode_replacements": faults.replaced,
                "skipped": faults.skipped,
                "skipped_messages": faults.messages,
                "notes": dict(faults.notes),
                "cleaning": counts.to_json(),
                "contaminated": contaminated,
            }
            write_json(directory / CLEAN_SUMMARY, summary)

    def _clean(
        self,
        document: Document,
        counts: CleaningCounts,
        contaminated: list[dict[str, Any]],
        split: "_SplitBefore | None",
    ) -> Document | None:
        try:
            if split:
                document = split.keyed(document)
            held_out = split is not None and split.holds_out(document)
            cleaned = document if held_out else self.cleaner.clean(document, counts)
        except UserError as error:
            self.source.faults.skip(UserError(f"{document['id']}: {error}"))
            return None
        if cleaned is not None and self.decontaminator is not None:
            found = self.decontaminator.overlap(content(cleaned))
            if found is not None:
                contaminated.append({"id": document["id"], **found._asdict()})
                return None
        return cleaned


class _SplitBefore:
    """Which documents are held out, by a hash of their text before it is cleaned."""

    def __init__(self, fractions: Fractions):
        self._fractions = fractions
        self._last: tuple[str, bool] = "", False  # the document, and whether it is held out

    def keyed(self, document: Document) -> Document:
        """The document with its uncleaned text as `split_key`, so that cleaning does not change its split."""
        return cast(Document, {"split_key": content(document), **document})

    def holds_out(self, document: Document) -> bool:
        """Called with the parts of a document in order. Raises UserError if the first one is not in the piece."""
        if document.get("part", 0) == 0:
            split = split_of_share(hashed_share(document["split_key"]), self._fractions)
            self._last = document["id"], split != "train"
        if document["id"] != self._last[0]:
            raise UserError(
                f"{document['id']} is so long that it begins in an earlier piece of the source, and whether it is held "
                "out is not known; use data.cleaned_splits=all"
            )
        return self._last[1]


class _Writer:
    """Writes the documents of a cleaned piece and, for each document, what the selection must know."""

    def __init__(self, documents: Any, extents: Any, deduplicate: str):
        self._documents = documents
        self._extents = extents
        self._exact = deduplicate != "none"
        self._hasher = MinHasher() if deduplicate == "near" else None
        self._signatures: list[np.ndarray] = []

    @classmethod
    @contextlib.contextmanager
    def opened(cls, directory: Path, deduplicate: str) -> Iterator["_Writer"]:
        with (
            zstd_writer(directory / CLEAN_DOCUMENTS) as documents,
            (directory / EXTENTS).open("w", encoding="utf-8") as extents,
        ):
            writer = cls(documents, extents, deduplicate)
            yield writer
        if writer._hasher is not None:
            shape = (-1, writer._hasher.num_permutations)
            save_array(directory / SIGNATURES, np.array(writer._signatures, np.uint32).reshape(shape))

    def add(self, document: Document) -> None:
        text = content(document)
        part = document.get("part", 0)
        extent = {
            "id": document["id"],
            "part": part,
            "characters": len(text),
            "share": hashed_share(document.get("split_key", text)) if part == 0 else 0.0,
            "split": document.get("split", ""),
            "whole": "messages" in document,
        }
        if self._exact:
            extent["exact"] = exact_key(text).hex()
        if self._hasher is not None:
            self._signatures.append(self._hasher.signature(text))
        self._extents.write(json.dumps(extent) + "\n")
        head = {name: document[name] for name in _KEPT if name in document}
        data = b"" if "messages" in document else text.encode("utf-8", "surrogatepass")
        self._documents.write(json.dumps({**head, "bytes": len(data)}).encode() + b"\n")
        self._documents.write(data)


def read_documents(directory: Path) -> Iterator[Document]:
    """The documents of a cleaned piece: `id`, `part`, and `text` or `messages` with what belongs to them."""
    with open_bytes(directory / CLEAN_DOCUMENTS) as file:
        for line in file:
            document = json.loads(line)
            text = file.read(document.pop("bytes")).decode("utf-8", "surrogatepass")
            if "messages" not in document:
                document["text"] = text
            yield document
