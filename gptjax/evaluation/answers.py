"""Short answers compared with references: F1 and exact match by the benchmarks' own rules, and GSM8K's numbers."""

import collections
import re
import string
import sys
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import NamedTuple

import numpy as np

from gptjax.data.scripts import count_han
from gptjax.errors import UserError
from gptjax.evaluation.metrics import Metric, item_ids, ratio_metric
from gptjax.evaluation.references import check
from gptjax.evaluation.words import split_unspaced
from gptjax.rewards.answers import final_number, reference_number

_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)
# From MLQA's evaluation script v1. Hindi and Chinese have none; in Arabic the two letters are removed anywhere.
_ARTICLES = {
    "en": r"\b(?:a|an|the)\b",
    "es": r"\b(?:un|una|unos|unas|el|la|los|las)\b",
    "vi": r"\b(?:của|là|cái|chiếc|những)\b",
    "de": r"\b(?:ein|eine|einen|einem|eines|einer|der|die|das|den|dem|des)\b",
    "ar": "ال",
    "hi": None,
    "zh": None,
}
_MLQA_HAN = re.compile("([\u4e00-\u9fa5])")
# From CMRC 2018's script. Its ellipsis of two characters never equals a single character, so it is not removed.
_CMRC_PUNCTUATION = frozenset("-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』")
_CMRC_CUT = re.compile("([\u4e00-\u9fa5])")


class Rule(NamedTuple):
    """How an answer is compared with a reference.

    Attributes:
      name: as it stands in the signature.
      tokens: splits an answer into words.
      f1: of the words of an answer and of a reference, 0 to 1.
      whole: what must be equal for an exact match.
    """

    name: str
    tokens: Callable[[str], list[str]]
    f1: Callable[[list[str], list[str]], float]
    whole: Callable[[str], object]


def choose_rule(name: str, references_list: Sequence[Sequence[str]], tokenize: str) -> Rule:
    """The rule named squad, mlqa, mlqa-LANGUAGE or cmrc; "" is squad, by character for scripts without spaces."""
    if not name:
        return RULES["squad"] if tokenize == "13a" else _SQUAD_CHARACTERS
    if name == "mlqa":
        name = f"mlqa-{_language(references_list)}"
    return RULES[name]


def check_rule(name: str) -> None:
    """Raises UserError for an unknown rule."""
    if name and name != "mlqa" and name not in RULES:
        raise UserError(f"--rules={name[:60]} is unknown; choose from {', '.join(RULES)}, mlqa")


def f1(
    hypotheses: Sequence[str], references_list: Sequence[Sequence[str]], *, tokenize: str = "13a", rules: str = ""
) -> dict[str, Metric]:
    """F1 of words and exact match, 0 to 100: the best reference of each item, averaged over items.

    Args:
      tokenize: "13a" for words between spaces; any other tokenizer of sacrebleu: each character is a word.
      rules: see `choose_rule`. squad: the SQuAD 2.0 script (arXiv:1606.05250): lower case, no ASCII punctuation, no
        English articles. mlqa: that of MLQA (arXiv:1910.07475): the punctuation of Unicode, the articles of the
        language. cmrc: that of CMRC 2018 (arXiv:1810.07366): the longest common substring of words.
    """
    check(hypotheses, references_list)
    rule = choose_rule(rules, references_list, tokenize)
    settings = f"rules:{rule.name}|refs:best|scale:0-100"

    def metric(prepare: Callable[[str], object], score: Callable[..., float]) -> Metric:
        prepare = cache(prepare)
        best = [
            max(score(prepare(hypothesis), prepare(reference)) for reference in references)
            for hypothesis, references in zip(hypotheses, references_list, strict=True)
        ]
        return ratio_metric(
            item_ids([list(references) for references in references_list]),
            np.array(best),
            signature=f"{settings}|ci:bootstrap-1000",
            formula="percent",
            unit=settings,
        )

    return {"f1": metric(rule.tokens, rule.f1), "exact_match": metric(rule.whole, lambda a, b: float(a == b))}


# ---- The rules -------------------------------------------------------------------------------------------


def _squad_tokens(text: str) -> list[str]:
    return re.sub(_ARTICLES["en"], " ", text.lower().translate(_ASCII_PUNCTUATION)).split()


def _character_tokens(text: str) -> list[str]:
    return split_unspaced(text.lower().translate(_punctuation())).split()


def _mlqa_tokens(language: str, text: str) -> list[str]:
    text = text.lower().translate(_punctuation())
    if _ARTICLES[language]:
        text = re.sub(_ARTICLES[language], " ", text)
    return (_MLQA_HAN.sub(r" \1 ", text) if language == "zh" else text).split()


def _cmrc_whole(text: str) -> str:
    return "".join(character for character in text.lower().strip() if character not in _CMRC_PUNCTUATION)


