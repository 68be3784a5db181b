"""Toy tasks: right answers, no duplicate questions, equal for equal seeds, and held-out questions stay out."""

import json
import re

import pytest

from gptjax.data.building.build import build_store
from gptjax.data.pipeline.prompts import PromptBatches, Questions
from gptjax.data.sources.opening import open_source
from gptjax.data.sources.toy import NAMES
from gptjax.data.tokenization.templates import ChatTemplate
from gptjax.data.tokenization.tokenizer import build_tokenizer
from gptjax.errors import UserError


def pairs(spec: str) -> list[tuple[str, str]]:
    return [tuple(m["content"] for m in document["messages"]) for document in open_source(spec).documents()]


def answer(question: str) -> str:
    """Computes the answer in another way than the source."""
    if "+" in question:
        return str(sum(map(int, question.split("+"))))
    if match := re.fullmatch(r"count (\d) in (\d+)", question) or re.fullmatch(r"数一数「(.)」：(.+)", question):
        return str(len(re.findall(match[1], match[2])))
    task, symbols = re.fullmatch(r"(\w+)[ ：](.+)", question).groups()
    by = {"copy": list, "sort": sorted, "reverse": reversed, "反转": reversed}
    return "".join(by[task](symbols))


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_right_and_questions_differ(name):
    found = pairs(f"toy:{name}#length=3,size=150")
    assert len(dict(found)) == len(found) == 150
    assert all(answer(question) == right for question, right in found)
    assert found == pairs(f"toy:{name}#size=150,length=3,seed=0")
    assert found != pairs(f"toy:{name}#length=3,size=150,seed=1")
    assert len({right for _, right in found}) > 2


def test_a_known_beginning():
    assert pairs("toy:copy#size=2") == [("copy 5254", "5254"), ("copy 0371", "0371")]


def test_there_may_be_fewer_questions_than_wanted():
    assert 8 <= len(pairs("toy:copy#length=1,size=100")) <= 10


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("toy:", "unknown toy task 'toy:': expected one of toy:copy"),
        ("toy:sorted", "unknown toy task"),
        ("toy", "unknown toy task"),
        ("toy:sort#len=3", "found 'len=3'; expected length=N, size=N or seed=N"),
        ("toy:sort#length=x", "found 'length=x'"),
        ("toy:sort#length=0", "length must be between 1 and 100"),
    ],
)
def test_a_wrong_name_or_option_is_refused(spec, message):
    with pytest.raises(UserError, match=message):
        open_source(spec)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    directory = tmp_path_factory.mktemp("store") / "s"
    options = {"validation_fraction": 0.2, "test_fraction": 0.1}
    return build_store(open_source("toy:反转#size=200"), directory, tokenizer="byte", **options)


def test_questions_are_read_back_and_splits_are_disjoint(store):
    tokenizer = store.tokenizer()
    told = {split: Questions.read({"toy": store.split(split)}, tokenizer, most_tokens=99) for split in store.splits}
    asked = {split: {q.prompt for q in questions.questions} for split, questions in told.items()}
    assert sum(map(len, asked.values())) == 200 == len(set.union(*asked.values()))
    assert min(map(len, asked.values())) > 10
    first = told["validation"].questions[0]
    assert first.id == "toy:0"
    user = re.fullmatch(r"<\|im_start\|>user\n(反转：.{4})<\|im_end\|>\n<\|im_start\|>assistant\n", first.prompt)[1]
    assert first.reference == answer(user)
    prompt = ChatTemplate().encode_prompt([{"role": "user", "content": user}], tokenizer)
    assert first.tokens.tolist() == [*tokenizer.begin_ids, *prompt.tolist()]


def test_what_does_not_fit_is_left_out_and_counted(store):
    split, tokenizer = {"toy": store.split("train")}, store.tokenizer()
    with pytest.raises(
        UserError, match=r"no question of toy has at most 9 tokens.*the shortest of \d+ has \d+, so rai"
    ):
        Questions.read(split, tokenizer, most_tokens=9)
    everything = Questions.read(split, tokenizer, most_tokens=10**6)
    longest = max(len(q.tokens) for q in everything.questions)
    assert everything.too_long == 0
    assert len(Questions.read(split, tokenizer, most_tokens=longest)) == len(everything)


def test_the_last_answer_of_a_dialogue_is_asked_for(tmp_path):
    path = tmp_path / "d.jsonl"
    turns = [("user", "hi"), ("assistant", "hello"), ("user", "1+1?"), ("assistant", "2")]
    line = json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]})
    path.write_text(f"{line}\n")
    directory = tmp_path / "s"
    options = {"validation_fraction": 0.0, "test_fraction": 0.0}
    store = build_store(open_source(f"messages:{path}"), directory, tokenizer="byte", **options)
    (question,) = Questions.read({"d": store.split("train")}, store.tokenizer(), most_tokens=200).questions
    assert question.reference == "2"
    assert question.prompt.endswith("hello<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n")


def test_texts_without_answers_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("word " * 100)
    store = build_store(
        open_source(f"text:{tmp_path}/a.txt"), tmp_path / "s", tokenizer="byte", validation_fraction=0.1
    )
    with pytest.raises(UserError, match="texts without answers; reinforcement needs dialogues"):
        Questions.read({"a": store.split("train")}, build_tokenizer("byte"), most_tokens=100)


def test_prompts_and_answers_of_files(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "1+1", "answer": "2"}\n{"prompt": "2+2", "answer": "4"}\n')
    assert pairs(f"pairs:{tmp_path}/a.jsonl") == [("1+1", "2"), ("2+2", "4")]
    (tmp_path / "a.csv").write_text("q,a\n1+1,2\n")
    assert pairs(f"pairs:{tmp_path}/a.csv#q,a") == [("1+1", "2")]


def test_each_question_is_asked_once_in_an_epoch(store):
    questions = Questions.read({"toy": store.split("train")}, store.tokenizer(), most_tokens=99)
    options = {"batch_size": 8, "group_size": 4, "seed": 3}
    once = PromptBatches(questions, num_iterations=1, **options)
    twice = PromptBatches(questions, num_iterations=2, **options)
    asked = [once[step]["questions"] for step in range(len(questions) // 2)]
    assert len({n for numbers in asked for n in numbers.tolist()}) == len(questions) // 2 * 2
    for step in range(8):
        assert (twice[step]["questions"] == asked[step // 2]).all()
    assert once.steps_per_epoch == len(questions) / 2 and twice.steps_per_epoch == len(questions)
    lengths = [4 * sum(len(questions.questions[n].tokens) for n in numbers) for numbers in asked]
    assert once.num_tokens(1, 3) == sum(lengths[1:3])
    assert twice.num_tokens(1, 4) == lengths[0] + 2 * lengths[1]
