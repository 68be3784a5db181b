"""Questions with choices, answered by the likelihood of each choice after the question.

The conventions are lm-eval's: a choice is scored after the query and a delimiter; `accuracy` takes the choice of
highest log-likelihood, `accuracy_normalized` (its acc_norm) that of the highest log-likelihood / characters.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.data.sources.records import Damaged, read_records
from gptjax.data.tokenization.tokenizer import Tokenizer
from gptjax.errors import UserError
from gptjax.evaluation.continuations import ContinuationScorer, Scores, encode_pair
from gptjax.evaluation.metrics import Outcome, item_ids, ratio_metric
from gptjax.evaluation.token_scorer import Progress

Fields = tuple[Any, Any, Any]  # query, choices and gold, as a file has them

_BRACKETS = re.compile(r"\[.*?\]")


@dataclasses.dataclass(frozen=True)
class Question:
    """A query with its choices; `gold` is the index of the right one."""

    query: str
    choices: Sequence[str]
    gold: int


def read_questions(path: str | Path, form: str = "multiple_choice") -> list[Question]:
    """The questions of a JSONL file, plain or compressed, in one of the forms of `FORMS`, as they are published.

    Raises UserError naming file and line.
    """
    path, parse = Path(path), FORMS[form]
    labels = _label_file(path) if form == "piqa" else None
    questions = []
    for number, record in enumerate(read_records(path)):
        try:
            if isinstance(record.value, Damaged):
                raise record.value
            entry = dict(record.value)
            if labels is not None:
                entry.setdefault("label", labels[number] if number < len(labels) else None)
            query, choices, gold = parse(entry)
        except KeyError as error:
            there = ", ".join(map(repr, record.value)) or "none"
            raise UserError(f"{record.place}: no field {error}, which {form} has; fields: {there}") from None
        except (Damaged, TypeError, ValueError, AttributeError, IndexError) as error:
            raise UserError(f"{record.place}: not a question of the form {form}: {error}") from None
        _check(record.place, query, choices, gold)
        questions.append(Question(query, choices, gold))
    if not questions:
        raise UserError(f"{path} has no questions")
    return questions


def _check(place: str, query: Any, choices: Any, gold: Any) -> None:
    if not isinstance(query, str):
        raise UserError(f"{place}: the query must be a text, not {query!r:.60}")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        raise UserError(f"{place}: choices must be a list of two texts or more, not {choices!r:.60}")
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(choices):
        raise UserError(
            f"{place}: gold is {gold!r}, but there are {len(choices)} choices; expected 0 to {len(choices) - 1}"
        )


def _plain(entry: dict[str, Any]) -> Fields:
    return entry["query"], entry["choices"], entry["gold"]


def _hellaswag(entry: dict[str, Any]) -> Fields:
    """Zellers et al. 2019; the clean-up of WikiHow's brackets is lm-eval's."""

    def clean(text: str) -> str:
        return _BRACKETS.sub("", text.strip().replace(" [title]", ". ")).replace("  ", " ")

    context = f"{entry['ctx_a']} {entry['ctx_b'].capitalize()}"
    return clean(f"{entry['activity_label']}: {context}"), [clean(e) for e in entry["endings"]], int(entry["label"])


def _arc(entry: dict[str, Any]) -> Fields:
    """Clark et al. 2018; AI2's own JSONL, or that of the Hugging Face hub."""
    if isinstance(entry["question"], dict):
        stem, options = entry["question"]["stem"], entry["question"]["choices"]
        texts, labels = [option["text"] for option in options], [option["label"] for option in options]
    else:
        stem, texts, labels = entry["question"], entry["choices"]["text"], entry["choices"]["label"]
    if entry["answerKey"] not in labels:
        raise ValueError(f"answerKey {entry['answerKey']!r} is none of the labels {', '.join(labels)}")
    return f"Question: {stem}\nAnswer:", texts, labels.index(entry["answerKey"])


