"""Files of prompts with references, and of what a system wrote for them."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptjax.data.sources.files import DAMAGE, open_bytes
from gptjax.data.sources.records import Damaged, read_records, suffix
from gptjax.errors import UserError

_HYPOTHESIS_FIELDS = ("completion", "hypothesis", "prediction")
_RECORDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


def read_prompts(spec: str | Path, *, references: bool = True) -> list[dict[str, Any]]:
    """The prompts of a file, as {"prompt": text, "references": [text, ...]}.

    FILE.jsonl, or a JSON list, has objects with `prompt` and either `references` (a list) or `reference`; CSV, TSV
    and Parquet files have columns of these names. FILE#PROMPT,REFERENCE names other fields, such as
    e2e/testset_w_refs.csv#mr,ref; records of the same prompt are then one prompt with several references. Files that
    end in .gz, .zst, .bz2 or .xz are decompressed.

    Args:
      references: False where prompts alone are wanted. Then records are returned with all that they have, references
        may be missing, FILE#PROMPT names one field, and FILE.txt has a prompt on each line that is not blank.

    Raises:
      UserError: the file cannot be read, or has no prompts; names file and line.
    """
    path, fields = _split_spec(str(spec))
    if suffix(path) == ".txt" and not fields:
        if references:
            raise UserError(f"{path} has prompts without references; they come in JSONL, CSV, TSV or Parquet")
        prompts = [{"prompt": line} for line in _lines(path) if line.strip()]
    else:
        if references and len(fields) == 1:
            raise UserError(f"{spec}: after # come two names, FILE#PROMPT,REFERENCE; found {fields[0]!r}")
        prompts = [_prompt(value, fields, references, place) for place, value in _records(path)]
    if not prompts:
        raise UserError(f'{path} has no prompts; a line is {{"prompt": "...", "references": ["...", "..."]}}')
    if len(fields) < 2:
        return prompts
    grouped: dict[str, list[str]] = {}
    for prompt in prompts:
        grouped.setdefault(prompt["prompt"], []).extend(prompt["references"])
    return [{"prompt": prompt, "references": references} for prompt, references in grouped.items()]


def read_hypotheses(path: Path) -> tuple[list[str], list[list[str]] | None]:
    """What a system wrote, one text per item, and the references where the file has them.

    A text file has one text per line, which may be empty; JSONL has `completion` (as `generate` writes),
    `hypothesis` or `prediction`, and may have `references` or `reference`.
    """
    if suffix(path) not in _RECORDS:
        return _lines(path), None
    hypotheses, references = [], []
    for place, value in _records(path):
        name = next((name for name in _HYPOTHESIS_FIELDS if isinstance(value.get(name), str)), None)
        if name is None:
            raise UserError(f"{place}: no text {', '.join(_HYPOTHESIS_FIELDS[:-1])} or {_HYPOTHESIS_FIELDS[-1]}")
        hypotheses.append(value[name])
        if "references" in value or "reference" in value:
            references.append(_references(value, place))
    return hypotheses, references if len(references) == len(hypotheses) else None


def read_references(specs: Sequence[str]) -> list[list[str]]:
    """References of each item.

    Each of several text files has one reference of every item, one per line. A single text file has one per line, or
    several with a blank line after each item's. Otherwise as `read_prompts`.
    """
    if len(specs) == 1:
        path, _ = _split_spec(specs[0])
        if suffix(path) in _RECORDS:
            return [prompt["references"] for prompt in read_prompts(specs[0])]
        lines = _lines(path)
        text = "\n".join(lines).strip("\n")
        groups = re.split(r"\n(?:[^\S\n]*\n)+", text)
        return [group.split("\n") for group in groups] if len(groups) > 1 else [[line] for line in text.split("\n")]
    columns = [_lines(spec) for spec in specs]
    for spec, column in zip(specs, columns, strict=True):
        if len(column) != len(columns[0]):
            raise UserError(
                f"{spec} has {len(column)} lines, {specs[0]} has {len(columns[0])}; line k of each file is a "
                "reference of item k"
            )
    return [list(row) for row in zip(*columns, strict=True)]


def _split_spec(spec: str) -> tuple[str, list[str]]:
    """The path, and the names of the one or two fields where there are any."""
    name, hash_sign, names = spec.rpartition("#")
    if not hash_sign or Path(spec).exists():
        return spec, []
    fields = [field.strip() for field in names.split(",")]
    if len(fields) > 2 or not all(fields):
        raise UserError(f"{spec}: after # come two names, FILE#PROMPT,REFERENCE; found {names!r}")
    return name, fields


def _records(path: str | Path) -> list[tuple[str, dict[str, Any]]]:
    """(place, object) of every record. Raises UserError naming file and line."""
    records = []
    for record in read_records(path):
        if isinstance(record.value, Damaged):
            raise UserError(f"{record.place}: {record.value}")
        if not isinstance(record.value, dict):
            found = json.dumps(record.value, ensure_ascii=False)[:60]
            raise UserError(f'{record.place}: expected an object such as {{"prompt": ...}}, not {found}')
        records.append((record.place, record.value))
    return records


def _prompt(entry: dict[str, Any], fields: Sequence[str], references: bool, where: str) -> dict[str, Any]:
    for field in fields:
        if not isinstance(entry.get(field), str):
            there = ", ".join(map(repr, entry)) or "none"
            raise UserError(f"{where}: no text {field!r}; fields: {there}")
    if fields:
        entry = {"prompt": entry[fields[0]], **({"references": [entry[fields[1]]]} if len(fields) == 2 else {})}
    elif not isinstance(entry.get("prompt"), str):
        there = ", ".join(entry) or "none"
        found = json.dumps(entry.get("prompt"), default=str)[:60]
        raise UserError(
            f'{where}: "prompt" must be a text, not {found}; fields: {there}. Name others with FILE#PROMPT,REFERENCE'
        )
    elif references:
        entry = {"prompt": entry["prompt"], "references": _references(entry, where)}
    try:
        json.dumps(entry, ensure_ascii=False).encode()  # what is generated is written beside it
    except (TypeError, ValueError) as error:  # a date of Parquet, half a surrogate pair
        raise UserError(f"{where}: it cannot be written as JSON in UTF-8: {error}") from None
    return entry


def _references(entry: dict[str, Any], where: str) -> list[str]:
    if "references" in entry and "reference" in entry:
        raise UserError(f'{where}: has both "references" and "reference"; keep one of them')
    references = entry.get("references", entry.get("reference"))
    if isinstance(references, str):
        references = [references]
    if not isinstance(references, list) or not references or not all(isinstance(r, str) for r in references):
        found = json.dumps(references, ensure_ascii=False)[:60]
        raise UserError(f'{where}: "references" must be a list of one text or more, not {found}')
    return references


def _lines(path: str | Path) -> list[str]:
    try:
        with open_bytes(path) as file:
            text = file.read().decode("utf-8-sig")
    except DAMAGE as error:
        raise UserError(f"cannot open {path}: {getattr(error, 'strerror', None) or error}; check the path") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; convert the file first") from None
    lines = text.replace("\r\n", "\n").split("\n")
    return lines[:-1] if not lines[-1] else lines
