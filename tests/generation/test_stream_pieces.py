"""Streamed pieces for each kind of vocabulary: whole characters, which together are the text of all tokens."""

from functools import cache

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from gptjax.data.tokenization.tokenizer import Tokenizer, build_tokenizer
from gptjax.generation.detokenizer import Detokenizer

WORDS = ["the", "cat", "sat", "on", "a", "mat", ".", ",", "naïve", "你好", "世界", "🚀", "don't", "end"]


@cache
def vocabulary(kind: str) -> Tokenizer:
    if kind == "byte-level BPE":
        return build_tokenizer("bpe:300", [" ".join(WORDS)] * 3)
    if kind == "WordPiece":  # BERT's, with the punctuation that its decoder joins to the word before
        characters = sorted(set("".join(WORDS)))
        pieces = ["[UNK]", "[SEP]", *characters, *(f"##{c}" for c in characters), "the", "cat", "n't", "'s"]
        model = tokenizers.Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
        model.normalizer, model.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        model.decoder = decoders.WordPiece(prefix="##", cleanup=True)
        model.add_special_tokens(["[SEP]"])
        return Tokenizer(model, "[SEP]")
    # SentencePiece with a byte for each character that it does not know, as Llama's
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((f"<0x{byte:02X}>", -9.0) for byte in range(256)), ("▁", -2.0)]
    pieces += [(piece, -3.0) for word in WORDS[:6] for piece in (word, f"▁{word}")]
    model = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    strip = decoders.Strip(content=" ", left=1, right=0)
    model.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    model.add_special_tokens(["</s>"])
    return Tokenizer(model, "</s>")


KINDS = ("byte-level BPE", "WordPiece", "SentencePiece")


def stream(tokenizer, tokens, size):
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(tokens[i : i + size]) for i in range(0, len(tokens), size)]
    return [*pieces, detokenizer.finish(cut=False)]


@pytest.mark.parametrize("kind", KINDS)
@given(words=st.lists(st.sampled_from(WORDS), max_size=30), size=st.integers(1, 5))
def test_a_text_comes_in_whole_characters(kind, words, size):
    tokenizer = vocabulary(kind)
    tokens = tokenizer.encode(" ".join(words)).tolist()
    pieces = stream(tokenizer, tokens, size)
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) == tokenizer.decode(tokens)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), size=st.integers(1, 5))
def test_any_tokens_are_those_of_all_decoded_at_once(kind, data, size):
    tokenizer = vocabulary(kind)
    # Of a run of bytes that is not text, a decoder of this kind gives up also what was text and is shown.
    first = tokenizer.encode("the").min() if kind == "SentencePiece" else 0
    tokens = data.draw(st.lists(st.integers(int(first), tokenizer.vocab_size - 1), max_size=80))
    assert "".join(stream(tokenizer, tokens, size)) == tokenizer.decode(tokens)
