"""The token store: a tokenised corpus on disk.

STORE/manifest.json      what it is made of and how; counts and sha256 of every file
STORE/tokenizer.json     Hugging Face form
STORE/card.json          the data card, for programs; card.md is the same for people
STORE/duplicates.jsonl   the documents that were left out because they repeat another, if any
STORE/SPLIT/             tokens and documents, see `gptjax.data.store.shards`; for dialogues also rows-of-N.npz, the
                         cached packing into rows of N tokens (may be deleted)

`gptjax.data.building.build` makes it.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from gptjax import json_text
from gptjax.buckets import is_url
from gptjax.data.store import remote
from gptjax.data.store.shards import DOCUMENTS, KINDS, TokenSplit, file_sha256
from gptjax.data.tokenization.tokenizer import Tokenizer
from gptjax.errors import UserError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
CARD = "card.json"
_ANEW = "remove the store and build it again"
_OF_SHARD = ("sha256", "mask_sha256")


class Store:
    """A token store that was opened or built.

    Attributes:
      directory: where it is.
      manifest: the content of manifest.json.
      url: its URL, if `directory` has only copies of the files read so far; else "".
    """

    url = ""

    def __init__(self, directory: Path, manifest: dict[str, Any], url: str = ""):
        self.directory = directory
        self.manifest = manifest
        self.url = url

    @property
    def fingerprint(self) -> str:
        """sha256 over the ids and texts of all documents, whatever the tokenizer."""
        return self.manifest["source_fingerprint"]

    @property
    def layout(self) -> str:
        """sha256 over the contents of the splits; it changes with the fractions and with what is left out."""
        parts = ("documents", "tokens", "bytes", "characters", "documents_sha256", "kinds_sha256")
        told = {name: [split.get(part) for part in parts] for name, split in self.manifest["splits"].items()}
        return _sha256_of([told, self.manifest["tokenizer"]["sha256"]])

    @property
    def content(self) -> str:
        """sha256 over the tokens of all splits, whatever the ids of the documents; "" if it is unknown."""
        told = [
            [name, split["documents_sha256"], *(shard.get(key) for shard in split["shards"] for key in _OF_SHARD)]
            for name, split in sorted(self.manifest["splits"].items())
            if "shards" in split
        ]
        return _sha256_of([told, self.manifest["dtype"], self.manifest["tokenizer"]["sha256"]]) if told else ""

    @property
    def num_bytes(self) -> int:
        """Bytes of the tokens of all splits."""
        itemsize = np.dtype(self.manifest["dtype"]).itemsize
        return itemsize * sum(split["tokens"] for split in self.manifest["splits"].values())

    @property
    def notes(self) -> list[str]:
        """What was not read of the source, from the data card: "40 x key 'rejected' of records, ..."."""
        return [f"{count:,} x {what}" for what, count in sorted(self._card("notes", {}).items(), key=lambda n: -n[1])]

    @property
    def removed_by_cleaning(self) -> dict[str, int]:
        """{cleaning step: documents that it removed}, from the data card, without steps that removed none."""
        steps = self._card("cleaning", {}).get("steps", [])
        removed = {step["step"]: step["documents_in"] - step["documents_out"] for step in steps}
        return {name: count for name, count in removed.items() if count}

    def _card(self, name: str, default: Any) -> Any:
        """A part of the data card; the default if there is no card or it lacks that part."""
        try:
            card = json_text.read_json(self.directory / CARD)
        except UserError:
            return default
        part = card.get(name) if isinstance(card, dict) else None
        return part if isinstance(part, type(default)) else default

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits that have documents."""
        return tuple(self.manifest["splits"])

    def tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises UserError if its file is damaged."""
        path = self.directory / TOKENIZER
        json_text.read_json(path)
        return Tokenizer.from_file(path)

    def split(self, name: str) -> TokenSplit:
        """The split `name`. Raises UserError if the store lacks it."""
        self._check_split(name)
        url = self.url and f"{self.url}/{name}"
        return TokenSplit(self.directory / name, name, self.manifest["dtype"], self.manifest["splits"][name], url)

    def _check_split(self, name: str) -> None:
        if name not in self.manifest["splits"]:
            raise UserError(
                f"the token store {self.url or self.directory} has no split {name!r}; it has {', '.join(self.splits)}. "
                f"Build it with a {name} fraction above 0"
            )

    def verify(self) -> None:
        """Reads every file. Raises UserError that names the first whose sha256 differs from the manifest's."""
        for name, split in self.manifest["splits"].items():
            expected = {shard["file"]: shard["sha256"] for shard in split["shards"]}
            expected |= {shard["mask"]: shard["mask_sha256"] for shard in split["shards"] if "mask" in shard}
            expected |= {DOCUMENTS: split["documents_sha256"]}
            expected |= {KINDS: split["kinds_sha256"]} if "kinds_sha256" in split else {}
            for file, sha256 in expected.items():
                path = self.directory / name / file
                if self.url and not path.is_file():
                    remote.fetch(f"{self.url}/{name}/{file}", path, sha256)
                if (found := file_sha256(path)) != sha256:
                    raise _damaged(path, f"its sha256 is {found}, the manifest says {sha256}")
        if (found := self.tokenizer().sha256) != self.manifest["tokenizer"]["sha256"]:
            raise _damaged(self.directory / TOKENIZER, f"its sha256 is {found}")


