"""Sources of documents, each named by a spec such as `python_docs` or `text:books/**/*.txt`.

A source is read as often as needed, always in the same order. Long documents arrive in parts, so that memory
does not grow with the size of a file.
"""

import codecs
import difflib
import glob
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

from gptjax.data.documents import Document, in_parts
from gptjax.errors import UserError

SPECS = (
    "python_docs",
    "python_docs:questions",
    "text:GLOB",
    "jsonl:GLOB[#FIELD]",
    "tfds:NAME[/CONFIG][:SPLIT][#FIELD]",
)
DECODE_ERRORS = ("reject", "replace")
_READ_BYTES = 1 << 20


@runtime_checkable
class Source(Protocol):
    """A corpus that can be read any number of times.

    Attributes:
      spec: the text it was opened with.
      replaced: U+FFFD written for bytes that are not UTF-8 in the latest reading; 0 unless decode_errors is
        "replace".
    """

    spec: str
    replaced: int

    def documents(self) -> Iterator[Document]:
        """All documents, always in the same order. Raises UserError at a document that cannot be read."""
        ...

    def key(self) -> str:
        """What says, without reading the texts, that the documents are still the same."""
        ...


def open_source(spec: str, *, data_dir: str = "", decode_errors: str = "reject") -> Source:
    """Opens the source that `spec` names, one of `SPECS`.

    Args:
      spec: globs may contain `**`; FIELD is `text` where it is left out.
      data_dir: the directory of prepared TFDS datasets, with NAME[/CONFIG]/VERSION inside; empty for
        $TFDS_DATA_DIR or ~/tensorflow_datasets.
      decode_errors: "reject" raises at the first byte that is not UTF-8, "replace" writes U+FFFD and counts.

    Raises:
      UserError: the spec is unknown, nothing matches the glob, or the dataset is not there.
    """
    if decode_errors not in DECODE_ERRORS:
        raise UserError(f"data.decode_errors={decode_errors!r}: expected one of {', '.join(DECODE_ERRORS)}")
    scheme, _, rest = spec.partition(":")
    if spec in ("python_docs", "python_docs:questions"):
        from gptjax.data.python_docs import PythonDocs

        return PythonDocs(questions_only=bool(rest))
    if scheme == "text" and rest:
        return TextFiles(spec, rest, decode_errors)
    if scheme == "jsonl" and rest:
        pattern, _, field = rest.partition("#")
        return JsonLines(spec, pattern, field or "text", decode_errors)
    if scheme == "tfds" and rest:
        from gptjax.data.catalogue import TfdsDataset

        return TfdsDataset(spec, data_dir, decode_errors)
    raise UserError(f"unknown data source {spec!r}: expected one of {', '.join(SPECS)}.{_hint(spec, scheme)}")


def _hint(spec: str, scheme: str) -> str:
    if scheme == "store":
        return " A prepared token store holds tokens, not documents: only training and evaluation read it."
    if Path(spec).expanduser().exists():
        return f" Did you mean 'text:{spec}'?"
    near = difflib.get_close_matches(scheme, ["python_docs", "text", "jsonl", "tfds"], n=1)
    return f" Did you mean {spec.replace(scheme, near[0], 1)!r}?" if near and near[0] != scheme else ""


class _Files:
    """The files that match a glob, in the order of their paths."""

    def __init__(self, spec: str, pattern: str, decode_errors: str):
        self.spec = spec
        self.replaced = 0
        self.decode_errors = decode_errors
        self.prefix, self.paths = _matching_files(spec, pattern)

    def key(self) -> str:
        digest = hashlib.sha256()
        for path in self.paths:
            stat = path.stat()
            digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        return f"{self.spec} decode_errors={self.decode_errors} files={digest.hexdigest()}"

    def name(self, path: Path) -> str:
        return path.relative_to(self.prefix).as_posix()


def _matching_files(spec: str, pattern: str) -> tuple[Path, list[Path]]:
    """The fixed directory at the start of `pattern` and the files that match, both absolute."""
    whole = Path(pattern).expanduser().absolute()
    if whole.is_file():
        return whole.parent, [whole]
    if whole.is_dir():
        raise UserError(f"{spec!r} is a directory: name its files, for example '{spec.rstrip('/')}/**/*.txt'")
    matches = glob.glob(str(whole), recursive=True)  # noqa: PTH207 (Path.glob takes no absolute pattern)
    paths = sorted(map(Path, matches))
    files = [path for path in paths if path.is_file()]
    if not files:
        raise UserError(f"no file matches {spec!r} (looked for {whole}): check the path and the glob")
    parts = whole.parts
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:fixed]), files


