"""The tokens and the document table of one split of a token store, written and read.

    tokens-00000.bin   flat little-endian uint16, or uint32 where the vocabulary needs it
    mask-00000.bin     uint8, 1 where the token, as a target, counts in the loss; only if there are dialogues
    documents.npy      int64 [num_documents, 2]: offset of the first token, UTF-8 bytes of the text
    kinds.npy          uint8 [num_documents]: `Kind` of each; only if there are preferences

A document is [eot] t1 ... tn, so the target after its last token is the eot of the next.
"""

import hashlib
import io
import json
import mmap
from array import array
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt8

from gptjax.data.documents import WORSE
from gptjax.data.store import remote
from gptjax.files import save_array

DOCUMENTS = "documents.npy"
KINDS = "kinds.npy"
_READ_BYTES = 1 << 20


class ShardFile(NamedTuple):
    """A file of `tokens` tokens, or of as many mask bytes, after a header of `header` bytes.

    Attributes:
      url: where it is in an object store, or ""; it is copied from there, and its `sha256` checked, at the first read.
    """

    path: Path
    tokens: int
    header: int = 0
    url: str = ""
    sha256: str = ""


class TokenSplit:
    """The tokens and documents of one split. Files are opened when first read; a pickled copy opens its own.

    Attributes:
      name: train, validation or test.
      directory: where its files are.
      fingerprint: changes with the tokens, the documents and the loss masks.
      num_tokens: tokens, the eot of each document included.
      num_documents: documents.
      num_bytes: UTF-8 bytes of their text.
      num_characters: characters of their text.
      has_mask: whether the split has a loss mask; without one, all tokens count in the loss.
      has_preferences: whether some documents are judged answers or sides of a pair.
    """

    has_preferences = False

    def __init__(self, directory: Path, name: str, dtype: str, description: dict[str, Any], url: str = ""):
        """`description` is what `SplitWriter.finish` returned; `url`: the original, if the directory is a copy."""
        self.name = name
        self.directory = directory
        self.fingerprint = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
        self.num_tokens: int = description["tokens"]
        self.num_documents: int = description["documents"]
        self.num_bytes: int = description["bytes"]
        self.num_characters: int = description["characters"]
        shards = description["shards"]
        self.has_preferences = "kinds_sha256" in description
        self.has_mask: bool = any("mask" in shard for shard in shards)

        def file(name: str, tokens: int, sha256: str) -> ShardFile:
            return ShardFile(directory / name, tokens, url=f"{url}/{name}" if url else "", sha256=sha256)

        self._tokens = ShardReader([file(s["file"], s["tokens"], s["sha256"]) for s in shards], dtype)
        masks = [file(s["mask"], s["tokens"], s["mask_sha256"]) for s in shards if "mask" in s]
        self._mask = ShardReader(masks, "uint8") if masks else None

    def __getstate__(self) -> dict[str, Any]:
        opened = ("_documents", "document_starts", "document_bytes", "document_kinds")
        return {name: value for name, value in self.__dict__.items() if name not in opened}

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

    @cached_property
    def document_kinds(self) -> UInt8[np.ndarray, " documents"]:
        """`Kind` of each document."""
        return np.load(self.directory / KINDS) if self.has_preferences else np.zeros(self.num_documents, np.uint8)

    @property
    def document_is_worse(self) -> Bool[np.ndarray, " documents"]:
        """Which documents are worse answers; language modeling does not train on them."""
        return np.isin(self.document_kinds, WORSE)

    def read(self, start: int, length: int) -> Int32[np.ndarray, " length"]:
        """The tokens from `start` to `start + length`. Raises IndexError beyond the ends of the split."""
        return self.read_windows(np.array([start]), length)[0]

    def read_windows(self, starts: Int64[np.ndarray, " windows"], length: int) -> Int32[np.ndarray, "windows length"]:
        """`read` from each of `starts`."""
        windows = np.empty((len(starts), length), np.int32)
        self._tokens.read_into(windows, starts)
        return windows

    def read_ranges(
        self, starts: Int64[np.ndarray, " ranges"], lengths: Int64[np.ndarray, " ranges"]
    ) -> Int32[np.ndarray, " total"]:
        """`read` from each of `starts`, of each of `lengths`, one after another."""
        return self._tokens.read_ranges(starts, lengths, np.int32)

    def read_mask(self, start: int, length: int) -> Bool[np.ndarray, " length"]:
        """Which of the tokens from `start` to `start + length` count in the loss as targets."""
        return self.read_mask_ranges(np.array([start]), np.array([length]))

    def read_mask_ranges(
        self, starts: Int64[np.ndarray, " ranges"], lengths: Int64[np.ndarray, " ranges"]
    ) -> Bool[np.ndarray, " total"]:
        """`read_mask` from each of `starts`, of each of `lengths`, one after another."""
        if self._mask is None:
            return np.ones(int(lengths.sum()), np.bool_)
        return self._mask.read_ranges(starts, lengths, np.bool_)


