"""Benchmark questions in their published formats: one schema per format, and the prompt that it becomes.

The prompts are those of lm-eval, zero-shot and without task descriptions.
"""

import abc
import csv
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from gptjax.data.sources.record import Damaged, Record
from gptjax.data.sources.records import open_utf8, read_records, suffix
from gptjax.errors import UserError
from gptjax.evaluation.multiple_choice import Question
from gptjax.evaluation.prompts import regular
from gptjax.foreign import Schema, check
from gptjax.json_text import show

_BRACKETS = re.compile(r"\[.*?\]")

Text = Annotated[str, pydantic.Field(min_length=1)]


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("text that is not blank")
    return text


Choice = Annotated[str, pydantic.AfterValidator(_not_blank)]
Choices = Annotated[list[Choice], pydantic.Field(min_length=2)]


def _whole(value: Any) -> Any:
    """ "1" of a CSV file, or of HellaSwag's JSON, as 1."""
    return int(value) if isinstance(value, str) and re.fullmatch(r"-?\d{1,9}", value) else value


Label = Annotated[int, pydantic.BeforeValidator(_whole)]


class Form(Schema):
    """A line of a file."""

    @abc.abstractmethod
    def question(self) -> Question:
        """The question of this line. Raises ValueError with a message for the user."""


class Plain(Form):
    query: str
    choices: Choices
    gold: int

    def question(self) -> Question:
        return Question(self.query, self.choices, self.gold)


class HellaSwag(Form):
    """Zellers et al. 2019; the clean-up of WikiHow's brackets is lm-eval's."""

    activity_label: str
    ctx_a: str
    ctx_b: str
    endings: Choices
    label: Label

    def question(self) -> Question:
        def clean(text: str) -> str:
            return _BRACKETS.sub("", text.strip().replace(" [title]", ". ")).replace("  ", " ")

        context = f"{self.ctx_a} {self.ctx_b.capitalize()}"
        return Question(clean(f"{self.activity_label}: {context}"), list(map(clean, self.endings)), self.label)


class _ArcOption(Schema):
    text: Choice
    label: str


class _ArcStem(Schema):
    stem: str
    choices: list[_ArcOption]


class _ArcChoices(Schema):
    text: Choices
    label: list[str]


class Arc(Form):
    """Clark et al. 2018; AI2's own JSONL, or that of the Hugging Face hub."""

    question_: str | _ArcStem = pydantic.Field(alias="question")
    choices: _ArcChoices | None = None
    answerKey: str

    def question(self) -> Question:
        if isinstance(self.question_, _ArcStem):
            stem, options = self.question_.stem, self.question_.choices
            texts, labels = [option.text for option in options], [option.label for option in options]
        elif self.choices is None:
            raise ValueError("choices is missing")
        else:
            stem, texts, labels = self.question_, self.choices.text, self.choices.label
        if len(labels) != len(texts):
            raise ValueError(f"there are {len(texts)} choices and {len(labels)} labels")
        return Question(f"Question: {stem}\nAnswer:", texts, _place(self.answerKey, labels, "answerKey"))


class Piqa(Form):
    """Bisk et al. 2020; `label` from the record or from the FILE-labels.lst beside FILE.jsonl."""

    goal: str
    sol1: Choice
    sol2: Choice
    label: Label

    def question(self) -> Question:
        return Question(f"Question: {self.goal}\nAnswer:", [self.sol1, self.sol2], self.label)


class Lambada(Form):
    """Paperno et al. 2016: `text`, whose last word is predicted; or llm-foundry's `context` and `continuation`."""

    text: str | None = None
    context: str | None = None
    continuation: Choice | None = None

    def question(self) -> Question:
        if self.text is not None:
            context, space, word = self.text.rstrip().rpartition(" ")
            if not space or not context.strip():
                raise ValueError(f"text is {show(self.text)}, but must be two words or more")
            return Question(context, [word], 0)
        if self.context is None or self.continuation is None:
            raise ValueError("text is missing (or context and continuation instead)")
        return Question(self.context, [self.continuation.strip()], 0)


