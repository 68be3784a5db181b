"""Questions with choices, answered by the likelihood of each choice after the question.

The conventions are lm-eval's: a choice is scored after the query and a delimiter; `accuracy` takes the choice of
highest log-likelihood, `accuracy_normalized` (its acc_norm) that of the highest log-likelihood / characters.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from gptjax.data.tokenization.tokenizer import Tokenizer
from gptjax.errors import UserError
from gptjax.evaluation.continuations import ContinuationScorer, Encoded, Scores, encode_pair
from gptjax.evaluation.metrics import Outcome, Progress, item_ids, ratio_metric
from gptjax.evaluation.room import TooLong


@dataclasses.dataclass(frozen=True)
class Question:
    """A query with its choices; `gold` is the index of the right one.

    Attributes:
      contexts: in partial evaluation, the query of each choice; the choices are then the same text.
    """

    query: str
    choices: Sequence[str]
    gold: int
    contexts: Sequence[str] | None = None

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(context, choice) for each choice."""
        return list(zip(self.contexts or [self.query] * len(self.choices), self.choices, strict=True))


@dataclasses.dataclass(frozen=True)
class Style:
    """How questions become tokens.

    Attributes:
      delimiter: between a query and a choice.
      begin: token ids before a query, or none; lm-eval puts those that the tokenizer adds by itself.
      too_long: what is done with a query that does not fit.
    """

    delimiter: str = " "
    begin: tuple[int, ...] = ()
    too_long: TooLong = "cut"


def choose(
    scorer: ContinuationScorer,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    style: Style | None = None,
    *,
    progress: Progress | None = None,
) -> Outcome:
    """accuracy and accuracy_normalized; for partial evaluation accuracy alone, since all its choices are one text."""
    style = style or Style()
    scored = _score(scorer, tokenizer, questions, style, progress)
    questions, scores = scored.questions, scored.scores
    counts = [len(question.choices) for question in questions]
    by_question = np.split(scores.log_likelihood, np.cumsum(counts)[:-1])
    lengths = [np.array([len(choice) for choice in question.choices]) for question in questions]
    chosen = np.array([row.argmax() for row in by_question])
    normalized = np.array([(row / length).argmax() for row, length in zip(by_question, lengths, strict=True)])
    gold = np.array([question.gold for question in questions])
    ids = _ids(questions)
    settings = f"delimiter:{style.delimiter!r}"
    signature = f"{settings}|{scored.signature}|{{}}|ci:bootstrap-1000"

    def accuracy(answers: np.ndarray, by: str):
        return ratio_metric(ids, answers == gold, signature=signature.format(f"highest:{by}"), unit=settings)

    metrics = {"accuracy": accuracy(chosen, "log-likelihood")}
    if not all(question.contexts for question in questions):
        metrics["accuracy_normalized"] = accuracy(normalized, "log-likelihood/characters")
    texts = {
        item: {
            "query": question.query,
            **({"contexts": list(question.contexts)} if question.contexts else {}),
            "choices": list(question.choices),
            "gold": question.gold,
            "chosen": int(answer),
            "log_likelihoods": row.round(4).tolist(),
        }
        for item, question, answer, row in zip(ids, questions, chosen, by_question, strict=True)
    }
    return Outcome(metrics, texts)


def predict_last_words(
    scorer: ContinuationScorer,
    tokenizer: Tokenizer,
    passages: Sequence[Question],
    style: Style | None = None,
    *,
    identity: str,
    progress: Progress | None = None,
) -> Outcome:
    """accuracy (the last word is the greedy continuation) and perplexity (exp of the mean nats of a last word).

    Paperno et al. 2016 (arXiv:1606.06031). `identity` is the tokenizer's.
    """
    style = dataclasses.replace(style or Style(), delimiter=" ")
    scored = _score(scorer, tokenizer, passages, style, progress)
    passages, scores = scored.questions, scored.scores
    ids, signature = _ids(passages), f"{identity}|{scored.signature}|ci:bootstrap-1000"
    metrics = {
        "accuracy": ratio_metric(ids, scores.is_greedy, signature=signature),
        "perplexity": ratio_metric(
            ids, -scores.log_likelihood, signature=signature, formula="exp", unit="words", lower_is_better=True
        ),
    }
    texts = {
        item: {"text": passage.query, "word": passage.choices[0]} for item, passage in zip(ids, passages, strict=True)
    }
    return Outcome(metrics, texts)


@dataclasses.dataclass(frozen=True)
class _Scored:
    """The questions that were scored, one score for each of their pairs, and how, for signatures."""

    questions: Sequence[Question]
    scores: Scores
    signature: str


def _score(
    scorer: ContinuationScorer,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    style: Style,
    progress: Progress | None,
) -> _Scored:
    encoded = [_encode(tokenizer, question, style) for question in questions]
    limit = scorer.context_length
    long = [max(len(one.context) + len(one.continuation) - 1 for one in pairs) > limit for pairs in encoded]
    if any(long) and style.too_long == "fail":
        number = long.index(True)
        raise UserError(
            f"question {number} ({questions[number].pairs[0][0][:60]!r}...) does not fit in context_length {limit} "
            f"({sum(long)} of {len(long)} questions are too long); --too_long=cut cuts their beginnings off, "
            "--too_long=skip leaves them out"
        )
    if all(long) and style.too_long == "skip":
        raise UserError(f"no question fits in context_length {limit}, so --too_long=skip leaves none; use =cut")
    kept = [number for number, is_long in enumerate(long) if not (is_long and style.too_long == "skip")]
    pairs = [one for number in kept for one in encoded[number]]
    scores = scorer.score([(one.context, one.continuation) for one in pairs], progress)
    cut = f"left-truncated:{int(scores.truncated.sum())}/{len(scores.truncated)}"
    parts = [f"prefix:{_name(style.begin, tokenizer)}", f"context:{limit}", cut]
    if len(kept) < len(questions):
        parts.append(f"too-long-skipped:{len(questions) - len(kept)}/{len(questions)}")
    if alone := sum(one.alone for one in pairs):
        parts.append(f"choices-encoded-alone:{alone}/{len(pairs)}")
    return _Scored([questions[number] for number in kept], scores, "|".join(parts))


def _encode(tokenizer: Tokenizer, question: Question, style: Style) -> list[Encoded]:
    found = [
        encode_pair(tokenizer, context, style.delimiter + choice, style.begin) for context, choice in question.pairs
    ]
    for (_, choice), encoded in zip(question.pairs, found, strict=True):
        if not len(encoded.continuation):
            raise UserError(f"the choice {choice[:60]!r} has no token that this tokenizer knows, so it has no score")
    return found


def _name(begin: tuple[int, ...], tokenizer: Tokenizer) -> str:
    """A prefix in a signature."""
    return "eot" if begin == (tokenizer.eot_id,) else "+".join(map(str, begin)) or "none"


def _ids(questions: Sequence[Question]) -> list[str]:
    return item_ids([[question.query, list(question.choices), *(question.contexts or ())] for question in questions])
