"""A dialogue rendered by a Jinja chat template, in pieces: special tokens, text, and which pieces have loss."""

import functools
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from gptjax.data.documents import Message
from gptjax.errors import UserError

Span = tuple[int, int]
MAX_LINES = 1_000_000  # steps of a template for one dialogue
COUNTED = 10  # the first renderings of a template, in which steps are counted
MAX_CHARACTERS = 10_000_000  # in one rendered dialogue

NO_TOOLS = (
    "; name a tokenizer whose template does: --config.tokenizer=hf:DIR, or leave them out: "
    "--config.data.tool_turns=leave_out"
)
_HAS_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class Segment(NamedTuple):
    """A piece of a rendered dialogue: one special token, or other text; `trained`: it counts in the loss."""

    text: str
    is_special: bool
    trained: bool


def render_jinja(
    jinja: str,
    messages: Sequence[Message],
    special_tokens: Sequence[str],
    variables: Mapping[str, str],
    add_generation_prompt: bool,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> Iterator[Segment]:
    """The pieces of a dialogue; `ChatTemplate` says which of them are trained.

    Args:
      jinja: the template.
      messages: the dialogue.
      special_tokens: texts that are special tokens if the template, not a message, writes them.
      variables: names that the template may use, such as eos_token.
      add_generation_prompt: whether the beginning of an answer is written at the end.
      tools: descriptions of tools that the template may write.

    Raises:
      UserError: the template is not Jinja, refuses the dialogue, or its loss mask cannot be derived.
    """
    written = json.dumps([list(messages), tools], ensure_ascii=False)
    within, *around = _unused_characters(3, "".join([jinja, *variables.values(), written]))
    protected = [
        {name: _protect(value, special_tokens, within) for name, value in message.items() if name != "train"}
        for message in messages
    ]
    described = _protect(tools, special_tokens, within) if tools else None

    def render(count: int, prompt: bool) -> str:
        return _run(jinja, variables, protected[:count], prompt, around, described)

    longest_first = sorted(special_tokens, key=len, reverse=True)
    special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
    text = render(len(messages), add_generation_prompt)
    if _HAS_GENERATION.search(jinja):
        text, spans = _without_marks(text, *around)
        spans = _learnt(spans, messages)
        spans = [_to_end_of_turn(text, span, special) for span in spans]
    else:
        try:
            spans = _learnt(_added_by_answers(text, protected, render, special), messages)
        except UserError:
            if not add_generation_prompt:
                raise
            spans = []  # a prompt has no loss
    _check_tools(text.replace(within, ""), messages, tools)
    borders = [0, *itertools.chain.from_iterable(spans), len(text)]
    for number, (start, end) in enumerate(itertools.pairwise(borders)):
        trained = number % 2 == 1
        for match in special.finditer(text, start, end):
            yield Segment(text[start : match.start()].replace(within, ""), False, trained)
            yield Segment(match.group(), True, trained)
            start = match.end()
        yield Segment(text[start:end].replace(within, ""), False, trained)


def _protect(value: Any, special_tokens: Sequence[str], mark: str) -> Any:
    """A text, or a value of JSON; a mark inside each special token that it spells keeps it from becoming one."""
    if isinstance(value, str):
        for token in special_tokens:
            value = value.replace(token, token[0] + mark + token[1:])
        return value
    if isinstance(value, Mapping):
        return {_protect(k, special_tokens, mark): _protect(v, special_tokens, mark) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_protect(entry, special_tokens, mark) for entry in value]
    return value


def _learnt(spans: list[Span], messages: Sequence[Message]) -> list[Span]:
    """The spans of the answers that count in the loss."""
    answers = [message.get("train", True) for message in messages if message["role"] == "assistant"]
    if all(answers):
        return spans
    if len(spans) != len(answers):
        raise UserError(
            f"the chat template marks {len(spans)} spans for {len(answers)} answers, so it is unclear which spans are "
            "the answers without loss (weight 0, train false)"
        )
    return [span for span, learnt in zip(spans, answers, strict=True) if learnt]


def _check_tools(text: str, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None) -> None:
    """Raises UserError if the template drops a tool call, a result or the description of a tool."""
    calls = [call["function"]["name"] for message in messages for call in message.get("tool_calls", [])]
    results = [message["content"].strip() for message in messages if message["role"] == "tool"]
    described = [str(tool.get("function", tool).get("name", "")) for tool in tools or []]
    for missing in (name for name in [*calls, *results, *described] if name not in text):
        raise UserError(f"the chat template does not write {missing[:60]!r} of a tool call{NO_TOOLS}")


def _unused_characters(count: int, text: str) -> list[str]:
    """Private-use characters that `text` does not have."""
    there = set(text)
    private = (chr(codepoint) for codepoint in range(0x10FFFD, 0xFFFFF, -1))
    return [next(character for character in private if character not in there) for _ in range(count)]


def _without_marks(text: str, begin: str, end: str) -> tuple[str, list[Span]]:
    """`text` without the marks, and the spans that they enclosed."""
    pieces = re.split(f"[{begin}{end}]", text)
    borders = list(itertools.accumulate(map(len, pieces)))
    return "".join(pieces), list(zip(borders[:-1:2], borders[1::2], strict=False))


def _added_by_answers(
    text: str, messages: Sequence[Message], render: Callable[[int, bool], str], special: re.Pattern[str]
) -> list[Span]:
    """The span of each answer: from the end of the text that is rendered before it to the end of its turn."""
    spans = []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            before, through = render(number, True), render(number + 1, False)
            start, end = _to_end_of_turn(through, (len(before), len(through)), special)
            if not (through.startswith(before) and text.startswith(through[:end])):
                raise UserError(
                    f"the chat template renders the first {number + 1} of {len(messages)} messages differently "
                    "alone than in the whole dialogue, so the loss mask cannot be derived; write "
                    "{% generation %} and {% endgeneration %} around the assistant's words in the template"
                )
            spans.append((start, end))
    return spans


def _to_end_of_turn(text: str, span: Span, special: re.Pattern[str]) -> Span:
    """The span up to and including the first special token at its end, or the one that directly follows it."""
    start, end = span
    ending = re.compile(rf"({special.pattern})(?:\s|{special.pattern})*\Z").search(text, start, end)
    if ending:
        return start, ending.end(1)
    following = special.match(text, end)
    return start, following.end() if following else end


def _run(
    jinja: str,
    variables: Mapping[str, str],
    messages: Sequence[Mapping[str, Any]],
    prompt: bool,
    marks: Sequence[str],
    tools: Any,
) -> str:
    template = _compiled(jinja)
    try:
        return _within_limits(
            template,
            messages=list(messages),
            add_generation_prompt=prompt,
            tools=tools,
            documents=None,
            generation_marks=marks,
            **variables,
        )
    except Exception as error:  # whatever the template does
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"the chat template refuses a dialogue of {len(messages)} messages: {reason}") from None


