"""Sources by name: a spec such as `python_docs` or `text:books/**/*.txt`."""

import difflib
import os
import re

from gptjax.data.sources.base import ON_ERROR, Faults, Reading, Source
from gptjax.data.sources.dialogues import FORMATS as DIALOGUE_FORMATS
from gptjax.data.sources.encodings import checked
from gptjax.errors import UserError

SPECS = (
    "python_docs",
    "python_docs:questions",
    "python_docs:dialogues",
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
    "preference:GLOB",
    "toy:TASK[#length=N,size=N,seed=N]",
)


def open_source(spec: str, *, data_dir: str = "", on_error: str = "raise", **reading: str) -> Source:
    """Opens the source that `spec` names, one of `SPECS`.

    Args:
      spec: globs may contain `**` and begin with `gs://`, `s3://` or another protocol of fsspec; files may
        end with .gz, .zst, .bz2 or .xz. FIELD is `text` by default; `A+B` joins two fields with a line end.
      data_dir: the directory of prepared TFDS datasets, with NAME[/CONFIG]/VERSION inside; empty for
        $TFDS_DATA_DIR or ~/tensorflow_datasets.
      on_error: "raise" an error at data that cannot be read, or "skip" and count it.
      reading: the fields of `Reading`.

    Raises:
      UserError: the spec is unknown, nothing matches the glob, or the dataset is not there.
    """
    if on_error not in ON_ERROR:
        raise UserError(f"data.on_error={on_error!r}: expected one of {', '.join(ON_ERROR)}")
    how = Reading(**{**reading, "encoding": checked(reading.get("encoding", Reading.encoding))})
    scheme, _, rest = spec.partition(":")
    faults = Faults(on_error)
    if spec in SPECS and scheme == "python_docs":
        from gptjax.data.sources.python_docs import PythonDocs

        return PythonDocs(rest)
    if scheme == "toy":
        from gptjax.data.sources.toy import ToyTask

        return ToyTask.of_spec(spec)
    if scheme == "tfds" and rest:
        from gptjax.data.sources.tfds import TfdsDataset

        return TfdsDataset(spec, data_dir, how, faults)
    if scheme == "hf" and rest:
        from gptjax.data.sources.hub import HuggingFaceDataset

        return HuggingFaceDataset(spec, how, faults)
    if scheme in ("text", "html", "jsonl", "csv", "parquet", "preference", *DIALOGUE_FORMATS) and rest:
        return _open_files(spec, scheme, rest, how, faults)
    raise UserError(f"unknown data source {spec[:200]!r}.{_hint(spec, scheme)} Expected one of {', '.join(SPECS)}")


def _open_files(spec: str, scheme: str, rest: str, reading: Reading, faults: Faults) -> Source:
    """The source of SCHEME:GLOB[#FIELD]."""
    from gptjax.data.sources.files import find_files
    from gptjax.data.sources.record_files import CsvFiles, JsonLines, ParquetFiles
    from gptjax.data.sources.text_files import DialogueFiles, HtmlFiles, PreferenceFiles, TextFiles

    kinds = {"text": TextFiles, "html": HtmlFiles, "jsonl": JsonLines, "csv": CsvFiles, "parquet": ParquetFiles}
    kinds["preference"] = PreferenceFiles
    kind = kinds.get(scheme, DialogueFiles)
    pattern, _, field = rest.partition("#") if kind.has_fields else (rest, "", "")
    names = field.split(",") if field else []
    if kind is DialogueFiles and names and (scheme != "pairs" or len(names) != 2 or not all(names)):
        form = "pairs:GLOB#A,B names two, those of the prompt and the response"
        raise UserError(f"{spec!r} names {len(names)} field{'s' * (len(names) != 1)}; only {form}")
    return kind(spec, scheme, field, find_files(spec, pattern), reading, faults)


_KINDS_BY_NAME = dict.fromkeys((".txt", ".md"), "text") | dict.fromkeys((".html", ".htm"), "html")
_KINDS_BY_NAME |= dict.fromkeys((".json", ".jsonl"), "jsonl") | {".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}


def _hint(spec: str, scheme: str) -> str:
    if scheme in ("store", "tokens"):
        return " A token store holds tokens, not documents: only training and evaluation read it."
    kind = _KINDS_BY_NAME.get(os.path.splitext(spec.partition("#")[0])[1].lower())  # noqa: PTH122
    there = len(spec) < 255 and "\0" not in spec and os.path.exists(os.path.expanduser(spec))  # noqa: PTH110, PTH111
    if there or (kind and ":" not in spec):
        return f" Did you mean '{kind or 'text'}:{spec}'?"
    near = difflib.get_close_matches(scheme, sorted({re.split("[:[]", known)[0] for known in SPECS}), n=1)
    return f" Did you mean {spec.replace(scheme, near[0], 1)!r}?" if near and near[0] != scheme else ""
