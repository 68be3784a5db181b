"""How varied generated texts are: distinct n-grams over all texts, repeated n-grams within a text."""

import importlib.metadata
from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from sacrebleu.metrics.bleu import BLEU

from gptjax.evaluation.metrics import Metric, ratio_metric

DISTINCT_ORDERS = (1, 2, 3)
REPEATED_ORDER = 4


def diversity(texts: Sequence[str], ids: Sequence[str], tokenize: str = "13a") -> dict[str, Metric]:
    """distinct1, distinct2, distinct3 and repetition of texts; words are those of sacrebleu's tokenizer.

    distinct-n is the number of different n-grams in all texts / the number of n-grams (Li et al. 2016,
    arXiv:1510.03055); it falls with the amount of text, so compare only sets of equal size. repetition is the mean
    share of 4-grams that have occurred before in their text (seq-rep-4 of Welleck et al. 2020, arXiv:1908.04319), over
    the texts that have any. The interval of distinct-n is over texts, from its delete-one jackknife influences.
    """
    tokenizer = BLEU(tokenize=tokenize).tokenizer
    words = [tokenizer(text.strip()).split() for text in texts]
    settings = f"tok:{tokenize}|sacrebleu:{importlib.metadata.version('sacrebleu')}"
    metrics = {}
    for order in DISTINCT_ORDERS:
        grams = [_ngrams(text, order) for text in words]
        if any(grams):
            metrics[f"distinct{order}"] = ratio_metric(
                ids, _influences(grams), signature=f"{settings}|corpus-level|ci:jackknife-bootstrap-1000", unit=settings
            )
    grams = [_ngrams(text, REPEATED_ORDER) for text in words]
    if any(grams):
        has_any = np.array([bool(g) for g in grams], np.float64)
        share = np.array([1 - len(g) / g.total() if g else 0.0 for g in grams])
        metrics["repetition"] = ratio_metric(
            ids,
            share,
            has_any,
            signature=f"{settings}|{REPEATED_ORDER}-grams|per-text|ci:bootstrap-1000",
            unit=settings,
            lower_is_better=True,
        )
    return metrics


def _ngrams(words: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[start:] for start in range(order)), strict=False))


def _influences(grams: Sequence[Counter]) -> Float[np.ndarray, " texts"]:
    """Numbers whose mean is distinct-n and whose spread is that of its jackknife."""
    texts_with = Counter(gram for text in grams for gram in text)
    distinct, total = len(texts_with), sum(text.total() for text in grams)
    only_here = np.array([sum(texts_with[gram] == 1 for gram in text) for text in grams])
    sizes = np.array([text.total() for text in grams])
    left = total - sizes
    without = np.divide(distinct - only_here, left, out=np.zeros(len(grams)), where=left > 0)
    return distinct / total + (len(grams) - 1) * (without.mean() - without)