def _piqa(entry: dict[str, Any]) -> Fields:
    """Bisk et al. 2020; `label` from the record or from the FILE-labels.lst beside FILE.jsonl."""
    return f"Question: {entry['goal']}\nAnswer:", [entry["sol1"], entry["sol2"]], int(entry["label"])


FORMS: dict[str, Callable[[dict[str, Any]], Fields]] = {
    "multiple_choice": _plain,
    "hellaswag": _hellaswag,
    "arc": _arc,
    "piqa": _piqa,
}


def _label_file(path: Path) -> list[str] | None:
    labels = path.with_name(f"{path.name.partition('.')[0]}-labels.lst")
    return labels.read_text(encoding="utf-8").split() if labels.is_file() else None


def read_passages(path: str | Path) -> list[Question]:
    """LAMBADA: JSONL with `text`, whose last word is to be predicted; a question with a single choice."""
    passages = []
    for record in read_records(path):
        text = record.value.get("text") if isinstance(record.value, dict) else None
        if not isinstance(text, str) or " " not in text:
            raise UserError(
                f'{record.place}: expected {{"text": "..."}} of two words or more, not {record.value!r:.60}'
            )
        context, _, word = text.rpartition(" ")
        passages.append(Question(context, [word], 0))
    if not passages:
        raise UserError(f"{path} has no passages")
    return passages


def choose(
    scorer: ContinuationScorer,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    *,
    delimiter: str = " ",
    progress: Progress | None = None,
) -> Outcome:
    """accuracy and accuracy_normalized. A query that is too long loses its beginning."""
    scores = _score(scorer, tokenizer, questions, delimiter, progress)
    counts = [len(question.choices) for question in questions]
    by_question = np.split(scores.log_likelihood, np.cumsum(counts)[:-1])
    lengths = [np.array([len(choice) for choice in question.choices]) for question in questions]
    chosen = np.array([row.argmax() for row in by_question])
    normalized = np.array([(row / length).argmax() for row, length in zip(by_question, lengths, strict=True)])
    gold = np.array([question.gold for question in questions])
    ids = _ids(questions)
    settings = f"delimiter:{delimiter!r}"
    signature = f"{settings}|{_context(scorer, scores, tokenizer)}|{{}}|ci:bootstrap-1000"

    def accuracy(answers: np.ndarray, by: str):
        return ratio_metric(ids, answers == gold, signature=signature.format(f"highest:{by}"), unit=settings)

    metrics = {
        "accuracy": accuracy(chosen, "log-likelihood"),
        "accuracy_normalized": accuracy(normalized, "log-likelihood/characters"),
    }
    texts = {
        item: {
            "query": question.query,
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
    *,
    identity: str,
    progress: Progress | None = None,
) -> Outcome:
    """accuracy (the last word is the greedy continuation) and perplexity (exp of the mean nats of a last word).

    Paperno et al. 2016 (arXiv:1606.06031). `identity` is the tokenizer's.
    """
    scores = _score(scorer, tokenizer, passages, " ", progress)
    ids, signature = _ids(passages), f"{identity}|{_context(scorer, scores, tokenizer)}|ci:bootstrap-1000"
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


def _score(
    scorer: ContinuationScorer,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    delimiter: str,
    progress: Progress | None,
) -> Scores:
    pairs = [encode_pair(tokenizer, q.query, delimiter + choice) for q in questions for choice in q.choices]
    return scorer.score(pairs, progress)


def _context(scorer: ContinuationScorer, scores: Scores, tokenizer: Tokenizer) -> str:
    prefix = "eot" if tokenizer.begin_ids == (tokenizer.eot_id,) else "+".join(map(str, tokenizer.begin_ids))
    cut = f"{int(scores.truncated.sum())}/{len(scores.truncated)}"
    return f"prefix:{prefix}|context:{scorer.context_length}|left-truncated:{cut}"


def _ids(questions: Sequence[Question]) -> list[str]:
    return item_ids([[question.query, list(question.choices)] for question in questions])
