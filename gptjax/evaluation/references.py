"""Text compared with references by sacrebleu: corpus BLEU, chrF and TER, with their signatures."""

import itertools
import json
import math
from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np
import sacrebleu
from jaxtyping import Float
from sacrebleu.metrics.base import Metric as Scorer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.metrics.ter import TER

from gptjax.data.scripts import count_han
from gptjax.errors import RunError, UserError
from gptjax.evaluation.metrics import FORMULAS, Metric, item_ids

# Functions of sacrebleu's scorers that are not public: the statistics of each item, and the score of their sums
_EXTRACT, _COMPUTE = "_extract_corpus_statistics", "_compute_score_from_stats"
BOOTSTRAP_SAMPLES = 1000  # the default of sacrebleu --confidence


def choose_tokenizer(texts: Iterable[str]) -> str:
    """The BLEU tokenizer for texts: "zh" (characters) when most letters are Han, else "13a" (words)."""
    letters = han = 0
    for text in texts:
        letters += sum(map(str.isalpha, text))
        han += count_han(text)
    return "zh" if 2 * han > letters else "13a"


def bleu(
    hypotheses: Sequence[str],
    references_list: Sequence[Sequence[str]],
    tokenize: str = "13a",
    *,
    lowercase: bool = False,
) -> Metric:
    """Corpus BLEU, 0 to 100, as `sacrebleu --confidence` prints it.

    Args:
      hypotheses: one text an item; may be empty.
      references_list: one reference or more an item; items may differ in how many.
      tokenize: sacrebleu's tokenizer, e.g. from `choose_tokenizer`.
      lowercase: with tokenize="13a" and several references, this is what mteval-v13a.pl and the script of the E2E
        challenge compute.

    Raises UserError where nothing can be scored. Papineni et al. 2002; Post 2018 (arXiv:1804.08771).
    """
    if tokenize not in BLEU.TOKENIZERS:
        raise UserError(f"BLEU tokenizer {tokenize!r} is unknown; choose from {', '.join(BLEU.TOKENIZERS)}")
    try:
        scorer = BLEU(tokenize=tokenize, lowercase=lowercase)
    except (ImportError, RuntimeError) as error:
        raise UserError(f"BLEU tokenizer {tokenize!r} needs another package: {error}") from None
    return _corpus_metric("bleu", scorer, hypotheses, references_list, limit=100.0)


def chrf(hypotheses: Sequence[str], references_list: Sequence[Sequence[str]], *, word_order: int = 0) -> Metric:
    """Corpus chrF2 (1- to 6-grams of characters), 0 to 100, as `sacrebleu -m chrf --confidence` prints it.

    word_order=2 is chrF++. Arguments and errors otherwise as `bleu`. Popović 2015 (aclanthology.org/W15-3049).
    """
    return _corpus_metric("chrf", CHRF(word_order=word_order), hypotheses, references_list, limit=100.0)


def ter(hypotheses: Sequence[str], references_list: Sequence[Sequence[str]], *, characters: bool = False) -> Metric:
    """Translation edit rate, edits in 100 words of a reference, as `sacrebleu -m ter --confidence` prints it.

    Lower is better. With `characters`, Chinese is counted by character (--ter-normalized --ter-asian-support).
    Snover et al. 2006.
    """
    scorer = TER(normalized=characters, asian_support=characters)
    return _corpus_metric("ter", scorer, hypotheses, references_list, limit=math.inf, lower_is_better=True)


def check_sacrebleu() -> None:
    """Raises RunError where sacrebleu has not the functions, private ones, by which its statistics are had."""
    missing = [name for name in (_EXTRACT, _COMPUTE) if not callable(getattr(Scorer, name, None))]
    if missing:
        raise RunError(
            f"sacrebleu {sacrebleu.__version__} has no {' and no '.join(missing)}: gptjax knows versions 2.5 and 2.6; "
            "pip install 'sacrebleu>=2.5,<2.7'"
        )


def _score_of_sums(scorer: Scorer, sums: Float[np.ndarray, " sums"]) -> float:
    """The score of summed statistics, which do not depend on tokenization and case any more."""
    check_sacrebleu()
    return float(getattr(scorer, _COMPUTE)(sums.tolist()).score)


FORMULAS |= {
    "bleu": partial(_score_of_sums, BLEU()),
    "chrf": lambda sums: _score_of_sums(CHRF(word_order=len(sums) // 3 - CHRF.CHAR_ORDER), sums),
    "ter": partial(_score_of_sums, TER()),
}


def check(hypotheses: Sequence[str], references_list: Sequence[Sequence[str]]) -> None:
    """Raises UserError where the two do not belong together or there is nothing to score."""
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


def _corpus_metric(
    formula: str,
    scorer: Scorer,
    hypotheses: Sequence[str],
    references_list: Sequence[Sequence[str]],
    *,
    limit: float,
    lower_is_better: bool = False,
) -> Metric:
    """The score with sacrebleu's interval: mean of the bootstrap +- half the width of its middle 95 %.

    sacrebleu holds all samples at once: about 80 KB an item for chrF, half of that for BLEU.
    """
    check(hypotheses, references_list)
    check_sacrebleu()
    recorded = []
    extract, compute = getattr(scorer, _EXTRACT), getattr(scorer, _COMPUTE)

    def extract_and_record(*arguments):  # the statistics are not public, and TER takes minutes to compute them twice
        recorded.extend(extract(*arguments))
        return recorded

    def compute_as_float(statistics):  # sacrebleu 2.6 cannot take the mean of numpy's numbers and Python's 0.0
        score = compute(statistics)
        score.score = float(score.score)
        return score

    setattr(scorer, _EXTRACT, extract_and_record)
    setattr(scorer, _COMPUTE, compute_as_float)
    # sacrebleu takes the k-th references of all items together, None where an item has fewer.
    streams = list(itertools.zip_longest(*references_list))
    resampled = len(hypotheses) > 1
    score = scorer.corpus_score(list(hypotheses), streams, n_bootstrap=BOOTSTRAP_SAMPLES if resampled else 1)
    signature = scorer.get_signature().format()
    # The interval is public only in the printed form; ten decimals lose nothing.
    printed = json.loads(score.format(width=10, signature=signature, is_json=True))
    # sacrebleu leaves the interval out where every sample scored zero.
    mean, margin = printed.get("confidence_mean", 0.0), printed.get("confidence_var", 0.0)
    settings = "|".join(part for part in signature.split("|") if not part.startswith(("nrefs:", "bs:", "seed:")))
    return Metric(
        value=float(score.score),
        ci95=[max(mean - margin, 0.0), min(mean + margin, limit)] if resampled else [math.nan, math.nan],
        n=len(hypotheses),
        signature=signature,
        ids=item_ids([list(references) for references in references_list]),
        sums=np.array(recorded, np.float64),
        formula=formula,
        unit=f"{formula}|{settings}",
        lower_is_better=lower_is_better,
    )
