"""Text compared with references: sacrebleu's corpus BLEU and chrF, with their signatures."""

import itertools
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sacrebleu.metrics.base import Metric
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from gptjax.errors import UserError
from gptjax.evaluation.confidence import Estimate

BOOTSTRAP_SAMPLES = 1000  # the default of sacrebleu --confidence

# CJK unified ideographs with their extensions and compatibility forms
_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")


def read_prompts(path: str | Path) -> list[dict[str, Any]]:
    """Prompts of a JSONL file as {"prompt": text, "references": [text, ...]}.

    A line has `prompt` and either `references` (a list) or `reference` (one text); blank lines are skipped.
    Raises UserError naming file and line.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected JSONL with prompts and references") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; convert the file first") from None
    prompts = [_prompt(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise UserError(f'{path} has no prompts; a line is {{"prompt": "...", "references": ["...", "..."]}}')
    return prompts


def _prompt(line: str, where: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(entry, dict):
        raise UserError(f'{where}: expected {{"prompt": ..., "references": [...]}}, not {line.strip()[:60]}')
    prompt = entry.get("prompt")
    if not isinstance(prompt, str):
        raise UserError(f'{where}: "prompt" must be a text, not {json.dumps(prompt)[:60]}')
    if "references" in entry and "reference" in entry:
        raise UserError(f'{where}: has both "references" and "reference"; keep one of them')
    references = entry.get("references", entry.get("reference"))
    if isinstance(references, str):
        references = [references]
    if not isinstance(references, list) or not references or not all(isinstance(r, str) for r in references):
        found = json.dumps(references, ensure_ascii=False)[:60]
        raise UserError(f'{where}: "references" must be a list of one text or more, not {found}')
    return {"prompt": prompt, "references": references}


def choose_tokenizer(texts: Iterable[str]) -> str:
    """The BLEU tokenizer for texts: "zh" (characters) when most letters are Han, else "13a" (words)."""
    letters = han = 0
    for text in texts:
        letters += sum(map(str.isalpha, text))
        han += len(_HAN.findall(text))
    return "zh" if 2 * han > letters else "13a"


def bleu(hypotheses: Sequence[str], references_list: Sequence[Sequence[str]], tokenize: str = "13a") -> Estimate:
    """Corpus BLEU, 0 to 100, as `sacrebleu --confidence` prints it.

    Args:
      hypotheses: one text an item; may be empty.
      references_list: one reference or more an item; items may differ in how many.
      tokenize: sacrebleu's tokenizer, e.g. from `choose_tokenizer`.

    Raises UserError where nothing can be scored. Papineni et al. 2002; Post 2018 (arXiv:1804.08771).
    """
    if tokenize not in BLEU.TOKENIZERS:
        raise UserError(f"BLEU tokenizer {tokenize!r} is unknown; choose from {', '.join(BLEU.TOKENIZERS)}")
    try:
        metric = BLEU(tokenize=tokenize)
    except (ImportError, RuntimeError) as error:
        raise UserError(f"BLEU tokenizer {tokenize!r} needs another package: {error}") from None
    return _corpus_estimate(metric, hypotheses, references_list)


def chrf(hypotheses: Sequence[str], references_list: Sequence[Sequence[str]]) -> Estimate:
    """Corpus chrF2 (1- to 6-grams of characters), 0 to 100, as `sacrebleu -m chrf --confidence` prints it.

    Arguments and errors as `bleu`. Popović 2015 (aclanthology.org/W15-3049).
    """
    return _corpus_estimate(CHRF(), hypotheses, references_list)


def _corpus_estimate(metric: Metric, hypotheses: Sequence[str], references_list: Sequence[Sequence[str]]) -> Estimate:
    """The score with sacrebleu's interval: mean of the bootstrap +- half the width of its middle 95 %.

    sacrebleu holds all samples at once: about 80 KB an item for chrF, half of that for BLEU.
    """
    if len(hypotheses) != len(references_list):
        raise UserError(
            f"there are {len(hypotheses)} hypotheses but references for {len(references_list)} items; "
            "every item needs one hypothesis"
        )
    if not hypotheses:
        raise UserError("there are no hypotheses to score")
    for item, references in enumerate(references_list):
        if not references:
            raise UserError(f"item {item} has no reference; every hypothesis needs one or more")
    # sacrebleu takes the k-th references of all items together, None where an item has fewer.
    streams = list(itertools.zip_longest(*references_list))
    resampled = len(hypotheses) > 1
    score = metric.corpus_score(list(hypotheses), streams, n_bootstrap=BOOTSTRAP_SAMPLES if resampled else 1)
    signature = metric.get_signature().format()
    # The interval is public only in the printed form; ten decimals lose nothing.
    printed = json.loads(score.format(width=10, signature=signature, is_json=True))
    # sacrebleu leaves the interval out where every sample scored zero.
    mean, margin = printed.get("confidence_mean", 0.0), printed.get("confidence_var", 0.0)
    return Estimate(
        value=float(score.score),
        ci95=[max(mean - margin, 0.0), min(mean + margin, 100.0)] if resampled else [math.nan, math.nan],
        n=len(hypotheses),
        signature=signature,
    )
