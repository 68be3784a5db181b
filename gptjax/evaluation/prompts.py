"""Reads files of prompts with references, and of system outputs."""

import codecs
import io
import itertools
import json
import re
import sys
import unicodedata
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from gptjax import files
from gptjax.data.sources.files import DAMAGE, is_remote, open_bytes
from gptjax.data.sources.records import Damaged, read_records, suffix
from gptjax.data.sources.utf8 import seeming_encoding
from gptjax.errors import UserError
from gptjax.json_text import show

_HYPOTHESIS_FIELDS = ("completion", "hypothesis", "prediction")
_RECORDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_MOST_BYTES = 1 << 29  # of a text, once it is decompressed
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


def read_prompts(spec: str | Path, *, references: bool = True) -> list[dict[str, Any]]:
    """The prompts of a file, as {"prompt": text, "references": [text, ...]}.

    FILE.jsonl, or a JSON list, has objects with `prompt` and either `references` (a list) or `reference`; CSV, TSV
    and Parquet files have columns of these names. FILE#PROMPT,REFERENCE names other fields, such as
    e2e/testset_w_refs.csv#mr,ref; records of the same prompt are then one prompt with several references. Files that
    end in .gz, .zst, .bz2 or .xz are decompressed. `-` is standard input: CSV with a header where fields are named,
    JSONL where it begins like it, else text.

    Args:
      references: False where prompts alone are wanted. Then records are returned with all that they have, references
        may be missing, FILE#PROMPT names one field, and a text file has a prompt on each line that is not blank.

    Raises:
      UserError: the file cannot be read, or has no prompts; names file and line.
    """
    path, fields = _split_spec(str(spec))
    if not fields and not _has_records(path):
        if references:
            raise UserError(f"{path} has prompts without references; they come in JSONL, CSV, TSV or Parquet")
        lines = [line.removeprefix("\ufeff") for line in _lines(path)]
        prompts = [{"prompt": line} for line in lines if line.strip()]
    else:
        if references and len(fields) == 1:
            raise UserError(f"{spec}: after # come two names, FILE#PROMPT,REFERENCE; found {fields[0]!r}")
        prompts = [_prompt(value, fields, references, place) for place, value in _records(path, table=bool(fields))]
    if not prompts:
        raise UserError(f'{path} has no prompts; a line is {{"prompt": "...", "references": ["...", "..."]}}')
    if len(fields) < 2:
        return prompts
    grouped: dict[str, list[str]] = {}
    for prompt in prompts:
        grouped.setdefault(prompt["prompt"], []).extend(prompt["references"])
    return [{"prompt": prompt, "references": references} for prompt, references in grouped.items()]


def read_hypotheses(path: str | Path) -> tuple[list[str], list[list[str]] | None]:
    """The outputs of a system, one text per item, and the references if the file has them.

    A text file has one text per line, which may be empty; JSONL has `completion` (as `generate` writes),
    `hypothesis` or `prediction`, and may have `references` or `reference`.
    """
    if suffix(path) not in _RECORDS and not (_is_stream(path) and _has_records(path)):
        return _lines(path), None
    hypotheses, references = [], []
    for place, value in _records(path):
        name = next((name for name in _HYPOTHESIS_FIELDS if isinstance(value.get(name), str)), None)
        if name is None:
            there = next((f"{name} is {show(value[name])}" for name in _HYPOTHESIS_FIELDS if name in value), "")
            wanted = f"no text {', '.join(_HYPOTHESIS_FIELDS[:-1])} or {_HYPOTHESIS_FIELDS[-1]}"
            raise UserError(f"{place}: {there or wanted}; fields: {_names(value)}")
        hypotheses.append(value[name])
        if "references" in value or "reference" in value:
            references.append(_references(value, place))
    return hypotheses, references if len(references) == len(hypotheses) else None


class ReferenceItems(NamedTuple):
    """The references of each item, and how the files were read, for messages."""

    items: list[list[str]]
    how: str


