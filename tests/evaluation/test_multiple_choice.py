"""Questions as they are published, and the two ways to choose."""

import json
import math

import numpy as np
import pytest

from gptjax.data.tokenization.tokenizer import build_tokenizer
from gptjax.errors import UserError
from gptjax.evaluation.continuations import ContinuationScorer, Scores
from gptjax.evaluation.multiple_choice import Question, choose, predict_last_words, read_passages, read_questions


def write(path, *entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return path


def plain(question):
    return question.query, list(question.choices), question.gold


def test_forms(tmp_path):
    own = write(tmp_path / "own.jsonl", {"query": "Q?", "choices": ["a", "b"], "gold": 1})
    assert plain(read_questions(own)[0]) == ("Q?", ["a", "b"], 1)
    hellaswag = write(
        tmp_path / "hellaswag.jsonl",
        {
            "activity_label": "Roof",
            "ctx_a": "[header] How to climb [title] Get  a ladder.",
            "ctx_b": "he",
            "endings": ["climbs [substeps] up.", "falls."],
            "label": "1",
        },
    )
    expected = "Roof: How to climb. Get a ladder. He"
    assert plain(read_questions(hellaswag, "hellaswag")[0]) == (expected, ["climbs up.", "falls."], 1)
    arc = write(
        tmp_path / "arc.jsonl",
        {"question": {"stem": "Why?", "choices": [{"text": "x", "label": "A"}, {"text": "y", "label": "B"}]},
         "answerKey": "B"},
        {"question": "Why?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "1"},
    )  # fmt: skip
    assert [plain(q) for q in read_questions(arc, "arc")] == [
        ("Question: Why?\nAnswer:", ["x", "y"], 1),
        ("Question: Why?\nAnswer:", ["x", "y"], 0),
    ]
    piqa = write(tmp_path / "valid.jsonl", {"goal": "G", "sol1": "one", "sol2": "two"})
    (tmp_path / "valid-labels.lst").write_text("1\n")
    assert plain(read_questions(piqa, "piqa")[0]) == ("Question: G\nAnswer:", ["one", "two"], 1)
    lambada = write(tmp_path / "lambada.jsonl", {"text": "He said to her friend"})
    assert plain(read_passages(lambada)[0]) == ("He said to her", ["friend"], 0)


@pytest.mark.parametrize(
    ("form", "entry", "message"),
    [
        (
            "multiple_choice",
            {"query": "q", "choices": ["a", "b"], "gold": 2},
            "gold is 2, but there are 2 choices; expected",
        ),
        ("multiple_choice", {"query": "q", "choices": ["a", "b"], "gold": -1}, "gold is -1"),
        ("multiple_choice", {"query": "q", "choices": ["a", "b"], "gold": "0"}, "gold is '0'"),
        ("multiple_choice", {"query": "q", "choices": ["a"], "gold": 0}, "choices must be a list of two texts or more"),
        ("multiple_choice", {"query": "q", "choices": ["a", ""], "gold": 0}, "choices must be a list of two texts"),
        ("multiple_choice", {"query": 3, "choices": ["a", "b"], "gold": 0}, "the query must be a text, not 3"),
        (
            "multiple_choice",
            {"query": "q", "choices": ["a", "b"]},
            "no field 'gold', which multiple_choice has; fields:",
        ),
        ("multiple_choice", ["q"], "not a question of the form multiple_choice"),
        ("piqa", {"goal": "g", "sol1": "a", "sol2": "b"}, "no field 'label'"),
        ("piqa", {"goal": "g", "sol1": "a", "sol2": "b", "label": 2}, "gold is 2"),
        ("arc", {"question": "q", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "C"}, "answerKey 'C' is"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, form, entry, message):
    good = {"query": "q", "choices": ["a", "b"], "gold": 0, "goal": "g", "sol1": "a", "sol2": "b", "label": 0}
    good |= {"question": "q", "answerKey": "A"} if form == "arc" else {}
    good |= {"choices": {"text": ["a", "b"], "label": ["A", "B"]}} if form == "arc" else {}
    path = write(tmp_path / "questions.jsonl", good, entry)
    with pytest.raises(UserError, match=f"questions.jsonl, line 2: .*{message}"):
        read_questions(path, form)


def test_files_without_questions(tmp_path):
    with pytest.raises(UserError, match="no questions"):
        read_questions(write(tmp_path / "empty.jsonl"))
    with pytest.raises(UserError, match="cannot open"):
        read_questions(tmp_path / "absent.jsonl")
    with pytest.raises(UserError, match=r'line 1: expected {"text"'):
        read_passages(write(tmp_path / "one.jsonl", {"text": "word"}))


class Given(ContinuationScorer):
    """Log-likelihoods that were decided beforehand."""

    def __init__(self, values, context_length=64):
        self.values, self.context_length, self.seen = np.array(values, np.float64), context_length, []

    def score(self, pairs, progress=None):
        self.seen = list(pairs)
        count = np.array([len(continuation) for _, continuation in pairs], np.float64)
        return Scores(self.values, count, self.values > -1, np.zeros(len(pairs), np.bool_))


def test_choices_by_likelihood_and_by_likelihood_per_character():
    questions = [Question("Q:", ["ab", "abcdefgh"], 1), Question("猫:", ["猫猫", "no", "maybe"], 0)]
    given = Given([-2.0, -3.0, -4.0, -4.5, -9.0])  # per character: -1, -0.375; -2, -2.25, -1.8
    outcome = choose(given, build_tokenizer("byte"), questions, delimiter="\nA: ")
    assert outcome.metrics["accuracy"].value == 0.5
    assert outcome.metrics["accuracy_normalized"].value == 0.5
    assert outcome.metrics["accuracy"].sums[:, 0].tolist() == [0, 1]
    assert outcome.metrics["accuracy_normalized"].sums[:, 0].tolist() == [1, 0]
    assert [bytes(pair[1].tolist()).decode() for pair in given.seen[:2]] == ["\nA: ab", "\nA: abcdefgh"]
    signature = outcome.metrics["accuracy"].signature
    assert r"delimiter:'\nA: '" in signature and "left-truncated:0/5" in signature
    shown = outcome.texts[outcome.metrics["accuracy"].ids[1]]
    assert (shown["query"], shown["chosen"], shown["gold"], shown["log_likelihoods"]) == ("猫:", 0, 0, [-4, -4.5, -9])


def test_last_words():
    passages = [Question("he said to her", ["friend"], 0), Question("a b", ["c"], 0)]
    outcome = predict_last_words(Given([-0.5, -3.5]), build_tokenizer("byte"), passages, identity="tokenizer:x")
    assert outcome.metrics["accuracy"].value == 0.5
    assert outcome.metrics["perplexity"].value == pytest.approx(math.exp(2.0))
