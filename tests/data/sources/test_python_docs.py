import inspect
import textwrap

import pytest

from gptjax.data.sources.opening import open_source
from gptjax.data.sources.python_docs import PythonDocs, question_answer_pairs, standard_library_docstrings


@pytest.fixture(scope="module")
def documents():
    return {document["id"]: document for document in open_source("python_docs").documents()}


def test_the_docstring_of_a_function_is_the_one_that_python_shows(documents):
    text = documents["docstrings/textwrap.dedent"]["text"]
    signature, _, rest = text.partition("\n\n")
    assert signature == "textwrap.dedent(text)"
    assert rest == inspect.getdoc(textwrap.dedent).strip() + "\n"


def test_methods_and_classes_have_their_qualified_name(documents):
    assert "docstrings/collections.OrderedDict.popitem" in documents
    assert documents["docstrings/argparse.ArgumentParser"]["text"].startswith("argparse.ArgumentParser\n\n")
    assert documents["docstrings/json"]["text"].startswith("json\n\n")


def test_the_size_of_the_corpus(documents):
    assert 7_000 < len(standard_library_docstrings()) < 12_000
    assert 2_000_000 < sum(len(document["text"]) for document in documents.values()) < 5_000_000
    assert any(name.startswith("topics/") for name in documents)


def test_bundled_programs_and_tests_are_left_out(documents):
    modules = {name.split("/")[1].split(".")[0] for name in documents if name.startswith("docstrings/")}
    assert modules.isdisjoint({"test", "idlelib", "site-packages", "turtledemo", "ensurepip"})


def test_ids_are_unique_and_the_order_is_always_the_same(documents):
    again = list(PythonDocs().documents())
    assert len(again) == len(documents)
    assert again == list(documents.values())


def test_a_question_shares_the_split_key_of_its_docstring(documents):
    pairs = question_answer_pairs()
    assert len(pairs) > 3_000
    for pair in pairs:
        name = pair["id"].removeprefix("questions/")
        assert pair["split_key"] == documents[f"docstrings/{name}"]["split_key"]
        assert documents[pair["id"]]["split_key"] == pair["split_key"]


def test_a_question_is_a_prompt_and_one_line_of_answer():
    pairs = {pair["id"]: pair for pair in open_source("python_docs:questions").documents()}
    pair = pairs["questions/textwrap.dedent"]
    assert pair["prompt"] == "Question: What does textwrap.dedent do?\nAnswer:"
    assert pair["references"][0].startswith("Remove any common leading whitespace")
    for pair in pairs.values():
        (answer,) = pair["references"]
        assert pair["text"] == f"{pair['prompt']} {answer}"
        assert len(answer.split()) >= 3
        assert answer == answer.strip()
        assert "\n" not in answer


def test_a_dialogue_is_a_question_and_its_answer_in_the_same_split():
    pairs = {pair["id"].removeprefix("questions/"): pair for pair in question_answer_pairs()}
    dialogues = [*open_source("python_docs:dialogues").documents()]
    assert len(dialogues) == len(pairs)
    for dialogue in dialogues:
        name = dialogue["id"].removeprefix("dialogues/")
        (answer,) = pairs[name]["references"]
        question = f"What does {name} do?"
        assert dialogue["messages"] == [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
        assert (dialogue["prompt"], dialogue["references"]) == (question, [answer])
        assert dialogue["split_key"] == pairs[name]["split_key"]
