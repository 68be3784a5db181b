"""`tokens:GLOB`: token files of other projects, read as they are.

nanoGPT writes raw little-endian uint16. llm.c writes a header of 256 int32 (20240520, 1, number of tokens)
before it. In both a document ends or begins with the end-of-text token, which is all that separates
documents.
"""

import hashlib
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from gptjax.data.sources.files import File, find_files, is_remote
from gptjax.data.store.shards import ShardFile, ShardReader, TokenSplit
from gptjax.data.store.store import Store
from gptjax.data.tokenization.tokenizer import Tokenizer
from gptjax.errors import UserError
from gptjax.files import whole_file

_MAGIC, _VERSION = 20240520, 1
_HEADER_BYTES = 256 * 4
_ITEM_BYTES = 2
_CHUNK_TOKENS = 1 << 22
_SPLIT_NAMES = (
    ("validation", re.compile(r"(?<![a-z])val(id|idation)?(?![a-z])")),
    ("test", re.compile(r"(?<![a-z])test(?![a-z])")),
    ("train", re.compile(r"(?<![a-z])train(ing)?(?![a-z])")),
)


def open_token_files(spec: str, tokenizer: Tokenizer, cache: Path) -> "TokenFiles":
    """Opens the files of `tokens:GLOB`, which are put into splits by their names: train, val, validation,
    test.

    Args:
      tokenizer: the one that made the tokens; the files do not say.
      cache: directory for the table of documents, which is found by reading every token once.

    Raises:
      UserError: nothing matches, a name does not say its split, a file is damaged or has another format, or
        the tokenizer has more ids than a uint16 can hold.
    """
    files = find_files(spec, spec.removeprefix("tokens:"))
    if remote := [file.path for file in files if is_remote(file.path)]:
        raise UserError(f"{spec!r}: {remote[0]} is not on this machine; token files are mapped into memory: copy them")
    if tokenizer.vocab_size > np.iinfo(np.uint16).max + 1:
        raise UserError(
            f"{spec!r}: token files of uint16 cannot hold the {tokenizer.vocab_size} ids of the tokenizer; "
            "name the one that they were made with, for example --config.tokenizer=hf:gpt2"
        )
    return TokenFiles(spec, files, tokenizer, cache)


class TokenFiles(Store):
    """Token files as a store, without a copy of them."""

    def __init__(self, spec: str, files: Sequence[File], tokenizer: Tokenizer, cache: Path):
        self._tokenizer = tokenizer
        self._cache = cache
        self._shards: dict[str, list[ShardFile]] = {}
        for file in files:
            self._shards.setdefault(_split_name(spec, file.name), []).append(_shard(file))
        if "train" not in self._shards:
            raise UserError(f"{spec!r}: no file has train in its name; there are {', '.join(f.name for f in files)}")
        identity = hashlib.sha256()
        for file in files:
            identity.update(f"{file.name}\0{file.size}\0{file.version}\n".encode())
        fingerprint = identity.hexdigest()
        manifest = {
            "source": spec,
            "source_fingerprint": fingerprint,
            "cleaning": "none",
            "tokenizer": {
                "spec": tokenizer.kind,
                "sha256": tokenizer.sha256,
                "vocab_size": tokenizer.vocab_size,
            },
            "dtype": "uint16",
            "splits": {
                name: {"tokens": sum(shard.tokens for shard in shards)} for name, shards in self._shards.items()
            },
        }
        super().__init__(Path(files[0].path).parent, manifest)

    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    def split(self, name: str) -> TokenSplit:
        self._check_split(name)
        table = self._cache / f"documents-{self.fingerprint[:16]}-{self._tokenizer.sha256[:8]}-{name}.npy"
        return ForeignSplit(name, self._shards[name], self._tokenizer, table)

    def verify(self) -> None:
        """Reads every token. Raises UserError where one is not in the vocabulary; there are no checksums."""
        for name in self.splits:
            self.split(name).find_documents()


class ForeignSplit(TokenSplit):
    """A split of files that have no table of documents: the table is made from the end-of-text tokens and kept."""

    def __init__(self, name: str, shards: Sequence[ShardFile], tokenizer: Tokenizer, table: Path):
        self.name = name
        self.has_mask = False
        self.num_tokens = sum(shard.tokens for shard in shards)
        self._tokens = ShardReader(shards, "uint16")
        self._mask = None
        self._eot_id = tokenizer.eot_id
        self._token_bytes = tokenizer.token_bytes()
        self._table = table

    @property
    def num_documents(self) -> int:
        return len(self._documents)

    @property
    def num_bytes(self) -> int:
        return int(self.document_bytes.sum())

    @cached_property
    def _documents(self) -> np.ndarray:
        if self._table.is_file():
            return np.load(self._table)
        documents = self.find_documents()
        self._table.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(self._table) as file:
            np.save(file, documents)
        return documents

    def find_documents(self) -> Int64[np.ndarray, "documents 2"]:
        """The table of documents. Raises UserError at an id that the vocabulary does not have."""
        starts, bytes_before = [], []
        tokens = num_bytes = 0
        for file, array in zip(self._tokens.files, self._tokens.arrays, strict=True):
            for begin in range(0, len(array), _CHUNK_TOKENS):
                chunk = array[begin : begin + _CHUNK_TOKENS]
                if chunk.max() >= len(self._token_bytes):
                    raise UserError(
                        f"{file.path} has the token id {chunk.max()}, and the tokenizer has only "
                        f"{len(self._token_bytes)}: name the tokenizer that the file was made with"
                    )
                is_start = chunk == self._eot_id
                is_start[0] |= tokens == 0
                found = np.flatnonzero(is_start)
                ends = np.cumsum(self._token_bytes[chunk])
                starts.append(found + tokens)
                bytes_before.append(num_bytes + ends[found] - self._token_bytes[chunk[found]])
                tokens, num_bytes = tokens + len(chunk), num_bytes + int(ends[-1])
        before = np.concatenate(bytes_before)
        return np.stack([np.concatenate(starts), np.diff(before, append=num_bytes)], axis=1).astype(np.int64)


def _split_name(spec: str, name: str) -> str:
    for split, pattern in _SPLIT_NAMES:
        if pattern.search(Path(name).name.lower()):
            return split
    raise UserError(f"{spec!r}: the name of {name!r} has neither train nor val, so its split is not known; rename it")


def _shard(file: File) -> ShardFile:
    path = Path(file.path)
    with path.open("rb") as opened:
        magic, version, tokens = np.frombuffer(opened.read(12).ljust(12, b"\0"), "<i4")
    if magic != _MAGIC:
        if not file.size or file.size % _ITEM_BYTES:
            raise UserError(f"{path} has {file.size} bytes: not whole tokens of uint16; it is damaged")
        return ShardFile(path, file.size // _ITEM_BYTES)
    if version != _VERSION:
        raise UserError(f"{path} is an llm.c file of version {version}; expected version {_VERSION}, of uint16 tokens")
    if file.size != _HEADER_BYTES + tokens * _ITEM_BYTES or not tokens:
        raise UserError(
            f"{path} has {file.size} bytes, and its header says {tokens} tokens, "
            f"{_HEADER_BYTES + tokens * _ITEM_BYTES} bytes; it is damaged"
        )
    return ShardFile(path, int(tokens), _HEADER_BYTES)
