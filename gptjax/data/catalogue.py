"""The source `tfds:NAME[/CONFIG][:SPLIT][#FIELD]`: a prepared TFDS dataset, read without TensorFlow."""

import os
import re
from collections.abc import Iterator
from typing import Any

from gptjax.data.documents import Document, in_parts
from gptjax.data.sources import decode_all
from gptjax.errors import UserError

_SPLITS = ("train", "validation", "test")
_VERSION = re.compile(r"\d+\.\d+\.\d+")
_READ_EXAMPLES = 64


class TfdsDataset:
    """A dataset that TFDS prepared as ArrayRecord files.

    With SPLIT (a name, or TFDS's slicing such as `train[:10%]`) the documents are just these examples.
    Without, they are those of the splits train, validation and test, as far as the dataset has them, and
    carry `split`.
    """

    def __init__(self, spec: str, data_dir: str, decode_errors: str):
        """Finds the dataset. Raises UserError where directory, split or field is not there."""
        self.spec = spec
        self.replaced = 0
        self.decode_errors = decode_errors
        path, _, field = spec.removeprefix("tfds:").partition("#")
        self.name, _, self.split = path.partition(":")
        self.field = field or "text"
        self.directory = _version_directory(spec, self.name.strip("/"), data_dir)
        self._builder = _open_builder(spec, self.directory)
        _check_field(spec, self._builder, self.field)
        self.splits = _check_splits(spec, self._builder, self.split)

    def key(self) -> str:
        return f"{self.spec} decode_errors={self.decode_errors} directory={self.directory}"

    def documents(self) -> Iterator[Document]:
        self.replaced = 0
        for split in self.splits:
            examples = self._data_source(split)
            for start in range(0, len(examples), _READ_EXAMPLES):
                indices = range(start, min(start + _READ_EXAMPLES, len(examples)))
                for index, example in zip(indices, examples.__getitems__(list(indices)), strict=True):
                    document: Document = {
                        "text": self._text(example[self.field], f"{self.spec}, {split} example {index}"),
                        "id": f"{self.name}/{split}/{index}",
                        "source": self.spec,
                    }
                    if not self.split:
                        document["split"] = split
                    yield from in_parts(document)

    def _data_source(self, split: str) -> Any:
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
        text, replaced = decode_all(value, self.decode_errors, where)
        self.replaced += replaced
        return text


def _version_directory(spec: str, name: str, data_dir: str) -> Any:
    """The directory of the latest version of the dataset, or of the version that `name` ends with."""
    from etils import epath  # data_dir may be gs://...

    root = epath.Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    directory = (root / name).resolve()
    if (directory / "dataset_info.json").exists():
        return directory
    advice = "set data.data_dir to the directory that holds NAME[/CONFIG]/VERSION"
    if not directory.is_dir():
        parent = directory.parent if directory.parent.is_dir() else root
        raise UserError(
            f"{spec!r}: no dataset {name!r} in {root}; {parent} holds: {_names(parent)}; {advice}"
        )
    versions = [path for path in directory.iterdir() if _VERSION.fullmatch(path.name)]
    if not versions:
        raise UserError(f"{spec!r}: {directory} holds no version; it holds: {_names(directory)}; {advice}")
    return max(versions, key=lambda path: tuple(map(int, path.name.split("."))))


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
        raise UserError(
            f"{spec!r}: no split 'train'; choose one with tfds:NAME:SPLIT: {', '.join(sorted(known))}"
        )
    return tuple(name for name in _SPLITS if name in known)