class ShardReader:
    """Files of one type of number, read as one long array. A pickled copy opens its own files."""

    def __init__(self, files: Sequence[ShardFile], dtype: str):
        self.files = list(files)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self._mapped: dict[int, np.ndarray] = {}
        self.starts = np.concatenate([[0], np.cumsum([file.tokens for file in self.files])]).astype(np.int64)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_mapped": {}}

    def array(self, shard: int) -> np.ndarray:
        """The content of a file, mapped into memory when it is first read."""
        if shard not in self._mapped:
            self._mapped[shard] = _map_file(self.files[shard], self.dtype)
        return self._mapped[shard]

    def read_into(self, windows: np.ndarray, starts: Int64[np.ndarray, " windows"]) -> None:
        """Fills each of `windows` from its start. Raises IndexError beyond the ends."""
        length = windows.shape[1]
        if len(starts) and (starts.min() < 0 or starts.max() + length > len(self)):
            raise IndexError(f"{length} tokens from {starts.min()}..{starts.max()}: there are {len(self)}")
        shards = np.searchsorted(self.starts, starts, side="right") - 1
        offsets = starts - self.starts[shards]
        for window, shard, offset in zip(windows, shards.tolist(), offsets.tolist(), strict=True):
            self._fill(window, shard, offset)

    def read_ranges(
        self, starts: Int64[np.ndarray, " ranges"], lengths: Int64[np.ndarray, " ranges"], dtype: type
    ) -> np.ndarray:
        """The numbers from each start, as many as its length, one after another."""
        if len(starts) and (starts.min() < 0 or lengths.min() < 0 or (starts + lengths).max() > len(self)):
            raise IndexError(f"ranges from {starts.min()} to {(starts + lengths).max()}: there are {len(self)}")
        values = np.empty(int(lengths.sum()), dtype)
        shards = np.searchsorted(self.starts, starts, side="right") - 1
        offsets = starts - self.starts[shards]
        end = 0
        for shard, offset, length in zip(shards.tolist(), offsets.tolist(), lengths.tolist(), strict=True):
            self._fill(values[end : end + length], shard, offset)
            end += length
        return values

    def _fill(self, values: np.ndarray, shard: int, offset: int) -> None:
        filled = 0
        while filled < len(values):
            found = self.array(shard)[offset : offset + len(values) - filled]
            values[filled : filled + len(found)] = found
            filled += len(found)
            shard, offset = shard + 1, 0


