import json
import math
import subprocess
import sys
from functools import partial

import numpy as np
import pytest

from gptjax import cli, evaluate
from gptjax.errors import RunError, UserError
from gptjax.evaluation.item_sums import compute
from gptjax.evaluation.metrics import FORMULAS
from gptjax.evaluation.overlap import RougeCounts
from gptjax.evaluation.prompts import read_hypotheses, read_references
from gptjax.evaluation.references import Counts, bleu, chrf, ter
from gptjax.evaluation.words import choose_tokenizer

HYPOTHESES = [
    "The cat sat on the mat near the door.",
    "A list is a mutable sequence of items.",
    "",
    "It returns the length, of the object - always.",
    "Nothing here agrees at all",
    "Dictionaries keep the order of insertion.",
]
REFERENCES = [
    ["The cat sat on the mat by the door.", "A cat was sitting on the mat near a door."],
    ["A list is a mutable sequence."],
    ["An empty answer is allowed."],
    ["Return the length of an object.", "It returns the length of the object, always."],
    ["Something else entirely was expected."],
    ["Dictionaries preserve the order of insertion."],
]
CHINESE = ["猫坐在门边的垫子上。", "列表是可变的序列。"]
CHINESE_REFERENCES = [["猫坐在门旁边的垫子上。"], ["列表是一种可变序列。"]]


def sacrebleu_cli(tmp_path, hypotheses, references_list, *options):
    """The JSON that the sacrebleu command prints; an item's first reference stands in for those it lacks.

    A repeated reference changes no BLEU and chrF, which take the best over references; of TER, it changes the mean
    length of references, so that only lists of equal length are given to it.
    """
    width = max(map(len, references_list))
    files = []
    for stream in range(width):
        lines = [refs[stream] if stream < len(refs) else refs[0] for refs in references_list]
        files.append(tmp_path / f"references{stream}")
        files[-1].write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    system = tmp_path / "hypotheses"
    system.write_text("".join(f"{line}\n" for line in hypotheses), encoding="utf-8")
    command = [sys.executable, "-m", "sacrebleu", *files, "-i", system, "--confidence", "--width=6", *options]
    return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)


@pytest.mark.parametrize(
    ("metric", "options"),
    [
        (bleu, ["-m", "bleu"]),
        (partial(bleu, lowercase=True), ["-m", "bleu", "-lc"]),
        (partial(bleu, tokenize="intl"), ["-m", "bleu", "--tokenize", "intl"]),
        (chrf, ["-m", "chrf"]),
        (partial(chrf, word_order=2), ["-m", "chrf", "--chrf-word-order", "2"]),
        (ter, ["-m", "ter"]),
    ],
    ids=["bleu", "bleu-lowercase", "bleu-intl", "chrf", "chrf++", "ter"],
)
@pytest.mark.parametrize(
    "references_list", [REFERENCES, [references[:1] for references in REFERENCES]], ids=["ragged", "single"]
)
def test_agrees_with_the_sacrebleu_command(tmp_path, metric, options, references_list):
    if metric is ter and references_list is REFERENCES:
        references_list = [references * 2 if len(references) == 1 else references for references in REFERENCES]
    estimate = metric(HYPOTHESES, references_list)
    printed = sacrebleu_cli(tmp_path, HYPOTHESES, references_list, *options)
    low, high = estimate.ci95
    assert round(estimate.value, 6) == printed["score"]
    assert (low + high) / 2 == pytest.approx(printed["confidence_mean"], abs=2e-6)
    assert (high - low) / 2 == pytest.approx(printed["confidence_var"], abs=2e-6)
    assert estimate.n == len(HYPOTHESES)
    assert FORMULAS[estimate.formula](estimate.sums.sum(axis=0)) == pytest.approx(estimate.value, abs=1e-9)
    number = {frozenset({1}): "1", frozenset({2}): "2"}.get(frozenset(map(len, references_list)), "var")
    assert estimate.signature == printed["signature"].replace(f"nrefs:{printed['nrefs']}", f"nrefs:{number}")


def test_chinese_agrees_with_the_sacrebleu_command(tmp_path):
    estimate = bleu(CHINESE, CHINESE_REFERENCES, tokenize="zh")
    printed = sacrebleu_cli(tmp_path, CHINESE, CHINESE_REFERENCES, "--tokenize", "zh")
    assert round(estimate.value, 6) == printed["score"]
    assert estimate.signature == printed["signature"]
    assert "tok:zh" in estimate.signature
    edits = ter(CHINESE, CHINESE_REFERENCES, characters=True)
    options = ["-m", "ter", "--ter-normalized", "--ter-asian-support"]
    printed = sacrebleu_cli(tmp_path, CHINESE, CHINESE_REFERENCES, *options)
    assert (round(edits.value, 6), edits.signature) == (printed["score"], printed["signature"])
    assert estimate.value > bleu(CHINESE, CHINESE_REFERENCES).value  # 13a sees one word a sentence


@pytest.mark.parametrize("metric", [bleu, chrf])
def test_limits_of_the_scale(metric):
    sentences = ["one two three four five", "six seven eight nine ten"]
    same = metric(sentences, [[sentence] for sentence in sentences])
    assert same.value == pytest.approx(100)
    assert same.ci95 == pytest.approx([100, 100])
    empty = metric(["", ""], [["one two three four five"], ["six"]])
    assert (empty.value, empty.ci95) == (0.0, [0.0, 0.0])