def read_references(specs: Sequence[str], count: int | None = None) -> ReferenceItems:
    """References of each item.

    A file of records (JSONL, CSV, Parquet) has `references` or `reference` in each record; FILE#REFERENCE names
    another field, and FILE#PROMPT,REFERENCE is read as in `read_prompts`. A single text file has one reference per line
    if it has `count` lines or no blank line between texts, else blank lines separate the references of the items. Each
    of several files has references of every item; text files have one per line.
    """
    if len(specs) == 1:
        if (records := _reference_records(specs[0])) is not None:
            return ReferenceItems(records, "one record per item")
        lines = _lines(_split_spec(specs[0])[0])
        text = "\n".join(lines).strip("\n")
        groups = re.split(r"\n(?:[^\S\n]*\n)+", text)
        if len(groups) == 1 or len(lines) == count:
            return ReferenceItems([[line] for line in lines], f"one reference per line, {len(lines)} lines")
        how = f"blank lines between items; it has {len(lines)} lines"
        return ReferenceItems([group.split("\n") for group in groups], how)
    read = {spec: _reference_records(spec) for spec in specs}
    columns = [[[line] for line in _lines(spec)] if read[spec] is None else read[spec] for spec in specs]
    for spec, column in zip(specs, columns, strict=True):
        if len(column) != len(columns[0]):
            unit = "lines" if not any(read.values()) else "items"
            raise UserError(
                f"{spec} has {len(column)} {unit}, {specs[0]} has {len(columns[0])}; line k of each file is a "
                "reference of item k"
            )
    joined = [list(itertools.chain.from_iterable(row)) for row in zip(*columns, strict=True)]
    return ReferenceItems(joined, "one reference per line of each file")


def _reference_records(spec: str) -> list[list[str]] | None:
    """The references of each item of a file of records; None for text. Raises UserError naming file and line."""
    path, fields = _split_spec(spec)
    if not (suffix(path) in _RECORDS or (_is_stream(path) and _has_records(path))):
        return None
    if len(fields) == 2:
        return [prompt["references"] for prompt in read_prompts(spec)]
    records = _records(path, table=bool(fields))
    if not records:
        raise UserError(f'{path} has no references; a line is {{"references": ["...", "..."]}}')
    if fields:
        return [[_prompt(value, fields, False, place)["prompt"]] for place, value in records]
    return [_references(value, place) for place, value in records]


def _split_spec(spec: str) -> tuple[str, list[str]]:
    """The path, and the one or two field names after "#", if any."""
    name, hash_sign, names = spec.rpartition("#")
    if not hash_sign or Path(spec).exists():
        return spec, []
    fields = [field.strip() for field in names.split(",")]
    if len(fields) > 2 or not all(fields):
        raise UserError(f"{spec}: after # come two names, FILE#PROMPT,REFERENCE; found {names!r}")
    return name, fields


def _is_stream(path: str | Path) -> bool:
    return str(path) == "-" or bool(re.fullmatch(r"/dev/(stdin|fd/\d+)", str(path)))


def _has_records(path: str | Path) -> bool:
    """Whether a file holds records, by its suffix or else by its first character."""
    if suffix(path) in _RECORDS:
        return True
    if suffix(path) == ".txt":
        return False
    return _content(path).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"[")


def _records(path: str | Path, *, table: bool = False) -> list[tuple[str, dict[str, Any]]]:
    """(place, object) of every record. Raises UserError naming file and line."""
    name = regular(path)
    if suffix(name) in _RECORDS:
        found = read_records(name)
    else:  # a stream, or a file without a known suffix
        form = ".csv" if table and not _has_records(path) else ""
        found = (
            record._replace(place=record.place.replace(f"{name}{form}", name))
            for record in read_records(f"{name}{form}", lambda _: io.BytesIO(_content(path)))
        )
    records = []
    for record in found:
        if isinstance(record.value, Damaged):
            raise UserError(f"{record.place}: {record.value}")
        if not isinstance(record.value, dict):
            raise UserError(f'{record.place}: expected an object such as {{"prompt": ...}}, not {show(record.value)}')
        records.append((record.place, record.value))
    return records


def _prompt(entry: dict[str, Any], fields: Sequence[str], references: bool, where: str) -> dict[str, Any]:
    for field in fields:
        if not isinstance(entry.get(field), str):
            found = f"{field!r} is {show(entry[field])}" if field in entry else f"no text {field!r}"
            raise UserError(f"{where}: {found}; fields: {_names(entry)}")
    if fields:
        entry = {"prompt": entry[fields[0]], **({"references": [entry[fields[1]]]} if len(fields) == 2 else {})}
    elif not isinstance(entry.get("prompt"), str):
        raise UserError(
            f'{where}: "prompt" must be a text, not {show(entry.get("prompt"))}; fields: {_names(entry)}. Name others '
            "with FILE#PROMPT,REFERENCE"
        )
    elif references:
        entry = {"prompt": entry["prompt"], "references": _references(entry, where)}
    try:
        json.dumps(entry, ensure_ascii=False).encode()  # it is written beside the generated text
    except ValueError:
        raise UserError(f"{where}: it cannot be written as JSON in UTF-8: it holds half a surrogate pair") from None
    except TypeError:
        raise UserError(f"{where}: it cannot be written as JSON in UTF-8: it holds a date or raw bytes") from None
    return entry


