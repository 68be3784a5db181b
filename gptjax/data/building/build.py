"""Building a token store: the same four stages on one machine and on many.

1. Each piece of the source is read and cleaned (`clean.py`).
2. One pass decides which documents stay and which split each goes to (`select.py`).
3. The tokenizer is trained if necessary, and the text of each piece becomes tokens (`tokenize.py`).
4. The pieces are joined, in order, into shards, with manifest and data card (`assemble.py`).

The content of the store depends on the source and the options alone. Each stage leaves files in a work directory
beside the store, so a killed build continues where it stopped.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

import gptjax
from gptjax.buckets import Bucket, cache, is_url
from gptjax.data.building import card, remains
from gptjax.data.building.assemble import assemble
from gptjax.data.building.clean import CLEAN_SUMMARY, CleanItem, CleanStage
from gptjax.data.building.options import Options
from gptjax.data.building.remains import LOCK
from gptjax.data.building.runners import Runner, open_runner
from gptjax.data.building.select import Selected, Selection, select, selected_texts
from gptjax.data.building.tokenize import TokenizeItem, TokenizeStage
from gptjax.data.cleaning.cleaner import Cleaner
from gptjax.data.sources.base import Piece, Source
from gptjax.data.sources.files import find_files
from gptjax.data.store import remote
from gptjax.data.store.shards import file_sha256
from gptjax.data.store.store import FORMAT_VERSION, MANIFEST, TOKENIZER, Store, open_store
from gptjax.data.tokenization.templates import ChatTemplate
from gptjax.data.tokenization.tokenizer import Tokenizer, build_tokenizer, check_spec
from gptjax.errors import UserError
from gptjax.files import about, expand, read_json, whole_directory, write_json

Progress = Callable[[str, int, int | None], None]

INPUTS = "inputs.json"  # in a store: its `build_identity`
_EXECUTION = ("progress", "runner", "workers", "beam_options")  # options that do not change what is built


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
      directory: a directory, or a URL (the store is then built in the cache); must not exist, or be empty. Finished
        stages are kept in a hidden directory beside it; called again, the build continues from there.
      tokenizer: a spec for `build_tokenizer`, or a tokenizer.
      runner: "local" or "beam"; see `gptjax.data.building.runners`.
      workers: processes of the local runner; 0 for one per core.
      beam_options: flags for Beam's pipeline.
      progress: called as progress(stage, bytes done, bytes in all), stage one of "clean", "select",
        "tokenize", "assemble".
      options: the fields of `Options`.

    Raises:
      UserError: the directory is taken (the store of the same source and options is returned), the corpus or its
        train or validation split is empty, a document cannot be read, or an option is wrong.
      RunError: a worker process died.
    """
    identity = build_identity(source, tokenizer, options)
    url = str(directory).rstrip("/") if is_url(directory) else ""
    if url and (there := _published(url, identity)):
        return there
    if url:
        cache().mkdir(parents=True, exist_ok=True)
    directory = Path(os.path.abspath(place_of(directory)))  # noqa: PTH100 (without its ..)
    work = work_directory(directory)
    if directory.is_dir() and _is_of(directory / INPUTS, identity):
        with contextlib.suppress(Timeout, OSError), FileLock(work / LOCK).acquire(timeout=0):
            shutil.rmtree(work)  # left by a build that was killed after its last stage
        return _finished(directory, url)
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise UserError(
            f"cannot build a token store at {directory}: it exists, and was not built from this source "
            "with these options; remove it or choose another directory"
        )
    check_spec(tokenizer)
    remains.sweep(directory.parent, but=work)
    build = _Build(source, tokenizer, Options(**options), work, progress or _no_progress)
    with remains.claimed(work, directory) as kept, about(work):
        try:
            build.run(open_runner(runner, workers=workers, beam_options=beam_options, directory=work))
        except BaseException:
            if len(build.pieces) > 1:  # with one piece, keeping it saves nothing
                kept()
            raise
        write_json(build.store / INPUTS, {"sha256": identity})
        build.store.replace(directory)
    return _finished(directory, url)


def place_of(directory: str | Path) -> Path:
    """Where a store is built: in its directory, or in the cache if that is a URL."""
    if not is_url(directory):
        return expand(directory)
    return cache() / f"built-{_digest(str(directory).rstrip('/'))}"


