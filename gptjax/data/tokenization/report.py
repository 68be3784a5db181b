"""Figures of a tokenizer on a sample of text: tokens per byte, round trips, and how much of the vocabulary is used."""

import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from gptjax.data.scripts import HAN_SCRIPT
from gptjax.data.tokenization.tokenizer import Tokenizer

_HAN = re.compile(f"[{HAN_SCRIPT}]")
_LATIN = re.compile("[A-Za-z\u00aa\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u1e00-\u1eff]")
_LETTER = re.compile(r"[^\W\d_]")
_MAX_EXAMPLES = 3
_EXCERPT_CHARACTERS = 80


def script_of(text: str) -> str:
    """The script of most letters of `text`, "han", "latin" or "other"; a Han character counts as three."""
    han, latin = len(_HAN.findall(text)), len(_LATIN.findall(text))
    other = len(_LETTER.findall(text)) - han - latin
    return max((("han", 3 * han), ("latin", latin), ("other", other)), key=lambda item: item[1])[0]


def tokenizer_report(tokenizer: Tokenizer, texts: Iterable[str], used: np.ndarray | None = None) -> dict[str, Any]:
    """Figures of a tokenizer on a sample.

    Args:
      texts: the sample.
      used: how often each id occurs in the corpus (default: counted in the sample).

    Returns:
      `scripts`: for "latin", "han" and "other", the documents, bytes and tokens of the texts in that script
      and `bytes_per_token`; `round_trip`: texts that decode to themselves, texts in all, and the first that do not;
      `lacking`: what the vocabulary lacks of the sample; `unused_ids`: how many ids do not occur; `vocab_size`.
    """
    texts = [text for text in texts if text]
    scripts = {name: {"documents": 0, "bytes": 0, "tokens": 0} for name in ("latin", "han", "other")}
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    failures: list[dict[str, str]] = []
    same = 0
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        script = scripts[script_of(text)]
        script["documents"] += 1
        script["bytes"] += len(text.encode())
        script["tokens"] += len(ids)
        counts += np.bincount(ids, minlength=len(counts))
        decoded = tokenizer.decode(ids)
        same += decoded == text
        if decoded != text and len(failures) < _MAX_EXAMPLES:
            failures.append(_difference(text, decoded))
    for script in scripts.values():
        script["bytes_per_token"] = round(script["bytes"] / script["tokens"], 3) if script["tokens"] else None
    unused = int((counts if used is None else used).astype(bool).__invert__().sum())
    return {
        "vocab_size": tokenizer.vocab_size,
        "unused_ids": unused,
        "lacking": tokenizer.lacking(texts),
        "scripts": {name: script for name, script in scripts.items() if script["documents"]},
        "round_trip": {"same": same, "texts": len(texts), "examples": failures},
    }


def _difference(text: str, decoded: str) -> dict[str, str]:
    pairs = enumerate(zip(text, decoded, strict=False))
    start = next((i for i, (a, b) in pairs if a != b), min(len(text), len(decoded)))
    start = max(start - 10, 0)
    end = start + _EXCERPT_CHARACTERS
    return {"text": text[start:end], "decoded": decoded[start:end]}
