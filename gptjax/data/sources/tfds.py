"""The source `tfds:NAME[/CONFIG][:SPLIT][#FIELD]`: a prepared TFDS dataset, read without TensorFlow."""

import glob
import hashlib
import importlib.util
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from gptjax.data.documents import Document, in_parts
from gptjax.data.sources.base import PIECE_BYTES, Faults, Piece, Reading, Source
from gptjax.data.sources.files import find_files
from gptjax.data.sources.utf8 import decode_all
from gptjax.errors import UserError

_SPLITS = ("train", "validation", "test")
_VERSION = re.compile(r"\d+\.\d+\.\d+")
_READ_EXAMPLES = 64


class TfdsDataset(Source):
    """A dataset that TFDS prepared as ArrayRecord files.

    With SPLIT (a name, or TFDS's slicing such as `train[:10%]`) the documents are its examples. Without SPLIT
    they are the examples of train, validation and test, if the dataset has them, and have a field `split`.
    """

    def __init__(self, spec: str, data_dir: str, reading: Reading, faults: Faults):
        """Finds the dataset. Raises UserError if the directory, the split or the field is missing."""
        self.spec = spec
        self.faults = faults
        self.reading = reading
        path, _, field = spec.removeprefix("tfds:").partition("#")
        self.name, _, self.split = path.partition(":")
        self.field = field or "text"
        self.directory = _version_directory(spec, self.name.strip("/"), data_dir)
        self._builder = _open_builder(spec, self.directory)
        _check_field(spec, self._builder, self.field)
        self.splits = _check_splits(spec, self._builder, self.split)
        self._opened: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_builder": None, "_opened": {}}

    def key(self) -> str:
        return f"{self.spec} {self.reading.key} directory={self.directory} files={self._version()}"

    def _version(self) -> str:
        """Changes when the dataset is prepared again in the same directory."""
        digest = hashlib.sha256((self.directory / "dataset_info.json").read_bytes())
        for file in find_files(self.spec, f"{glob.escape(str(self.directory))}/*"):
            digest.update(f"{file.name}\0{file.size}\0{file.version}\n".encode())
        return digest.hexdigest()

    def pieces(self) -> list[Piece]:
        pieces: list[Piece] = []
        version = self._version()
        for split in self.splits:
            about = self._builder.info.splits[split.partition("[")[0].split("+")[0]]
            example_bytes = max(about.num_bytes // max(about.num_examples, 1), 1)
            count = len(self._data_source(split))
            size = max(PIECE_BYTES // example_bytes, 1)
            for start in range(0, count, size):
                end = min(start + size, count)
                content = [version, split, start, end]
                pieces.append(Piece(f"{split} examples {start}-{end}", (end - start) * example_bytes, content))
        return pieces

    def read(self, piece: Piece) -> Iterator[Document]:
        _, split, first, last = piece.content
        examples = self._data_source(split)
        for start in range(first, last, _READ_EXAMPLES):
            indices = range(start, min(start + _READ_EXAMPLES, last))
            for index, example in zip(indices, examples.__getitems__(list(indices)), strict=True):
                try:
                    text = self._text(example[self.field], f"{self.spec}, {split} example {index}")
                except UserError as error:
                    self.faults.skip(error)
                    continue
                document: Document = {"text": text, "id": f"{self.name}/{split}/{index}", "source": self.spec}
                if not self.split:
                    document["split"] = split
                yield from in_parts(document)

    def _data_source(self, split: str) -> Any:
        if split not in self._opened:
            self._builder = self._builder or _open_builder(self.spec, self.directory)
            self._opened[split] = self._open_split(split)
        return self._opened[split]

    def _open_split(self, split: str) -> Any:
        try:
            return self._builder.as_data_source(split=split)
        except NotImplementedError as error:
            raise UserError(
                f"{self.spec!r}: {self.directory} has no random access ({error}); "
                "prepare it again with file_format='array_record'"
            ) from None
        except ValueError as error:
            known = ", ".join(sorted(self._builder.info.splits))
            raise UserError(f"{self.spec!r}: no split {split!r} ({error}); splits: {known}") from None

    def _text(self, value: bytes | str, where: str) -> str:
        if isinstance(value, str):
            return value
        text, replaced = decode_all(value, self.reading.decode_errors, where)
        self.faults.replaced += replaced
        return text


def _version_directory(spec: str, name: str, data_dir: str) -> Any:
    """The directory of the latest version of the dataset, or of the version that `name` ends with."""
    from etils import epath  # data_dir may be gs://...

    root = epath.Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    directory = (root / name).resolve()
    if (directory / "dataset_info.json").exists():
        return directory
    advice = (
        "set data.data_dir to the directory that holds NAME[/CONFIG]/VERSION; with tensorflow-cpu and "
        "importlib_resources installed the dataset is downloaded and prepared there"
    )
    if not directory.is_dir() and importlib.util.find_spec("tensorflow") is not None:
        _download_and_prepare(spec, name, root)
    if not directory.is_dir():
        parent = directory.parent if directory.parent.is_dir() else root
        raise UserError(f"{spec!r}: no dataset {name!r} in {root}; {parent} holds: {_names(parent)}; {advice}")
    versions = [path for path in directory.iterdir() if _VERSION.fullmatch(path.name)]
    if not versions:
        raise UserError(f"{spec!r}: {directory} holds no version; it holds: {_names(directory)}; {advice}")
    return max(versions, key=lambda path: tuple(map(int, path.name.split("."))))


def _download_and_prepare(spec: str, name: str, root: Any) -> None:
    """Prepares a dataset in another process, since that needs TensorFlow, which is never imported here."""
    command = "from tensorflow_datasets.scripts.cli.main import launch_cli; launch_cli()"
    arguments = ["build", name, f"--data_dir={root}", "--file_format=array_record"]
    logging.getLogger(__name__).info("downloading and preparing %s in %s", name, root)
    done = subprocess.run([sys.executable, "-c", command, *arguments], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{spec!r}: TFDS could not prepare {name!r} in {root}: {reason}")


def _names(directory: Any) -> str:
    if not directory.is_dir():
        return "nothing (there is no such directory)"
    names = sorted(path.name for path in directory.iterdir())
    return ", ".join(name for name in names if not name.startswith(".")) or "nothing"


def _open_builder(spec: str, directory: Any) -> Any:
    import tensorflow_datasets as tfds

    try:
        return tfds.builder_from_directory(directory)
    except (OSError, ValueError) as error:
        raise UserError(f"{spec!r}: {directory} is not a prepared TFDS dataset: {error}") from None


def _check_field(spec: str, builder: Any, field: str) -> None:
    import tensorflow_datasets as tfds

    features = builder.info.features
    texts = sorted(name for name in features if isinstance(features[name], tfds.features.Text))
    if field not in texts:
        raise UserError(
            f"{spec!r}: no text feature {field!r}; text features: {', '.join(texts) or 'none'}; "
            "choose one with tfds:NAME#FIELD"
        )


def _check_splits(spec: str, builder: Any, split: str) -> tuple[str, ...]:
    known = builder.info.splits
    if split:
        name = split.partition("[")[0].split("+")[0]
        if name not in known and name != "all":
            raise UserError(f"{spec!r}: no split {split!r}; splits: {', '.join(sorted(known))}")
        return (split,)
    if "train" not in known:
        raise UserError(f"{spec!r}: no split 'train'; choose one with tfds:NAME:SPLIT: {', '.join(sorted(known))}")
    return tuple(name for name in _SPLITS if name in known)
