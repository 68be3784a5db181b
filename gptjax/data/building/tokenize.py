"""Third stage of a build: the selected text of a piece becomes tokens, split by split.

SPLIT.tokens          token ids, little-endian, as they are in the shards
SPLIT.mask            uint8, 1 where a token counts in the loss; only if the corpus has dialogues
SPLIT.documents.npy   int64 [documents, 2]: offset of the first token, bytes of the text
SPLIT.kinds.npy       uint8 [documents]: `Kind` of each; only if the corpus has preferences
used.npy              int64 [vocabulary]: how often each id occurs
summary.json          counts, and the sha256 of the documents
"""

import contextlib
import hashlib
import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptjax.data.building.clean import read_documents
from gptjax.data.building.select import read_segments
from gptjax.data.building.splits import SPLITS, Segment
from gptjax.data.documents import Document, Kind, Message, content, said
from gptjax.data.tokenization.templates import ChatTemplate
from gptjax.data.tokenization.tokenizer import Tokenizer
from gptjax.errors import UserError
from gptjax.files import save_array, whole_directory, write_json

TOKEN_SUMMARY = "summary.json"
USED = "used.npy"

_BATCH_CHARACTERS = 1_000_000


class TokenizeItem(NamedTuple):
    """A cleaned piece, the file with the splits of its text, and the directory for its tokens."""

    cleaned: Path
    segments: Path
    directory: Path


class Encoded(NamedTuple):
    """A segment of a document with its tokens and, where it is a dialogue, its loss mask."""

    segment: Segment
    text: str
    ids: np.ndarray
    mask: np.ndarray | None = None
    kind: Kind = Kind.PLAIN


@dataclass
class TokenizeStage:
    """Tokenises a cleaned piece.

    Attributes:
      dtype: of the tokens, such as "uint16".
      template: `ChatTemplate.to_json`, or None where the corpus has no dialogues.
    """

    tokenizer: Tokenizer
    dtype: str
    template: dict[str, Any] | None = None

    @cached_property
    def chat_template(self) -> ChatTemplate:
        return ChatTemplate.from_json(self.template)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "chat_template"}

    def __call__(self, item: TokenizeItem) -> None:
        if item.directory.is_dir():
            return
        digest = hashlib.sha256()
        used = np.zeros(self.tokenizer.vocab_size, np.int64)
        with whole_directory(item.directory) as directory, contextlib.ExitStack() as stack:
            writers = {split: _Writer(stack, directory, split, self) for split in SPLITS}
            for encoded in self._encoded(item, digest):
                writers[encoded.segment.split].add(encoded)
                used += np.bincount(encoded.ids, minlength=len(used))
            splits = {split: writer.finish() for split, writer in writers.items() if writer.tokens}
            used[self.tokenizer.eot_id] += sum(len(writer.starts) for writer in writers.values())
            save_array(directory / USED, used)
            write_json(directory / TOKEN_SUMMARY, {"sha256": digest.hexdigest(), "splits": splits})

    def _encoded(self, item: TokenizeItem, digest: Any) -> Iterator[Encoded]:
        texts: list[tuple[Segment, str]] = []
        characters = 0
        for document, segments in zip(read_documents(item.cleaned), read_segments(item.segments), strict=True):
            if not segments:
                continue
            _update(digest, document)
            text = content(document)
            if "messages" in document or characters >= _BATCH_CHARACTERS:
                yield from self._encoded_texts(texts)
                texts, characters = [], 0
            if "messages" in document:
                for kind, messages in _sides(document):
                    yield Encoded(segments[0], said(messages), *self._encode(document, messages), kind)
            else:
                texts += [(segment, text[segment.begin : segment.end]) for segment in segments]
                characters += len(text)
        yield from self._encoded_texts(texts)

    def _encode(self, document: Document, messages: list[Message]) -> tuple[np.ndarray, np.ndarray]:
        try:
            return self.chat_template.encode(messages, self.tokenizer, tools=document.get("tools"))
        except UserError as error:
            raise UserError(f"{document['id']}: {error}") from None

    def _encoded_texts(self, texts: list[tuple[Segment, str]]) -> Iterator[Encoded]:
        ids_of = self.tokenizer.encode_batch([text for _, text in texts])
        for (segment, text), ids in zip(texts, ids_of, strict=True):
            yield Encoded(segment, text, ids)


