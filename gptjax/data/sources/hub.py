"""The source `hf:NAME[/CONFIG][:SPLIT][#FIELD]`: a dataset of the Hugging Face hub, or a directory of one."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptjax.data.documents import Document, in_parts
from gptjax.data.sources.base import PIECE_BYTES, Faults, Piece, Reading, Source
from gptjax.data.sources.record_files import field_text
from gptjax.errors import UserError

_SPLITS = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "dev": "validation",
    "test": "test",
}
_SPEC = re.compile(r"hf:(?P<name>[^#]+?)(?::(?P<split>\w[^/#]*))?(?:#(?P<field>.+))?")
_READ_ROWS = 256
_SAMPLE_ROWS = 100


class HuggingFaceDataset(Source):
    """A dataset read by the `datasets` library, from the hub, from `save_to_disk` or from Parquet files.

    NAME is a directory, or a dataset of the hub: two parts are owner and name, a third one is the configuration.
    With SPLIT (`train`, `train[:10%]`) the documents are its rows. Without SPLIT they are the rows of train,
    validation and test, if the dataset has them, and have a field `split`.
    """

    def __init__(self, spec: str, reading: Reading, faults: Faults):
        """Opens the dataset, downloading it if needed. Raises UserError if it, a split or the field is missing."""
        match = _SPEC.fullmatch(spec)
        if match is None:
            raise UserError(
                f"{spec!r}: expected hf:NAME[/CONFIG][:SPLIT][#FIELD], as in hf:roneneldan/TinyStories:train"
            )
        self.spec = spec
        self.reading = reading
        self.faults = faults
        self.name, self.split, self.field = match["name"], match["split"] or "", match["field"] or "text"
        self._opened: dict[str, Any] | None = None
        columns = next(iter(self._splits().values())).column_names
        if self.field not in columns and not set(self.field.split("+")) <= set(columns):
            raise UserError(f"{spec!r}: no column {self.field!r}; columns: {', '.join(columns)}; choose with #FIELD")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def key(self) -> str:
        # The library's manual (about_cache) documents `_fingerprint`; nothing else identifies the content of a dataset.
        fingerprints = [rows._fingerprint for rows in self._splits().values()]
        return f"{self.spec} {self.reading.key} fingerprints={','.join(fingerprints)}"

    def pieces(self) -> list[Piece]:
        pieces: list[Piece] = []
        for split, rows in self._splits().items():
            sample = rows[:_SAMPLE_ROWS]
            num_bytes = sum(len(str(value).encode()) for name in self._columns(rows) for value in sample[name])
            row_bytes = max(num_bytes // max(min(len(rows), _SAMPLE_ROWS), 1), 1)
            size = max(PIECE_BYTES // row_bytes, 1)
            for start in range(0, len(rows), size):
                end = min(start + size, len(rows))
                content = [rows._fingerprint, split, start, end]
                pieces.append(Piece(f"{split} rows {start}-{end}", (end - start) * row_bytes, content))
        return pieces

    def read(self, piece: Piece) -> Iterator[Document]:
        _, split, first, last = piece.content
        rows = self._splits()[split]
        rows = rows.select_columns(self._columns(rows))
        for start in range(first, last, _READ_ROWS):
            batch = rows[start : min(start + _READ_ROWS, last)]
            for offset, values in enumerate(zip(*batch.values(), strict=True)):
                place = f"{self.spec}, {split} row {start + offset}"
                try:
                    record = dict(zip(batch, values, strict=True))
                    text, _ = field_text(record, self.field, self.reading, place)
                except UserError as error:
                    self.faults.skip(error)
                    continue
                document: Document = {
                    "text": text,
                    "id": f"{self.name}/{split}/{start + offset}",
                    "source": self.spec,
                }
                if not self.split:
                    document["split"] = _SPLITS[split]
                yield from in_parts(document)

    def _columns(self, rows: Any) -> list[str]:
        return [self.field] if self.field in rows.column_names else self.field.split("+")

    def _splits(self) -> dict[str, Any]:
        if self._opened is None:
            self._opened = _open_splits(self.spec, self.name, self.split)
        return self._opened


def _open_splits(spec: str, name: str, split: str) -> dict[str, Any]:
    try:
        import datasets
    except ImportError:
        raise UserError(f"{spec!r} needs the library datasets: pip install 'gptjax[data]'") from None
    try:
        opened = _open_dataset(name)
    except Exception as error:  # no network, no such name, damaged files: each has its own error
        raise UserError(f"{spec!r} cannot be opened: {str(error).strip().partition(chr(10))[0]}") from None
    if not isinstance(opened, dict):
        opened = {"train": opened}
    known = ", ".join(sorted(opened))
    if not split:
        if "train" not in opened:
            raise UserError(f"{spec!r}: no split 'train'; choose one with hf:NAME:SPLIT: {known}")
        return {name: rows for name, rows in opened.items() if name in _SPLITS}
    try:
        instruction = datasets.ReadInstruction.from_spec(split)
        shares = instruction.to_absolute({name: len(rows) for name, rows in opened.items()})
        chosen = [opened[share.splitname].select(range(share.from_, share.to)) for share in shares]
    except (ValueError, AssertionError, AttributeError) as error:
        raise UserError(f"{spec!r}: no split {split!r} ({error}); splits: {known}") from None
    return {split: chosen[0] if len(chosen) == 1 else datasets.concatenate_datasets(chosen)}


def _open_dataset(name: str) -> Any:
    import datasets

    path = Path(name).expanduser()
    if path.is_dir():
        saved = any((path / file).is_file() for file in ("dataset_dict.json", "state.json"))
        return datasets.load_from_disk(str(path)) if saved else datasets.load_dataset(str(path))
    *owner, last = name.split("/")
    return datasets.load_dataset("/".join(owner), last) if len(owner) == 2 else datasets.load_dataset(name)
