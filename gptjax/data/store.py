"""The token store: a tokenised corpus on disk, built in two passes over its documents.

STORE/manifest.json    what it is made of and how; counts and sha256 of every file
STORE/tokenizer.json   Hugging Face form
STORE/SPLIT/           tokens and documents, see `gptjax.data.shards`
"""

import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from gptjax.data.documents import Document
from gptjax.data.shards import DOCUMENTS, SplitWriter, TokenSplit, file_sha256
from gptjax.data.sources import Source
from gptjax.data.splits import SPLITS, Census, Fractions, Segment, Splitter
from gptjax.data.tokenizers import Tokenizer, build_tokenizer
from gptjax.errors import UserError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"

Progress = Callable[[str, int, int | None], None]

_BATCH_CHARACTERS = 4_000_000
_MAX_UINT16_VOCAB = 1 << 16


class Store:
    """A token store that was opened or built.

    Attributes:
      directory: where it is.
      manifest: the content of manifest.json.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any]):
        self.directory = directory
        self.manifest = manifest

    @property
    def fingerprint(self) -> str:
        """sha256 over the ids and texts of all documents, whatever the tokenizer."""
        return self.manifest["source_fingerprint"]

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits that have documents."""
        return tuple(self.manifest["splits"])

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_file(self.directory / TOKENIZER)

    def split(self, name: str) -> TokenSplit:
        """The split `name`. Raises UserError where the store has none."""
        if name not in self.manifest["splits"]:
            raise UserError(
                f"the token store {self.directory} has no split {name!r}; it has {', '.join(self.splits)}. "
                f"Build it with a {name} fraction above 0"
            )
        return TokenSplit(self.directory / name, name, self.manifest["dtype"], self.manifest["splits"][name])

    def verify(self) -> None:
        """Reads every file. Raises UserError naming the first whose sha256 is not the manifest's."""
        for name, split in self.manifest["splits"].items():
            expected = {shard["file"]: shard["sha256"] for shard in split["shards"]}
            for file, sha256 in (*expected.items(), (DOCUMENTS, split["documents_sha256"])):
                path = self.directory / name / file
                if (found := file_sha256(path)) != sha256:
                    raise _damaged(path, f"its sha256 is {found}, the manifest says {sha256}")
        if (found := self.tokenizer().sha256) != self.manifest["tokenizer"]["sha256"]:
            raise _damaged(self.directory / TOKENIZER, f"its sha256 is {found}")


def open_store(directory: str | Path) -> Store:
    """Opens a store, by its directory or as `store:DIR`, and checks that its files are there, whole.

    Raises:
      UserError: it is not a token store, of another format version, or a file is missing or has another size.
    """
    directory = Path(str(directory).removeprefix("store:")).expanduser().absolute()
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{directory} is not a token store: it has no {MANIFEST}; make one with gptjax prepare"
        ) from None
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from None
    if (version := manifest.get("format_version")) != FORMAT_VERSION:
        raise UserError(
            f"{directory} has format version {version}, expected {FORMAT_VERSION}; build it again"
        )
    itemsize = np.dtype(manifest["dtype"]).itemsize
    for name, split in manifest["splits"].items():
        for shard in split["shards"]:
            _check_size(directory / name / shard["file"], shard["tokens"] * itemsize)
        if not (directory / name / DOCUMENTS).is_file():
            raise _damaged(directory / name / DOCUMENTS, "it is missing")
    if not (directory / TOKENIZER).is_file():
        raise _damaged(directory / TOKENIZER, "it is missing")
    return Store(directory, manifest)


