"""ROUGE: the n-grams and the longest common subsequence that a text shares with references."""

import dataclasses
import importlib.metadata
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from gptjax.evaluation import item_sums
from gptjax.evaluation.item_sums import References, Systems
from gptjax.evaluation.metrics import Metric, item_ids, ratio_metric
from gptjax.evaluation.references import check
from gptjax.evaluation.words import ROUGE_WORDS, Words, rouge_words

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")


def rouge(
    hypotheses: Sequence[str],
    references_list: Sequence[Sequence[str]],
    *,
    words: str = "",
    stemmer: bool = False,
) -> dict[str, Metric]:
    """ROUGE-1, -2 and -L F-measures, 0 to 1, by the rouge_score package: the mean over items of the best reference.

    Args:
      words: "default", rouge_score's own, which are a-z and 0-9 and nothing else; "unicode"; or "" for those that fit
        the references, see `rouge_words`.
      stemmer: Porter's, for English; only with the default words.

    Lin 2004 (aclanthology.org/W04-1013).
    """
    check(hypotheses, references_list)
    words = words or rouge_words(text for references in references_list for text in references)
    counts = RougeCounts(words, stemmer)
    (sums,) = item_sums.compute([counts], [hypotheses], references_list)
    return rouge_metrics(counts, sums[counts], references_list)


def rouge_metrics(
    counts: "RougeCounts", sums: Float[np.ndarray, "items types"], references_list: References
) -> dict[str, Metric]:
    """The metrics of counted items."""
    settings = (
        f"stemmer:{'yes' if counts.stemmer else 'no'}|tok:{counts.words}|refs:best|"
        f"scale:0-1|rouge_score:{importlib.metadata.version('rouge_score')}"
    )
    ids = item_ids([list(references) for references in references_list])
    return {
        name: ratio_metric(ids, column, signature=f"{settings}|ci:bootstrap-1000", unit=settings)
        for name, column in zip(ROUGE_TYPES, sums.T, strict=True)
    }


@dataclasses.dataclass(frozen=True)
class RougeCounts:
    """The F-measure of each type of each item; see `rouge`."""

    words: str = "default"
    stemmer: bool = False

    def __call__(self, systems: Systems, references_list: References) -> list[Float[np.ndarray, "items types"]]:
        from rouge_score.rouge_scorer import RougeScorer

        tokenizer = None if self.words == "default" else _Tokenizer(ROUGE_WORDS[self.words])
        scorer = RougeScorer(list(ROUGE_TYPES), use_stemmer=self.stemmer, tokenizer=tokenizer)

        def f_measures(text: str, references: Sequence[str]) -> list[float]:
            scores = scorer.score_multi(list(references), text)
            return [scores[name].fmeasure for name in ROUGE_TYPES]

        return [np.array(list(map(f_measures, texts, references_list)), np.float64) for texts in systems]


class _Tokenizer:
    """Words, in the shape that rouge_score wants."""

    def __init__(self, words: Words):
        self.tokenize = words
