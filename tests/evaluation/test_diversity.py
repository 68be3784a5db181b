"""distinct-n and repetition by hand; the interval of distinct-n by leaving out each text."""

import numpy as np
import pytest

from gptjax.evaluation.diversity import diversity
from gptjax.evaluation.metrics import item_ids

TEXTS = ["a b c a b c a b c", "a b d", "e", ""]


def test_by_hand():
    metrics = diversity(TEXTS, item_ids(TEXTS))
    assert metrics["distinct1"].value == pytest.approx(5 / 13)  # a b c d e
    assert metrics["distinct2"].value == pytest.approx(4 / 10)  # ab bc ca bd of 8 + 2
    assert metrics["distinct3"].value == pytest.approx(4 / 8)  # abc bca cab abd of 7 + 1
    assert metrics["repetition"].value == pytest.approx(1 - 3 / 6)  # only the first text has 4-grams
    assert metrics["repetition"].lower_is_better and not metrics["distinct1"].lower_is_better


def test_the_spread_of_distinct_is_that_of_the_jackknife():
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(list("abcdefghijkl"), 8)) for _ in range(30)]
    influences = diversity(texts, item_ids(texts))["distinct2"].sums[:, 0]
    left_out = [
        diversity(texts[:i] + texts[i + 1 :], item_ids(texts[1:]))["distinct2"].value for i in range(len(texts))
    ]
    jackknife = 29 / 30 * np.square(left_out - np.mean(left_out)).sum()
    assert np.square(influences - influences.mean()).sum() / (30 * 29) == pytest.approx(jackknife)


def test_chinese_by_character():
    assert diversity(["猫猫狗"], ["x"], "zh")["distinct1"].value == pytest.approx(2 / 3)


def test_texts_without_words_have_no_diversity():
    assert diversity(["", " "], ["x", "y"]) == {}
