"""Questions in published formats, and the two ways to choose an answer."""

import json
import math

import numpy as np
import pytest

from gptjax.data.tokenization.tokenizer import build_tokenizer
from gptjax.errors import UserError
from gptjax.evaluation.benchmarks import read_questions
from gptjax.evaluation.continuations import ContinuationScorer, Scores
from gptjax.evaluation.multiple_choice import Question, Style, choose, predict_last_words


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
    assert plain(read_questions(lambada, "lambada")[0]) == ("He said to her", ["friend"], 0)


NO_YES = ["no", "yes"]
LETTERS = "A. w\nB. x\nC. y\nD. z\n"


@pytest.mark.parametrize(
    ("form", "entry", "expected"),
    [
        ("lambada", {"context": "He said to her", "continuation": " friend"}, ("He said to her", ["friend"], 0)),
        ("boolq", {"passage": "P.", "question": "is it", "label": 1}, ("P.\nQuestion: is it?\nAnswer:", NO_YES, 1)),
        ("boolq", {"passage": "P.", "question": "is", "answer": False}, ("P.\nQuestion: is?\nAnswer:", NO_YES, 0)),
        ("copa", {"premise": "It rained.", "choice1": "The road was wet.", "choice2": "I slept.", "question": "effect",
                  "label": 0}, ("It rained therefore", ["the road was wet.", "i slept."], 0)),
        ("mmlu", {"question": "Q? ", "subject": "law", "choices": ["w", "x", "y", "z"], "answer": 2},
         (f"Q?\n{LETTERS}Answer:", ["A", "B", "C", "D"], 2)),
        ("ceval", {"id": 0, "question": "Q?", "A": "w", "B": "x", "C": "y", "D": "z", "answer": "B", "explanation": ""},
         (f"Q?\n{LETTERS}答案：", ["A", "B", "C", "D"], 1)),
        ("cmmlu", {"Question": "Q?", "A": "w", "B": "x", "C": "y", "D": "z", "Answer": "D"},
         (f"Q?\n{LETTERS}答案：", ["A", "B", "C", "D"], 3)),
        ("piqa", {"query": "Q: G", "choices": ["one", "two"], "gold": 1}, ("Q: G", ["one", "two"], 1)),  # llm-foundry's
    ],
)  # fmt: skip
def test_forms_as_published(tmp_path, form, entry, expected):
    assert plain(read_questions(write(tmp_path / "file.jsonl", entry), form)[0]) == expected


@pytest.mark.parametrize(
    "entry",
    [
        {
            "sentence": "The cup did not fit in the box as the _ was big.",
            "option1": "cup",
            "option2": "box",
            "answer": "1",
        },
        {
            "context_options": [
                "The cup did not fit in the box as the cup",
                "The cup did not fit in the box as the box",
            ],
            "continuation": " was big.",
            "gold": 0,
        },
    ],
)
def test_winogrande_compares_what_follows_after_each_option(tmp_path, entry):
    (question,) = read_questions(write(tmp_path / "file.jsonl", entry), "winogrande")
    start = "The cup did not fit in the box as the "
    assert question.pairs == [(f"{start}cup", "was big."), (f"{start}box", "was big.")] and question.gold == 0
    given = Given([-3.0, -2.0])
    outcome = choose(given, build_tokenizer("byte"), [question])
    assert outcome.metrics.keys() == {"accuracy"} and outcome.metrics["accuracy"].value == 0
    assert [bytes(context.tolist()).decode() for context, _ in given.seen] == [f"{start}cup", f"{start}box"]
    assert {bytes(continuation.tolist()) for _, continuation in given.seen} == {b" was big."}


def test_columns_of_a_table_are_a_question(tmp_path):
    (tmp_path / "winogrande.csv").write_text("sentence,option1,option2,answer\nThe _ ran.,cat,mat,1\n")
    assert read_questions(tmp_path / "winogrande.csv", "winogrande")[0].pairs[0] == ("The cat", "ran.")


def test_the_csv_files_of_mmlu_have_no_header(tmp_path):
    rows = '"What is, 1+1?",1,2,2,4,B\nQ?,w,x,y,z,D\n'
    for text in (rows, "\ufeff" + rows, "question,A,B,C,D,answer\n" + rows):
        (tmp_path / "law_test.csv").write_text(text)
        found = [plain(question) for question in read_questions(tmp_path / "law_test.csv", "mmlu")]
        first = "What is, 1+1?\nA. 1\nB. 2\nC. 2\nD. 4\nAnswer:"
        assert found == [(first, list("ABCD"), 1), (f"Q?\n{LETTERS}Answer:", list("ABCD"), 3)]
    (tmp_path / "law_test.csv").write_text(rows + "Q?,w,x,y,z,E\n")
    with pytest.raises(UserError, match=r'law_test.csv, row 3: answer is "E", but must be one of A, B, C, D'):
        read_questions(tmp_path / "law_test.csv", "mmlu")