class WinoGrande(Form):
    """Sakaguchi et al. 2019, by partial evaluation (Trinh and Le 2018): which context makes the rest more probable.

    The fields of the Hugging Face hub, or those of llm-foundry.
    """

    sentence: str | None = None
    option1: Choice | None = None
    option2: Choice | None = None
    answer: str | int | None = None
    context_options: Choices | None = None
    continuation: Choice | None = None
    gold: int | None = None

    def question(self) -> Question:
        if self.context_options is not None:
            if self.continuation is None or self.gold is None:
                raise ValueError(f"{'gold' if self.continuation else 'continuation'} is missing")
            rest = self.continuation.strip()
            return Question("", [rest] * len(self.context_options), self.gold, self.context_options)
        if self.sentence is None or self.option1 is None or self.option2 is None:
            raise ValueError("sentence, option1 and option2 are missing (or context_options instead)")
        before, gap, after = self.sentence.partition("_")
        if not gap or not after.strip():
            raise ValueError(f"sentence is {show(self.sentence)}, but must have a _ and words after it")
        gold = _place(str(self.answer), ["1", "2"], "answer")
        return Question("", [after.strip()] * 2, gold, [before + self.option1, before + self.option2])


class BoolQ(Form):
    """Clark et al. 2019; `label` of SuperGLUE or `answer` of the original."""

    passage: str
    question_: str = pydantic.Field(alias="question")
    label: Label | None = None
    answer: bool | Literal["true", "false", "True", "False"] | None = None

    def question(self) -> Question:
        given = self.label if self.label is not None else self.answer
        if given is None:
            raise ValueError("label is missing (or answer instead)")
        gold = given if isinstance(given, int) else given.lower() == "true"
        asked = self.question_.rstrip("?")
        return Question(f"{self.passage}\nQuestion: {asked}?\nAnswer:", ["no", "yes"], int(gold))


class Copa(Form):
    """Roemmele et al. 2011, with SuperGLUE's fields."""

    premise: Text
    choice1: Choice
    choice2: Choice
    question_: Literal["cause", "effect"] = pydantic.Field(alias="question")
    label: Label

    def question(self) -> Question:
        connector = {"cause": "because", "effect": "therefore"}[self.question_]
        choices = [text.strip()[0].lower() + text.strip()[1:] for text in (self.choice1, self.choice2)]
        return Question(f"{self.premise.strip()[:-1]} {connector}", choices, self.label)


class Mmlu(Form):
    """Hendrycks et al. 2021 (arXiv:2009.03300), with the fields of the Hugging Face hub."""

    question_: str = pydantic.Field(alias="question")
    choices: Annotated[list[Choice], pydantic.Field(min_length=4, max_length=4)]
    answer: Label | Literal["A", "B", "C", "D"]

    def question(self) -> Question:
        gold = "ABCD".index(self.answer) if isinstance(self.answer, str) else self.answer
        return _letters(self.question_, self.choices, gold, "Answer:")


class CEval(Form):
    """Huang et al. 2023 (arXiv:2305.08322)."""

    question_: str = pydantic.Field(alias="question")
    A: Choice
    B: Choice
    C: Choice
    D: Choice
    answer: str

    def question(self) -> Question:
        gold = _place(self.answer, list("ABCD"), "answer")
        return _letters(self.question_, [self.A, self.B, self.C, self.D], gold, "答案：")


class MmluColumns(CEval):
    """MMLU as its authors publish it, with a column for each choice."""

    def question(self) -> Question:
        gold = _place(self.answer, list("ABCD"), "answer")
        return _letters(self.question_, [self.A, self.B, self.C, self.D], gold, "Answer:")


