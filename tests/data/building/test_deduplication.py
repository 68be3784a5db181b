import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.data.building.deduplication import Deduplicator, MinHasher, bands_for, exact_key
from gptjax.data.building.ngrams import ngram_hashes, word_hashes
from gptjax.errors import UserError

HASHER = MinHasher()
HAN = "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏闰余成岁律吕调阳云腾致雨露结为霜金生丽水玉出昆冈"


def prose(seed: int, words: int = 300) -> list[str]:
    generator = random.Random(seed)
    return ["".join(generator.choices("abcdefghij", k=generator.randint(2, 8))) for _ in range(words)]


def jaccard(left: str, right: str) -> float:
    """Of the sets of word 5-grams, by hand."""
    a, b = ({tuple(t.split()[i : i + 5]) for i in range(len(t.split()) - 4)} for t in (left, right))
    return len(a & b) / len(a | b)


def duplicates(texts: list[str], **options) -> list[str | None]:
    deduplicator = Deduplicator(**options)
    return [deduplicator.duplicate_of(str(i), exact_key(text), HASHER.signature(text)) for i, text in enumerate(texts)]


def test_words_are_runs_of_letters_or_single_han_characters():
    text = "don't stop_now, été 42 你好ab 世"
    _, starts, ends = word_hashes(text)
    words = [text[a:b] for a, b in zip(starts, ends, strict=True)]
    assert words == ["don", "t", "stop", "now", "été", "42", "你", "好", "ab", "世"]


@given(st.lists(st.text("ab你", min_size=1, max_size=4), max_size=30), st.integers(1, 6))
def test_equal_ngrams_and_only_they_have_equal_hashes(words, n):
    hashes = word_hashes(" ".join(words))[0]
    text = " ".join(words)
    _, starts, ends = word_hashes(text)
    split = [text[a:b] for a, b in zip(starts, ends, strict=True)]
    n = min(n, len(split))
    grams = [tuple(split[i : i + n]) for i in range(len(split) - n + 1)] if split else []
    found = ngram_hashes(hashes, n or 1).tolist()
    assert len(found) == len(grams)
    assert len(set(found)) == len(set(grams)) == len(set(zip(found, grams, strict=True)))


def test_signatures_are_those_of_datasketch():
    datasketch = pytest.importorskip("datasketch", minversion="2.0")
    for seed, text in ((1, " ".join(prose(0))), (7, HAN * 3), (1, "one"), (1, " ".join(prose(1, 9000)))):
        hasher = MinHasher(num_permutations=64, seed=seed)
        reference = datasketch.MinHash(64, seed=seed, hashfunc=int)
        reference.update_batch((ngram_hashes(word_hashes(text)[0], 5) >> np.uint64(32)).tolist())
        np.testing.assert_array_equal(hasher.signature(text), reference.hashvalues)


def test_equal_entries_estimate_the_jaccard_similarity():
    base = prose(3, 1000)
    for changed in (5, 20, 60):
        other = base[:]
        for i in range(changed):
            other[i * 1000 // changed] = "changed"
        left, right = " ".join(base), " ".join(other)
        estimate = float((HASHER.signature(left) == HASHER.signature(right)).mean())
        assert estimate == pytest.approx(jaccard(left, right), abs=0.12)  # three standard errors


def test_the_signature_ignores_case_punctuation_and_white_space():
    assert (HASHER.signature("One, two; THREE\nfour five!") == HASHER.signature("one two three four five")).all()
    assert (HASHER.signature("!!!") != HASHER.signature("???")).any()


def test_signatures_are_the_same_in_another_process():
    code = (
        "from gptjax.data.building.deduplication import MinHasher, exact_key;"
        "print(MinHasher().signature('a b c \\u4f60\\u597d').tobytes().hex(), exact_key('a  b').hex())"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split() == [HASHER.signature("a b c 你好").tobytes().hex(), exact_key("a b").hex()]


def test_exact_keys_ignore_white_space_only():
    assert exact_key(" a\n\tb ") == exact_key("a b") != exact_key("a B")
    assert len(exact_key("")) == 16


def test_exact_duplicates_name_the_first():
    assert duplicates(["a b", "c", "a  b", "A b", "c"], mode="exact") == [None, None, "0", None, "1"]
    assert duplicates(["a", "a"], mode="none") == [None, None]


@pytest.mark.parametrize("words", [prose(5, 200), list(HAN * 4)])
def test_a_planted_near_duplicate_is_found_among_others(words):
    planted = words[:]
    planted[100] = "X"
    separator = "" if words[0] in HAN else " "
    texts = [" ".join(prose(100 + i)) for i in range(200)]
    texts.insert(50, separator.join(words))
    texts.insert(170, separator.join(planted))
    assert [name for name in duplicates(texts) if name] == ["50"]
    assert duplicates(texts)[170] == "50"


def test_pairs_above_the_threshold_are_found_and_those_below_kept():
    found = {0.9: 0, 0.6: 0}
    for similarity in found:
        for seed in range(60):
            base = prose(seed, 400)
            changed = round(396 * (1 - similarity) / (1 + similarity))  # words at the end: one 5-gram each
            texts = [" ".join(base), " ".join(base[: 400 - changed] + prose(1000 + seed, changed))]
            assert jaccard(*texts) == pytest.approx(similarity, abs=0.03)
            found[similarity] += duplicates(texts)[1] is not None
    assert found[0.9] >= 58
    assert found[0.6] == 0


def test_the_index_finds_the_same_after_it_has_grown():
    random_signatures = np.random.default_rng(0).integers(0, 1 << 32, (9000, 128), dtype=np.uint32)
    deduplicator = Deduplicator()
    for i, signature in enumerate(random_signatures):
        assert deduplicator.duplicate_of(str(i), i.to_bytes(16, "big"), signature) is None
    for i in range(0, 9000, 111):
        changed = random_signatures[i].copy()
        changed[:20] += 1
        assert deduplicator.duplicate_of("new", (10**6 + i).to_bytes(16, "big"), changed) == str(i)


def test_the_bands_find_95_percent_at_the_threshold():
    for threshold in (0.5, 0.7, 0.8, 0.95, 1.0):
        bands, rows = bands_for(threshold, 128)
        assert bands * rows <= 128
        assert 1 - (1 - threshold**rows) ** bands >= 0.95
        assert threshold == 1 or 1 - (1 - threshold ** (rows + 1)) ** (128 // (rows + 1)) < 0.95


@pytest.mark.parametrize(("options", "message"), [({"mode": "fuzzy"}, "none, exact, near"), ({"threshold": 80}, "0.8")])
def test_wrong_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        Deduplicator(**options)
