"""Fourth stage of a build, in one process: the tokens of all pieces become shards, with manifest and data card."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.data.building import card
from gptjax.data.building.select import Selected, Selection, selected_texts
from gptjax.data.building.splits import SPLITS
from gptjax.data.building.tokenize import TOKEN_SUMMARY, USED, TokenizeStage
from gptjax.data.store.shards import SplitWriter
from gptjax.data.store.store import FORMAT_VERSION, MANIFEST, TOKENIZER
from gptjax.files import read_json

_SAMPLE_PIECES = 16
_SAMPLE_CHARACTERS = 400_000


def assemble(
    directory: Path,
    *,
    about: dict[str, Any],
    summary: dict[str, Any],
    selection: Selection,
    selected: Sequence[Selected],
    stage: TokenizeStage,
    tokenized: Sequence[Path],
    shard_tokens: int,
) -> None:
    """Writes the store.

    Args:
      directory: new and empty.
      about: source and options, for the manifest.
      summary: of the cleaned pieces, from `card.merge_summaries`.
      stage: the stage that made the tokens.
      tokenized: the directories of the pieces' tokens.
      shard_tokens: most tokens in a file.
    """
    summaries = [read_json(path / TOKEN_SUMMARY) for path in tokenized]
    stage.tokenizer.save(directory / TOKENIZER)
    manifest = {
        "format_version": FORMAT_VERSION,
        **about,
        "source_fingerprint": _fingerprint([piece["sha256"] for piece in summaries]),
        "duplicates": len(selection.duplicates),
        "contaminated": len(summary["contaminated"]),
        **{name: summary[name] for name in ("decode_replacements", "skipped", "empty_documents")},
        "tokenizer": {
            "spec": about["tokenizer"],
            "sha256": stage.tokenizer.sha256,
            "vocab_size": stage.tokenizer.vocab_size,
        },
        "chat_template": stage.template,
        "dtype": stage.dtype,
        "split_by": selection.method,
        "splits": _join(directory, stage, tokenized, summaries, shard_tokens),
    }
    used = sum(np.load(path / USED) for path in tokenized)
    card.write(directory, manifest, summary, selection, stage.tokenizer, used, _sample(selected))
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _fingerprint(digests: list[str]) -> str:
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _join(
    directory: Path,
    stage: TokenizeStage,
    tokenized: Sequence[Path],
    summaries: list[dict[str, Any]],
    shard_tokens: int,
) -> dict[str, Any]:
    """Joins the tokens of the pieces into shards; returns the description of each split."""
    splits: dict[str, Any] = {}
    for split in SPLITS:
        writer = SplitWriter(
            directory / split, np.dtype(stage.dtype), shard_tokens, has_mask=stage.template is not None
        )
        for path, summary in zip(tokenized, summaries, strict=True):
            if counts := summary["splits"].get(split):
                writer.add(path, split, counts["continued_bytes"], counts["characters"])
        if writer.num_documents:
            splits[split] = writer.finish()
    return splits


def _sample(selected: Sequence[Selected]) -> Iterator[str]:
    """Texts from the start of a few pieces, evenly spread over the corpus."""
    pieces = selected[:: -(-len(selected) // _SAMPLE_PIECES)]
    for piece in pieces:
        rest = _SAMPLE_CHARACTERS // len(pieces)
        for text in selected_texts([piece]):
            yield text[:rest]
            rest -= len(text)
            if rest <= 0:
                break