def _cmrc_tokens(text: str) -> list[str]:
    """Han characters, and NLTK's words between them. No sentence splitting: its model is a separate download."""
    from nltk.tokenize import NLTKWordTokenizer

    words = NLTKWordTokenizer()
    pieces = _CMRC_CUT.split(_cmrc_whole(text))
    return [token for i, piece in enumerate(pieces) for token in ([piece] if i % 2 else words.tokenize(piece))]


@cache
def _punctuation() -> dict[int, None]:
    """All that Unicode calls punctuation, and ASCII's symbols, for str.translate."""
    codes = (code for code in range(sys.maxunicode) if unicodedata.category(chr(code)).startswith("P"))
    return dict.fromkeys([*codes, *map(ord, string.punctuation)])


def _bag_f1(words: list[str], reference: list[str], *, empty: bool = True) -> float:
    """2 P R / (P + R) of two bags of words. If one is empty: 1 where `empty` is set and both are, else 0."""
    if not words or not reference:
        return float(empty and words == reference)
    common = (collections.Counter(words) & collections.Counter(reference)).total()
    return 2 * common / (len(words) + len(reference))


def _substring_f1(words: list[str], reference: list[str]) -> float:
    """The same with the longest common substring of words as the overlap."""
    numbers = {word: number for number, word in enumerate({*words, *reference})}
    codes = np.array([numbers[word] for word in reference], np.int64)
    longest, run = 0, np.zeros(len(codes) + 1, np.int64)  # run: length of the common words that end at each place
    for word in words:
        run[1:] = np.where(codes == numbers[word], run[:-1] + 1, 0)
        longest = max(longest, int(run.max()))
    return 2 * longest / (len(words) + len(reference)) if longest else 0.0


def _language(references_list: Sequence[Sequence[str]]) -> str:
    """MLQA's language if its letters show it (Chinese, Arabic, Hindi). Raises UserError otherwise."""
    text = "".join(reference for references in references_list for reference in references)
    letters = sum(map(str.isalpha, text))
    counts = {
        "zh": count_han(text),
        "ar": len(re.findall("[\u0620-\u06ff]", text)),
        "hi": len(re.findall("[\u0904-\u0939]", text)),
    }
    for language, count in counts.items():
        if 2 * count > letters:
            return language
    raise UserError(
        "--rules=mlqa: the letters of the references do not show the language; name it: "
        "--rules=mlqa-en, mlqa-es, mlqa-de or mlqa-vi"
    )


def _mlqa(language: str) -> Rule:
    tokens = partial(_mlqa_tokens, language)
    return Rule(f"mlqa-{language}", tokens, partial(_bag_f1, empty=False), tokens)


_SQUAD_CHARACTERS = Rule(
    "squad-2.0|punctuation:unicode|articles:kept|tok:characters", _character_tokens, _bag_f1, _character_tokens
)
RULES: dict[str, Rule] = {
    "squad": Rule("squad-2.0|tok:words", _squad_tokens, _bag_f1, _squad_tokens),
    **{f"mlqa-{language}": _mlqa(language) for language in _ARTICLES},
    "cmrc": Rule("cmrc-2018|f1:longest-substring|tok:characters+nltk", _cmrc_tokens, _substring_f1, _cmrc_whole),
}


# ---- Numbers ---------------------------------------------------------------------------------------------


def exact_answer(hypotheses: Sequence[str], references_list: Sequence[Sequence[str]]) -> dict[str, Metric]:
    """GSM8K's rule: the number after "####" is that of a reference; commas and dollar signs do not count.

    `accuracy` is the share of right answers, `answered` the share of hypotheses that have a "####" with a number. A
    reference may be the number alone. Cobbe et al. 2021 (arXiv:2110.14168).
    """
    check(hypotheses, references_list)
    expected = check_references(references_list)
    given = [final_number(hypothesis) for hypothesis in hypotheses]
    rule = "rule:gsm8k-####"

    def metric(marks: list[bool]) -> Metric:
        return ratio_metric(
            item_ids([list(references) for references in references_list]),
            np.array(marks, np.float64),
            signature=f"{rule}|ci:bootstrap-1000",
            unit=rule,
        )

    right = [answer in answers for answer, answers in zip(given, expected, strict=True)]
    return {"accuracy": metric(right), "answered": metric([answer is not None for answer in given])}


def check_references(references_list: Sequence[Sequence[str]]) -> list[set[str]]:
    """The right numbers of each item. Raises UserError for a reference that has none."""
    return [
        {_reference_answer(reference, item) for reference in references}
        for item, references in enumerate(references_list, start=1)
    ]


def _reference_answer(text: str, item: int) -> str:
    answer = reference_number(text)
    if answer is None:
        raise UserError(
            f'the reference of item {item} has no answer: expected "#### NUMBER" or a number, found {text[-60:]!r}'
        )
    return answer