@pytest.mark.parametrize(
    ("form", "entry", "message"),
    [
        ("multiple_choice", {"query": "q", "choices": ["a", "b"], "gold": 2}, "gold is 2, but there are 2 choices"),
        ("multiple_choice", {"query": "q", "choices": ["a", "b"], "gold": -1}, "gold is -1"),
        ("multiple_choice", {"query": "q", "choices": ["a", "b"], "gold": "0"}, 'gold is "0", but must be a whole'),
        ("multiple_choice", {"query": "q", "choices": ["a", "b"], "gold": None}, "gold is null, but must be a whole"),
        ("multiple_choice", {"query": "q", "choices": ["a"], "gold": 0}, "choices is .* must be a list of at least 2"),
        ("multiple_choice", {"query": "q", "choices": ["a", ""], "gold": 0}, r'choices\[1\] is "", but must be text'),
        (
            "multiple_choice",
            {"query": "q", "choices": ["a", None], "gold": 0},
            r"choices\[1\] is null, but must be text",
        ),
        ("multiple_choice", {"query": 3, "choices": ["a", "b"], "gold": 0}, "query is 3, but must be text"),
        ("multiple_choice", {"query": "q", "choices": ["a", "b"]}, "gold is missing"),
        ("multiple_choice", ["q"], "holds .*, but must be an object"),
        ("piqa", {"goal": "g", "sol1": "a", "sol2": "b"}, "label is missing"),
        ("piqa", {"goal": "g", "sol1": "a", "sol2": None, "label": 0}, "sol2 is null, but must be text"),
        ("piqa", {"goal": "g", "sol1": "a", "sol2": "b", "label": 2}, "gold is 2"),
        (
            "hellaswag",
            {"activity_label": "R", "ctx_a": "a", "ctx_b": None, "endings": ["a", "b"], "label": ""},
            "ctx_b is null",
        ),
        ("winogrande", {"sentence": "no gap", "option1": "a", "option2": "b", "answer": "1"}, "must have a _"),
        (
            "winogrande",
            {"sentence": "a _ b", "option1": "a", "option2": "b", "answer": ""},
            'answer is "", but must be one of 1, 2',
        ),
        (
            "arc",
            {"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "C"},
            'answerKey is "C", but must be one of A, B',
        ),
    ],
)
def test_a_wrong_line_is_named(tmp_path, form, entry, message):
    good = {"query": "q", "choices": ["a", "b"], "gold": 0, "goal": "g", "sol1": "a", "sol2": "b", "label": 0}
    good |= {"question": "q", "answerKey": "A"} if form == "arc" else {}
    good |= {"activity_label": "", "ctx_a": "", "ctx_b": "", "endings": ["a", "b"]}
    good |= {"sentence": "a _ b", "option1": "a", "option2": "b", "answer": "1"}
    good |= {"choices": {"text": ["a", "b"], "label": ["A", "B"]}} if form == "arc" else {}
    path = write(tmp_path / "questions.jsonl", good, entry)
    with pytest.raises(UserError, match=f"questions.jsonl, line 2.*{message}"):
        read_questions(path, form)


def test_files_without_questions(tmp_path):
    with pytest.raises(UserError, match="no questions"):
        read_questions(write(tmp_path / "empty.jsonl"))
    with pytest.raises(UserError, match=r"absent.jsonl cannot be read: there is no such file"):
        read_questions(tmp_path / "absent.jsonl")
    with pytest.raises(UserError, match='line 1: text is "word", but must be two words or more'):
        read_questions(write(tmp_path / "one.jsonl", {"text": "word"}), "lambada")


class Given(ContinuationScorer):
    """A scorer with fixed log-likelihoods."""

    def __init__(self, values, context_length=64):
        self.values, self.context_length, self.seen = np.array(values, np.float64), context_length, []

    def score(self, pairs, progress=None):
        self.seen = list(pairs)
        count = np.array([len(continuation) for _, continuation in pairs], np.float64)
        return Scores(self.values, count, self.values > -1, np.zeros(len(pairs), np.bool_))


def test_choices_by_likelihood_and_by_likelihood_per_character():
    questions = [Question("Q:", ["ab", "abcdefgh"], 1), Question("猫:", ["猫猫", "no", "maybe"], 0)]
    given = Given([-2.0, -3.0, -4.0, -4.5, -9.0])  # per character: -1, -0.375; -2, -2.25, -1.8
    outcome = choose(given, build_tokenizer("byte"), questions, style=Style(delimiter="\nA: "))
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


def test_what_is_too_long_is_cut_left_out_or_refused():
    questions = [Question("q", ["a", "b"], 0), Question("q" * 90, ["a", "b"], 1)]
    tokenizer = build_tokenizer("byte")
    found = choose(Given([-1.0, -2.0, -1.0, -2.0]), tokenizer, questions)
    assert found.metrics["accuracy"].n == 2
    found = choose(Given([-1.0, -2.0]), tokenizer, questions, Style(too_long="skip"))
    assert found.metrics["accuracy"].n == 1 and "too-long-skipped:1/2" in found.metrics["accuracy"].signature
    with pytest.raises(UserError, match=r"question 1 .* does not fit in context_length 64 .* --too_long=cut"):
        choose(Given([]), tokenizer, questions, Style(too_long="fail"))
    with pytest.raises(UserError, match="no question fits"):
        choose(Given([]), tokenizer, questions[1:], Style(too_long="skip"))
