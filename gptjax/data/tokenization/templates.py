"""Chat templates: a dialogue as tokens, with a loss mask.

The assistant's words and the token that ends its turn count in the loss; without the latter a model never stops.
The text of a message never becomes a special token: only the template itself writes those.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32

from gptjax.data.documents import Message
from gptjax.data.tokenization import published_files
from gptjax.data.tokenization.jinja import NO_TOOLS, Segment, render_jinja
from gptjax.data.tokenization.tokenizer import Tokenizer
from gptjax.errors import UserError

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

Encoded = tuple[Int32[np.ndarray, " tokens"], Bool[np.ndarray, " tokens"]]

_CONFIG_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
_PROBE = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]


class ChatTemplate:
    """ChatML, or a Jinja template as `tokenizer_config.json` has it.

    A Jinja template runs in jinja2's sandbox, with the names that transformers gives it except
    `strftime_now`: a training set must not depend on the day. Its loss mask is what {% generation %} blocks
    enclose. Without such blocks it is what each assistant message adds to the text of the dialogue before it, so
    the template must render the first messages of a dialogue as the beginning of its text.

    Attributes:
      jinja: the template; None is ChatML, which needs no jinja2.
      special_tokens: the tokens that only the template may write; the tokenizer must have those it uses.
      variables: the values of bos_token, eos_token and so on in the template.
    """

    def __init__(
        self,
        jinja: str | None = None,
        *,
        special_tokens: Sequence[str] = (IM_START, IM_END),
        variables: Mapping[str, str] | None = None,
    ):
        """Raises UserError if it is not Jinja, or ends an assistant's turn without a special token."""
        self.jinja = jinja
        # A token of one character could not be distinguished from that character in a text.
        self.special_tokens = tuple(token for token in special_tokens if len(token) > 1)
        self.variables = dict(variables or {})
        trained = [segment for segment in self.render(_PROBE) if segment.trained]
        if not trained or not trained[-1].is_special:
            raise UserError(
                "the chat template does not end an assistant's turn with a special token, so a model could "
                f"not learn to stop; write eos_token there; special tokens: {', '.join(self.special_tokens)}"
            )
        self.end_of_turn = trained[-1].text

    @classmethod
    def of_tokenizer(cls, tokenizer: Tokenizer, directory: str | Path | None = None) -> "ChatTemplate":
        """The chat template beside a tokenizer: chat_template.jinja, else `chat_template` in
        tokenizer_config.json ("default" if it has several), else ChatML."""
        if directory is None:
            return cls()
        config = published_files.read_config(Path(directory))
        jinja = published_files.read_template(Path(directory), config)
        if jinja is None:
            return cls()
        roles = published_files.read_special_tokens(Path(directory)).roles() | config.roles()
        variables = {name: published_files.content(roles[name]) for name in _CONFIG_TOKENS if name in roles}
        variables.setdefault("eos_token", tokenizer.eot_token)
        return cls(jinja, special_tokens=list(tokenizer.special_tokens), variables=variables)

    def to_json(self) -> dict[str, Any]:
        """The description that `from_json` reads."""
        return {"jinja": self.jinja, "special_tokens": list(self.special_tokens), "variables": self.variables}

    @classmethod
    def from_json(cls, description: Mapping[str, Any]) -> "ChatTemplate":
        return cls(
            description["jinja"],
            special_tokens=description["special_tokens"],
            variables=description["variables"],
        )

    def prepare_tokenizer(self, tokenizer: Tokenizer) -> Tokenizer:
        """`tokenizer`, with ChatML's two tokens added if it lacks them.

        Raises:
          UserError: the tokenizer lacks a special token of a Jinja template.
        """
        missing = [token for token in self.special_tokens if token not in tokenizer.special_tokens]
        if missing and self.jinja is not None:
            raise UserError(
                f"the tokenizer lacks {', '.join(missing)} of the chat template; take the tokenizer that the "
                "template belongs to, or ChatML"
            )
        return tokenizer.with_special_tokens(missing) if missing else tokenizer

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[Segment]:
        """The dialogue in pieces; with `add_generation_prompt`, followed by the beginning of an answer.

        Args:
          tools: descriptions that a Jinja template may write before the dialogue.

        Raises:
          UserError: the template refuses the dialogue or cannot write its tool calls, or the loss mask cannot be
            derived.
        """
        if self.jinja is None:
            if tools or any(message["role"] == "tool" or "tool_calls" in message for message in messages):
                raise UserError(f"the built-in chat template writes no tool calls{NO_TOOLS}")
            pieces = _chatml(messages, add_generation_prompt)
        else:
            pieces = render_jinja(
                self.jinja, messages, self.special_tokens, self.variables, add_generation_prompt, tools=tools
            )
        return _merged(pieces)

    def encode(
        self,
        messages: Sequence[Message],
        tokenizer: Tokenizer,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Encoded:
        """(ids, mask): the token ids of a dialogue, and which of them count in the loss as targets.

        The ids before an answer are those of `encode_prompt` of the messages before it.
        """
        return _encode([self.render(messages, tools=tools)], tokenizer)[0]

    def encode_batch(self, dialogues: Sequence[Sequence[Message]], tokenizer: Tokenizer) -> list[Encoded]:
        """What `encode` returns for each dialogue; faster than one call per dialogue."""
        return _encode([self.render(messages) for messages in dialogues], tokenizer)

    def encode_prompt(
        self,
        messages: Sequence[Message],
        tokenizer: Tokenizer,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Int32[np.ndarray, " tokens"]:
        """The token ids of a dialogue up to where the assistant's next answer begins."""
        return _encode([self.render(messages, add_generation_prompt=True, tools=tools)], tokenizer)[0][0]


def _chatml(messages: Sequence[Message], add_generation_prompt: bool) -> Iterator[Segment]:
    for message in messages:
        trained = message["role"] == "assistant" and message.get("train", True)
        yield Segment(IM_START, True, False)
        yield Segment(f"{message['role']}\n", False, False)
        yield Segment(message["content"], False, trained)
        yield Segment(IM_END, True, trained)
        yield Segment("\n", False, False)
    if add_generation_prompt:
        yield Segment(IM_START, True, False)
        yield Segment("assistant\n", False, False)


def _merged(segments: Iterator[Segment]) -> list[Segment]:
    """Joins successive texts with the same `trained`, and drops empty ones."""
    merged: list[Segment] = []
    for segment in segments:
        if merged and not segment.is_special and merged[-1][1:] == segment[1:]:
            merged[-1] = merged[-1]._replace(text=merged[-1].text + segment.text)
        elif segment.text:
            merged.append(segment)
    return merged


def _encode(dialogues: Sequence[Sequence[Segment]], tokenizer: Tokenizer) -> list[Encoded]:
    """Encodes dialogues; pieces of text without a special token between them are encoded as one text."""
    texts, context = [], ""
    for segment in itertools.chain.from_iterable(dialogues):
        context = "" if segment.is_special else context + segment.text
        if context:
            texts.append(context)
    continued = iter(tokenizer.encode_batch(texts))
    return [_encode_one(segments, continued, tokenizer) for segments in dialogues]


def _encode_one(segments: Sequence[Segment], continued: Iterator[np.ndarray], tokenizer: Tokenizer) -> Encoded:
    nothing = context = np.empty(0, np.int32)
    ids = []
    for text, is_special, _ in segments:
        if is_special:
            if text not in tokenizer.special_tokens:
                raise UserError(f"the tokenizer lacks the special token {text!r} of the chat template")
            ids.append(np.array([tokenizer.special_tokens[text]], np.int32))
            context = nothing
            continue
        joint = next(continued)
        if np.array_equal(joint[: len(context)], context):
            ids.append(joint[len(context) :])
        else:  # a token would cross the border, but generation starts from the tokens before it
            ids.append(tokenizer.encode(text))
        context = joint
    trained = np.array([segment.trained for segment in segments], np.bool_)
    return np.concatenate([nothing, *ids]), np.repeat(trained, [len(piece) for piece in ids])