def _references(entry: dict[str, Any], where: str) -> list[str]:
    if "references" in entry and "reference" in entry:
        raise UserError(f'{where}: has both "references" and "reference"; keep one of them')
    if "references" not in entry and "reference" not in entry:
        raise UserError(
            f"{where}: no 'references' and no 'reference'; fields: {_names(entry)}. Name others with "
            "FILE#PROMPT,REFERENCE"
        )
    references = entry.get("references", entry.get("reference"))
    if isinstance(references, str):
        references = [references]
    if not isinstance(references, list) or not references or not all(isinstance(r, str) for r in references):
        raise UserError(f'{where}: "references" must be a list of one text or more, not {show(references)}')
    return references


def _names(entry: dict[str, Any]) -> str:
    names = [repr(str(name)[:40]) for name in entry]
    return (", ".join(names[:12]) or "none") + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def _lines(path: str | Path) -> list[str]:
    """The lines of a text file, unchanged: a byte-order mark is kept, as by the sacrebleu command."""
    try:
        text = _content(path).decode("utf-8")
    except UnicodeDecodeError as error:
        data, line = error.object, 1 + error.object.count(b"\n", 0, error.start)
        marked = "UTF-16" if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else ""
        name = marked or seeming_encoding(data[error.start :]).upper() or "ENCODING"
        raise UserError(
            f"{path}, line {line}: byte {data[error.start]:#04x} is not UTF-8; convert the file first: iconv -f {name} "
            "-t UTF-8"
        ) from None
    lines = text.replace("\r\n", "\n").split("\n")
    return lines[:-1] if not lines[-1] else lines


def regular(path: str | Path) -> str:
    """The path of a regular file, a URL or "-". Raises UserError for others."""
    path = str(path)
    if path == "-" or is_remote(path):
        return path
    try:
        return str(files.regular(Path(path).expanduser()))
    except RuntimeError:
        raise UserError(f"{path}: there is no such user") from None


_streams: dict[tuple[str, int], bytes] = {}  # content of streams, which can be read only once, by name and identity


def _content(path: str | Path) -> bytes:
    """The whole content of a file, decompressed. Raises UserError."""
    name = regular(path)
    stream = (name, id(sys.stdin) if name == "-" else Path(name).stat().st_ino) if _is_stream(name) else None
    if stream in _streams:
        return _streams[stream]
    try:
        if name == "-":
            content = sys.stdin.buffer.read(_MOST_BYTES + 1)
        else:
            with open_bytes(name) as file:
                content = file.read(_MOST_BYTES + 1)
    except DAMAGE as error:
        problem = files.words(error) if isinstance(error, OSError) else "the file is damaged or cut off"
        raise UserError(f"{path} cannot be read: {problem}") from None
    if len(content) > _MOST_BYTES:
        raise UserError(f"{path} holds more than {_MOST_BYTES >> 20} MiB; split it")
    if stream:
        _streams[stream] = content
    return content


_is_composed = partial(unicodedata.is_normalized, "NFC")


def oddities(texts: Sequence[str]) -> list[str]:
    """Messages on odd characters in texts that are scored unchanged."""
    kinds = {
        "hold U+FEFF, a byte-order mark": lambda text: "\ufeff" in text,
        "hold U+FFFD, which stands for bytes that could not be read": lambda text: "\ufffd" in text,
        "hold control characters": lambda text: bool(_CONTROL.search(text)),
        "are not in Unicode's composed form (NFC), so that é may differ from é": lambda text: not _is_composed(text),
        "are empty": lambda text: not text.strip(),
    }
    found = {kind: sum(map(is_odd, texts)) for kind, is_odd in kinds.items()}
    return [f"{number} of {len(texts)} {kind}" for kind, number in found.items() if number]
