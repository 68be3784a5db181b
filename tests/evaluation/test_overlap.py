"""ROUGE as rouge_score computes it, F1 by SQuAD's rules, GSM8K's answers."""

import collections
import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from gptjax.errors import UserError
from gptjax.evaluation.answers import exact_answer, f1
from gptjax.evaluation.overlap import rouge
from gptjax.evaluation.text_tasks import score_texts
from gptjax.evaluation.words import unicode_words

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
    assert rouge(hypotheses, references, words="default")["rouge1"].value == 0  # rouge_score drops them
    metrics = rouge(hypotheses, references)
    assert metrics["rouge1"].value == pytest.approx(2 * 5 / (6 + 6))  # 猫坐在垫上 of 6 and 5 + jax
    assert metrics["rouge2"].value == pytest.approx(2 * 2 / (5 + 5))  # 猫坐 坐在
    assert metrics["rougeL"].value == pytest.approx(2 * 5 / (6 + 6))
    english = (["the cat sat"], [["a cat sat"]])
    assert rouge(*english, words="unicode")["rouge1"].value == rouge(*english)["rouge1"].value


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
    metrics = f1(hypotheses, references, tokenize="zh")
    assert metrics["f1"].value == pytest.approx(100 * 2 * 5 / (6 + 6))
    assert f1(["猫，坐。"], [["猫坐"]], tokenize="zh")["exact_match"].value == 100


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
    with pytest.raises(UserError, match='the reference of item 2 has no answer: expected "#### NUMBER" or a number'):
        exact_answer(["#### 1", "#### 2"], [["1"], ["two"]])


IDENTICAL = {
    "Russian": "Кошка сидит на коврике у двери.",
    "Korean": "고양이가 문 옆 매트 위에 앉아 있다.",
    "Arabic": "القطة تجلس على الحصيرة بجانب الباب.",
    "Thai": "แมวนั่งอยู่บนเสื่อข้างประตู",
    "Japanese": "ねこがドアのそばのマットにすわっています。",
    "Chinese": "猫坐在门边的垫子上。",
    "Hindi": "बिल्ली दरवाज़े के पास चटाई पर बैठी है।",
    "Greek": "Η γάτα κάθεται στο χαλί δίπλα στην πόρτα.",
    "Hebrew": "החתול יושב על השטיח ליד הדלת.",
    "Burmese": "ကြောင်သည်တံခါးအနီးတွင်ထိုင်နေသည်။",
}


@pytest.mark.parametrize("text", IDENTICAL.values(), ids=IDENTICAL)
@pytest.mark.parametrize("task", ["rouge", "bleu", "chrf", "f1", "exact_match", "bleu_lowercase"])
def test_identical_texts_of_any_script_have_the_highest_score(task, text):
    outcome = score_texts(task, (), [text, text], [[text], [text]])
    highest = 1 if task == "rouge" else 100
    assert {name: metric.value for name, metric in outcome.metrics.items()} == pytest.approx(
        dict.fromkeys(outcome.metrics, highest)
    )
    assert not outcome.warnings


def test_the_words_of_rouge_follow_the_references_and_are_named():
    assert "|tok:default|" in rouge(["the café"], [["the café in Kraków is open today"]])["rouge1"].signature
    mixed = [["the cat sat on the mat, as cats do"]] * 9 + [["Кошка сидит"]]
    found = rouge([references[0] for references in mixed], mixed)["rouge1"]
    assert "|tok:unicode|" in found.signature and found.value == 1
    assert unicode_words("ねこ cats, ที่ Кот-2 がg") == ["ね", "こ", "cats", "ที่", "кот", "2", "が", "g"]


def test_a_text_without_words_is_warned_of():
    outcome = score_texts("rouge", (), ["?!", "cat", ""], [["a cat"], ["cat"], ["..."]])
    assert [warning.split(",")[0] for warning in outcome.warnings] == [
        "rouge keeps no word of 1 of 3 hypotheses",
        "rouge keeps no word of 1 of 3 references",
    ]
    assert "f1 keeps no word of 1 of 1 references" in score_texts("f1", (), ["cat"], [["the"]]).warnings[0]


def both(prediction, truths, **options):
    metrics = f1([prediction], [truths], **options)
    return metrics["f1"].value, metrics["exact_match"].value


@pytest.mark.parametrize("rules", ["", "mlqa", "mlqa-zh", "cmrc"])
def test_the_middle_dot_of_foreign_names_does_not_count(rules):
    assert both("丹尼特里维森", ["丹尼·特里维森"], tokenize="zh", rules=rules) == (100, 100)


def test_chinese_keeps_english_words_that_are_articles_elsewhere():
    assert both("A 股", ["股"], tokenize="zh") == (pytest.approx(200 / 3), 0)
    assert both("A 股", ["股"], tokenize="zh", rules="squad") == (100, 100)  # SQuAD's own rules, asked for by name
    assert "rules:squad-2.0|tok:words|" in f1(["a"], [["a"]])["f1"].signature


@pytest.mark.parametrize(
    ("rules", "prediction", "truth", "expected"),
    [  # by the script mlqa_evaluation_v1.py
        ("mlqa-en", "The U.S. «Army»", "us army", (100, 100)),
        ("mlqa-es", "los tres años", "el ¿tres años?", (100, 100)),
        ("mlqa-de", "der große Hund", "ein großer Hund", (50, 0)),
        ("mlqa-vi", "những con mèo", "con mèo của", (100, 100)),
        ("mlqa-ar", "البيت الكبير", "بيت كبير", (100, 100)),
        ("mlqa-hi", "यह घर।", "यह घर", (100, 100)),
        ("mlqa-zh", "JAX 库", "jax库", (100, 100)),
        ("mlqa-en", "the", "a", (0, 100)),  # no word left: F1 is 0 by this script, 100 by SQuAD 2.0's
        ("squad", "the", "a", (100, 100)),
        # by cmrc2018_evaluate.py: the longest common substring; an English full stop and brackets stay
        ("cmrc", "北京大学和清华大学", "清华大学", (pytest.approx(100 * 2 * 4 / (9 + 4)), 0)),
        ("cmrc", "北大京学", "北京大学", (pytest.approx(100 * 2 * 1 / 8), 0)),
        ("cmrc", "约100-200米。", "约100200米", (100, 100)),
        ("cmrc", "2008 年", "2008年", (100, 0)),
        ("cmrc", "猫(cat)", "猫cat", (pytest.approx(100 * 2 * 1 / (4 + 2)), 0)),
        ("cmrc", "……猫", "猫", (pytest.approx(100 * 2 * 1 / (2 + 1)), 0)),
    ],
)
def test_the_rules_of_published_scripts(rules, prediction, truth, expected):
    assert both(prediction, [truth], rules=rules) == expected
    assert rules in f1([prediction], [[truth]], rules=rules)["f1"].signature


def test_the_language_of_mlqa_must_be_known():
    with pytest.raises(UserError, match=r"name it: --rules=mlqa-en, mlqa-es, mlqa-de or mlqa-vi"):
        f1(["ein Haus"], [["Haus"]], rules="mlqa")