def test_resamples_without_any_match():
    """Some of them score 0, which sacrebleu's own average cannot add to the others."""
    estimate = chrf(["the cat sat", "", ""], [["the cat sat"], ["x"], ["y"]])
    assert estimate.ci95[0] < estimate.value < estimate.ci95[1]


@pytest.mark.parametrize("metric", [bleu, chrf])
def test_one_item_has_no_interval(metric):
    estimate = metric(["the cat sat on the mat"], [["the cat sat on a mat"]])
    assert all(math.isnan(bound) for bound in estimate.ci95)
    assert "bs:" not in estimate.signature


@pytest.mark.parametrize("metric", [bleu, chrf])
def test_what_cannot_be_scored_is_named(metric):
    with pytest.raises(UserError, match="2 hypotheses but references for 1 items"):
        metric(["a", "b"], [["a"]])
    with pytest.raises(UserError, match="item 2 has no reference"):
        metric(["a", "b"], [["a"], []])
    with pytest.raises(UserError, match="no hypotheses"):
        metric([], [])


def test_unknown_tokenizer():
    with pytest.raises(UserError, match=r"'chinese' is unknown; choose from .*zh"):
        bleu(["a"], [["a"]], tokenize="chinese")


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["The cat sat."], "13a"),
        (["猫坐在垫子上。"], "zh"),
        (["猫坐在垫子上，垫子在门边。", "JAX"], "zh"),
        (["the character 猫 means cat"], "13a"),
        (["\U00020000\U0002a700"], "zh"),  # extensions B and C
        (["ねこがすわった"], "char"),
        (["แมวนั่งอยู่บนเสื่อ"], "char"),
        (["Кошка сидит на коврике"], "13a"),
        (["42!"], "13a"),
        ([], "13a"),
    ],
)
def test_tokenizer_follows_the_script_of_most_letters(texts, expected):
    assert choose_tokenizer(texts) == expected


def test_the_example_of_the_e2e_challenge(shared_data):
    """The official script prints BLEU 72.0293: it is mteval-v13a.pl, which ignores case."""
    directory = shared_data / "e2e" / "metrics_example"
    hypotheses, _ = read_hypotheses(directory / "baseline-output.txt")
    references_list, _ = read_references([str(directory / "devel-conc.txt")], len(hypotheses))
    assert round(bleu(hypotheses, references_list, lowercase=True).value, 4) == 72.0293


def test_a_sacrebleu_that_is_not_known_is_told(monkeypatch):
    monkeypatch.delattr("sacrebleu.metrics.base.Metric._compute_score_from_stats")
    with pytest.raises(RunError, match=r"has no _compute_score_from_stats: gptjax knows .* pip install 'sacrebleu>="):
        chrf(["a"], [["a"]])


@pytest.mark.slow
def test_many_systems_in_processes_have_the_sums_of_one(monkeypatch):
    monkeypatch.setattr("gptjax.evaluation.item_sums.PIECE", 2)
    counters = [Counts.bleu("13a"), Counts.chrf(), Counts.ter(), RougeCounts()]
    systems = [HYPOTHESES, list(reversed(HYPOTHESES))]
    seen = []
    found = compute(counters, systems, REFERENCES, workers=2, progress=lambda *done: seen.append(done))
    assert seen == [(n, 12) for n in range(1, 13)]
    for texts, sums in zip(systems, found, strict=True):
        for counter in counters:
            np.testing.assert_array_equal(sums[counter], counter([texts], REFERENCES)[0])


def test_what_begins_with_a_byte_order_mark_is_scored_as_it_is(tmp_path, capsys):
    hypotheses = ["\ufeffThe cat sat on the mat near the door.", *HYPOTHESES[1:]]
    single = [references[:1] for references in REFERENCES]
    printed = sacrebleu_cli(tmp_path, hypotheses, single, "-m", "bleu")  # writes the files as well
    options = [f"--hypotheses={tmp_path}/hypotheses", f"--references={tmp_path}/references0"]
    assert cli.run(evaluate.main, ["evaluate", *options, f"--output={tmp_path}/out.json"]) == 0
    found = json.loads((tmp_path / "out.json").read_text())["results"]
    assert found.keys() == {"bleu"} and found["bleu"].keys() == {"bleu", "chrf"}
    assert round(found["bleu"]["bleu"]["value"], 6) == printed["score"] != round(bleu(HYPOTHESES, single).value, 6)
    assert "1 of 6 hold U+FEFF, a byte-order mark" in capsys.readouterr().err


def test_an_empty_line_among_references_is_a_reference(tmp_path, capsys):
    references = ["The cat sat on the mat by the door.", "", "Dictionaries keep the order of insertion."]
    hypotheses = ["The cat sat on the mat by the door.", "", "Dictionaries keep order of insertion."]
    printed = sacrebleu_cli(tmp_path, hypotheses, [[text] for text in references], "-m", "bleu")
    options = [f"--hypotheses={tmp_path}/hypotheses", f"--references={tmp_path}/references0"]
    assert cli.run(evaluate.main, ["evaluate", *options, f"--output={tmp_path}/out.json"]) == 0
    found = json.loads((tmp_path / "out.json").read_text())["results"]["bleu"]["bleu"]
    assert round(found["value"], 6) == printed["score"]
    assert "one reference per line, 3 lines" in capsys.readouterr().err
    (tmp_path / "hypotheses").write_text("one\n")
    assert cli.run(evaluate.main, ["evaluate", *options]) == 2
    assert "has 1 hypotheses" in (said := capsys.readouterr().err) and "blank lines between items; it has 3" in said