class TextFiles(_Files):
    """`text:GLOB`: each file is one document; its id is the path below the fixed start of the glob."""

    def documents(self) -> Iterator[Document]:
        self.replaced = 0
        for path in self.paths:
            yield from in_parts({"text": "", "id": self.name(path), "source": self.spec}, self._pieces(path))

    def _pieces(self, path: Path) -> Iterator[str]:
        decoder = Utf8Decoder(self.decode_errors, str(path))
        with path.open("rb") as file:
            while data := file.read(_READ_BYTES):
                yield decoder.decode(data)
        yield decoder.decode(b"", final=True)
        self.replaced += decoder.replaced


class JsonLines(_Files):
    """`jsonl:GLOB#FIELD`: each line is an object whose FIELD is one document; blank lines are skipped."""

    def __init__(self, spec: str, pattern: str, field: str, decode_errors: str):
        super().__init__(spec, pattern, decode_errors)
        self.field = field

    def documents(self) -> Iterator[Document]:
        self.replaced = 0
        for path in self.paths:
            decoder = Utf8Decoder(self.decode_errors, str(path))
            with path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    # A line ends with an ASCII byte, so it never ends within a character.
                    text = decoder.decode(line, final=True).strip()
                    if text:
                        document_id = f"{self.name(path)}:{number}"
                        text = self._text(text, f"{path}, line {number}")
                        yield from in_parts({"text": text, "id": document_id, "source": self.spec})
            self.replaced += decoder.replaced

    def _text(self, line: str, where: str) -> str:
        try:
            value = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}: not JSON ({error}); each line must be one JSON object") from None
        if not isinstance(value, dict):
            raise UserError(f"{where}: a JSON {type(value).__name__}; each line must be one JSON object")
        if self.field not in value:
            there = ", ".join(map(repr, value)) or "none"
            raise UserError(
                f"{where}: no field {self.field!r}; fields: {there}. Choose one with jsonl:GLOB#FIELD"
            )
        text = value[self.field]
        if not isinstance(text, str):
            raise UserError(f"{where}: field {self.field!r} is a {type(text).__name__}; expected a string")
        return self._without_surrogates(text, where)

    def _without_surrogates(self, text: str, where: str) -> str:
        # JSON can escape half a surrogate pair, which no UTF-8 text can contain.
        clean, count = re.subn("[\ud800-\udfff]", "\ufffd", text)
        if count and self.decode_errors == "reject":
            raise UserError(
                f"{where}: field {self.field!r} has half a surrogate pair (\\ud800 to \\udfff); "
                "data.decode_errors=replace continues with U+FFFD in its place"
            )
        self.replaced += count
        return clean


class Utf8Decoder:
    """Decodes one byte stream piece by piece, without its byte order mark.

    Attributes:
      replaced: U+FFFD written so far for bytes that are not UTF-8, as many as
        `bytes.decode(errors="replace")` writes.
    """

    def __init__(self, decode_errors: str, where: str):
        self.replaced = 0
        self._strict = decode_errors == "reject"
        self._where = where
        self._decoder = codecs.getincrementaldecoder("utf-8")("strict" if self._strict else "replace")
        self._consumed = 0
        self._tail = b""
        self._at_start = True

    def decode(self, data: bytes, *, final: bool = False) -> str:
        """The text of the next bytes, up to the last whole character.

        Raises:
          UserError: a byte is not UTF-8 and decode_errors is "reject"; names the place and the byte's offset.
        """
        pending = len(self._decoder.getstate()[0])
        try:
            text = self._decoder.decode(data, final)
        except UnicodeDecodeError as error:
            offset = self._consumed - pending + error.start
            raise UserError(
                f"{self._where}: byte {error.object[error.start]:#04x} at offset {offset} is not UTF-8; "
                "convert the text to UTF-8, or continue with U+FFFD in its place: data.decode_errors=replace"
            ) from None
        self._consumed += len(data)
        if not self._strict:
            self._count_replaced(data, text)
        if self._at_start and text:
            text = text.removeprefix("\ufeff")
            self._at_start = False
        return text

    def _count_replaced(self, data: bytes, text: str) -> None:
        # A U+FFFD that the bytes do contain is not an error, and it may lie across two pieces.
        window = self._tail + data
        self.replaced += text.count("\ufffd") - window.count(b"\xef\xbf\xbd")
        self._tail = window[-2:]


def decode_all(data: bytes, decode_errors: str, where: str) -> tuple[str, int]:
    """The text of `data` and how many U+FFFD were written for bytes that are not UTF-8; see `Utf8Decoder`."""
    decoder = Utf8Decoder(decode_errors, where)
    return decoder.decode(data, final=True), decoder.replaced