def _within_limits(template: Any, **names: Any) -> str:
    """The rendered text. Raises OverflowError if the template loops without an end, or writes too much.

    Steps are counted in the first dialogues of a template only, since counting is slow.
    """
    budget = itertools.count()
    template.globals["renderings"] = renderings = template.globals.get("renderings", 0) + 1
    tracing = sys.gettrace()

    def count(frame: Any, event: str, argument: Any) -> Any:
        if next(budget) > MAX_LINES:
            raise OverflowError(f"it takes more than {MAX_LINES} steps")
        return count

    if tracing is None and renderings <= COUNTED:  # not under a debugger or a coverage tool
        sys.settrace(count)
    try:
        text = template.render(**names)
    finally:
        sys.settrace(tracing)
    if len(text) > MAX_CHARACTERS:
        raise OverflowError(f"it writes more than {MAX_CHARACTERS} characters")
    return text


@functools.lru_cache(maxsize=16)
def _compiled(jinja: str) -> Any:
    try:
        from jinja2 import TemplateError, TemplateSyntaxError, nodes
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ModuleNotFoundError:
        raise UserError("a chat template in Jinja needs jinja2: pip install 'gptjax[data]'") from None

    class Generation(Extension):
        """{% generation %}...{% endgeneration %}: its text between two marks."""

        tags = {"generation"}  # noqa: RUF012 (Jinja's)

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            marks = nodes.Name("generation_marks", "load")
            return nodes.CallBlock(self.call_method("_mark", [marks]), [], [], body).set_lineno(line)

        def _mark(self, marks, caller):
            return marks[0] + caller() + marks[1]

    def refuse(message: str) -> None:
        raise TemplateError(message)

    class Sandbox(ImmutableSandboxedEnvironment):
        """A sandbox that refuses products and powers that would fill the memory."""

        intercepted_binops = frozenset(["*", "**"])

        def is_safe_attribute(self, obj, attr, value):
            fills = isinstance(obj, str) and attr in ("zfill", "center", "ljust", "rjust", "expandtabs")
            return not fills and super().is_safe_attribute(obj, attr, value)

        def call_binop(self, context, operator, left, right):
            sizes = [len(value) if hasattr(value, "__len__") else abs(value) for value in (left, right)]
            numbers = not any(hasattr(value, "__len__") for value in (left, right))
            if (operator == "**" and max(sizes) > 1000) or (sizes[0] * sizes[1] > MAX_CHARACTERS and not numbers):
                raise OverflowError(f"{operator} makes something too large")
            return super().call_binop(context, operator, left, right)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = _tojson
    del environment.filters["center"]
    environment.globals["raise_exception"] = refuse
    try:
        return environment.from_string(jinja)
    except TemplateSyntaxError as error:
        raise UserError(
            f"line {error.lineno} of the chat template is not Jinja: {(error.message or '')[:300]}"
        ) from None
    except Exception as error:  # brackets thousands deep, a name that Python does not take
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"the chat template cannot be compiled: {reason or type(error).__name__}") from None


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)
