import functools
import json
import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from gptjax.data.tokenization import vocabularies
from gptjax.data.tokenization.tokenizer import Tokenizer, build_tokenizer
from gptjax.errors import UserError

CORPUS = [
    "The quick brown fox jumps over the lazy dog. don't, we'll\r\n",
    "你好,世界。混合 English 和中文\n\n",
    "e\u0301 👩‍👩‍👧 \U0001f600 \ufffd \x00\x1f\x85\u2028 tab\t",
    "<|endoftext|>",
]
UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=80)
KINDS = ("char", "byte", "bpe:340", "bpe:340:digits=2")


@functools.cache
def tokenizer_of(spec: str) -> Tokenizer:
    return build_tokenizer(spec, CORPUS * 5)


def plain(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """The ids by the Hugging Face library alone, from tokenizer.json."""
    reference = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    reference.encode_special_tokens = True
    return reference


@pytest.mark.parametrize("spec", KINDS)
def test_the_corpus_comes_back(spec):
    tokenizer = tokenizer_of(spec)
    for text in CORPUS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("spec", KINDS)
def test_ids_are_those_of_the_tokenizer_json(spec):
    tokenizer = tokenizer_of(spec)
    for text in [*CORPUS, "", "".join(CORPUS)]:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32
        assert ids.tolist() == plain(tokenizer).encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("spec", ["byte", "bpe:340"])
@given(text=UNICODE)
def test_any_text_comes_back(spec, text):
    tokenizer = tokenizer_of(spec)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(text).tolist() == plain(tokenizer).encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    ("digits", "pieces"),
    [
        ("", ["in", " 1234567", ",", " 89", " x", "10"]),
        (":digits=3", ["in", " ", "123", "456", "7", ",", " ", "89", " x", "10"]),
        (":digits=2", ["in", " ", "12", "34", "56", "7", ",", " ", "89", " x", "10"]),
        (":digits=1", ["in", " ", *"1234567", ",", " ", *"89", " x", *"10"]),
    ],
)
def test_a_number_is_cut_from_the_left_into_groups_of_digits(digits, pieces):
    text = "in 1234567, 89 x10"
    tokenizer = build_tokenizer(f"bpe:400{digits}", [text] * 5)
    assert [tokenizer.decode([i]) for i in tokenizer.encode(text)] == pieces
    assert tokenizer.kind == "bpe"


@given(st.text(sorted(set("".join(CORPUS))), max_size=60))
def test_any_text_in_known_characters_comes_back(text):
    tokenizer = tokenizer_of("char")
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(text).tolist() == plain(tokenizer).encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("spec", KINDS)
def test_text_never_becomes_a_special_token(spec):
    tokenizer = tokenizer_of(spec)
    ids = tokenizer.encode("T<|endoftext|>")
    assert tokenizer.eot_id not in ids
    assert tokenizer.decode([*ids, tokenizer.eot_id]) == "T<|endoftext|>"


@pytest.mark.parametrize("spec", KINDS)
def test_the_end_of_text_token_is_the_last_id(spec):
    tokenizer = tokenizer_of(spec)
    assert tokenizer.eot_id == tokenizer.vocab_size - 1
    assert tokenizer.eot_token == "<|endoftext|>"
    assert json.loads(tokenizer.to_str())["added_tokens"][0]["special"]


@pytest.mark.parametrize("spec", KINDS)
def test_saved_and_loaded_it_is_the_same(spec, tmp_path):
    tokenizer = tokenizer_of(spec)
    tokenizer.save(tmp_path / "tokenizer.json")
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]
    for loaded in (
        Tokenizer.from_file(tmp_path / "tokenizer.json"),
        Tokenizer.from_str(tokenizer.to_str()),
        pickle.loads(pickle.dumps(tokenizer)),
        build_tokenizer(f"hf:{tmp_path}"),
    ):
        assert (loaded.kind, loaded.sha256) == (tokenizer.kind, tokenizer.sha256)
        assert (loaded.eot_id, loaded.vocab_size) == (tokenizer.eot_id, tokenizer.vocab_size)
        for mine, other in zip(tokenizer.encode_batch(CORPUS), loaded.encode_batch(CORPUS), strict=True):
            np.testing.assert_array_equal(mine, other)


def test_kinds_are_recognised():
    assert [tokenizer_of(spec).kind for spec in KINDS] == ["char", "byte", "bpe", "bpe"]


