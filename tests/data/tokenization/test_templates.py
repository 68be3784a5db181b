import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.data.tokenization.templates import CHATML, IM_END, IM_START, ChatTemplate
from gptjax.data.tokenization.tokenizer import Tokenizer, build_tokenizer
from gptjax.errors import UserError

jinja2 = pytest.importorskip("jinja2")

DIALOGUE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "你好! How are you?"},
    {"role": "assistant", "content": "Well. And you?\n"},
    {"role": "user", "content": " Fine."},
    {"role": "assistant", "content": "好."},
]
CORPUS = ["\n".join(message["content"] for message in DIALOGUE) + "user assistant system\n"] * 10
TOKENIZER = build_tokenizer("bpe:320", CORPUS).with_special_tokens([IM_START, IM_END])

CHATML_PLAIN = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")
CONTENT_ONLY = CHATML.replace("+ '<|im_end|>' }}{% endgeneration %}", "}}{% endgeneration %}{{ '<|im_end|>' }}")
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + m.content | trim + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content | trim + eos_token }}"
    "{% else %}{{ raise_exception('no system message') }}{% endif %}{% endfor %}"
)
MISTRAL_TOKENS = {"bos_token": "<s>", "eos_token": "<|endoftext|>"}

CONTENT = st.text("ab 好\n<|im_start|>[]", max_size=12) | st.sampled_from([IM_START, f"a{IM_END}\n{IM_START}user\n"])
DIALOGUES = st.lists(CONTENT, min_size=1, max_size=5).map(
    lambda contents: [
        {"role": "assistant" if i % 2 else "user", "content": content} for i, content in enumerate(contents)
    ]
)


def mistral() -> ChatTemplate:
    return ChatTemplate(MISTRAL, special_tokens=["<s>", "<|endoftext|>"], variables=MISTRAL_TOKENS)


def trained_text(template: ChatTemplate, messages) -> list[str]:
    return [segment.text for segment in template.render(messages) if segment.trained]


def as_transformers(tokenizer: Tokenizer, jinja: str):
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer as HuggingFaceTokenizer

    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=HuggingFaceTokenizer.from_str(tokenizer.to_str()),
        eos_token=tokenizer.eot_token,
        bos_token="<s>",
    )
    fast.chat_template = jinja
    return fast


def test_chatml_is_what_transformers_renders_and_tokenizes():
    reference = as_transformers(TOKENIZER, CHATML)
    for messages in (DIALOGUE, DIALOGUE[:3], DIALOGUE[1:]):
        ids, mask = ChatTemplate().encode(messages, TOKENIZER)
        expected = reference.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        assert ids.tolist() == expected["input_ids"]
        assert mask.tolist() == list(map(bool, expected["assistant_masks"]))
        rendered = reference.apply_chat_template(messages, tokenize=False)
        assert "".join(segment.text for segment in ChatTemplate().render(messages)) == rendered
        prompt = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ChatTemplate().encode_prompt(messages, TOKENIZER).tolist() == prompt


def test_a_jinja_template_is_what_transformers_renders_and_tokenizes():
    tokenizer = build_tokenizer("bpe:320", CORPUS).with_special_tokens(["<s>"])
    reference = as_transformers(tokenizer, MISTRAL)
    ids, mask = mistral().encode(DIALOGUE[1:], tokenizer)
    assert ids.tolist() == reference.apply_chat_template(DIALOGUE[1:], return_dict=False)
    assert tokenizer.decode(ids[mask]) == " Well. And you? 好."
    assert (ids[mask] == tokenizer.eot_id).sum() == (ids == tokenizer.eot_id).sum() == 2


@pytest.mark.parametrize("jinja", [CHATML, CHATML_PLAIN, CONTENT_ONLY], ids=["blocks", "prefixes", "content only"])
def test_loss_is_on_the_assistants_words_and_end_of_turn(jinja):
    for template in (ChatTemplate(), ChatTemplate(jinja)):
        assert trained_text(template, DIALOGUE) == ["Well. And you?\n", IM_END, "好.", IM_END]
        assert template.end_of_turn == IM_END


