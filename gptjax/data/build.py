"""Building a token store: the same four stages on one machine and on many.

1. Each piece of the source is read and cleaned (`clean_stage`).
2. One pass decides which documents stay and which split each goes to (`select_stage`); the tokenizer is
trained. 3. The text of each piece becomes tokens (`tokenize_stage`).
4. The pieces are joined, in order, into shards, with manifest and data card.

What is in the store depends on the source and the options alone. Each stage leaves files in a work directory
beside the store, so a build that was killed goes on where it stopped.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

import gptjax
from gptjax.data import card
from gptjax.data.clean_stage import SUMMARY, CleanItem, CleanStage, read_documents
from gptjax.data.cleaning import Cleaner
from gptjax.data.documents import content
from gptjax.data.files import find_files, read_json, whole_directory
from gptjax.data.runners import Runner, open_runner
from gptjax.data.select_stage import Selection, read_segments, select
from gptjax.data.shards import SplitWriter
from gptjax.data.sources import Piece, Source
from gptjax.data.splits import SPLITS, Fractions
from gptjax.data.store import FORMAT_VERSION, MANIFEST, TOKENIZER, Store, open_store
from gptjax.data.tokenize_stage import TokenizeItem, TokenizeStage
from gptjax.data.tokenizers import Tokenizer, build_tokenizer
from gptjax.errors import UserError

DTYPES = ("auto", "uint16", "uint32")
Progress = Callable[[str, int, int | None], None]

_SAMPLE_PIECES = 16
_SAMPLE_CHARACTERS = 400_000
_EXECUTION = ("progress", "runner", "workers", "beam_options")  # options that do not change what is built


@dataclass(frozen=True)
class Options:
    """How a store is built.

    Attributes:
      cleaning: profile of `gptjax.data.cleaning.Cleaner`.
      cleaning_options: its options.
      deduplicate: "none", "exact", or "near" for exact and near duplicates.
      near_threshold: Jaccard similarity of word 5-grams from which on documents are near duplicates.
      decontaminate: globs of JSONL files of evaluation sets.
      split_by: "document" by a hash of each document; "position" by the order of the characters: the first of
        them train, then validation, then test, exact to the character; "auto" as the source says if it does,
        else "document" for 100 documents or more.
      validation_fraction: share of the documents or characters held out for validation.
      test_fraction: the same for testing.
      shard_tokens: most tokens in a file.
      dtype: of the tokens; "auto" is uint16 where the vocabulary fits.
    """

    cleaning: str = "none"
    cleaning_options: dict[str, Any] | None = None
    deduplicate: str = "none"
    near_threshold: float = 0.8
    decontaminate: tuple[str, ...] = ()
    split_by: str = "auto"
    validation_fraction: float = 0.05
    test_fraction: float = 0.05
    shard_tokens: int = 100_000_000
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if self.shard_tokens < 1:
            raise UserError(f"shard_tokens={self.shard_tokens}: expected at least 1")
        if self.dtype not in DTYPES:
            raise UserError(f"dtype={self.dtype!r}: expected one of {', '.join(DTYPES)}")

    @property
    def fractions(self) -> Fractions:
        return Fractions(self.validation_fraction, self.test_fraction)


def build_store(
    source: Source,
    directory: str | Path,
    *,
    tokenizer: str | Tokenizer,
    runner: str = "local",
    workers: int = 0,
    beam_options: Sequence[str] = (),
    progress: Progress | None = None,
    **options: Any,
) -> Store:
    """Makes a token store of `source` at `directory`, which appears complete or not at all.

    Args:
      directory: must not exist, or be empty. What is done is kept in a hidden directory beside it until it is
        complete; called again, the build continues from there.
      tokenizer: a spec for `build_tokenizer`, or a tokenizer.
      runner: "local" or "beam"; see `gptjax.data.runners`.
      workers: processes of the local runner; 0 for one a core.
      beam_options: flags for Beam's pipeline.
      progress: called as progress(stage, bytes done, bytes in all), stage one of "clean", "select",
        "tokenize", "assemble".
      options: those of `Options`.

    Raises:
      UserError: the directory is taken, the corpus or its train or validation split is empty, a document
      cannot
        be read, or an option is wrong.
      RunError: a worker process died.
    """
    directory = Path(directory).expanduser().absolute()
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise UserError(f"cannot build a token store at {directory}: it exists; remove it or choose another directory")
    build = _Build(source, tokenizer, Options(**options), work_directory(directory), progress or _no_progress)
    build.work.mkdir(parents=True, exist_ok=True)
    lock = FileLock(build.work / "lock")
    try:
        with lock.acquire(timeout=0):
            build.run(open_runner(runner, workers=workers, beam_options=beam_options, directory=build.work))
            build.store.replace(directory)
            shutil.rmtree(build.work)
    except Timeout:
        raise UserError(f"{directory} is being built by another process: wait for it") from None
    except BaseException:
        if len(build.pieces) <= 1:  # nothing that would be saved
            shutil.rmtree(build.work, ignore_errors=True)
        raise
    return open_store(directory)


def work_directory(directory: Path) -> Path:
    """Where the build of the store `directory` keeps what is done."""
    return directory.with_name(f".{directory.name}.building")


def cached_store(source: Source, cache_dir: str | Path, *, tokenizer: str | Tokenizer, **options: Any) -> Store:
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
        **{name: value for name, value in options.items() if name not in _EXECUTION},
    }
    cache = Path(cache_dir).expanduser().absolute()
    cache.mkdir(parents=True, exist_ok=True)
    directory = cache / f"store-{_digest(identity)}"
    with FileLock(cache / f"{directory.name}.lock"):
        if (directory / MANIFEST).exists():
            return open_store(directory)
        return build_store(source, directory, tokenizer=spec, **options)


class _Build:
    """The stages of one build, and where their files are."""

    def __init__(self, source: Source, tokenizer: str | Tokenizer, options: Options, work: Path, progress: Progress):
        self.source = source
        self.tokenizer_spec = tokenizer
        self.options = options
        self.fractions = options.fractions
        self.cleaner = Cleaner(options.cleaning, options=options.cleaning_options)
        self.evaluation_sets = [file for pattern in options.decontaminate for file in find_files(pattern, pattern)]
        self.work = work
        self.store = work / "store"
        self.pieces: list[Piece] = source.pieces()
        self.progress = progress

    def run(self, runner: Runner) -> None:
        """Leaves the whole store in `self.store`."""
        shutil.rmtree(self.store, ignore_errors=True)
        cleaned = self._clean(runner)
        self.progress("select", 0, 1)
        segments = [self.work / "segments" / f"{number:05d}.jsonl" for number in range(len(cleaned))]
        (self.work / "segments").mkdir(exist_ok=True)
        selection = select(
            cleaned,
            segments,
            deduplicate=self.options.deduplicate,
            near_threshold=self.options.near_threshold,
            split_by=self.options.split_by,
            fractions=self.fractions,
        )
        summary = card.merge_summaries([read_json(directory / SUMMARY) for directory in cleaned])
        self.progress("select", 1, 1)
        self._check_text(selection, summary)
        dealt = [hashlib.sha256(path.read_bytes()).hexdigest() for path in segments]
        tokenizer, template = self._tokenizer(cleaned, segments, dealt, selection.has_dialogues)
        stage = TokenizeStage(tokenizer, self._dtype(tokenizer), template)
        tokenized = self._tokenize(runner, stage, cleaned, segments, dealt)
        self.progress("assemble", 0, 1)
        with whole_directory(self.store) as directory:
            self._assemble(directory, stage, cleaned, segments, tokenized, selection, summary)
        self.progress("assemble", 1, 1)

    def _clean(self, runner: Runner) -> list[Path]:
        stage = CleanStage(
            self.source,
            self.cleaner,
            self.options.deduplicate,
            tuple(file.path for file in self.evaluation_sets),
        )
        identity = {
            "version": gptjax.__version__,
            "spec": self.source.spec,
            "on_error": self.source.faults.on_error,
            "decode_errors": getattr(self.source, "decode_errors", ""),
            "cleaning": [self.cleaner.steps, self.cleaner.options],
            "deduplicate": self.options.deduplicate,
            "decontaminate": self.evaluation_sets,
        }
        items = [
            CleanItem(piece, self.work / "cleaned" / f"{number:05d}-{_digest([identity, piece])}")
            for number, piece in enumerate(self.pieces)
        ]
        self._run_stage(runner, "clean", stage, items)
        return [item.directory for item in items]

    def _tokenize(
        self,
        runner: Runner,
        stage: TokenizeStage,
        cleaned: list[Path],
        segments: list[Path],
        dealt: list[str],
    ) -> list[Path]:
        identity = [stage.tokenizer.sha256, stage.dtype, stage.template]
        items = [
            TokenizeItem(directory, path, self.work / "tokens" / _digest([identity, directory.name, sha256]))
            for directory, path, sha256 in zip(cleaned, segments, dealt, strict=True)
        ]
        self._run_stage(runner, "tokenize", stage, items)
        return [item.directory for item in items]

    def _run_stage(self, runner: Runner, name: str, stage: Any, items: Sequence[Any]) -> None:
        """Runs a stage on the items that are not done, one for each piece."""
        num_bytes = {item.directory: piece.num_bytes for item, piece in zip(items, self.pieces, strict=True)}
        total = sum(num_bytes.values())
        todo = [item for item in items if not item.directory.is_dir()]
        done = total - sum(num_bytes[item.directory] for item in todo)
        self.progress(name, done, total)

        def finished(item: Any) -> None:
            nonlocal done
            done += num_bytes[item.directory]
            self.progress(name, done, total)

        if todo:
            todo[0].directory.parent.mkdir(exist_ok=True)
            runner.run(stage, todo, finished)

    def _check_text(self, selection: Selection, summary: dict[str, Any]) -> None:
        if selection.characters:
            return
        if summary["documents"] - summary["empty_documents"] <= 0:
            raise UserError(f"the source {self.source.spec!r} has no text: check the files it names")
        raise UserError(
            f"nothing is left of the {summary['documents']} documents of {self.source.spec!r} after "
            f"cleaning={self.options.cleaning!r} and decontamination; choose other steps"
        )

    def _tokenizer(
        self, cleaned: list[Path], segments: list[Path], dealt: list[str], has_dialogues: bool
    ) -> tuple[Tokenizer, dict[str, Any] | None]:
        spec = self.tokenizer_spec
        if isinstance(spec, Tokenizer):
            tokenizer = spec
        elif spec.startswith("hf:"):
            tokenizer = build_tokenizer(spec)
        else:
            names = [directory.name for directory in cleaned]
            path = self.work / f"tokenizer-{_digest([spec, names, dealt])}" / TOKENIZER
            if not path.exists():
                with whole_directory(path.parent) as directory:
                    build_tokenizer(spec, selected_texts(cleaned, segments)).save(directory / TOKENIZER)
            tokenizer = Tokenizer.from_file(path)
        if not has_dialogues:
            return tokenizer, None
        from gptjax.data.templates import ChatTemplate

        beside = Path(spec[3:]).expanduser() if isinstance(spec, str) and spec.startswith("hf:") else None
        template = ChatTemplate.of_tokenizer(tokenizer, beside if beside and beside.is_dir() else None)
        return template.prepare_tokenizer(tokenizer), template.to_json()

    def _dtype(self, tokenizer: Tokenizer) -> str:
        fits = tokenizer.vocab_size <= np.iinfo(np.uint16).max + 1
        if self.options.dtype == "uint16" and not fits:
            raise UserError(f"dtype=uint16 has no room for the tokenizer's {tokenizer.vocab_size} ids; use dtype=auto")
        return ("uint16" if fits else "uint32") if self.options.dtype == "auto" else self.options.dtype

    def _assemble(
        self,
        directory: Path,
        stage: TokenizeStage,
        cleaned: list[Path],
        segments: list[Path],
        tokenized: list[Path],
        selection: Selection,
        summary: dict[str, Any],
    ) -> None:
        summaries = [read_json(path / SUMMARY) for path in tokenized]
        splits = self._join(directory, stage, tokenized, summaries)
        self._check_splits(splits, selection)
        stage.tokenizer.save(directory / TOKENIZER)
        digests = [piece["sha256"] for piece in summaries]
        fingerprint = hashlib.sha256("".join(digests).encode()).hexdigest() if len(digests) > 1 else digests[0]
        spec = self.tokenizer_spec
        manifest = {
            "format_version": FORMAT_VERSION,
            "source": self.source.spec,
            "source_fingerprint": fingerprint,
            "cleaning": self.options.cleaning,
            "cleaning_steps": list(self.cleaner.steps),
            "invertible": self.cleaner.invertible,
            "deduplicate": self.options.deduplicate,
            "duplicates": len(selection.duplicates),
            "decontaminate": list(self.options.decontaminate),
            "contaminated": len(summary["contaminated"]),
            "tokenizer": {
                "spec": spec if isinstance(spec, str) else spec.kind,
                "sha256": stage.tokenizer.sha256,
                "vocab_size": stage.tokenizer.vocab_size,
            },
            "chat_template": stage.template,
            "dtype": stage.dtype,
            "decode_replacements": summary["decode_replacements"],
            "skipped": summary["skipped"],
            "empty_documents": summary["empty_documents"],
            "split_by": selection.method,
            "validation_fraction": self.fractions.validation,
            "test_fraction": self.fractions.test,
            "splits": splits,
        }
        used = sum(np.load(path / "used.npy") for path in tokenized)
        card.write(directory, manifest, summary, selection, stage.tokenizer, used, _sample(cleaned, segments))
        (directory / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def _join(
        self, directory: Path, stage: TokenizeStage, tokenized: list[Path], summaries: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """Joins the tokens of the pieces into shards; returns the description of each split."""
        has_mask = stage.template is not None
        splits: dict[str, Any] = {}
        for split in SPLITS:
            writer = SplitWriter(directory / split, np.dtype(stage.dtype), self.options.shard_tokens, has_mask=has_mask)
            for path, summary in zip(tokenized, summaries, strict=True):
                if about := summary["splits"].get(split):
                    writer.add(path, split, about["continued_bytes"], about["characters"])
            if writer.num_documents:
                splits[split] = writer.finish()
        return splits

    def _check_splits(self, splits: dict[str, Any], selection: Selection) -> None:
        for name, wanted in (("train", True), ("validation", self.fractions.validation > 0)):
            if wanted and name not in splits:
                raise UserError(
                    f"the {name} split is empty: {selection.documents} documents with {selection.characters} "
                    f"characters were split by {selection.method} with "
                    f"data.validation_fraction={self.fractions.validation}, "
                    f"data.test_fraction={self.fractions.test}; use data.split_by=position, or more text"
                )


def selected_texts(cleaned: Sequence[Path], segments: Sequence[Path]) -> Iterator[str]:
    """The texts of the documents that stay, in order."""
    for directory, path in zip(cleaned, segments, strict=True):
        for document, dealt in zip(read_documents(directory), read_segments(path), strict=True):
            if dealt:
                yield content(document)


def _sample(cleaned: Sequence[Path], segments: Sequence[Path]) -> Iterator[str]:
    """Texts from the start of a few pieces, evenly spread over the corpus."""
    pieces = range(0, len(cleaned), -(-len(cleaned) // _SAMPLE_PIECES))
    for piece in pieces:
        characters = 0
        for text in selected_texts(cleaned[piece : piece + 1], segments[piece : piece + 1]):
            yield text[: _SAMPLE_CHARACTERS // len(pieces)]
            characters += len(text)
            if characters >= _SAMPLE_CHARACTERS // len(pieces):
                break


def _digest(identity: Any) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _no_progress(stage: str, done: int, total: int | None) -> None:
    pass