def test_char_ids_follow_code_points():
    tokenizer = build_tokenizer("char", ["ba\n", "c你"])
    assert tokenizer.encode("\nabc你").tolist() == [0, 1, 2, 3, 4]
    assert tokenizer.vocab_size == 6


@pytest.mark.parametrize("character", ["z", "\U0010ffff", "\ud800"])
def test_a_character_outside_the_vocabulary_is_named(character):
    with pytest.raises(UserError, match=rf"U\+{ord(character):04X}"):
        build_tokenizer("char", ["abc你"]).encode(f"a{character}b")


def test_byte_ids_are_byte_values():
    tokenizer = tokenizer_of("byte")
    assert tokenizer.encode("é你\n").tolist() == list("é你\n".encode())
    assert (tokenizer.eot_id, tokenizer.vocab_size) == (256, 257)


@pytest.mark.parametrize("spec", ["byte", "bpe:340"])
def test_half_a_character_decodes_to_the_replacement_character(spec):
    tokenizer = tokenizer_of(spec)
    ids = tokenizer.encode("你")
    assert tokenizer.decode(ids) == "你"
    if len(ids) > 1:
        assert tokenizer.decode(ids[:-1]) == "\ufffd"
    assert tokenizer_of("byte").decode([228, 189, 65]) == "\ufffdA"


@pytest.mark.parametrize("spec", ["byte", "bpe:340"])
def test_half_a_surrogate_pair_is_refused(spec):
    with pytest.raises(UserError, match="surrogate"):
        tokenizer_of(spec).encode("ab\ud83d")


def test_bpe_has_the_size_asked_for_and_is_shorter_than_bytes():
    tokenizer = tokenizer_of("bpe:340")
    assert tokenizer.vocab_size == 340
    assert len(tokenizer.encode(CORPUS[0])) < len(CORPUS[0]) / 2
    assert build_tokenizer("bpe:340", CORPUS * 5).sha256 == tokenizer.sha256


def test_a_large_corpus_is_sampled_evenly():
    texts = [str(i % 10) * 10 for i in range(1000)]
    sample = vocabularies._even_sample(texts, 1500)
    assert sample == texts[::8]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("word", "'word': expected word:N with a whole number N from 3"),
        ("wrd", "unknown tokenizer 'wrd': expected one of char, byte.*did you mean word"),
        ("bpe:many", "expected bpe:N with a whole number"),
        ("bpe:many:digits=3", "expected bpe:N with a whole number"),
        ("bpe:512:digits=0", "expected bpe:N:digits=D"),
        ("bpe:512:3", "expected bpe:N:digits=D"),
        ("word:512:digits=3", "expected word:N with a whole number"),
        ("bpe:200", "from 257"),
        ("bpe:-1", "from 257"),
        ("bpe:99999999999", "to 1,000,000"),
        ("word:" + "9" * 5000, "to 1,000,000"),
        ("char", "no text"),
        ("bpe:300", "no text"),
    ],
)
def test_wrong_specs(spec, message):
    with pytest.raises(UserError, match=message):
        build_tokenizer(spec, [])


# Hugging Face


