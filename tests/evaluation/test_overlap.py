"""ROUGE as rouge_score computes it, F1 by SQuAD's rules, GSM8K's answers."""

import collections
import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from gptjax.errors import UserError
from gptjax.evaluation.overlap import exact_answer, f1, rouge

HYPOTHESES = ["The cats sat on the mats.", "", "Running quickly home", "a b c d"]
REFERENCES = [
    ["The cat sat on a mat.", "Cats were sitting on the mat."],
    ["Something."],
    ["He runs home quickly"],
    ["d c b a", "a b d"],
]


@pytest.mark.parametrize("stemmer", [False, True])
def test_rouge_agrees_with_rouge_score(stemmer):
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=stemmer)
    metrics = rouge(HYPOTHESES, REFERENCES, stemmer=stemmer)
    for name, metric in metrics.items():
        best = [
            max(scorer.score(reference, hypothesis)[name].fmeasure for reference in references)
            for hypothesis, references in zip(HYPOTHESES, REFERENCES, strict=True)
        ]
        assert metric.value == pytest.approx(sum(best) / len(best), abs=1e-12)
        assert metric.sums[:, 0].tolist() == pytest.approx(best)
        assert metric.ci95[0] <= metric.value <= metric.ci95[1]


def test_rouge_counts_chinese_characters():
    hypotheses, references = ["猫坐在垫子上。"], [["猫坐在JAX垫上"]]
    assert rouge(hypotheses, references)["rouge1"].value == 0  # rouge_score drops them
    metrics = rouge(hypotheses, references, characters=True)
    assert metrics["rouge1"].value == pytest.approx(2 * 5 / (6 + 6))  # 猫坐在垫上 of 6 and 5 + jax
    assert metrics["rouge2"].value == pytest.approx(2 * 2 / (5 + 5))  # 猫坐 坐在
    assert metrics["rougeL"].value == pytest.approx(2 * 5 / (6 + 6))
    english = (["the cat sat"], [["a cat sat"]])
    assert rouge(*english, characters=True)["rouge1"].value == rouge(*english)["rouge1"].value


def squad(prediction, truths):
    """F1 and exact match as the evaluation script of SQuAD 2.0 defines them."""

    def normalise(text):
        text = "".join(c for c in text.lower() if c not in set(string.punctuation))
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())

    def score(truth):
        gold, words = normalise(truth).split(), normalise(prediction).split()
        if not gold or not words:
            return float(gold == words)
        same = sum((collections.Counter(gold) & collections.Counter(words)).values())
        if same == 0:
            return 0.0
        precision, recall = same / len(words), same / len(gold)
        return 2 * precision * recall / (precision + recall)

    return 100 * max(map(score, truths)), 100.0 * max(normalise(prediction) == normalise(t) for t in truths)


WORDS = st.lists(st.sampled_from(["the", "a", "cat", "Cat,", "sat", "U.S.", "--", "5"]), max_size=6).map(" ".join)


@given(WORDS, st.lists(WORDS, min_size=1, max_size=3))
def test_f1_follows_the_rules_of_squad(prediction, truths):
    metrics = f1([prediction], [truths])
    assert (metrics["f1"].value, metrics["exact_match"].value) == pytest.approx(squad(prediction, truths))


def test_f1_counts_chinese_characters():
    hypotheses, references = ["「猫」坐在垫子上。"], [["猫在垫子上，JAX"]]
    metrics = f1(hypotheses, references, characters=True)
    assert metrics["f1"].value == pytest.approx(100 * 2 * 5 / (6 + 6))
    assert f1(["猫，坐。"], [["猫坐"]], characters=True)["exact_match"].value == 100


@pytest.mark.parametrize(
    ("hypothesis", "right"),
    [
        ("So it is 70 + 2.\n#### 72", 1),
        ("#### $72", 1),
        ("#### 72.", 1),
        ("#### 7,2", 1),  # commas do not count
        ("####72", 1),
        ("#### 73", 0),
        ("72", 0),  # the answer follows ####
        ("", 0),
    ],
)
def test_the_number_after_the_hashes(hypothesis, right):
    metrics = exact_answer([hypothesis, "#### -1,000.5"], [["48/2 = 24\n#### 72"], ["-1000.5"]])
    assert metrics["accuracy"].value == (right + 1) / 2
    assert metrics["answered"].value == (1 + ("####" in hypothesis)) / 2


def test_gsm8k_answers_itself(shared_data):
    from gptjax.evaluation.prompts import read_prompts

    prompts = read_prompts(f"{shared_data}/eval/gsm8k_train.jsonl.gz#question,answer")
    references = [prompt["references"] for prompt in prompts]
    assert exact_answer([texts[-1] for texts in references], references)["accuracy"].value == 1
    assert len(prompts) > 7000


def test_what_cannot_be_scored_is_named():
    with pytest.raises(UserError, match="2 hypotheses but references for 1 items"):
        rouge(["a", "b"], [["a"]])
    with pytest.raises(UserError, match='the reference of item 1 has no answer: expected "#### NUMBER" or a number'):
        exact_answer(["#### 1", "#### 2"], [["1"], ["two"]])
