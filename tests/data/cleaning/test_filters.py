import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.data.cleaning import filters

PROSE = (
    "The committee met on Tuesday to discuss the new bridge. Several members asked who would pay for it, and "
    "the engineer explained that a toll was planned. After two hours they agreed to hold a public hearing."
)
ZH = (
    "委员会星期二开会讨论新桥的建设。几位委员询问由谁来付钱，工程师解释说计划收取过桥费。"
    "两个小时以后，他们同意在春天举行一次公开听证会。"
)


@given(st.text(st.characters(exclude_categories=[])))
def test_filters_take_any_text_and_ratios_lie_between_0_and_1(text):
    assert 0 <= filters.symbol_ratio(text) <= 1
    assert 0 <= filters.repeated_line_ratio(text) <= 1
    assert all(0 <= filters.top_ngram_ratio(text * 3, size) <= 1 for size in (2, 3))
    assert all(0 <= filters.repeated_ngram_ratio(text * 3, size) <= 1 for size in (2, 5))


@pytest.mark.parametrize("text", [PROSE, ZH, "हम अपने घर में बैठकर पुरानी किताबें पढ़ते हैं और चाय पीते हैं।"])
def test_prose_passes(text):
    assert filters.length(len(text), 20, 1000) == ""
    assert filters.symbols(text, 0.2) == ""
    assert filters.repeated_lines(text, 0.2) == ""
    assert filters.repeated_ngrams(text, 0.2, 0.15) == ""


def test_length():
    assert filters.length(5, 6, 0) == "5 characters, fewer than 6"
    assert filters.length(7, 6, 6) == "7 characters, more than 6"
    assert filters.length(6, 6, 6) == ""


def test_symbol_ratio_leaves_out_white_space():
    assert filters.symbol_ratio("ab !! \n#") == 3 / 5
    assert filters.symbol_ratio("你好，世界。") == 2 / 6
    assert filters.symbol_ratio(" ") == 0


def test_repeated_lines_are_those_seen_before():
    assert filters.repeated_line_ratio("abc\n\nb\nabc\n abc \nc") == 6 / 11


def test_ngram_ratios_by_hand():
    text = "ab cd x ab cd yz ab cd"  # 15 characters; the 2-gram "ab cd" three times
    assert filters.top_ngram_ratio(text, 2) == 12 / 15
    assert filters.repeated_ngram_ratio(text, 2) == 8 / 15
    assert filters.repeated_ngram_ratio("a b c d e f g h", 2) == 0


@given(st.lists(st.sampled_from("abc"), max_size=30), st.integers(2, 4))
def test_ngram_ratios_equal_a_plain_count(words, n):
    text = " ".join(words)
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    if len(words) < 2 * n:
        return
    covered = set()
    for i, gram in enumerate(grams):
        if gram in grams[:i]:
            covered.update(range(i, i + n))
    assert filters.repeated_ngram_ratio(text, n) == len(covered) / len(words)
    most = max(map(grams.count, grams))
    assert filters.top_ngram_ratio(text, n) == pytest.approx(min(1, most * n / len(words)) if most > 1 else 0)


def test_repetition_is_found_in_both_languages():
    assert "2-gram" in filters.repeated_ngrams("buy now " * 30, 0.2, 0.15)
    assert "repeated 5-grams" in filters.repeated_ngrams(f"{PROSE} {PROSE}", 0.2, 0.15)
    assert "repeated 5-grams" in filters.repeated_ngrams(ZH + ZH, 0.2, 0.15)


def test_a_ten_times_longer_text_takes_ten_times_longer(assert_linear):
    rng = random.Random(0)
    words = [str(rng.randrange(5000)) for _ in range(100_000)]
    assert_linear(lambda words: filters.repeated_ngrams(" ".join(words), 0.2, 0.15), words[:10_000], words)
    assert filters.repeated_ngrams(" ".join(words), 0.2, 0.15) == ""


def test_language():
    pytest.importorskip("py3langid")
    assert filters.language(PROSE, ("en", "zh")) == ""
    assert filters.language(ZH, ("en", "zh")) == ""
    assert filters.language(ZH, ("en",)) == "the language is zh, not en"
    assert filters.language("Der Ausschuss tagte am Dienstag wegen der neuen Brücke.", ("en", "zh")) != ""
    assert filters.language(ZH, ()) == ""
    assert isinstance(filters.language("\ud800", ("en",)), str)