def write_foreign_tokenizer(directory: Path, special: list[str], config: dict | None = None) -> None:
    """A word tokenizer with a template that adds special tokens, as many published models have."""
    words = {word: i for i, word in enumerate(["[UNK]", "hello", "world", "<", ">", "/", "s", "|"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(special)
    bos = special[0]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    tokenizer.enable_truncation(3)
    directory.mkdir(exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))


def test_a_foreign_tokenizer_adds_nothing_and_cuts_nothing(tmp_path):
    write_foreign_tokenizer(tmp_path, ["<s>", "</s>"])
    tokenizer = build_tokenizer(f"hf:{tmp_path}")
    assert tokenizer.eot_token == "</s>"
    assert tokenizer.kind == "wordlevel"
    assert tokenizer.encode("hello world hello world").tolist() == [1, 2, 1, 2]
    assert tokenizer.eot_id not in tokenizer.encode("hello </s>")


@pytest.mark.parametrize("eos", ["<|im_end|>", {"content": "<|im_end|>", "special": True}])
def test_the_configured_end_of_text_token_survives_saving(tmp_path, eos):
    write_foreign_tokenizer(tmp_path / "a", ["<|endoftext|>", "<|im_end|>"], {"eos_token": eos})
    tokenizer = build_tokenizer(f"hf:{tmp_path}/a")
    assert tokenizer.eot_token == "<|im_end|>"
    tokenizer.save(tmp_path / "tokenizer.json")
    assert Tokenizer.from_file(tmp_path / "tokenizer.json").eot_token == "<|im_end|>"
    assert pickle.loads(pickle.dumps(tokenizer)).eot_token == "<|im_end|>"


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    write_foreign_tokenizer(tmp_path, ["<begin>"])
    with pytest.raises(UserError, match=r"no end-of-text token; special tokens: <begin>; .*eos_token"):
        build_tokenizer(f"hf:{tmp_path}")


def test_vocabulary_and_merges(tmp_path):
    trained = json.loads(tokenizer_of("bpe:340").to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(trained["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in trained["merges"])
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", "utf-8")
    tokenizer = build_tokenizer(f"hf:{tmp_path}")
    for text in CORPUS:
        np.testing.assert_array_equal(tokenizer.encode(text), tokenizer_of("bpe:340").encode(text))


def test_what_cannot_be_had_is_said(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"has neither tokenizer\.json"):
        build_tokenizer(f"hf:{tmp_path}")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json: model is missing"):
        build_tokenizer(f"hf:{tmp_path}")
    with pytest.raises(UserError, match=r"absent\.json cannot be read: there is no such file"):
        Tokenizer.from_file(tmp_path / "absent.json")

    def no_network(*_, **__):
        raise OSError("no network\nmore")

    monkeypatch.setattr("huggingface_hub.snapshot_download", no_network)
    with pytest.raises(UserError, match=r"did not give it \(no network\)"):
        build_tokenizer("hf:nobody/nothing")


def test_gpt2():
    shared = os.environ.get("GPTJAX_SHARED_DATA")
    if not shared:
        pytest.skip("GPTJAX_SHARED_DATA is not set")
    expected = json.loads(Path(shared, "gpt2_bpe", "expected.json").read_text(encoding="utf-8"))
    tokenizer = build_tokenizer(f"hf:{shared}/gpt2_bpe")
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (expected["vocab"], expected["eot"])
    for text, ids in expected["examples"].items():
        assert tokenizer.encode(text).tolist() == ids
    text = Path(shared, "tinyshakespeare", "input.txt").read_text(encoding="utf-8")
    border = int(0.9 * len(text))
    counts = [len(ids) for ids in tokenizer.encode_batch([text[:border], text[border:]])]
    assert counts == [301_966, 36_059]


def random_unicode(count: int) -> list[str]:
    """Strings of 0 to 40 characters from all planes (no surrogates), half of them mostly ASCII."""
    source = random.Random(0)
    ranges = [(32, 127), (32, 127), (0, 0x250), (0x300, 0x3100), (0x4E00, 0xA000), (0xE000, 0x20000)]

    def character() -> str:
        return chr(source.randrange(*source.choice(ranges)))

    return ["".join(character() for _ in range(source.randrange(41))) for _ in range(count)]


def test_gpt2_ids_are_those_of_tiktoken_and_transformers(shared_data):
    tiktoken = pytest.importorskip("tiktoken")
    transformers = pytest.importorskip("transformers")
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    directory = shared_data / "gpt2_bpe"
    vocabulary, merges = directory / "encoder.json", directory / "vocab.bpe"
    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
    ranks = data_gym_to_mergeable_bpe_ranks(str(merges), str(vocabulary))
    encoding = tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    rules = [tuple(line.split(" ")) for line in merges.read_text(encoding="utf-8").split("\n")[1:-1]]
    fast = transformers.GPT2Tokenizer(vocab=json.loads(vocabulary.read_text(encoding="utf-8")), merges=rules)
    texts = random_unicode(10_000)
    ours = [ids.tolist() for ids in build_tokenizer(f"hf:{directory}").encode_batch(texts)]
    assert ours == encoding.encode_ordinary_batch(texts)
    assert ours == fast(texts)["input_ids"]


# Han and Latin, and tokenizers for ablations

MIXED = ["你好world 混合English和中文, the quick brown fox。我来到北京清华大学\n"] * 5


def test_no_token_has_han_and_other_characters():
    tokenizer = build_tokenizer("bpe:400", MIXED)
    assert tokenizer.kind == "bpe"
    tokens = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
    han = [token for token in tokens if any("\u4e00" <= c <= "\u9fff" for c in token)]
    assert any(len(token) > 1 for token in han)
    # U+FFFD stands for the bytes of a part of a character.
    assert all("\u4e00" <= c <= "\u9fff" or c == "\ufffd" for token in han for c in token)
    assert tokenizer.decode(tokenizer.encode(MIXED[0])) == MIXED[0]


def test_text_without_han_has_the_ids_of_the_plain_gpt2_split():
    tokenizer = build_tokenizer("bpe:340", CORPUS[:1] * 5)
    description = json.loads(tokenizer.to_str())
    description["pre_tokenizer"] = description["pre_tokenizer"]["pretokenizers"][-1]
    reference = Tokenizer.from_str(json.dumps(description))
    for text in ("don't  stop\n\n it's 12.5 größer", *CORPUS[:1]):
        np.testing.assert_array_equal(tokenizer.encode(text), reference.encode(text))


def test_words():
    tokenizer = build_tokenizer("word:7", ["one two, two three three three", "漢字word"])
    assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.eot_id) == ("word", 7, 6)
    assert tokenizer.decode(tokenizer.encode("three, two four")) == "three , two <|unknown|>"
    assert tokenizer.encode("three three two").tolist() == [0, 0, 1]
    again = Tokenizer.from_str(tokenizer.to_str())
    assert (again.kind, again.sha256) == ("word", tokenizer.sha256)
    assert build_tokenizer("word:20", ["漢字word"]).encode("漢字word word").tolist() == [1, 0, 0]


def test_words_of_jieba():
    pytest.importorskip("jieba")
    tokenizer = build_tokenizer("jieba:40", MIXED)
    assert tokenizer.kind == "jieba"
    assert tokenizer.decode(tokenizer.encode(MIXED[0])) == MIXED[0]
    assert len(tokenizer.encode("我来到北京清华大学")) == 4
    assert tokenizer.decode(tokenizer.encode("我来到 xyzzy")) == "我来到 <|unknown|>"
    for again in (Tokenizer.from_str(tokenizer.to_str()), pickle.loads(pickle.dumps(tokenizer))):
        assert again.kind == "jieba"
        np.testing.assert_array_equal(again.encode(MIXED[0]), tokenizer.encode(MIXED[0]))


@pytest.mark.parametrize("spec", ["word:2", "jieba:1"])
def test_a_vocabulary_without_room_for_a_word(spec):
    with pytest.raises(UserError, match="a whole number N from 3"):
        build_tokenizer(spec, ["text"])


@pytest.mark.parametrize("spec", ["byte", "bpe:340", "char"])
@given(text=st.text(sorted(set("".join(CORPUS))), max_size=60))
def test_the_bytes_of_the_tokens_are_those_of_the_text(spec, text):
    tokenizer = tokenizer_of(spec)
    sizes = tokenizer.token_bytes()
    assert sizes[tokenizer.encode(text)].sum() == len(text.encode())
    assert sizes[tokenizer.eot_id] == 0


def test_the_prefix_is_what_other_programs_put_before_a_text():
    assert build_tokenizer("char", ["北京"]).begin_ids == (2,)
    plain = build_tokenizer("byte")
    assert plain.prefix == () and plain.begin_ids == (256,)
    description = json.loads(plain.with_special_tokens(["<s>"]).to_str())
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    description["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, sequence],
        "pair": [sequence, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [257], "tokens": ["<s>"]}},
    }
    tokenizer = Tokenizer.from_str(json.dumps(description))
    assert tokenizer.prefix == tokenizer.begin_ids == (257,)
    assert tokenizer.encode("ab").tolist() == [97, 98]


def test_bpe_is_trained_on_words_of_bounded_length_and_on_all_their_text():
    tokenizer = build_tokenizer("byte")._tokenizer
    split = vocabularies._without_long_words
    text = "a b\n" + "x" * 2500 + " c" + " " * 3000 + "d"
    pieces = list(split(text, build_tokenizer("bpe:300", [text])._tokenizer.pre_tokenizer))
    assert "".join(pieces) == text and max(map(len, pieces)) <= vocabularies.MAX_WORD_CHARACTERS + 4
    assert list(split("short words only", tokenizer.pre_tokenizer)) == ["short words only"]