class SplitWriter:
    """Writes one split, shard after shard. Its directory is made with the first token."""

    def __init__(self, directory: Path, dtype: np.dtype, shard_tokens: int, *, has_mask: bool):
        self.directory = directory
        self._tokens = _ShardWriter(directory, "tokens", dtype.itemsize, shard_tokens)
        self._mask = _ShardWriter(directory, "mask", 1, shard_tokens) if has_mask else None
        self._starts = array("q")
        self._bytes = array("q")
        self._kinds = array("B")
        self._characters = 0

    @property
    def num_documents(self) -> int:
        return len(self._starts)

    def add(self, piece: Path, split: str, continued_bytes: int, characters: int) -> None:
        """Appends what a tokenised piece of the corpus has for the split: see `gptjax.data.building.tokenize`.

        Args:
          piece: the directory with SPLIT.tokens, SPLIT.mask, SPLIT.documents.npy and SPLIT.kinds.npy.
          continued_bytes: bytes of text that continue the last document of the piece before.
          characters: of all the text.
        """
        documents = np.load(piece / f"{split}.documents.npy")
        self._starts.extend((documents[:, 0] + self._tokens.count).tolist())
        if continued_bytes:
            self._bytes[-1] += continued_bytes
        self._bytes.extend(documents[:, 1].tolist())
        kinds = piece / f"{split}.kinds.npy"
        self._kinds.extend((np.load(kinds) if kinds.exists() else np.zeros(len(documents), np.uint8)).tolist())
        self._characters += characters
        for writer, name in ((self._tokens, "tokens"), (self._mask, "mask")):
            if writer is not None:
                with (piece / f"{split}.{name}").open("rb") as stream:
                    writer.copy(stream)

    def finish(self) -> dict[str, Any]:
        """Writes the document table; returns what the manifest says about the split."""
        self.close()
        documents = np.stack([np.array(self._starts, np.int64), np.array(self._bytes, np.int64)], axis=1)
        save_array(self.directory / DOCUMENTS, documents)
        shards = [{"file": name, "tokens": count, "sha256": sha256} for name, count, sha256 in self._tokens.finished]
        if self._mask is not None:
            for shard, (name, _, sha256) in zip(shards, self._mask.finished, strict=True):
                shard |= {"mask": name, "mask_sha256": sha256}
        kinds = {}
        if any(self._kinds):
            save_array(self.directory / KINDS, np.array(self._kinds, np.uint8))
            kinds = {"kinds_sha256": file_sha256(self.directory / KINDS)}
        return {
            "documents": len(documents),
            "tokens": self._tokens.count,
            "bytes": int(documents[:, 1].sum()),
            "characters": self._characters,
            "documents_sha256": file_sha256(self.directory / DOCUMENTS),
            **kinds,
            "shards": shards,
        }

    def close(self) -> None:
        self._tokens.close()
        if self._mask is not None:
            self._mask.close()


class _ShardWriter:
    """Cuts a stream into files of `shard_tokens` items and takes the sha256 of each as it is written."""

    def __init__(self, directory: Path, stem: str, itemsize: int, shard_tokens: int):
        self.count = 0
        self.finished: list[tuple[str, int, str]] = []  # name, items, sha256
        self._directory = directory
        self._stem = stem
        self._itemsize = itemsize
        self._shard_tokens = shard_tokens
        self._file: io.IOBase | None = None
        self._digest = hashlib.sha256()

    def copy(self, stream: io.IOBase) -> None:
        """Appends all that is left of `stream`, which ends with a whole item."""
        while True:
            room = self._shard_tokens - self.count % self._shard_tokens
            data = stream.read(min(room * self._itemsize, _READ_BYTES))
            if not data:
                return
            if self._file is None:
                self._directory.mkdir(exist_ok=True)
                self._file = (self._directory / f"{self._stem}-{len(self.finished):05d}.bin").open("wb")
            self._file.write(data)
            self._digest.update(data)
            self.count += len(data) // self._itemsize
            if self.count % self._shard_tokens == 0:
                self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            written = self.count - sum(count for _, count, _ in self.finished)
            self.finished.append((Path(self._file.name).name, written, self._digest.hexdigest()))
            self._file, self._digest = None, hashlib.sha256()


def file_sha256(path: Path) -> str:
    """sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(_READ_BYTES):
            digest.update(data)
    return digest.hexdigest()


def _map_file(file: ShardFile, dtype: np.dtype) -> np.ndarray:
    if file.url and not file.path.is_file():
        remote.fetch(file.url, file.path, file.sha256)
    with file.path.open("rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    return np.frombuffer(mapped, dtype=dtype, count=file.tokens, offset=file.header)