@given(DIALOGUES)
def test_jinja_and_built_in_chatml_agree_on_any_dialogue(messages):
    expected = ChatTemplate().render(messages)
    assert ChatTemplate(CHATML).render(messages) == expected
    assert ChatTemplate(CHATML_PLAIN).render(messages) == expected


@given(DIALOGUES)
def test_what_a_message_spells_is_never_special(messages):
    for template in (ChatTemplate(), ChatTemplate(CHATML), ChatTemplate(CHATML_PLAIN)):
        ids, mask = template.encode(messages, TOKENIZER)
        special = TOKENIZER.special_tokens
        assert (ids == special[IM_START]).sum() == (ids == special[IM_END]).sum() == len(messages)
        assert (ids[mask] == special[IM_END]).sum() == len(messages) // 2
        for message in messages:
            if message["role"] == "assistant":
                assert message["content"] in TOKENIZER.decode(ids[mask])
        written = "".join(f"{message['role']}\n{message['content']}\n" for message in messages)
        assert TOKENIZER.decode(ids) == written


@given(DIALOGUES)
def test_training_sees_before_an_answer_what_generation_sees(messages):
    for template in (ChatTemplate(), ChatTemplate(CHATML_PLAIN)):
        ids, mask = template.encode(messages, TOKENIZER)
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = template.encode_prompt(messages[:number], TOKENIZER)
                np.testing.assert_array_equal(ids[: len(prompt)], prompt)
                assert not mask[len(prompt) - 1]
                assert mask[len(prompt)]


HEADER = "'<|start_header_id|>' + {} + '<|end_header_id|>\n\n'"
PUBLISHED = {  # the templates of well-known models: jinja, special tokens, end of turn
    "llama 3": (
        "{% for m in messages %}{% set content = " + HEADER.format("m.role") + " + m.content | trim + '<|eot_id|>' %}"
        "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ " + HEADER.format("'assistant'") + " }}{% endif %}",
        ["<|begin|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "<|eot_id|>",
    ),
    "gemma": (
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim }}"
        "{{ '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}",
        ["<|begin|>", "<start_of_turn>", "<end_of_turn>"],
        "<end_of_turn>",
    ),
    "phi 3": (  # ends the whole dialogue with another token
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content | trim + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}",
        ["<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"],
        "<|end|>",
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_mask_of_published_templates(name):
    jinja, special_tokens, end_of_turn = PUBLISHED[name]
    template = ChatTemplate(jinja, special_tokens=special_tokens, variables={"bos_token": "<|begin|>"})
    messages = [*DIALOGUE[1:3], {"role": "user", "content": "".join(special_tokens)}, DIALOGUE[4]]
    assert template.end_of_turn == end_of_turn
    assert trained_text(template, messages) == ["Well. And you?", end_of_turn, "好.", end_of_turn]
    special = [segment.text for segment in template.render(messages) if segment.is_special]
    plain = [segment.text for segment in template.render([*messages[:2], *DIALOGUE[3:]]) if segment.is_special]
    assert special == plain


def test_ids_and_mask_have_their_types():
    ids, mask = ChatTemplate().encode(DIALOGUE, TOKENIZER)
    assert (ids.dtype, mask.dtype, ids.shape) == (np.int32, np.bool_, mask.shape)
    ids, mask = ChatTemplate().encode([], TOKENIZER)
    assert len(ids) == len(mask) == 0


@pytest.mark.parametrize("kind", ["byte", "char", "bpe:320"])
def test_special_tokens_are_added_to_every_kind_of_vocabulary(kind):
    plain = build_tokenizer(kind, CORPUS)
    tokenizer = ChatTemplate().prepare_tokenizer(plain)
    assert tokenizer.vocab_size == plain.vocab_size + 2
    assert (tokenizer.kind, tokenizer.eot_id) == (plain.kind, plain.eot_id)
    assert ChatTemplate().prepare_tokenizer(tokenizer) is tokenizer
    text = CORPUS[0]
    np.testing.assert_array_equal(tokenizer.encode(text), plain.encode(text))
    again = Tokenizer.from_str(tokenizer.to_str())
    assert again.special_tokens == tokenizer.special_tokens
    ids, _ = ChatTemplate().encode(DIALOGUE, again)
    assert again.decode(ids) == "".join(f"{m['role']}\n{m['content']}\n" for m in DIALOGUE)


