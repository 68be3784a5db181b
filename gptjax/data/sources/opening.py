"""Sources by name: a spec such as `python_docs` or `text:books/**/*.txt`."""

import difflib
import re
from pathlib import Path

from gptjax.data.sources.base import ON_ERROR, Faults, Source
from gptjax.data.sources.dialogues import FORMATS as DIALOGUE_FORMATS
from gptjax.data.sources.utf8 import DECODE_ERRORS
from gptjax.errors import UserError

SPECS = (
    "python_docs",
    "python_docs:questions",
    "text:GLOB",
    "html:GLOB",
    "jsonl:GLOB[#FIELD]",
    "csv:GLOB[#FIELD]",
    "parquet:GLOB[#FIELD]",
    "tfds:NAME[/CONFIG][:SPLIT][#FIELD]",
    "hf:NAME[/CONFIG][:SPLIT][#FIELD]",
    "messages:GLOB",
    "sharegpt:GLOB",
    "alpaca:GLOB",
    "pairs:GLOB",
    "chatterbot:GLOB",
    "kdconv:GLOB",
)


def open_source(spec: str, *, data_dir: str = "", decode_errors: str = "reject", on_error: str = "raise") -> Source:
    """Opens the source that `spec` names, one of `SPECS`.

    Args:
      spec: globs may contain `**` and begin with `gs://`, `s3://` or another protocol of fsspec; files may
        end with .gz, .zst, .bz2 or .xz. FIELD is `text` where it is left out; `A+B` joins two fields with a line end.
      data_dir: the directory of prepared TFDS datasets, with NAME[/CONFIG]/VERSION inside; empty for
        $TFDS_DATA_DIR or ~/tensorflow_datasets.
      decode_errors: "reject" bytes that are not UTF-8, or "replace" them with U+FFFD and count.
      on_error: "raise" an error at what cannot be read, or "skip" and count it.

    Raises:
      UserError: the spec is unknown, nothing matches the glob, or the dataset is not there.
    """
    for name, value, choices in (
        ("decode_errors", decode_errors, DECODE_ERRORS),
        ("on_error", on_error, ON_ERROR),
    ):
        if value not in choices:
            raise UserError(f"data.{name}={value!r}: expected one of {', '.join(choices)}")
    scheme, _, rest = spec.partition(":")
    faults = Faults(on_error)
    if spec in ("python_docs", "python_docs:questions"):
        from gptjax.data.sources.python_docs import PythonDocs

        return PythonDocs(questions_only=bool(rest))
    if scheme == "tfds" and rest:
        from gptjax.data.sources.tfds import TfdsDataset

        return TfdsDataset(spec, data_dir, decode_errors, faults)
    if scheme == "hf" and rest:
        from gptjax.data.sources.hub import HuggingFaceDataset

        return HuggingFaceDataset(spec, faults)
    if scheme in ("text", "html", "jsonl", "csv", "parquet", *DIALOGUE_FORMATS) and rest:
        return _open_files(spec, scheme, rest, decode_errors, faults)
    raise UserError(f"unknown data source {spec!r}: expected one of {', '.join(SPECS)}.{_hint(spec, scheme)}")


def _open_files(spec: str, scheme: str, rest: str, decode_errors: str, faults: Faults) -> Source:
    """The source of SCHEME:GLOB[#FIELD]."""
    from gptjax.data.sources.files import find_files
    from gptjax.data.sources.record_files import CsvFiles, JsonLines, ParquetFiles
    from gptjax.data.sources.text_files import DialogueFiles, HtmlFiles, TextFiles

    kinds = {"text": TextFiles, "html": HtmlFiles, "jsonl": JsonLines, "csv": CsvFiles, "parquet": ParquetFiles}
    kind = kinds.get(scheme, DialogueFiles)
    pattern, _, field = rest.partition("#") if kind.has_fields else (rest, "", "")
    return kind(spec, scheme, field, find_files(spec, pattern), decode_errors, faults)


def _hint(spec: str, scheme: str) -> str:
    if scheme in ("store", "tokens"):
        return " A token store holds tokens, not documents: only training and evaluation read it."
    if Path(spec).expanduser().exists():
        return f" Did you mean 'text:{spec}'?"
    near = difflib.get_close_matches(scheme, sorted({re.split("[:[]", known)[0] for known in SPECS}), n=1)
    return f" Did you mean {spec.replace(scheme, near[0], 1)!r}?" if near and near[0] != scheme else ""
