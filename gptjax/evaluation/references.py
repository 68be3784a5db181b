"""Text compared with references by sacrebleu: corpus BLEU, chrF and TER, with their signatures."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import sacrebleu
from jaxtyping import Float
from sacrebleu.metrics.base import Metric as Scorer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.metrics.ter import TER

from gptjax.errors import RunError, UserError
from gptjax.evaluation import item_sums
from gptjax.evaluation.item_sums import References, Systems
from gptjax.evaluation.metrics import FORMULAS, Metric, item_ids, resamples

# Functions of sacrebleu's scorers that are not public: the statistics of each item, and the score of their sums
_EXTRACT, _COMPUTE = "_extract_corpus_statistics", "_compute_score_from_stats"
BOOTSTRAP_SAMPLES, SEED = 1000, 12345  # the defaults of sacrebleu --confidence


def bleu(
    hypotheses: Sequence[str],
    references_list: Sequence[Sequence[str]],
    tokenize: str = "13a",
    *,
    lowercase: bool = False,
) -> Metric:
    """Corpus BLEU, 0 to 100, as `sacrebleu --confidence` prints it.

    Args:
      hypotheses: one text per item; may be empty.
      references_list: one or more references per item; the number may differ between items.
      tokenize: sacrebleu's tokenizer, e.g. from `words.choose_tokenizer`.
      lowercase: with tokenize="13a" and several references, this is what mteval-v13a.pl and the script of the E2E
        challenge compute.

    Raises UserError where nothing can be scored. Papineni et al. 2002; Post 2018 (arXiv:1804.08771).
    """
    return _metric(Counts.bleu(tokenize, lowercase=lowercase), hypotheses, references_list)


def chrf(hypotheses: Sequence[str], references_list: Sequence[Sequence[str]], *, word_order: int = 0) -> Metric:
    """Corpus chrF2 (1- to 6-grams of characters), 0 to 100, as `sacrebleu -m chrf --confidence` prints it.

    word_order=2 is chrF++. Arguments and errors otherwise as `bleu`. Popović 2015 (aclanthology.org/W15-3049).
    """
    return _metric(Counts.chrf(word_order=word_order), hypotheses, references_list)


def ter(hypotheses: Sequence[str], references_list: Sequence[Sequence[str]], *, characters: bool = False) -> Metric:
    """Translation edit rate, edits per 100 words of a reference, as `sacrebleu -m ter --confidence` prints it.

    Lower is better. With `characters`, Chinese is counted by character (--ter-normalized --ter-asian-support).
    Snover et al. 2006.
    """
    return _metric(Counts.ter(characters=characters), hypotheses, references_list)


def check_sacrebleu() -> None:
    """Raises RunError if sacrebleu lacks the private functions that compute its statistics."""
    missing = [name for name in (_EXTRACT, _COMPUTE) if not callable(getattr(Scorer, name, None))]
    if missing:
        raise RunError(
            f"sacrebleu {sacrebleu.__version__} has no {' and no '.join(missing)}: gptjax knows versions 2.5 and 2.6; "
            "pip install 'sacrebleu>=2.5,<2.7'"
        )


def _score_of_sums(scorer: Scorer, sums: Float[np.ndarray, " sums"]) -> float:
    """The score of summed statistics; tokenization and case no longer matter for it."""
    check_sacrebleu()
    return float(getattr(scorer, _COMPUTE)(sums.tolist()).score)


FORMULAS |= {
    "bleu": partial(_score_of_sums, BLEU()),
    "chrf": lambda sums: _score_of_sums(CHRF(word_order=len(sums) // 3 - CHRF.CHAR_ORDER), sums),
    "ter": partial(_score_of_sums, TER()),
}


def check(hypotheses: Sequence[str], references_list: Sequence[Sequence[str]]) -> None:
    """Raises UserError if items lack hypotheses or references, or there is nothing to score."""
    if len(hypotheses) != len(references_list):
        raise UserError(
            f"there are {len(hypotheses)} hypotheses but references for {len(references_list)} items; "
            "every item needs one hypothesis"
        )
    if not hypotheses:
        raise UserError("there are no hypotheses to score")
    for item, references in enumerate(references_list, start=1):
        if not references:
            raise UserError(f"item {item} has no reference; every hypothesis needs one or more")


@dataclasses.dataclass(frozen=True)
class Counts:
    """Computes sacrebleu's statistics of each item; `formula` names the score."""

    formula: str
    options: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def bleu(cls, tokenize: str, *, lowercase: bool = False) -> "Counts":
        """Raises UserError for a tokenizer that is unknown or not installed."""
        if tokenize not in BLEU.TOKENIZERS:
            raise UserError(f"BLEU tokenizer {tokenize!r} is unknown; choose from {', '.join(BLEU.TOKENIZERS)}")
        counts = cls("bleu", (("tokenize", tokenize), ("lowercase", lowercase)))
        try:
            counts.scorer()
        except (ImportError, RuntimeError) as error:
            raise UserError(f"BLEU tokenizer {tokenize!r} needs another package: {error}") from None
        return counts

    @classmethod
    def chrf(cls, *, word_order: int = 0) -> "Counts":
        return cls("chrf", (("word_order", word_order),))

    @classmethod
    def ter(cls, *, characters: bool = False) -> "Counts":
        return cls("ter", (("normalized", characters), ("asian_support", characters)))

    def scorer(self, references: Sequence[Sequence[str | None]] | None = None) -> Scorer:
        return {"bleu": BLEU, "chrf": CHRF, "ter": TER}[self.formula](**dict(self.options), references=references)

    def __call__(self, systems: Systems, references_list: References) -> list[Float[np.ndarray, "items sums"]]:
        check_sacrebleu()
        # sacrebleu takes the k-th references of all items together, None where an item has fewer.
        scorer = self.scorer(list(itertools.zip_longest(*references_list)))
        return [np.array(getattr(scorer, _EXTRACT)(texts, None), np.float64) for texts in systems]