def _published(url: str, identity: str) -> Store | None:
    """The store at a URL, if it was built from the same source and options; None if the URL is empty."""
    bucket = Bucket(url)
    if not bucket.list():
        bucket.try_writing(MANIFEST)
        return None
    inputs = bucket.read(INPUTS)
    if inputs is not None and json.loads(inputs) == {
        "sha256": identity
    }:  # without a manifest, its upload was interrupted
        return open_store(url) if bucket.read(MANIFEST) is not None else None
    raise UserError(
        f"cannot build a token store at {url}: what is there was not built from this source with these options; "
        "remove it or choose another place"
    )


def _finished(directory: Path, url: str) -> Store:
    """The store that was built in a directory; for a URL, it is uploaded first."""
    if url:
        remote.publish(directory, url, first=INPUTS, last=MANIFEST)
    return open_store(url or directory)


def work_directory(directory: Path) -> Path:
    """Where the build of the store `directory` keeps finished stages."""
    return directory.with_name(f".{directory.name}.building")


def build_identity(source: Source, tokenizer: str | Tokenizer, options: Mapping[str, Any]) -> str:
    """A digest of everything that changes the content of the store."""
    if isinstance(tokenizer, str) and tokenizer.startswith("hf:"):
        tokenizer = build_tokenizer(tokenizer)  # its files may change, so the content identifies it
    return _digest(
        {
            "format_version": FORMAT_VERSION,
            "source": source.key(),
            "on_error": source.faults.on_error,
            "tokenizer": tokenizer if isinstance(tokenizer, str) else tokenizer.sha256,
            **{name: value for name, value in options.items() if name not in _EXECUTION},
        }
    )


def _is_of(path: Path, identity: str) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return read_json(path) == {"sha256": identity}
    return False


