import gzip
import json
import pickle

import pytest

from gptjax.data.building.decontamination import Contamination, Decontaminator
from gptjax.errors import UserError

ITEMS = [
    {
        "query": "The man turned on the faucet, therefore",
        "choices": ["the toilet filled.", "water came out."],
    },
    {"question": " ".join(f"word{i}" for i in range(20)), "answer": "no"},
    {
        "text": "床前明月光疑是地上霜举头望明月低头思故乡",
        "meta": {"notes": ["one two three four five six seven eight"]},
    },
]


@pytest.fixture
def decontaminator(tmp_path):
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl.gz"
    first.write_text("".join(json.dumps(item) + "\n" for item in ITEMS[:2]))
    second.write_bytes(gzip.compress(json.dumps(ITEMS[2]).encode()))
    return Decontaminator.from_files([first, second])


def found(decontaminator, text):
    match = decontaminator.overlap(text)
    return match and (match.file.rsplit("/")[-1], match.line)


def test_thirteen_words_in_a_row_are_found_and_twelve_are_not(decontaminator):
    words = ITEMS[1]["question"].split()
    assert found(decontaminator, f"Before, {'; '.join(words[3:16]).upper()}\n after") == ("first.jsonl", 2)
    assert found(decontaminator, "before " + " ".join(words[3:15]) + " after") is None


def test_the_match_names_line_piece_and_number_of_ngrams(decontaminator):
    words = ITEMS[1]["question"].split()
    match = decontaminator.overlap("Some TEXT " + " ".join(words[2:17]))
    assert isinstance(match, Contamination)
    assert (match.line, match.ngrams, match.excerpt) == (2, 3, " ".join(words[2:15]))


def test_a_short_question_is_found_with_its_answer(decontaminator):
    query, (_, answer) = ITEMS[0]["query"], ITEMS[0]["choices"]
    assert found(decontaminator, f"x {query} {answer} y") == ("first.jsonl", 1)
    assert found(decontaminator, f"x {query} we laughed") is None


def test_han_characters_are_words(decontaminator):
    assert found(decontaminator, "诗曰:明月光,疑是地上霜。举头望明月") == ("second.jsonl.gz", 1)
    assert found(decontaminator, "明月光疑是地上霜举头") is None


def test_texts_within_lists_and_objects_count_as_a_whole_from_eight_words(decontaminator):
    assert found(decontaminator, "zero one two three four five six seven eight nine") == (
        "second.jsonl.gz",
        1,
    )
    assert found(decontaminator, "one two three four five six seven") is None


def test_a_copy_in_another_process_finds_the_same(decontaminator):
    text = ITEMS[1]["question"]
    assert pickle.loads(pickle.dumps(decontaminator)).overlap(text) == decontaminator.overlap(text)


def test_the_evaluation_sets_are_found_in_themselves_and_nowhere_else(shared_data):
    path = shared_data / "eval" / "copa.jsonl"
    decontaminator = Decontaminator.from_files([path])
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        item = json.loads(line)
        match = decontaminator.overlap(f"Yes. {item['query']} {item['choices'][item['gold']]} Indeed.")
        words = len(f"{item['query']} {item['choices'][item['gold']]}".split())
        assert words < 8 or (match is not None and match.line <= number), line
    assert decontaminator.overlap((shared_data / "tinyshakespeare" / "input.txt").read_text()) is None


def test_files_that_cannot_be_used_are_named(tmp_path):
    path = tmp_path / "bad.jsonl"
    with pytest.raises(UserError, match=r"cannot open .*bad\.jsonl"):
        Decontaminator.from_files([path])
    path.write_text('{"a": "b"}\nnonsense\n')
    with pytest.raises(UserError, match=r"bad\.jsonl, line 2: not JSON"):
        Decontaminator.from_files([path])
    path.write_text('{"a": "b"}\n')
    with pytest.raises(UserError, match=r"no text of .* has 8 words"):
        Decontaminator.from_files([path])
    with pytest.raises(UserError, match="take 13"):
        Decontaminator([], ngram=3)
    assert Decontaminator.from_files([]).overlap("anything") is None
