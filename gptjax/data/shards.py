"""The tokens and the document table of one split of a token store, written and read.

    tokens-00000.bin   flat little-endian uint16, or uint32 where the vocabulary needs it
    documents.npy      int64 [num_documents, 2]: offset of the first token, UTF-8 bytes of the text

A document is [eot] t1 ... tn, so the target after its last token is the eot of the next.
"""

import hashlib
import mmap
from array import array
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64

DOCUMENTS = "documents.npy"
_HASH_BYTES = 1 << 20


class TokenSplit:
    """The tokens and documents of one split. Files are opened when first read; a pickled copy opens its own.

    Attributes:
      name: train, validation or test.
      num_tokens: tokens, the eot of each document included.
      num_documents: documents.
      num_bytes: UTF-8 bytes of their text.
    """

    def __init__(self, directory: Path, name: str, dtype: str, description: dict[str, Any]):
        self.name = name
        self.directory = directory
        self.num_tokens: int = description["tokens"]
        self.num_documents: int = description["documents"]
        self.num_bytes: int = description["bytes"]
        self.num_characters: int = description["characters"]
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._files = [shard["file"] for shard in description["shards"]]
        sizes = [shard["tokens"] for shard in description["shards"]]
        self._shard_starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

    def __getstate__(self) -> dict[str, Any]:
        opened = ("_shards", "_documents", "document_starts", "document_bytes")
        return {name: value for name, value in self.__dict__.items() if name not in opened}

    @cached_property
    def _shards(self) -> list[np.ndarray]:
        return [_map_file(self.directory / file, self._dtype) for file in self._files]

    @cached_property
    def _documents(self) -> np.ndarray:
        return np.load(self.directory / DOCUMENTS)

    @cached_property
    def document_starts(self) -> Int64[np.ndarray, " documents"]:
        """Offset of the first token (the eot) of each document, increasing from 0."""
        return np.ascontiguousarray(self._documents[:, 0])

    @cached_property
    def document_bytes(self) -> Int64[np.ndarray, " documents"]:
        """UTF-8 bytes of the text of each document."""
        return np.ascontiguousarray(self._documents[:, 1])

    def read(self, start: int, length: int) -> Int32[np.ndarray, " length"]:
        """The tokens from `start` to `start + length`. Raises IndexError beyond the ends of the split."""
        return self.read_windows(np.array([start]), length)[0]

    def read_windows(
        self, starts: Int64[np.ndarray, " windows"], length: int
    ) -> Int32[np.ndarray, "windows length"]:
        """`read` from each of `starts`."""
        if len(starts) and (length < 0 or starts.min() < 0 or starts.max() + length > self.num_tokens):
            raise IndexError(
                f"{length} tokens from {starts.min()}..{starts.max()}: {self.name} has {self.num_tokens}"
            )
        windows = np.empty((len(starts), length), np.int32)
        shards = np.searchsorted(self._shard_starts, starts, side="right") - 1
        offsets = starts - self._shard_starts[shards]
        for window, shard, offset in zip(windows, shards.tolist(), offsets.tolist(), strict=True):
            filled = 0
            while filled < length:
                tokens = self._shards[shard][offset : offset + length - filled]
                window[filled : filled + len(tokens)] = tokens
                filled += len(tokens)
                shard, offset = shard + 1, 0
        return windows


@dataclass
class SplitWriter:
    """Writes one split, shard after shard. Its directory is made with the first token."""

    directory: Path
    dtype: np.dtype
    shard_tokens: int
    tokens: int = 0
    characters: int = 0
    starts: array = field(default_factory=lambda: array("q"))
    num_bytes: array = field(default_factory=lambda: array("q"))
    _file: Any = None

    def start_document(self, eot_id: int) -> None:
        """Begins a document; the text that `add` brings from now on is part of it."""
        self.starts.append(self.tokens)
        self.num_bytes.append(0)
        self._write(np.array([eot_id], self.dtype))

    def add(self, text: str, ids: np.ndarray) -> None:
        """Appends `text`, whose token ids are `ids`, to the last document."""
        self.num_bytes[-1] += len(text.encode())
        self.characters += len(text)
        self._write(ids.astype(self.dtype))

    def _write(self, ids: np.ndarray) -> None:
        while len(ids):
            room = self.shard_tokens - self.tokens % self.shard_tokens
            if room == self.shard_tokens:
                self.close()
                self.directory.mkdir(exist_ok=True)
                self._file = self._shard(self.tokens // self.shard_tokens).open("wb")
            self._file.write(ids[:room].tobytes())
            self.tokens += len(ids[:room])
            ids = ids[room:]

    def _shard(self, index: int) -> Path:
        return self.directory / f"tokens-{index:05d}.bin"

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def description(self) -> dict[str, Any]:
        """Writes the document table; returns what the manifest says about the split."""
        documents = np.stack([np.array(self.starts, np.int64), np.array(self.num_bytes, np.int64)], axis=1)
        np.save(self.directory / DOCUMENTS, documents)
        sizes = [min(self.shard_tokens, self.tokens - i) for i in range(0, self.tokens, self.shard_tokens)]
        paths = [self._shard(index) for index in range(len(sizes))]
        return {
            "documents": len(documents),
            "tokens": self.tokens,
            "bytes": int(documents[:, 1].sum()),
            "characters": self.characters,
            "documents_sha256": file_sha256(self.directory / DOCUMENTS),
            "shards": [
                {"file": path.name, "tokens": size, "sha256": file_sha256(path)}
                for path, size in zip(paths, sizes, strict=True)
            ],
        }


def file_sha256(path: Path) -> str:
    """sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(_HASH_BYTES):
            digest.update(data)
    return digest.hexdigest()


def _map_file(path: Path, dtype: np.dtype) -> np.ndarray:
    with path.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=dtype)
