"""Files of prompts with references, and of what a system wrote for them."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptjax.data.sources.records import Damaged, read_records
from gptjax.errors import UserError

_HYPOTHESIS_FIELDS = ("completion", "hypothesis", "prediction")
_RECORDS = (".jsonl", ".json", ".csv", ".gz")


def read_prompts(spec: str | Path) -> list[dict[str, Any]]:
    """Prompts as {"prompt": text, "references": [text, ...]}.

    FILE is JSONL, or a JSON list, whose objects have `prompt` and either `references` (a list) or `reference`.
    FILE#PROMPT,REFERENCE names the fields of JSONL or the columns of a CSV file, such as
    e2e/testset_w_refs.csv#mr,ref; records of the same prompt are then one prompt with several references. `.gz`
    files are decompressed. Raises UserError naming file and line.
    """
    path, fields = _split_spec(str(spec))
    prompts = [_prompt(value, fields, place) for place, value in _records(path)]
    if not prompts:
        raise UserError(f'{path} has no prompts; a line is {{"prompt": "...", "references": ["...", "..."]}}')
    if not fields:
        return prompts
    grouped: dict[str, list[str]] = {}
    for prompt in prompts:
        grouped.setdefault(prompt["prompt"], []).extend(prompt["references"])
    return [{"prompt": prompt, "references": references} for prompt, references in grouped.items()]


def read_hypotheses(path: Path) -> tuple[list[str], list[list[str]] | None]:
    """What a system wrote, one text an item, and the references where the file has them.

    A text file has one text a line, which may be empty; JSONL has `completion` (as `generate` writes),
    `hypothesis` or `prediction`, and may have `references` or `reference`.
    """
    if path.suffix not in _RECORDS:
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

    Several text files have one reference of every item each, one a line. A single text file has one a line, or
    several with a blank line after each item's. Otherwise as `read_prompts`.
    """
    if len(specs) == 1:
        path, _ = _split_spec(specs[0])
        if path.suffix in _RECORDS:
            return [prompt["references"] for prompt in read_prompts(specs[0])]
        lines = _lines(path)
        text = "\n".join(lines).strip("\n")
        groups = re.split(r"\n(?:[^\S\n]*\n)+", text)
        return [group.split("\n") for group in groups] if len(groups) > 1 else [[line] for line in text.split("\n")]
    columns = [_lines(Path(spec)) for spec in specs]
    for spec, column in zip(specs, columns, strict=True):
        if len(column) != len(columns[0]):
            raise UserError(
                f"{spec} has {len(column)} lines, {specs[0]} has {len(columns[0])}; line k of each file is a "
                "reference of item k"
            )
    return [list(row) for row in zip(*columns, strict=True)]


def _split_spec(spec: str) -> tuple[Path, list[str]]:
    """The path, and the names of the two fields where there are any."""
    name, hash_sign, names = spec.rpartition("#")
    if not hash_sign or Path(spec).exists():
        return Path(spec), []
    fields = [field.strip() for field in names.split(",")]
    if len(fields) != 2 or not all(fields):
        raise UserError(f"{spec}: after # come two names, FILE#PROMPT,REFERENCE; found {names!r}")
    return Path(name), fields


def _records(path: Path) -> list[tuple[str, dict[str, Any]]]:
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


def _prompt(entry: dict[str, Any], fields: Sequence[str], where: str) -> dict[str, Any]:
    if fields:
        for field in fields:
            if not isinstance(entry.get(field), str):
                there = ", ".join(map(repr, entry)) or "none"
                raise UserError(f"{where}: no text {field!r}; fields: {there}")
        return {"prompt": entry[fields[0]], "references": [entry[fields[1]]]}
    prompt = entry.get("prompt")
    if not isinstance(prompt, str):
        there = ", ".join(entry) or "none"
        raise UserError(
            f'{where}: "prompt" must be a text, not {json.dumps(prompt)[:60]}; fields: {there}. Name others with '
            "FILE#PROMPT,REFERENCE"
        )
    return {"prompt": prompt, "references": _references(entry, where)}


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


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot open {path}: {error.strerror}; check the path") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; convert the file first") from None
    lines = text.replace("\r\n", "\n").split("\n")
    return lines[:-1] if not lines[-1] else lines