def cached_store(source: Source, cache_dir: str | Path, *, tokenizer: str | Tokenizer, **options: Any) -> Store:
    """The store of `source` below `cache_dir`, built on the first call with these options.

    Processes that ask at the same time build it once. Arguments and errors are those of `build_store`.
    """
    cache = expand(cache_dir).absolute()
    cache.mkdir(parents=True, exist_ok=True)
    directory = cache / f"store-{build_identity(source, tokenizer, options)}"
    with FileLock(cache / f"{directory.name}.lock"):
        if (directory / MANIFEST).exists():
            shutil.rmtree(work_directory(directory), ignore_errors=True)  # left by a build that was killed at its end
            remains.sweep(cache, but=cache)
            return open_store(directory)
        return build_store(source, directory, tokenizer=tokenizer, **options)


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
        summary = card.merge_summaries([read_json(directory / CLEAN_SUMMARY) for directory in cleaned])
        selection, selected = self._select(cleaned)
        self._check(selection, summary)
        self.progress("select", 1, 1)
        tokenizer, template = self._tokenizer(selected, selection.has_dialogues)
        stage = TokenizeStage(tokenizer, self._dtype(tokenizer), template)
        tokenized = self._tokenize(runner, stage, selected)
        self.progress("assemble", 0, 1)
        with whole_directory(self.store) as directory:
            assemble(
                directory,
                about=self._about(),
                summary=summary,
                selection=selection,
                selected=selected,
                stage=stage,
                tokenized=tokenized,
                shard_tokens=self.options.shard_tokens,
            )
        self.progress("assemble", 1, 1)

    def _clean(self, runner: Runner) -> list[Path]:
        stage = CleanStage(
            self.source,
            self.cleaner,
            self.options.deduplicate,
            tuple(file.path for file in self.evaluation_sets),
            self.fractions if self.options.cleaned_splits == "train" else None,
        )
        identity = {
            "version": gptjax.__version__,
            "spec": self.source.spec,
            "on_error": self.source.faults.on_error,
            "reading": getattr(self.source, "reading", ""),
            "cleaning": [self.cleaner.steps, self.cleaner.options],
            "deduplicate": self.options.deduplicate,
            "decontaminate": self.evaluation_sets,
            **({"kept_raw": stage.kept_raw} if stage.kept_raw else {}),
        }
        items = [
            CleanItem(piece, self.work / "cleaned" / f"{number:05d}-{_digest([identity, piece])}")
            for number, piece in enumerate(self.pieces)
        ]
        self._run_stage(runner, "clean", stage, items)
        return [item.directory for item in items]

    def _select(self, cleaned: list[Path]) -> tuple[Selection, list[Selected]]:
        folder = self.work / "segments"
        folder.mkdir(exist_ok=True)
        segments = [folder / f"{number:05d}.jsonl" for number in range(len(cleaned))]
        selection = select(
            cleaned,
            segments,
            deduplicate=self.options.deduplicate,
            near_threshold=self.options.near_threshold,
            split_by=self.options.split_by,
            fractions=self.fractions,
        )
        return selection, [Selected(*paths, file_sha256(paths[1])) for paths in zip(cleaned, segments, strict=True)]

    def _tokenize(self, runner: Runner, stage: TokenizeStage, selected: list[Selected]) -> list[Path]:
        identity = [stage.tokenizer.sha256, stage.dtype, stage.template]
        items = [
            TokenizeItem(
                piece.cleaned,
                piece.segments,
                self.work / "tokens" / _digest([identity, piece.cleaned.name, piece.sha256]),
            )
            for piece in selected
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

    def _check(self, selection: Selection, summary: dict[str, Any]) -> None:
        """Raises UserError if the train or the validation split is empty."""
        if not selection.characters and summary["documents"] > summary["empty_documents"]:
            raise UserError(
                f"nothing is left of the {summary['documents']} documents of {self.source.spec!r} after "
                f"cleaning={self.options.cleaning!r} and decontamination; choose other steps"
            )
        if not selection.characters:
            raise UserError(f"the source {self.source.spec!r} has no text: check the files it names")
        for name, wanted in (("train", True), ("validation", self.fractions.validation > 0)):
            if wanted and not selection.split_documents[name]:
                raise UserError(
                    f"the {name} split is empty: {selection.documents} documents with {selection.characters} "
                    f"characters were split by {selection.method} with "
                    f"--config.data.validation_fraction={self.fractions.validation}, "
                    f"--config.data.test_fraction={self.fractions.test}{self._why_empty(selection)}"
                )

    def _why_empty(self, selection: Selection) -> str:
        if selection.method == "document" and selection.repeated:
            what = "the text before the first answer" if selection.has_dialogues else "their text"
            return (
                f"; documents equal in {what} go to one split, and there are only {selection.groups} different ones "
                f"({selection.largest_group} documents share one): use --config.data.split_by=position, which splits "
                "by the order of the documents"
            )
        if selection.method == "document":
            return ": use --config.data.split_by=position, which splits by the order of the text, or more text"
        return ": use larger fractions, or more text"

    def _tokenizer(self, selected: list[Selected], has_dialogues: bool) -> tuple[Tokenizer, dict[str, Any] | None]:
        """The tokenizer, trained if necessary, and the description of the chat template if there are dialogues."""
        spec = self.tokenizer_spec
        directory = None
        if isinstance(spec, Tokenizer):
            tokenizer = spec
        elif spec.startswith("hf:"):
            tokenizer = build_tokenizer(spec)
            directory = Path(spec.removeprefix("hf:")).expanduser()
        else:
            identity = [spec, [(piece.cleaned.name, piece.sha256) for piece in selected]]
            trained = self.work / f"tokenizer-{_digest(identity)}"
            if not trained.is_dir():
                with whole_directory(trained) as partial:
                    build_tokenizer(spec, selected_texts(selected)).save(partial / TOKENIZER)
            tokenizer = Tokenizer.from_file(trained / TOKENIZER)
        if not has_dialogues:
            return tokenizer, None
        template = ChatTemplate.of_tokenizer(tokenizer, directory)
        return template.prepare_tokenizer(tokenizer), template.to_json()

    def _dtype(self, tokenizer: Tokenizer) -> str:
        fits = tokenizer.vocab_size <= np.iinfo(np.uint16).max + 1
        if self.options.dtype == "uint16" and not fits:
            raise UserError(f"dtype=uint16 has no room for the tokenizer's {tokenizer.vocab_size} ids; use dtype=auto")
        return ("uint16" if fits else "uint32") if self.options.dtype == "auto" else self.options.dtype

    def _about(self) -> dict[str, Any]:
        """Source and options, for the manifest."""
        spec = self.tokenizer_spec
        return {
            "source": self.source.spec,
            "cleaning": self.options.cleaning,
            "cleaning_steps": list(self.cleaner.steps),
            "cleaning_options": self.options.cleaning_options or {},
            "cleaned_splits": self.options.cleaned_splits,
            "invertible": self.cleaner.invertible,
            "deduplicate": self.options.deduplicate,
            "near_threshold": self.options.near_threshold,
            "decontaminate": list(self.options.decontaminate),
            "tokenizer": spec if isinstance(spec, str) else spec.kind,
            "validation_fraction": self.fractions.validation,
            "test_fraction": self.fractions.test,
        }


def _digest(identity: Any) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _no_progress(stage: str, done: int, total: int | None) -> None:
    pass
