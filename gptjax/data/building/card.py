"""The data card of a token store: what was read, what was removed and why, what is left, and warnings."""

import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.data.building.select import Selection
from gptjax.data.cleaning.cleaner import CleaningCounts
from gptjax.data.store.store import CARD
from gptjax.data.tokenization.report import tokenizer_report
from gptjax.data.tokenization.tokenizer import Tokenizer

CARD_TEXT = "card.md"
DUPLICATES = "duplicates.jsonl"

_MAX_LISTED = 1000
_MAX_MESSAGES = 100
_SHOWN = 10
_MANY_UNUSED = 0.5


def merge_summaries(summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The summaries of all cleaned pieces, in their order, as one."""
    totals = ("documents", "bytes", "empty_documents", "decode_replacements", "skipped")
    merged: dict[str, Any] = {name: sum(summary[name] for summary in summaries) for name in totals}
    for name in ("skipped_messages", "contaminated"):
        merged[name] = [entry for summary in summaries for entry in summary[name]]
    merged["notes"] = dict(sum((Counter(summary["notes"]) for summary in summaries), Counter()))
    counts = CleaningCounts()
    for summary in summaries:
        counts.merge(CleaningCounts.from_json(summary["cleaning"]))
    return {**merged, "cleaning": counts.to_json()}


def write(
    directory: Path,
    manifest: dict[str, Any],
    summary: dict[str, Any],
    selection: Selection,
    tokenizer: Tokenizer,
    used: np.ndarray,
    sample: Iterable[str],
) -> None:
    """Writes card.json, card.md and, if there are duplicates, duplicates.jsonl.

    Args:
      directory: of the store.
      manifest: of the store.
      summary: of all cleaned pieces, from `merge_summaries`.
      used: how often each id of the vocabulary occurs.
      sample: texts of the store, for the report on the tokenizer.
    """
    report = tokenizer_report(tokenizer, sample, used)
    if report["lacking"]:
        print(f"warning: {manifest['source']}: {report['lacking']}", file=sys.stderr)
    card = describe(manifest, summary, selection, report)
    text = json.dumps(card, indent=1, ensure_ascii=False) + "\n"
    (directory / CARD).write_text(text, encoding="utf-8", errors="surrogatepass")
    (directory / CARD_TEXT).write_text(to_markdown(card), encoding="utf-8", errors="replace")
    if selection.duplicates:
        lines = (json.dumps(dataclasses.asdict(duplicate), ensure_ascii=False) for duplicate in selection.duplicates)
        with (directory / DUPLICATES).open("w", encoding="utf-8", errors="surrogatepass") as file:
            file.writelines(f"{line}\n" for line in lines)


def describe(
    manifest: dict[str, Any], summary: dict[str, Any], selection: Selection, report: dict[str, Any]
) -> dict[str, Any]:
    """The data card as JSON values."""
    duplicates = selection.duplicates
    across = [duplicate for duplicate in duplicates if duplicate.split != duplicate.kept_split]
    listed = across + [duplicate for duplicate in duplicates if duplicate.split == duplicate.kept_split]
    splits = {
        name: {key: split[key] for key in ("documents", "tokens", "bytes", "characters")}
        | {"bytes_per_token": round(split["bytes"] / split["tokens"], 3)}
        for name, split in manifest["splits"].items()
    }
    card = {
        "source": manifest["source"],
        "source_fingerprint": manifest["source_fingerprint"],
        "read": {name: summary[name] for name in ("documents", "bytes", "empty_documents", "decode_replacements")},
        "skipped": {"count": summary["skipped"], "messages": summary["skipped_messages"][:_MAX_MESSAGES]},
        "notes": summary["notes"],
        "cleaning": {
            "profile": manifest["cleaning"],
            "invertible": manifest["invertible"],
            "steps": summary["cleaning"],
        },
        "contamination": {
            "against": manifest["decontaminate"],
            "removed": len(summary["contaminated"]),
            "documents": summary["contaminated"][:_MAX_LISTED],
        },
        "duplicates": {
            "mode": manifest["deduplicate"],
            "removed": dict(Counter(duplicate.kind for duplicate in duplicates)),
            "across_splits": len(across),
            "pairs": [dataclasses.asdict(duplicate) for duplicate in listed[:_MAX_LISTED]],
        },
        "split_by": manifest["split_by"],
        "split": {
            "asked": {name: manifest[f"{name}_fraction"] for name in ("validation", "test")},
            "got": _shares(manifest["splits"], "documents" if manifest["split_by"] == "document" else "characters"),
            "different": selection.groups,
            "repeated": selection.repeated,
            "largest_group": selection.largest_group,
        },
        "splits": splits,
        "characters_of_documents": {
            f"{2**i}-{2 ** (i + 1) - 1}": count for i, count in sorted(selection.lengths.items())
        },
        "tokenizer": {**manifest["tokenizer"], **report},
    }
    return {**card, "warnings": list(_warnings(card))}


def _shares(splits: dict[str, Any], unit: str) -> dict[str, float]:
    total = sum(split[unit] for split in splits.values())
    return {name: round(splits.get(name, {unit: 0})[unit] / max(total, 1), 4) for name in ("validation", "test")}


def _split(card: dict[str, Any]) -> str:
    """How the corpus was split, and why the shares differ from those that were asked for."""
    split, by = card["split"], card["split_by"]
    unit = "documents" if by == "document" else "characters"
    shares = ", ".join(
        f"{name} {split['asked'][name]:.1%} asked, {split['got'][name]:.1%} got" for name in split["got"]
    )
    text = f"Split by {by}; of the {unit}: {shares}."
    if by == "document" and split["repeated"]:
        text += (
            " The split is chosen by a hash of the words, in dialogues of those before the first answer, so that no "
            f"question is in two splits: {split['repeated']:,} documents share these words with others and stay "
            f"together; the largest group has {split['largest_group']:,}."
        )
    return text


def _warnings(card: dict[str, Any]) -> Iterator[str]:
    if not card["cleaning"]["invertible"]:
        yield (
            f"the cleaning {card['cleaning']['profile']!r} reduced the text: the original cannot be restored, and a "
            "model trained on it generates such text"
        )
    if card["skipped"]["count"]:
        count = card["skipped"]["count"]
        yield f"{count} lines, documents or ends of files could not be read and were skipped"
    for what, count in sorted(card["notes"].items(), key=lambda note: -note[1])[:_SHOWN]:
        yield f"{count:,} x {what}"
    if card["read"]["decode_replacements"]:
        yield f"{card['read']['decode_replacements']} bytes were not UTF-8 and became U+FFFD"
    if card["duplicates"]["mode"] == "none":
        yield "duplicates were not looked for: text of the validation split may be in the training split"
    if not card["contamination"]["against"]:
        yield "the text was not compared with evaluation sets"
    trip = card["tokenizer"]["round_trip"]
    if trip["same"] < trip["texts"]:
        yield (
            f"the tokenizer {card['tokenizer']['spec']} decodes {trip['texts'] - trip['same']} of "
            f"{trip['texts']} sampled texts to another text"
        )
    if card["tokenizer"]["lacking"]:
        yield card["tokenizer"]["lacking"]
    if card["tokenizer"]["unused_ids"] > _MANY_UNUSED * card["tokenizer"]["vocab_size"]:
        yield f"{card['tokenizer']['unused_ids']} of {card['tokenizer']['vocab_size']} token ids never occur"


def to_markdown(card: dict[str, Any]) -> str:
    """The data card for people."""
    return "\n".join(_lines(card)) + "\n"


def _lines(card: dict[str, Any]) -> Iterator[str]:
    read = card["read"]
    yield f"# Data card of `{card['source']}`"
    yield ""
    yield (
        f"Read: {read['documents']:,} documents, {read['bytes']:,} bytes; "
        f"{read['empty_documents']:,} of them empty. Fingerprint {card['source_fingerprint'][:12]}."
    )
    for warning in card["warnings"]:
        yield f"\n> **Beware:** {warning}."
    yield from _table(
        "Splits",
        ("split", "documents", "tokens", "bytes", "bytes per token"),
        [
            (name, split["documents"], split["tokens"], split["bytes"], split["bytes_per_token"])
            for name, split in card["splits"].items()
        ],
    )
    yield f"\n{_split(card)}"
    yield from _cleaning(card["cleaning"])
    yield from _removed(card)
    yield from _tokenizer(card["tokenizer"])
    yield from _table("Characters of a document", ("characters", "documents"), card["characters_of_documents"].items())


def _cleaning(cleaning: dict[str, Any]) -> Iterator[str]:
    names = ("documents_in", "documents_out", "documents_changed", "bytes_in", "bytes_out")
    rows = [(step["step"], *(step[name] for name in names)) for step in cleaning["steps"]]
    yield from _table(f"Cleaning: {cleaning['profile']}", ("step", *(n.replace("_", " ") for n in names)), rows)
    for step in cleaning["steps"]:
        for example in step["removed"]:
            where = f"{_code(example['id'])} ({example['reason']})"
            yield f"* `{step['step']}` removed {where}: {_code(example['text'])}"
        for example in step["changed"]:
            changed = f"{_code(example['before'])} → {_code(example['after'])}"
            yield f"* `{step['step']}` in {_code(example['id'])}: {changed}"


def _removed(card: dict[str, Any]) -> Iterator[str]:
    duplicates, contamination = card["duplicates"], card["contamination"]
    if duplicates["pairs"]:
        removed = ", ".join(f"{count:,} {kind}" for kind, count in sorted(duplicates["removed"].items()))
        rows = [
            tuple(_code(pair[name]) for name in ("id", "kept_id", "kind", "split", "kept_split"))
            for pair in duplicates["pairs"][:_SHOWN]
        ]
        title = f"Duplicates removed: {removed}; {duplicates['across_splits']:,} across splits"
        yield from _table(title, ("removed", "repeats", "kind", "its split", "split of the other"), rows)
    if contamination["documents"]:
        rows = [
            (_code(entry["id"]), _code(entry["file"]), entry["line"], _code(entry["excerpt"]))
            for entry in contamination["documents"][:_SHOWN]
        ]
        title = f"Contaminated documents removed: {contamination['removed']:,}"
        yield from _table(title, ("document", "evaluation file", "line", "shared text"), rows)
    if card["skipped"]["messages"]:
        yield f"\n## Skipped: {card['skipped']['count']:,}\n"
        yield from (f"* {message}" for message in card["skipped"]["messages"][:_SHOWN])


def _tokenizer(tokenizer: dict[str, Any]) -> Iterator[str]:
    rows = [
        (script, about["documents"], about["bytes"], about["tokens"], about["bytes_per_token"])
        for script, about in tokenizer["scripts"].items()
    ]
    title = f"Tokenizer: {tokenizer['spec']}, on a sample"
    yield from _table(title, ("script", "documents", "bytes", "tokens", "bytes per token"), rows)
    trip = tokenizer["round_trip"]
    yield (
        f"\n{tokenizer['vocab_size']:,} ids, of which {tokenizer['unused_ids']:,} do not occur. "
        f"{trip['same']:,} of {trip['texts']:,} texts decode to themselves."
    )


def _table(title: str, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> Iterator[str]:
    rows = list(rows)
    yield f"\n## {title}\n"
    if not rows:
        yield "Nothing."
        return
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(f'{cell:,}' if isinstance(cell, int) else str(cell) for cell in row)} |"


def _code(text: str) -> str:
    """Text for one line of a table; line ends and control characters are escaped as in JSON."""
    return "`" + json.dumps(str(text), ensure_ascii=False)[1:-1].replace("`", "'").replace("|", "¦") + "`"
