import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from gptjax.data.tokenization.tokenizer import Tokenizer, build_tokenizer
from gptjax.generation.detokenizer import Detokenizer

BYTES = build_tokenizer("byte")
TEXT = "naïve 你好，世界 👩‍🚀🚀 end"


def pieces_of(tokens, size, **options):
    """The pieces that are shown when tokens arrive in groups of `size`, and the detokenizer."""
    detokenizer = Detokenizer(BYTES, **options)
    pieces = [detokenizer.push(tokens[i : i + size]) for i in range(0, len(tokens), size)]
    return pieces, detokenizer


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_characters_are_shown_whole(size):
    tokens = BYTES.encode(TEXT).tolist()
    pieces, _ = pieces_of(tokens, size)
    assert "".join(pieces) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)
    if size == 1:
        assert [piece for piece in pieces if piece] == list(TEXT)


def test_half_a_character_at_the_end():
    tokens = BYTES.encode("go 🚀").tolist()[:-1]
    pieces, detokenizer = pieces_of(tokens, 1)
    assert "".join(pieces) == "go "
    assert detokenizer.finish(cut=True) == ""
    _, detokenizer = pieces_of(tokens, 1)
    assert detokenizer.finish(cut=False) == "\ufffd"


def test_bytes_that_are_never_text_do_not_block_what_follows():
    pieces, _ = pieces_of([0xFF, 0xFF, *b"ok"], 1)
    assert "".join(pieces) == "\ufffd\ufffdok"


@pytest.mark.parametrize("size", [1, 4, 100])
def test_a_stop_text_ends_the_text_before_it(size):
    tokens = BYTES.encode("one\n\nQ: two").tolist()
    pieces, detokenizer = pieces_of(tokens, size, stop=("Q:", "\n\nQ"))
    assert "".join(pieces) == "one"
    assert detokenizer.stop == "\n\nQ"
    assert detokenizer.tokens == BYTES.encode("one\n\nQ").tolist()
    assert detokenizer.finish(cut=False) == ""


def test_the_beginning_of_a_stop_text_is_held_back_until_it_is_not_one():
    detokenizer = Detokenizer(BYTES, stop=("</end>",))
    assert detokenizer.push(BYTES.encode("a </e")) == "a "
    assert detokenizer.push(BYTES.encode("m>")) == "</em>"
    assert detokenizer.push(BYTES.encode("</")) == ""
    assert detokenizer.finish(cut=True) == "</"


def test_a_prompt_that_ends_in_half_a_character_is_completed():
    prompt, rest = np.split(BYTES.encode("你好"), [4])
    detokenizer = Detokenizer(BYTES, prompt)
    assert detokenizer.push(rest) == "好"


def test_words_keep_their_space_after_the_prompt():
    """A vocabulary of the SentencePiece kind leaves out the space before the first word it decodes."""
    vocabulary = [("<unk>", 0.0), ("</s>", 0.0), ("▁The", -1.0), ("▁end", -1.0)]
    model = tokenizers.Tokenizer(tokenizers.models.Unigram(vocabulary, unk_id=0))
    model.decoder = tokenizers.decoders.Metaspace()
    model.add_special_tokens(["</s>"])
    detokenizer = Detokenizer(Tokenizer(model), [1, 2])
    assert detokenizer.push([3]) == " end"


@given(st.text(), st.lists(st.text(min_size=1, max_size=3), max_size=3), st.integers(1, 9))
def test_result_does_not_depend_on_how_many_tokens_come_at_once(text, stop, size):
    tokens = BYTES.encode(text).tolist()
    pieces, detokenizer = pieces_of(tokens, size, stop=stop)
    pieces.append(detokenizer.finish(cut=False))
    at_once, whole = pieces_of(tokens, len(tokens) + 1, stop=stop)
    expected = "".join([*at_once, whole.finish(cut=False)])
    assert "".join(pieces) == expected
    assert detokenizer.tokens == whole.tokens
    assert detokenizer.stop == whole.stop
    if any(s in text for s in stop):
        assert text.startswith(expected + whole.stop)
    else:
        assert expected == text


def byte_fallback() -> Tokenizer:
    """Writes bytes as Llama's vocabularies do: a run of bytes that is not valid text is replaced as a whole."""
    words = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"</s>": 256}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="</s>"))
    model.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
    model.add_special_tokens(["</s>"])
    return Tokenizer(model)


@pytest.mark.parametrize("tokenizer", [BYTES, byte_fallback()], ids=["byte level", "byte fallback"])
@given(st.text(st.sampled_from("aé你🚀 "), max_size=60), st.text(max_size=12), st.integers(1, 20))
def test_long_texts_are_those_of_all_tokens_decoded_at_once(tokenizer, text, prompt, size):
    tokens = list(text.encode())
    detokenizer = Detokenizer(tokenizer, list(prompt.encode()))
    pieces = [detokenizer.push(tokens[i : i + size]) for i in range(0, len(tokens), size)]
    assert "".join([*pieces, detokenizer.finish(cut=False)]) == text == tokenizer.decode(tokens)


@given(st.lists(st.sampled_from([*"a你🚀".encode(), 0x80, 0xFF, 256]), max_size=150), st.integers(1, 20))
def test_bytes_that_are_no_text_are_those_of_all_tokens_decoded_at_once(tokens, size):
    pieces, detokenizer = pieces_of(tokens, size)
    assert "".join([*pieces, detokenizer.finish(cut=False)]) == BYTES.decode(tokens)


@pytest.mark.parametrize("text", [TEXT.encode() * 40, b"\x80" * 1500, [256] * 1500], ids=["text", "bytes", "special"])
def test_the_cost_of_a_token_does_not_grow_with_the_text(monkeypatch, text):
    decoded, decode = [], Tokenizer.decode

    def counting(self, ids):
        decoded.append(len(ids))
        return decode(self, ids)

    monkeypatch.setattr(Tokenizer, "decode", counting)
    detokenizer, costs = Detokenizer(BYTES, stop=("never",)), []
    for token in list(text)[:1500]:
        decoded.clear()
        detokenizer.push([token])
        costs.append(sum(decoded))
    assert sum(costs[1000:]) <= 1.1 * sum(costs[500:1000]), "tokens handed to the tokenizer"
