"""Tokenizers from the files of published models, with transformers as the oracle if it is installed."""

import json
import random
import re

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from gptjax.data.tokenization.tokenizer import build_tokenizer
from gptjax.errors import UserError

TEXT = ["the cat isn't on the mat, don't!", "床前明月光,疑是地上霜。", "hello 1234 5678 naïve café\n\n x\ty"] * 10
PIECES = [
    "hello",
    "the",
    " ",
    "  ",
    "\n",
    "\t",
    "1",
    "23",
    "中",
    "国",
    "床",
    "é",
    "e\u0301",
    "\U0001f600",
    "。",
    ",",
    ".",
]
PIECES += ["!", "'s", "don't", "[SEP]", "<|endoftext|>", "</s>", "<user>", "한", "W"]
CHINESE = "床前明月光中国。"
FLAGS = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}


def random_texts(count=60):
    generator = random.Random(0)
    return ["".join(generator.choices(PIECES, k=generator.randrange(14))) for _ in range(count)]


def write_json(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def write_byte_level(directory, kind, name, **config):
    """Writes vocab.json and merges.txt; returns the first free id."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    write_json(directory / "vocab.json", model["vocab"] | {"<|endoftext|>": len(model["vocab"])})
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (directory / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    write_json(directory / "config.json", {"model_type": kind})
    write_json(directory / "tokenizer_config.json", {"tokenizer_class": name, **config})
    return len(model["vocab"]) + 1


def write_bert(directory, **config):
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    vocabulary += ["hello", "the", "W", "é", "##é", *",.!'。床前明月光中国"]
    (directory / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    write_json(directory / "config.json", {"model_type": "gpt2", "tokenizer_class": "BertTokenizer"})
    write_json(directory / "tokenizer_config.json", {"tokenizer_class": "BertTokenizerFast", **config})


def assert_as_transformers(directory, *, joins_chinese=False):
    """Equal ids and texts, except for spaces beside Chinese; both treat text that spells a special token as text."""
    transformers = pytest.importorskip("transformers")
    ours = build_tokenizer(f"hf:{directory}")
    theirs = transformers.AutoTokenizer.from_pretrained(directory, split_special_tokens=True)
    assert ours.vocab_size == len(theirs)
    for text in random_texts():
        ids = ours.encode(text).tolist()
        assert ids == theirs.encode(text, add_special_tokens=False), text
        decoded = theirs.decode(ids, skip_special_tokens=True)
        if joins_chinese:
            decoded = re.sub(f" ?([{CHINESE}]) ?", r"\1", decoded)
        assert ours.decode(ids) == decoded, text
    whole, plain = (theirs.encode("the", add_special_tokens=special) for special in (True, False))
    assert list(ours.prefix) == whole[: whole.index(plain[0])]


@pytest.mark.parametrize("config", [{}, {"add_prefix_space": True, "add_bos_token": True}, {"add_bos_token": False}])
def test_gpt2(config, tmp_path):
    write_byte_level(tmp_path, "gpt2", "GPT2Tokenizer", **config)
    assert_as_transformers(tmp_path)


def test_added_tokens_and_special_tokens_beside_a_vocabulary(tmp_path):
    free = write_byte_level(tmp_path, "gpt2", "GPT2Tokenizer")
    write_json(tmp_path / "added_tokens.json", {"<user>": free + 1, "<bot>": free, "[PAD]": free + 2})
    write_json(tmp_path / "special_tokens_map.json", {"pad_token": "[PAD]", "additional_special_tokens": ["<bot>"]})
    tokenizer = build_tokenizer(f"hf:{tmp_path}")
    assert tokenizer.vocab_size == free + 3
    assert tokenizer.encode("<user>").tolist() == [free + 1]
    assert tokenizer.special_tokens == {"<|endoftext|>": free - 1, "<bot>": free, "[PAD]": free + 2}
    assert_as_transformers(tmp_path)


def test_an_added_token_with_another_id_is_refused(tmp_path):
    free = write_byte_level(tmp_path, "gpt2", "GPT2Tokenizer")
    write_json(tmp_path / "added_tokens.json", {"<user>": free + 1})
    with pytest.raises(UserError, match=rf"'<user>' has the id {free + 1}, but in the vocabulary it is {free}"):
        build_tokenizer(f"hf:{tmp_path}")


def test_qwen2_without_tokenizer_json(tmp_path):
    free = write_byte_level(tmp_path, "qwen2", "Qwen2Tokenizer")
    config = {"added_tokens_decoder": {str(free): {"content": "<|im_start|>", "special": True, **FLAGS}}}
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "Qwen2Tokenizer", **config})
    tokenizer = build_tokenizer(f"hf:{tmp_path}")
    assert tokenizer.special_tokens["<|im_start|>"] == free
    assert len(tokenizer.encode("1234")) == 4  # digits one by one
    assert tokenizer.encode("e\u0301").tolist() == tokenizer.encode("é").tolist()  # NFC
    assert_as_transformers(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"do_lower_case": False},
        {"tokenize_chinese_chars": False},
        {"strip_accents": True, "do_lower_case": False},
        {"clean_up_tokenization_spaces": True, "eos_token": "[MASK]"},
    ],
)
def test_the_chinese_gpt2_with_the_vocabulary_of_bert(config, tmp_path):
    write_bert(tmp_path, **config)
    tokenizer = build_tokenizer(f"hf:{tmp_path}")
    assert (tokenizer.kind, tokenizer.prefix) == ("wordpiece", (2,))
    assert tokenizer.eot_token == config.get("eos_token", "[SEP]")
    assert_as_transformers(tmp_path, joins_chinese=config.get("tokenize_chinese_chars", True))


def test_texts_of_a_vocabulary_of_bert_come_back_without_spaces_beside_chinese(tmp_path):
    write_bert(tmp_path)
    tokenizer = build_tokenizer(f"hf:{tmp_path}")
    assert tokenizer.decode(tokenizer.encode("中国hello the月光。 hello")) == "中国hello the月光。hello"
    assert tokenizer.lacking(["中国", "hello"]) == ""
    assert tokenizer.lacking(["中饕国饕", "餮"]) == "the vocabulary lacks 饕 餮: the model reads [UNK] there"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"tokenizer_class": "CpmTokenizer"}, "the tokenizer is a CpmTokenizer, which is not read here"),
        ({"add_eos_token": True}, "add_eos_token is true, which would end every prompt"),
        ({"add_prefix_space": "yes"}, 'add_prefix_space is "yes", but must be true or false'),
        ({"added_tokens_decoder": {"x": {"content": "a"}}}, "an object whose names are ids"),
        ({"added_tokens_decoder": {"9": {"content": 5}}}, "content is 5, but must be text"),
        ({"bos_token": ["a"]}, "bos_token"),
        ({"chat_template": 5}, "chat_template is 5, but must be text"),
    ],
)
def test_what_cannot_be_followed_is_refused(config, message, tmp_path):
    write_byte_level(tmp_path, "gpt2", "GPT2Tokenizer", **config)
    with pytest.raises(UserError) as error:
        build_tokenizer(f"hf:{tmp_path}")
    assert message in str(error.value)


def test_what_nobody_knows_is_warned_of(tmp_path, capsys):
    write_byte_level(tmp_path, "gpt2", "GPT2Tokenizer", word_tokenizer_type="mecab", model_max_length=5)
    build_tokenizer(f"hf:{tmp_path}")
    assert "tokenizer_config.json: word_tokenizer_type is unknown here and ignored" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.json", b'{"a": -1}', 'the id of "a" is -1, but must be a whole number'),
        ("vocab.json", b'{"a": 1, "b": 1}', '"a" and "b" have the same id 1'),
        ("merges.txt", b"#version\na b c\n", 'line 2: "a b c" is not two tokens'),
        ("merges.txt", b"\xff\xfe", "line 1: byte 0xff is not UTF-8"),
        ("tokenizer.json", b"{}", "model is missing"),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {"a": 1e9}}}', 'the id of "a" is 1000000000.0'),
        ("tokenizer_config.json", b"[" * 5000, "more than 100 deep"),
    ],
)
def test_files_of_the_wrong_shape(name, content, message, tmp_path):
    write_byte_level(tmp_path, "gpt2", "GPT2Tokenizer")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        build_tokenizer(f"hf:{tmp_path}")
    assert message in str(error.value) and name in str(error.value)


def write_sentencepiece(path, model_type):
    """A model as SentencePiece writes it: letters, <0xNN> for every byte with BPE, and words that merge."""
    from gptjax.data.tokenization import sentencepiece

    proto = sentencepiece._message_class()()
    proto.trainer_spec.model_type = model_type
    proto.trainer_spec.byte_fallback = model_type == 2
    proto.normalizer_spec.remove_extra_whitespaces = False
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)] if model_type == 2 else []
    words = ["he", "ll", "hell", "hello", "▁hello", "▁", *"helo<s/>"]
    for number, word in enumerate(words):
        pieces.append((word, -float(number), 1))
    for text, score, kind in pieces:
        proto.pieces.add(piece=text, score=score, type=kind)
    path.write_bytes(proto.SerializeToString())


@pytest.mark.parametrize("model_type", [1, 2])
def test_a_sentencepiece_model_alone(model_type, tmp_path):
    write_sentencepiece(tmp_path / "tokenizer.model", model_type)
    write_json(tmp_path / "config.json", {"model_type": "llama"})
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True})
    tokenizer = build_tokenizer(f"hf:{tmp_path}")
    assert (tokenizer.eot_token, tokenizer.prefix) == ("</s>", (1,))
    first = 3 + 256 * (model_type == 2)
    assert tokenizer.encode("hello").tolist() == [first + 4]  # the space before the text is the word's
    assert tokenizer.decode(tokenizer.encode(" hello  hello")) == " hello  hello"
    assert not {1, 2} & set(tokenizer.encode("<s></s>").tolist())
    if model_type == 2:
        assert tokenizer.encode("é").tolist() == [first + 5, 3 + 0xC3, 3 + 0xA9]
        assert tokenizer.decode(tokenizer.encode("中\U0001f600")) == "中\U0001f600"


@pytest.mark.parametrize("content", [b"", b"no model", b"\x0a\xff\xff\xff\xff\x7f"])
def test_a_damaged_sentencepiece_model(content, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(content)
    write_json(tmp_path / "config.json", {"model_type": "llama"})
    with pytest.raises(UserError, match=r"tokenizer\.model is not a SentencePiece model"):
        build_tokenizer(f"hf:{tmp_path}")
