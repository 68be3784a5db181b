"""Which class reads the files of which spec."""

from gptjax.data.files import find_files
from gptjax.data.record_files import CsvFiles, JsonLines, ParquetFiles
from gptjax.data.sources import Faults
from gptjax.data.text_files import DialogueFiles, Files, HtmlFiles, TextFiles

_FORMATS: dict[str, type[Files]] = {
    "text": TextFiles,
    "html": HtmlFiles,
    "jsonl": JsonLines,
    "csv": CsvFiles,
    "parquet": ParquetFiles,
}


def open_files(spec: str, decode_errors: str, faults: Faults) -> Files:
    """The source of a spec SCHEME:GLOB[#FIELD]; a scheme that is not above is a format of dialogues."""
    scheme, _, rest = spec.partition(":")
    kind = _FORMATS.get(scheme, DialogueFiles)
    pattern, _, field = rest.partition("#") if kind.has_fields else (rest, "", "")
    return kind(spec, scheme, field, find_files(spec, pattern), decode_errors, faults)
