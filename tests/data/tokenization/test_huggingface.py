"""Tokenizer files in Hugging Face's format: a round trip, and transformers' AutoTokenizer as the oracle."""

import json

import pytest

from gptjax.data.tokenization import huggingface as tokenizer_files
from gptjax.data.tokenization.templates import CHATML, ChatTemplate
from gptjax.data.tokenization.tokenizer import build_tokenizer
from gptjax.errors import UserError

TEXTS = ["Hello world! It's 12 o'clock\n\n  two  spaces", "naïve café 北京 тест 🙂", "a\tb", ""]
MESSAGES = [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Yes  ok"}]
OWN = "{% for m in messages %}{{ bos_token + m['role'] + ' ' + m['content'] + eos_token }}{% endfor %}"


@pytest.fixture(params=["byte", "bpe:300"])
def tokenizer(request):
    return ChatTemplate().prepare_tokenizer(build_tokenizer(request.param, ["the cat sat on the mat " * 20]))


@pytest.mark.parametrize(
    "template",
    [None, ChatTemplate(), ChatTemplate(OWN, variables={"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"})],
)
def test_round_trip(tokenizer, template, tmp_path):
    tokenizer_files.write(tmp_path, tokenizer, template, context_length=64)
    again = tokenizer_files.read_tokenizer(tmp_path)
    template_again = tokenizer_files.read_template(tmp_path, again)
    assert again.sha256 == tokenizer.sha256 and again.eot_token == tokenizer.eot_token
    if template is None:
        assert template_again is None
        return
    assert template_again.jinja == template.jinja
    if template.jinja is None:
        for ours, theirs in zip(template.encode(MESSAGES, again), template_again.encode(MESSAGES, again), strict=True):
            assert ours.tolist() == theirs.tolist()


def test_transformers_reads_the_same_ids(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer_files.write(tmp_path, tokenizer, ChatTemplate(), context_length=64)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.eos_token, theirs.model_max_length, theirs.chat_template) == ("<|endoftext|>", 64, CHATML)
    for text in TEXTS:
        ids = tokenizer.encode(text).tolist()
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == tokenizer.decode(ids)
    encoded = theirs.apply_chat_template(MESSAGES, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = ChatTemplate().encode(MESSAGES, tokenizer)
    assert encoded["input_ids"] == ids.tolist()
    assert encoded["assistant_masks"] == mask.astype(int).tolist()


def test_jieba_is_not_exported(tmp_path):
    pytest.importorskip("jieba")
    with pytest.raises(UserError, match="cuts words with the library jieba"):
        tokenizer_files.write(tmp_path, build_tokenizer("jieba:50", ["我来到北京"]), None, context_length=8)
