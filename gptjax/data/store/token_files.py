"""`tokens:GLOB`: token files of other projects, read as they are.

nanoGPT writes raw little-endian uint16, others uint32. llm.c writes a header of 256 int32 (magic, version, number of
tokens) before uint16 of GPT-2 (20240520, 1) or uint32 of Llama 3 (20240801, 7). In all of
them, documents are separated only by the end-of-text token at their beginning or end.
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
from gptjax.files import beside, save_array

_HEADERS = {20240520: (1, "uint16"), 20240801: (7, "uint32")}  # magic: version, type of the ids
_HEADER_BYTES = 256 * 4
# First bytes of files of other kinds, which would otherwise be read as tokens.
_OTHER_KINDS = {
    b"\x93NUMPY": "an array of NumPy's (.npy): write its ids with array.astype('uint16').tofile(FILE)",
    b"PK\x03\x04": "a ZIP archive, such as NumPy's .npz or PyTorch's .pt",
    b"\x1f\x8b\x08": "compressed with gzip: unpack it, since token files are mapped into memory",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: unpack it, since token files are mapped into memory",
    b"\xfd7zXZ\x00": "compressed with xz: unpack it, since token files are mapped into memory",
    b"MMIDIDX\x00\x00": "an index of Megatron-LM's: name its .bin file, whose ids have no header",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"\x80\x04\x95": "a pickle of Python's",
    b"\x89HDF": "an HDF5 file",
    b"GGUF": "a model in GGUF",
}
_LOOK_BYTES = 1 << 16
_CHUNK_TOKENS = 1 << 22
_SPLIT_NAMES = (
    ("validation", re.compile(r"(?<![a-z])val(id|idation)?(?![a-z])")),
    ("test", re.compile(r"(?<![a-z])test(?![a-z])")),
    ("train", re.compile(r"(?<![a-z])train(ing)?(?![a-z])")),
)


def open_token_files(spec: str, tokenizer: Tokenizer, cache: Path, *, dtype: str = "auto") -> "TokenFiles":
    """Opens the files of `tokens:GLOB`, which are put into splits by their names: train, val, validation,
    test.

    Args:
      tokenizer: the one that made the tokens; the files do not say.
      cache: directory for the table of documents, which is found by reading every token once.
      dtype: of ids without a header: "uint16", "uint32", or "auto", which is uint32 where the tokenizer has more ids
        than a uint16 can hold.

    Raises:
      UserError: nothing matches, a name does not say its split, a file is damaged, has another format or another type
        of ids, or the tokenizer has more ids than the type can hold.
    """
    files = find_files(spec, spec.removeprefix("tokens:"))
    if remote := [file.path for file in files if is_remote(file.path)]:
        raise UserError(f"{spec!r}: {remote[0]} is not on this machine; token files are mapped into memory: copy them")
    large = tokenizer.vocab_size > np.iinfo(np.uint16).max + 1
    found = {file.path: _shard(Path(file.path), file.size, dtype, large) for file in files}
    dtypes = {dtype for _, dtype in found.values()}
    if len(dtypes) > 1:
        named = ", ".join(f"{Path(path).name} {dtype}" for path, (_, dtype) in list(found.items())[:4])
        raise UserError(f"{spec!r}: the files hold ids of different types ({named}); name those of one type")
    if large and dtypes == {"uint16"}:
        raise UserError(
            f"{spec!r}: token files of uint16 cannot hold the {tokenizer.vocab_size} ids of the tokenizer; "
            "name the one that they were made with, for example --config.tokenizer=hf:gpt2"
        )
    return TokenFiles(spec, files, [shard for shard, _ in found.values()], dtypes.pop(), tokenizer, cache)


class TokenFiles(Store):
    """Token files as a store, without a copy of them."""

    def __init__(
        self,
        spec: str,
        files: Sequence[File],
        shards: Sequence[ShardFile],
        dtype: str,
        tokenizer: Tokenizer,
        cache: Path,
    ):
        self._tokenizer = tokenizer
        self._cache = cache
        self._shards: dict[str, list[ShardFile]] = {}
        for file, shard in zip(files, shards, strict=True):
            self._shards.setdefault(_split_name(spec, file.name), []).append(shard)
        if "train" not in self._shards:
            raise UserError(f"{spec!r}: no file has train in its name; there are {', '.join(f.name for f in files)}")
        identity = hashlib.sha256()
        for file in files:
            identity.update(f"{file.name}\0{file.size}\0{file.version}\n".encode("utf-8", "surrogateescape"))
        if dtype != "uint16":
            identity.update(dtype.encode())
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
            "dtype": dtype,
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
        return ForeignSplit(name, self._shards[name], self.manifest["dtype"], self._tokenizer, table)

    def verify(self) -> None:
        """Reads every token. Raises UserError if one is not in the vocabulary; there are no checksums."""
        for name in self.splits:
            self.split(name).find_documents()


class ForeignSplit(TokenSplit):
    """A split of files that have no table of documents: the table is made from the end-of-text tokens and kept."""

    def __init__(self, name: str, shards: Sequence[ShardFile], dtype: str, tokenizer: Tokenizer, table: Path):
        self.name = name
        self.has_mask = False
        self.num_tokens = sum(shard.tokens for shard in shards)
        self._tokens = ShardReader(shards, dtype)
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
        partial = beside(self._table)
        try:
            save_array(partial, documents)
            partial.replace(self._table)
        finally:
            partial.unlink(missing_ok=True)
        return documents

    def find_documents(self) -> Int64[np.ndarray, "documents 2"]:
        """The table of documents. Raises UserError at an id that the vocabulary does not have."""
        starts, bytes_before = [], []
        tokens = num_bytes = 0
        for number, file in enumerate(self._tokens.files):
            array = self._tokens.array(number)
            for begin in range(0, len(array), _CHUNK_TOKENS):
                chunk = array[begin : begin + _CHUNK_TOKENS]
                if chunk.max() >= len(self._token_bytes):
                    place = int(np.argmax(chunk >= len(self._token_bytes)))
                    raise UserError(
                        f"{file.path} has the token id {chunk[place]} at token {begin + place}, and the tokenizer has "
                        f"only {len(self._token_bytes)} ids: name the tokenizer that the file was made with, or the "
                        f"type of its ids, --config.data.token_dtype, which is {array.dtype.name} here"
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


def _shard(path: Path, size: int, dtype: str, large: bool) -> tuple[ShardFile, str]:
    """(position of the tokens in a file, their type). Raises UserError."""
    with path.open("rb") as opened:
        head = opened.read(_LOOK_BYTES)
    if kind := next((kind for magic, kind in _OTHER_KINDS.items() if head.startswith(magic)), None):
        raise UserError(f"{path} is not a token file: it is {kind}")
    numbers = np.frombuffer(head[:_HEADER_BYTES].ljust(_HEADER_BYTES, b"\0"), "<i4")
    if numbers[0] in _HEADERS:
        return _shard_with_header(path, size, *map(int, numbers[:3]))
    if size >= _HEADER_BYTES and _is_date(int(numbers[0])) and not numbers[8:].any():
        raise UserError(
            f"{path} begins like an llm.c file, but its magic number {numbers[0]} is not one of token files "
            f"({', '.join(map(str, _HEADERS))})"
        )
    if dtype == "auto":
        dtype = "uint32" if large else "uint16"
        _check_guess(path, head, dtype)
    item = np.dtype(dtype).itemsize
    if not size or size % item:
        raise UserError(f"{path} has {size} bytes: not whole tokens of {dtype}; it is damaged, or of another type")
    return ShardFile(path, size // item), dtype


def _shard_with_header(path: Path, size: int, magic: int, version: int, tokens: int) -> tuple[ShardFile, str]:
    known, dtype = _HEADERS[magic]
    if version != known:
        raise UserError(
            f"{path} is an llm.c file of version {version}; expected version {known}, of {dtype} tokens, for {magic}"
        )
    expected = _HEADER_BYTES + tokens * np.dtype(dtype).itemsize
    if tokens <= 0 or size != expected:
        raise UserError(
            f"{path} has {size} bytes, and its header says {tokens} tokens of {dtype}, {expected} bytes; it is damaged"
        )
    return ShardFile(path, tokens, _HEADER_BYTES), dtype


def _is_date(number: int) -> bool:
    """Whether a number is a date such as 20240520: llm.c numbers its formats by dates."""
    year, month, day = number // 10000, number // 100 % 100, number % 100
    return 2023 <= year <= 2035 and 1 <= month <= 12 and 1 <= day <= 31


def _check_guess(path: Path, head: bytes, dtype: str) -> None:
    """Raises UserError if ids without a header are most likely of another type than `dtype`."""
    item = np.dtype(dtype).itemsize
    values = np.frombuffer(head[: len(head) // (2 * item) * 2 * item], f"<u{item}")
    first, second = values[::2], values[1::2]
    if len(first) < 4 or not values.any():
        return
    wider = f"uint{16 * item}"
    if not second.any():
        advice = "--config.data.token_dtype=uint32" if wider == "uint32" else f"write them as {dtype}"
        if wider == "uint32" and not values[2::4].any() and len(values) >= 16:
            wider, advice = "int64", "write them as uint16 or uint32"
        other = f", or --config.data.token_dtype={dtype} if they are"
        raise UserError(f"{path}: every second {dtype} is 0, so the ids are not {dtype} but {wider}: {advice}{other}")
    if not first.any() or (dtype == "uint32" and not (values & 0xFFFF).any()):
        raise UserError(
            f"{path}: the ids seem to be of another type, or with the highest byte first; write them as little-endian "
            f"uint16 or uint32, or name their type: --config.data.token_dtype={dtype}"
        )