class Cmmlu(Form):
    """Li et al. 2023 (arXiv:2306.09212)."""

    question_: str = pydantic.Field(alias="Question")
    A: Choice
    B: Choice
    C: Choice
    D: Choice
    Answer: str

    def question(self) -> Question:
        gold = _place(self.Answer, list("ABCD"), "Answer")
        return _letters(self.question_, [self.A, self.B, self.C, self.D], gold, "答案：")


def _letters(question: str, choices: Sequence[str], gold: int, answer: str) -> Question:
    lines = [question.strip(), *(f"{letter}. {choice}" for letter, choice in zip("ABCD", choices, strict=True)), answer]
    return Question("\n".join(lines), list("ABCD"), gold)


def _place(answer: str, labels: Sequence[str], field: str) -> int:
    if answer not in labels:
        raise ValueError(f"{field} is {show(answer)}, but must be one of {', '.join(labels)}")
    return labels.index(answer)


FORMS: dict[str, type[Form]] = {
    "multiple_choice": Plain,
    "hellaswag": HellaSwag,
    "arc": Arc,
    "piqa": Piqa,
    "winogrande": WinoGrande,
    "boolq": BoolQ,
    "copa": Copa,
    "mmlu": Mmlu,
    "ceval": CEval,
    "cmmlu": Cmmlu,
    "lambada": Lambada,
}


def _mmlu_rows(path: str) -> Iterator[Record]:
    """The records of a CSV of MMLU, whose own files have no header: their first row ends in A, B, C or D."""
    with open_utf8(path) as file:
        data = file.read().removeprefix(b"\xef\xbb\xbf")
    first = next(csv.reader(io.StringIO(data.decode("utf-8", "replace"))), [])
    if len(first) != 6 or first[-1].strip() not in ("A", "B", "C", "D"):
        yield from read_records(path, lambda _: io.BytesIO(data))
        return
    for record in read_records(path, lambda _: io.BytesIO(b"question,A,B,C,D,answer\n" + data)):
        yield record._replace(place=f"{path}, row {record.number}")


def read_questions(path: str | Path, form: str = "multiple_choice") -> list[Question]:
    """The questions of a JSONL, JSON, CSV, TSV or Parquet file, plain or compressed, in one of the forms of `FORMS`.

    Lines that have the fields of `multiple_choice`, as llm-foundry publishes many, are taken as they are.

    Raises UserError: the file, the line, the field, what it holds, what it must be.
    """
    path = regular(path)
    labels = _label_file(Path(path)) if form == "piqa" else None
    questions = []
    records = _mmlu_rows(path) if form == "mmlu" and suffix(path) == ".csv" else read_records(path)
    for number, record in enumerate(records):
        if isinstance(record.value, Damaged):
            raise UserError(f"{record.place}: {record.value}")
        value = record.value
        if labels is not None and isinstance(value, dict):
            value = {"label": labels[number] if number < len(labels) else None} | value
        plain = form != "lambada" and isinstance(value, dict) and {"query", "choices", "gold"} <= value.keys()
        plain = plain and isinstance(value["choices"], list)
        schema = Plain if plain else FORMS[form]
        if schema is Mmlu and isinstance(value, dict) and "A" in value:
            schema = MmluColumns
        line = check(schema, value, record.place)
        try:
            question = line.question()
        except ValueError as error:
            raise UserError(f"{record.place}: {error} (a line of the form {form})") from None
        if not 0 <= question.gold < len(question.choices):
            raise UserError(
                f"{record.place}: gold is {question.gold}, but there are {len(question.choices)} choices; expected 0 "
                f"to {len(question.choices) - 1}"
            )
        questions.append(question)
    if not questions:
        raise UserError(f"{path} has no questions")
    return questions


def _label_file(path: Path) -> list[str] | None:
    labels = path.with_name(f"{path.name.partition('.')[0]}-labels.lst")
    return labels.read_text(encoding="utf-8", errors="replace").split() if labels.is_file() else None