def build_store(
    source: Source,
    directory: str | Path,
    *,
    tokenizer: str | Tokenizer,
    split_by: str = "auto",
    validation_fraction: float = 0.05,
    test_fraction: float = 0.05,
    shard_tokens: int = 100_000_000,
    progress: Progress | None = None,
) -> Store:
    """Tokenises `source` into a new store at `directory`, which appears complete or not at all.

    Args:
      source: read twice; both readings must give the same documents.
      directory: must not exist, or be empty.
      tokenizer: a spec for `build_tokenizer`, or a tokenizer.
      split_by: "document" by a hash of each document; "position" by the order of the characters: the first of
        them train, then validation, then test, exact to the character; "auto" as the source says if it does,
        else "document" for 100 documents or more.
      validation_fraction: share of the documents or characters held out for validation.
      test_fraction: the same for testing.
      shard_tokens: most tokens in a file.
      progress: called as progress(pass, characters done, characters in all or None), pass "read" or
        "tokenize".

    Raises:
      UserError: the directory is taken, the corpus or its train or validation split is empty, or an option is
        wrong.
    """
    directory = Path(directory).expanduser().absolute()
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise UserError(
            f"cannot build a token store at {directory}: it exists; remove it or choose another directory"
        )
    if shard_tokens < 1:
        raise UserError(f"shard_tokens={shard_tokens}: expected at least 1")
    fractions = Fractions(validation_fraction, test_fraction)
    partial = directory.with_name(f".{directory.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir(parents=True)
    try:
        _write_store(source, partial, tokenizer, split_by, fractions, shard_tokens, progress or _no_progress)
        partial.replace(directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return open_store(directory)


def cached_store(
    source: Source, cache_dir: str | Path, *, tokenizer: str | Tokenizer, **options: Any
) -> Store:
    """The store of `source` below `cache_dir`, built on the first call with these options.

    Processes that ask at the same time build it once. Arguments and errors are those of `build_store`.
    """
    spec = tokenizer
    if isinstance(tokenizer, str) and tokenizer.startswith("hf:"):
        tokenizer = build_tokenizer(tokenizer)  # the files may change, so what identifies it is its content
    identity = {
        "format_version": FORMAT_VERSION,
        "source": source.key(),
        "tokenizer": tokenizer if isinstance(tokenizer, str) else tokenizer.sha256,
        **{name: value for name, value in options.items() if name != "progress"},
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    cache = Path(cache_dir).expanduser().absolute()
    cache.mkdir(parents=True, exist_ok=True)
    directory = cache / f"store-{digest}"
    with FileLock(cache / f"store-{digest}.lock"):
        if (directory / MANIFEST).exists():
            return open_store(directory)
        return build_store(source, directory, tokenizer=spec, **options)


class _Survey:
    """The first pass: counts the corpus and takes its fingerprint while the tokenizer is trained on it."""

    def __init__(self, source: Source, progress: Progress):
        self._source = source
        self._progress = progress
        self._digest = hashlib.sha256()
        self.census = Census()
        self.characters = 0
        self.empty_documents = 0

    def texts(self) -> Iterator[str]:
        for document in self._source.documents():
            text = document["text"]
            if not text:
                self.empty_documents += 1
                continue
            self.census.add(document)
            self.characters += len(text)
            if document.get("part", 0) == 0:
                # 0xff never occurs in UTF-8, so no other documents have these bytes.
                self._digest.update(b"\xff" + document["id"].encode() + b"\xff")
            self._digest.update(text.encode())
            self._progress("read", self.characters, None)
            yield text

    @property
    def fingerprint(self) -> str:
        return self._digest.hexdigest()


def _write_store(
    source: Source,
    directory: Path,
    tokenizer: str | Tokenizer,
    split_by: str,
    fractions: Fractions,
    shard_tokens: int,
    progress: Progress,
) -> None:
    survey = _Survey(source, progress)
    texts = survey.texts()
    spec = tokenizer if isinstance(tokenizer, str) else tokenizer.kind
    if isinstance(tokenizer, str):
        tokenizer = build_tokenizer(tokenizer, texts)
    for _ in texts:
        pass  # what the tokenizer did not need to see is still counted
    if not survey.characters:
        raise UserError(f"the source {source.spec!r} has no text: check the files it names")
    splitter = Splitter(split_by, fractions, survey.census)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= _MAX_UINT16_VOCAB else np.uint32)
    writers = {name: SplitWriter(directory / name, dtype.newbyteorder("<"), shard_tokens) for name in SPLITS}
    try:
        _tokenize(splitter.segments(_not_empty(source)), tokenizer, writers, survey.characters, progress)
    finally:
        for writer in writers.values():
            writer.close()
    splits = {name: writer.description() for name, writer in writers.items() if writer.starts}
    _check_splits(splits, survey, splitter, fractions)
    tokenizer.save(directory / TOKENIZER)
    manifest = {
        "format_version": FORMAT_VERSION,
        "source": source.spec,
        "source_fingerprint": survey.fingerprint,
        "cleaning": "none",
        "tokenizer": {"spec": spec, "sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size},
        "dtype": dtype.name,
        "decode_replacements": source.replaced,
        "empty_documents": survey.empty_documents,
        "split_by": splitter.method,
        "validation_fraction": fractions.validation,
        "test_fraction": fractions.test,
        "splits": splits,
    }
    (directory / MANIFEST).write_text(
        json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def _not_empty(source: Source) -> Iterator[Document]:
    return (document for document in source.documents() if document["text"])


def _tokenize(
    segments: Iterator[Segment],
    tokenizer: Tokenizer,
    writers: dict[str, SplitWriter],
    total_characters: int,
    progress: Progress,
) -> None:
    done = 0
    for batch in _batches(segments):
        texts = [segment.text for segment in batch]
        for segment, ids in zip(batch, tokenizer.encode_batch(texts), strict=True):
            if segment.starts_document:
                writers[segment.split].start_document(tokenizer.eot_id)
            writers[segment.split].add(segment.text, ids)
        done += sum(map(len, texts))
        progress("tokenize", done, total_characters)
    if done != total_characters:
        raise UserError(
            f"the source had {total_characters} characters when it was first read, then {done}; "
            "build the token store when nothing writes to its files"
        )


def _batches(segments: Iterator[Segment]) -> Iterator[list[Segment]]:
    """Consecutive segments of about `_BATCH_CHARACTERS` together: enough to keep every core busy."""
    batch: list[Segment] = []
    characters = 0
    for segment in segments:
        batch.append(segment)
        characters += len(segment.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _check_splits(splits: dict[str, Any], survey: _Survey, splitter: Splitter, fractions: Fractions) -> None:
    for name, wanted in (("train", True), ("validation", fractions.validation > 0)):
        if wanted and name not in splits:
            documents = sum(survey.census.documents.values())
            raise UserError(
                f"the {name} split is empty: {documents} documents with {survey.characters} characters were "
                f"split by {splitter.method} with data.validation_fraction={fractions.validation}, "
                f"data.test_fraction={fractions.test}; use data.split_by=position, or more text"
            )


def _no_progress(stage: str, done: int, total: int | None) -> None:
    pass


def _check_size(path: Path, num_bytes: int) -> None:
    if not path.is_file():
        raise _damaged(path, "it is missing")
    if (size := path.stat().st_size) != num_bytes:
        raise _damaged(path, f"it has {size} bytes, the manifest says {num_bytes}")


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"the token store is damaged at {path}: {reason}; remove the store and build it again")