def _sides(document: Document) -> list[tuple[Kind, list[Message]]]:
    """The documents that a dialogue becomes in the store; a pair becomes two successive ones."""
    messages = document["messages"]
    if "rejected" in document:
        return [(Kind.CHOSEN, messages), (Kind.REJECTED, document["rejected"])]
    if "label" in document:
        return [(Kind.DESIRABLE if document["label"] else Kind.UNDESIRABLE, messages)]
    return [(Kind.PLAIN, messages)]


def _update(digest: Any, document: Document) -> None:
    if document.get("part", 0) == 0:
        # 0xff never occurs in UTF-8, so no other documents have these bytes.
        digest.update(b"\xff" + document["id"].encode("utf-8", "surrogatepass") + b"\xff")
    if "messages" in document:
        for name in ("messages", "rejected", "label", "tools"):
            if name in document:
                digest.update(json.dumps(document[name], ensure_ascii=False).encode("utf-8", "surrogatepass"))
    else:
        digest.update(document["text"].encode("utf-8", "surrogatepass"))


class _Writer:
    """Writes the tokens of one split of a piece."""

    def __init__(self, stack: contextlib.ExitStack, directory: Path, split: str, stage: TokenizeStage):
        self.tokens = 0
        self.starts = array("q")
        self._bytes = array("q")
        self._continued_bytes = self._characters = 0
        self._kinds = array("B")
        self._path = directory / f"{split}.documents.npy"
        self._kinds_path = directory / f"{split}.kinds.npy"
        self._dtype = np.dtype(stage.dtype).newbyteorder("<")
        self._eot = np.array([stage.tokenizer.eot_id], self._dtype)
        self._file = stack.enter_context((directory / f"{split}.tokens").open("wb"))
        self._mask = stack.enter_context((directory / f"{split}.mask").open("wb")) if stage.template else None

    def add(self, encoded: Encoded) -> None:
        num_bytes = len(encoded.text.encode())
        mask = np.ones(len(encoded.ids), np.bool_) if encoded.mask is None else encoded.mask
        if encoded.segment.starts:
            self.starts.append(self.tokens)
            self._bytes.append(num_bytes)
            self._kinds.append(encoded.kind)
            # Texts train on the end-of-text token. Dialogues end with the template's own end-of-turn token, so
            # end-of-text does not count in their loss.
            self._write(self._eot, np.array([encoded.mask is None]))
        elif self._bytes:
            self._bytes[-1] += num_bytes
        else:
            self._continued_bytes += num_bytes
        self._characters += len(encoded.text)
        self._write(encoded.ids.astype(self._dtype), mask)

    def _write(self, ids: np.ndarray, mask: np.ndarray) -> None:
        self._file.write(ids.tobytes())
        if self._mask is not None:
            self._mask.write(mask.astype(np.uint8).tobytes())
        self.tokens += len(ids)

    def finish(self) -> dict[str, int]:
        """Writes the document table; returns the counts."""
        documents = np.stack([np.array(self.starts, np.int64), np.array(self._bytes, np.int64)], axis=1)
        save_array(self._path, documents)
        if any(self._kinds):
            save_array(self._kinds_path, np.array(self._kinds, np.uint8))
        return {
            "tokens": self.tokens,
            "documents": len(documents),
            "bytes": int(documents[:, 1].sum()) + self._continued_bytes,
            "continued_bytes": self._continued_bytes,
            "characters": self._characters,
        }
