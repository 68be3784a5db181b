"""Paired differences: sacrebleu's paired bootstrap is the oracle; items that do not match are refused."""

import numpy as np
import pytest
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.metrics.ter import TER
from sacrebleu.significance import PairedTest

from gptjax.errors import UserError
from gptjax.evaluation import metrics as items
from gptjax.evaluation.compare import compare
from gptjax.evaluation.metrics import Outcome, item_ids, ratio_metric
from gptjax.evaluation.references import bleu, chrf, ter

WORDS = np.array(["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "and", "then", "saw", "it", "again"])


@pytest.fixture(scope="module")
def texts():
    """40 references, and two systems of which the second changes more words."""
    rng = np.random.default_rng(0)
    references = [list(rng.choice(WORDS, rng.integers(5, 12))) for _ in range(40)]

    def changed(share):
        return [" ".join(w if rng.random() > share else rng.choice(WORDS) for w in text) for text in references]

    return changed(0.3), changed(0.35), [[" ".join(text)] for text in references]


def write(path, outcomes):
    path.write_text("".join(items.lines(outcomes)), encoding="utf-8")
    return path


def test_agrees_with_the_paired_bootstrap_of_sacrebleu(texts, tmp_path):
    a, b, references = texts
    outcomes = [
        {"bleu": Outcome({"bleu": bleu(h, references), "chrf": chrf(h, references), "ter": ter(h, references)})}
        for h in (a, b)
    ]
    files = [write(tmp_path / f"{name}.items.jsonl", outcome) for name, outcome in zip("ab", outcomes, strict=True)]
    found = {difference.metric: difference for difference in compare(*files).differences}
    streams = [[text for (text,) in references]]
    metrics = {"BLEU": BLEU(references=streams), "chrF2": CHRF(references=streams), "TER": TER(references=streams)}
    _, scores = PairedTest([("a", a), ("b", b)], metrics, references=None, test_type="bs")()
    for name, theirs in (("bleu", "BLEU"), ("chrf", "chrF2"), ("ter", "TER")):
        first, second = scores[theirs]
        assert (found[name].a, found[name].b) == pytest.approx((first.score, second.score))
        assert found[name].p == pytest.approx(second.p_value)
        low, high = found[name].ci95
        assert low < found[name].difference < high and found[name].n == 40
    assert found["bleu"].difference < 0 < found["ter"].difference


def metric(ids, numbers, unit="", **options):
    return ratio_metric(ids, np.array(numbers, np.float64), signature="", unit=unit, **options)


def test_pairing_finds_what_separate_intervals_cannot(tmp_path):
    """Losses that vary from 0 to 10 between items, and by 0.1 between models."""
    rng = np.random.default_rng(0)
    loss = rng.uniform(0, 10, 200)
    ids = item_ids(list(range(200)))
    first = metric(ids, loss, lower_is_better=True)
    order = rng.permutation(200)  # B has the items in another order
    second = metric([ids[i] for i in order], (loss + 0.1 + rng.normal(0, 0.1, 200))[order], lower_is_better=True)
    a = write(tmp_path / "a.items.jsonl", {"perplexity": Outcome({"nll": first})})
    b = write(tmp_path / "b.items.jsonl", {"perplexity": Outcome({"nll": second})})
    (difference,) = compare(a, b).differences
    assert difference.verdict == "A is better" and difference.p < 0.01
    assert difference.difference == pytest.approx(0.1, abs=0.03)
    assert difference.ci95[1] - difference.ci95[0] < 0.1 < first.ci95[1] - first.ci95[0]
    one = write(tmp_path / "one.items.jsonl", {"perplexity": Outcome({"nll": metric(["x"], [1.0])})})
    (alone,) = compare(one, one).differences
    assert alone.verdict == "too few items to say" and alone.to_json()["ci95"] == [None, None]
    (same,) = compare(a, a).differences
    assert (same.difference, same.p, same.verdict) == (0, 1, "no difference shown")


def test_p_values_are_uniform_where_there_is_no_difference(tmp_path):
    rng = np.random.default_rng(1)
    ids, p_values = item_ids(list(range(50))), []
    for _ in range(60):
        both = [metric(ids, rng.normal(size=50)) for _ in range(2)]
        files = [
            write(tmp_path / f"{n}.items.jsonl", {"t": Outcome({"m": m})}) for n, m in zip("ab", both, strict=True)
        ]
        p_values.append(compare(*files).differences[0].p)
    assert 0.3 < np.mean(p_values) < 0.7
    assert np.mean(np.array(p_values) < 0.05) < 0.2


def test_other_items_are_refused_with_counts(tmp_path):
    a = write(tmp_path / "a.items.jsonl", {"rouge": Outcome({"rouge1": metric(["x", "y"], [0, 1])})})
    b = write(tmp_path / "b.items.jsonl", {"rouge": Outcome({"rouge1": metric(["y", "z", "w"], [0, 1, 1])})})
    with pytest.raises(UserError, match=r"rouge rouge1: the items differ \(A has 2, B has 3, 1 in common\)"):
        compare(a, b)
    c = write(tmp_path / "c.items.jsonl", {"f1": Outcome({"f1": metric(["x", "y"], [0, 1])})})
    with pytest.raises(UserError, match="A has rouge, B has f1"):
        compare(a, c)


def test_other_tokenizers_are_compared_by_the_byte_alone(tmp_path):
    def model(tokenizer, per_token):
        ids = item_ids(list("abc"))
        nll = metric(ids, per_token, f"tokenizer:{tokenizer}", lower_is_better=True)
        return {"perplexity": Outcome({"nll": nll, "bits_per_byte": metric(ids, [1, 2, 3], "bytes")})}

    a = write(tmp_path / "a.items.jsonl", model("one", [1, 2, 3]))
    b = write(tmp_path / "b.items.jsonl", model("two", [3, 4, 5]))
    comparison = compare(a, b)
    assert [difference.metric for difference in comparison.differences] == ["bits_per_byte"]
    (problem,) = comparison.problems
    assert problem == "perplexity nll: tokenizer:one in A, tokenizer:two in B, which have no common scale"


def test_a_work_directory_has_its_newest_evaluation(tmp_path):
    ids = item_ids(["x", "y"])
    (tmp_path / "run" / "evaluation").mkdir(parents=True)
    for name, value in (("f1-100", 1.0), ("f1-200", 2.0)):
        write(
            tmp_path / "run" / "evaluation" / f"{name}.items.jsonl", {"f1": Outcome({"f1": metric(ids, [value] * 2)})}
        )
    result = tmp_path / "result.json"
    write(tmp_path / "result.items.jsonl", {"f1": Outcome({"f1": metric(ids, [3.0, 5.0])})})
    comparison = compare(tmp_path / "run", result)
    assert (comparison.differences[0].a, comparison.differences[0].b) == (2, 4)
    assert [path.name for path in comparison.files[0]] == ["f1-200.items.jsonl"]
    with pytest.raises(UserError, match=r"nothing.json is neither a work directory nor a result"):
        compare(tmp_path / "nothing.json", result)
    with pytest.raises(UserError, match=r"has no evaluation/\*.items.jsonl; run gptjax evaluate"):
        compare(tmp_path, result)
    (tmp_path / "result.items.jsonl").write_text('{"item": 1}\n')
    with pytest.raises(UserError, match=r"result.items.jsonl:1: not a line of an items file"):
        compare(result, result)