def corpus_metric(counts: Counts, sums: Float[np.ndarray, "items sums"], references_list: References) -> Metric:
    """The score of counted items with sacrebleu's interval: mean of the bootstrap +- half its middle 95 %."""
    scorer = counts.scorer()
    compute = partial(_score_of_sums, scorer)
    resampled = len(sums) > 1
    interval = [math.nan, math.nan]
    if resampled:
        drawn = np.concatenate([weights @ sums for weights in resamples(len(sums), BOOTSTRAP_SAMPLES, SEED)])
        # Single precision as in sacrebleu; it changes the sixth digit of an interval.
        scores = np.sort([float(getattr(scorer, _COMPUTE)(row).score) for row in drawn.astype(np.float32)])
        outside = len(scores) // 40
        margin = (scores[-1 - outside] - scores[outside]) / 2
        limit = math.inf if counts.formula == "ter" else 100.0
        interval = [max(scores.mean() - margin, 0.0), min(scores.mean() + margin, limit)]
        scorer.n_bootstrap, scorer.seed = BOOTSTRAP_SAMPLES, str(SEED)
    numbers = {len(references) for references in references_list}
    scorer.num_refs = numbers.pop() if len(numbers) == 1 else -1
    signature = scorer.get_signature().format()
    settings = "|".join(part for part in signature.split("|") if not part.startswith(("nrefs:", "bs:", "seed:")))
    return Metric(
        value=compute(sums.sum(axis=0)),
        ci95=interval,
        n=len(sums),
        signature=signature,
        ids=item_ids([list(references) for references in references_list]),
        sums=sums,
        formula=counts.formula,
        unit=f"{counts.formula}|{settings}",
        lower_is_better=counts.formula == "ter",
    )


def _metric(counts: Counts, hypotheses: Sequence[str], references_list: References) -> Metric:
    check(hypotheses, references_list)
    (sums,) = item_sums.compute([counts], [hypotheses], references_list)
    return corpus_metric(counts, sums[counts], references_list)