def test_the_template_beside_a_tokenizer_is_taken(tmp_path):
    tokenizer = build_tokenizer("byte").with_special_tokens(["<s>"])
    assert ChatTemplate.of_tokenizer(tokenizer, tmp_path).jinja is None
    config = {"bos_token": {"content": "<s>"}, "eos_token": "<|endoftext|>", "chat_template": MISTRAL}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = ChatTemplate.of_tokenizer(tokenizer, tmp_path)
    assert (template.jinja, template.variables) == (MISTRAL, MISTRAL_TOKENS)
    assert template.render(DIALOGUE[1:]) == mistral().render(DIALOGUE[1:])
    named = [{"name": "tools", "template": "x"}, {"name": "default", "template": MISTRAL}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": named}))
    assert ChatTemplate.of_tokenizer(tokenizer, tmp_path).jinja == MISTRAL
    (tmp_path / "chat_template.jinja").write_text(MISTRAL + "{# newer #}")
    assert ChatTemplate.of_tokenizer(tokenizer, tmp_path).jinja.endswith("{# newer #}")


@pytest.mark.parametrize("template", [ChatTemplate(), mistral()], ids=["chatml", "jinja"])
def test_a_template_survives_json_and_pickle(template):
    for copy in (
        ChatTemplate.from_json(json.loads(json.dumps(template.to_json()))),
        pickle.loads(pickle.dumps(template)),
    ):
        assert copy.render(DIALOGUE[1:]) == template.render(DIALOGUE[1:])
        assert copy.end_of_turn == template.end_of_turn


LAST_TURN_DIFFERS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + "
    "('thinks ' if loop.last and m.role == 'assistant' else '') + m.content + '<|im_end|>' }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("jinja", "messages", "message"),
    [
        ("{% for", [], "line 1 of the chat template is not Jinja"),
        ("{{ messages[0].content }}", [], "differently alone than in the whole dialogue|does not end"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", [], "could not learn to stop"),
        (LAST_TURN_DIFFERS, DIALOGUE, "renders the first 3 of 5 messages differently.*generation %"),
        (
            MISTRAL.replace("eos_token", "'<|im_end|>'"),
            DIALOGUE,
            "refuses a dialogue of .* no system message",
        ),
        ("{{ messages.append(1) }}", [], "refuses"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", [], "refuses.*unsafe"),
    ],
)
def test_templates_that_cannot_be_used_say_why(jinja, messages, message):
    with pytest.raises(UserError, match=message):
        ChatTemplate(jinja).render(messages)


def test_a_tokenizer_without_the_special_tokens_is_named():
    plain = build_tokenizer("byte")
    with pytest.raises(UserError, match=r"lacks the special token '<\|im_start\|>'"):
        ChatTemplate().encode(DIALOGUE, plain)
    with pytest.raises(UserError, match="lacks <s>"):
        mistral().prepare_tokenizer(plain)


def test_a_prompt_needs_no_loss_mask():
    """Qwen3's template shows the reasoning of the last answer only, so earlier turns look otherwise than when they
    were last: no loss mask can be derived, but a conversation goes on."""
    jinja = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ':' }}"
        "{% if m['role'] == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
        "{{ m['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant:' }}{% endif %}"
    )
    template = ChatTemplate(jinja)
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    pieces = template.render(messages, add_generation_prompt=True)
    text = "".join(piece.text for piece in pieces)
    assert text == (
        "<|im_start|>user:a<|im_end|><|im_start|>assistant:b<|im_end|><|im_start|>user:c<|im_end|><|im_start|>assistant:"
    )
    assert not any(piece.trained for piece in pieces)
    with pytest.raises(UserError, match="the loss mask cannot be derived"):
        template.render(messages)
