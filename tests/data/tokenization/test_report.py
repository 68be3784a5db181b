import numpy as np
import pytest

from gptjax.data.tokenization.report import script_of, tokenizer_report
from gptjax.data.tokenization.tokenizer import build_tokenizer


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("plain English, with größer words", "latin"),
        ("君不見黃河之水天上來", "han"),
        ("GPT 是一种语言模型", "han"),
        ("the word 漢 in a sentence of English", "latin"),
        ("Ελληνικά και русский", "other"),
    ],
)
def test_the_script_of_a_text(text, script):
    assert script_of(text) == script


def test_figures_by_hand():
    report = tokenizer_report(build_tokenizer("char", ["abc漢字"]), ["abca", "漢字漢字", ""])
    assert report["scripts"] == {
        "latin": {"documents": 1, "bytes": 4, "tokens": 4, "bytes_per_token": 1.0},
        "han": {"documents": 1, "bytes": 12, "tokens": 4, "bytes_per_token": 3.0},
    }
    assert report["round_trip"] == {"same": 2, "texts": 2, "examples": []}
    assert (report["vocab_size"], report["unused_ids"]) == (6, 1)  # eot is in no text


def test_ids_counted_over_the_corpus_take_the_place_of_the_sample():
    tokenizer = build_tokenizer("byte")
    used = np.zeros(257, np.int64)
    used[:200] = 1
    assert tokenizer_report(tokenizer, ["a"], used)["unused_ids"] == 57


def test_what_does_not_come_back_is_shown():
    tokenizer = build_tokenizer("word:5", ["one two two three three three"])
    report = tokenizer_report(tokenizer, ["three two", "three  unheard"])
    assert (report["round_trip"]["same"], report["round_trip"]["texts"]) == (1, 2)
    assert report["round_trip"]["examples"] == [{"text": "three  unheard", "decoded": "three <|unknown|>"}]
