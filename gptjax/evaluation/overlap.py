"""Text compared with references, item by item: ROUGE, SQuAD's F1 and exact match, GSM8K's answers."""

import collections
import importlib.metadata
import re
import string
from collections.abc import Callable, Sequence

import numpy as np

from gptjax.data.scripts import HAN
from gptjax.errors import UserError
from gptjax.evaluation.metrics import Metric, item_ids, ratio_metric
from gptjax.evaluation.references import check

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
# General punctuation, CJK symbols and punctuation, full-width forms.
_CHINESE_PUNCTUATION = re.compile("[\u2010-\u205e\u3000-\u303f\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65]")
_HAN_CHARACTER = re.compile(f"([{HAN}])")
_ROUGE_WORD = re.compile(f"[a-z0-9]+|[{HAN}]")
_FINAL_ANSWER = re.compile(r"####\s*(-?[$]?-?[0-9.,]+)")  # grade-school-math, dataset.py, with a dollar sign allowed
_NUMBER = re.compile(r"-?[$]?-?[0-9.,]*[0-9][0-9.,]*")


def rouge(
    hypotheses: Sequence[str],
    references_list: Sequence[Sequence[str]],
    *,
    characters: bool = False,
    stemmer: bool = False,
) -> dict[str, Metric]:
    """ROUGE-1, -2 and -L F-measures, 0 to 1, by the rouge_score package: the mean over items of the best reference.

    rouge_score drops everything but a-z and 0-9. With `characters`, each Chinese character is a word as well. The
    stemmer is Porter's, for English. Lin 2004 (aclanthology.org/W04-1013).
    """
    from rouge_score.rouge_scorer import RougeScorer

    check(hypotheses, references_list)
    tokenizer = _Characters() if characters else None
    scorer = RougeScorer(list(ROUGE_TYPES), use_stemmer=stemmer, tokenizer=tokenizer)
    scored = [scorer.score_multi(list(r), h) for h, r in zip(hypotheses, references_list, strict=True)]
    settings = (
        f"stemmer:{'yes' if stemmer else 'no'}|tok:{'zh-characters' if characters else 'default'}|refs:best|"
        f"scale:0-1|rouge_score:{importlib.metadata.version('rouge_score')}"
    )
    return {
        name: ratio_metric(
            _ids(references_list),
            np.array([scores[name].fmeasure for scores in scored]),
            signature=f"{settings}|ci:bootstrap-1000",
            unit=settings,
        )
        for name in ROUGE_TYPES
    }


class _Characters:
    """A tokenizer for rouge_score: words as its own, and every Chinese character."""

    def tokenize(self, text: str) -> list[str]:
        return _ROUGE_WORD.findall(text.lower())


def f1(
    hypotheses: Sequence[str], references_list: Sequence[Sequence[str]], *, characters: bool = False
) -> dict[str, Metric]:
    """F1 of words and exact match, 0 to 100, by the rules of the SQuAD 2.0 script: the best over references, averaged.

    Lower case, no punctuation, no articles, single spaces. With `characters`, Chinese punctuation goes as well and
    each Chinese character is a word. Rajpurkar et al. 2016 (arXiv:1606.05250).
    """
    check(hypotheses, references_list)
    settings = f"rules:squad-2.0|tok:{'zh-characters' if characters else 'words'}|refs:best|scale:0-100"

    def metric(score: Callable[[list[str], list[str]], float]) -> Metric:
        best = [
            max(score(_words(hypothesis, characters), _words(reference, characters)) for reference in references)
            for hypothesis, references in zip(hypotheses, references_list, strict=True)
        ]
        return ratio_metric(
            _ids(references_list),
            np.array(best),
            signature=f"{settings}|ci:bootstrap-1000",
            formula="percent",
            unit=settings,
        )

    return {"f1": metric(_word_f1), "exact_match": metric(lambda words, reference: float(words == reference))}


def _words(text: str, characters: bool) -> list[str]:
    text = text.lower().translate(_PUNCTUATION)
    if characters:
        text = _HAN_CHARACTER.sub(r" \1 ", _CHINESE_PUNCTUATION.sub("", text))
    return _ARTICLES.sub(" ", text).split()


def _word_f1(words: list[str], reference: list[str]) -> float:
    if not words or not reference:
        return float(words == reference)
    common = (collections.Counter(words) & collections.Counter(reference)).total()
    return 2 * common / (len(words) + len(reference))  # 2 P R / (P + R)


def exact_answer(hypotheses: Sequence[str], references_list: Sequence[Sequence[str]]) -> dict[str, Metric]:
    """GSM8K's rule: the number after "####" is that of a reference; commas and dollar signs do not count.

    `accuracy` is the share of right answers, `answered` the share of hypotheses that have a "####" with a number. A
    reference may be the number alone. Cobbe et al. 2021 (arXiv:2110.14168).
    """
    check(hypotheses, references_list)
    expected = [
        {_reference_answer(reference, item) for reference in references}
        for item, references in enumerate(references_list)
    ]
    given = [_answer(hypothesis) for hypothesis in hypotheses]
    rule = "rule:gsm8k-####"

    def metric(marks: list[bool]) -> Metric:
        return ratio_metric(
            _ids(references_list), np.array(marks, np.float64), signature=f"{rule}|ci:bootstrap-1000", unit=rule
        )

    right = [answer in answers for answer, answers in zip(given, expected, strict=True)]
    return {"accuracy": metric(right), "answered": metric([answer is not None for answer in given])}


def _answer(text: str) -> str | None:
    match = _FINAL_ANSWER.search(text)
    return _plain_number(match[1]) if match else None


def _reference_answer(text: str, item: int) -> str:
    answer = _answer(text)
    if answer is None and _NUMBER.fullmatch(text.strip()):
        answer = _plain_number(text.strip())
    if answer is None:
        raise UserError(
            f'the reference of item {item} has no answer: expected "#### NUMBER" or a number, found {text[-60:]!r}'
        )
    return answer


def _plain_number(text: str) -> str:
    return text.replace(",", "").replace("$", "").rstrip(".")


def _ids(references_list: Sequence[Sequence[str]]) -> list[str]:
    return item_ids([list(references) for references in references_list])
