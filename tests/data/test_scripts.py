"""All modules agree on which characters are Chinese."""

import re
import unicodedata

import numpy as np
import pytest
from tokenizers import Regex, pre_tokenizers

from gptjax.data.building.ngrams import word_hashes
from gptjax.data.cleaning.filters import top_ngram_ratio
from gptjax.data.cleaning.lossy import segment
from gptjax.data.cleaning.social_media import emoji
from gptjax.data.pipeline.augmentation import Augmentation
from gptjax.data.scripts import HAN, HAN_SCRIPT, HAN_SCRIPT_RUN, UNSPACED, count_han
from gptjax.data.tokenization.report import script_of
from gptjax.data.tokenization.tokenizer import build_tokenizer
from gptjax.evaluation.words import choose_tokenizer

# An ideograph of the first block, of extension A, of the compatibility forms, of extensions B and G.
IDEOGRAPHS = ["漢", "\u3400", "\uf900", "\U00020000", "\U00030000"]


@pytest.mark.parametrize("character", IDEOGRAPHS)
def test_all_places_agree_on_ideographs(character):
    assert count_han(f"a{character}b{character}") == 2
    assert len(word_hashes(character * 3)[0]) == 3
    assert top_ngram_ratio(character * 8, 2) == 1.0
    assert emoji(f"a[{character}]b", "remove") == "ab"
    assert script_of(f"ab{character}") == "han"
    assert choose_tokenizer([f"a{character}{character}"]) == "zh"
    tokenizer = build_tokenizer("bpe:270", [f"字a{character}b" * 9])
    tokens = np.array(tokenizer.encode(f"字a{character}b"), np.int32)
    swap = Augmentation(tokenizer, seed=0, word_swap=1.0)
    texts = [swap(tokens, np.arange(4), np.full(4, epoch))[1].tolist() for epoch in range(9)]
    assert tokens[[2, 3, 0, 1]].tolist() in texts, "the words 字a and the next are swapped in some epochs"


@pytest.mark.parametrize("character", IDEOGRAPHS)
def test_segmentation_finds_ideographs(character):
    pytest.importorskip("jieba")
    assert segment(f"a{character}b") == f"a {character} b"


@pytest.mark.parametrize("character", ["々", "〇", "の", "ｱ", "가", "a", "，", "1"])
def test_the_letters_without_spaces_are_the_same_for_filters_and_ngrams(character):
    alone = character in "々〇の"
    assert bool(re.match(f"[{UNSPACED}]", character)) == alone
    assert len(word_hashes(character * 3)[0]) == (0 if character == "，" else 3 if alone else 1)
    assert top_ngram_ratio(character * 8, 2) == alone
    assert not count_han(character)


def test_the_wider_classes_hold_the_ideographs():
    everything = [chr(code) for code in range(0x40000) if not 0xD800 <= code < 0xE000]
    han = {character for character in everything if re.match(f"[{HAN}]", character)}
    assert all(re.match(f"[{HAN_SCRIPT}]", character) and re.match(f"[{UNSPACED}]", character) for character in han)


def test_the_class_of_the_script_is_that_of_the_tokenizers():
    splitter = pre_tokenizers.Split(Regex(HAN_SCRIPT_RUN), "removed")
    ours = re.compile(f"[{HAN_SCRIPT}]")
    # Ideographs of the latest versions of Unicode are not known everywhere: those of 3.2 are.
    known = [chr(code) for code in range(0x30000) if unicodedata.ucd_3_2_0.category(chr(code))[0] in "LNMPS"]
    wrong = [c for c in known if bool(ours.match(c)) == bool(splitter.pre_tokenize_str(c))]
    assert wrong == []