def open_store(directory: str | Path) -> Store:
    """Opens a store by its directory, its URL or `store:DIR`, and checks that its files are there and complete.

    Raises:
      UserError: it is not a token store, of another format version, or a file is missing or has another size.
    """
    place, url, sizes = str(directory).removeprefix("store:"), "", None
    if is_url(place):
        url = place.rstrip("/")
        directory, sizes = remote.mirrored(url, MANIFEST)
    else:
        directory = Path(place).expanduser().absolute()
    path = directory / MANIFEST
    if not path.exists():
        raise UserError(f"{directory} is not a token store: it has no {MANIFEST}; make one with gptjax prepare")
    try:
        manifest = json_text.read_json(path)
    except UserError as error:
        raise UserError(f"the token store is damaged: {error}; {_ANEW}") from None
    if not isinstance(manifest, dict):
        raise _damaged(path, "it is not an object")
    if (version := manifest.get("format_version")) != FORMAT_VERSION:
        raise UserError(f"{directory} has format version {version}, expected {FORMAT_VERSION}; build it again")
    try:
        _check_splits(directory, manifest, sizes)
    except (KeyError, TypeError, AttributeError):
        raise _damaged(path, "an entry is missing or of another kind") from None
    if not (directory / TOKENIZER).is_file():
        raise _damaged(directory / TOKENIZER, "it is missing")
    return Store(directory, manifest, url)


def _check_splits(directory: Path, manifest: dict[str, Any], sizes: dict[str, int] | None) -> None:
    """Raises UserError if a file of a split is missing or has another size.

    `sizes`: {name below the directory: bytes} of files that are not copied yet; None: look at the disk.
    """
    itemsize = np.dtype(manifest["dtype"]).itemsize
    for name, split in manifest["splits"].items():
        for shard in split["shards"]:
            _check_size(directory, f"{name}/{shard['file']}", shard["tokens"] * itemsize, sizes)
            if "mask" in shard:
                _check_size(directory, f"{name}/{shard['mask']}", shard["tokens"], sizes)
        for file in (DOCUMENTS, *([KINDS] if "kinds_sha256" in split else [])):
            _check_array(directory / name / file, split["documents"])


def _sha256_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _check_array(path: Path, rows: int) -> None:
    if not path.is_file():
        raise _damaged(path, "it is missing")
    try:
        found = len(np.load(path, mmap_mode="r"))
    except (OSError, ValueError, EOFError, TypeError):
        raise _damaged(path, "it is not a whole array") from None
    if found != rows:
        raise _damaged(path, f"it has {found} rows, the manifest says {rows} documents")


def _check_size(directory: Path, name: str, num_bytes: int, sizes: dict[str, int] | None) -> None:
    path = directory / name
    if not (path.is_file() if sizes is None else name in sizes):
        raise _damaged(path, "it is missing")
    if (size := path.stat().st_size if sizes is None else sizes[name]) != num_bytes:
        raise _damaged(path, f"it has {size} bytes, the manifest says {num_bytes}")


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"the token store is damaged at {path}: {reason}; {_ANEW}")
