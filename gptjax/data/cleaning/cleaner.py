"""Cleaning of documents by a profile of named steps, and the count of what each step did."""

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from typing import Any, cast

from gptjax.data.cleaning.steps import STEPS, Step, parse_profile
from gptjax.data.documents import PART_CHARACTERS, Document

MAX_EXAMPLES = 3
_EXCERPT_CHARACTERS = 200
_EMPTY = "nothing is left"


@dataclasses.dataclass
class StepCounts:
    """What one step did to the documents that reached it.

    Bytes are of UTF-8 text. `removed` and `changed` have the first `MAX_EXAMPLES` examples,
    {"id", "reason", "text"} and {"id", "before", "after"}; excerpts begin shortly before the first difference.
    """

    documents_in: int = 0
    documents_out: int = 0
    documents_changed: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    removed: list[dict[str, str]] = dataclasses.field(default_factory=list)
    changed: list[dict[str, str]] = dataclasses.field(default_factory=list)

    def merge(self, other: "StepCounts") -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name) + getattr(other, field.name)
            setattr(self, field.name, value[:MAX_EXAMPLES] if isinstance(value, list) else value)


class CleaningCounts:
    """Counts of each step of a cleaner, in the order of its steps.

    The counts of a corpus are those of its pieces, merged in their order.
    """

    def __init__(self, steps: Iterable[str] = ()):
        self.steps: dict[str, StepCounts] = {name: StepCounts() for name in steps}

    def merge(self, other: "CleaningCounts") -> None:
        """Adds the counts of the documents that follow."""
        for name, counts in other.steps.items():
            self.steps.setdefault(name, StepCounts()).merge(counts)

    def to_json(self) -> list[dict[str, Any]]:
        """One object per step: `step` and the fields of `StepCounts`."""
        return [{"step": name, **dataclasses.asdict(counts)} for name, counts in self.steps.items()]

    @classmethod
    def from_json(cls, value: Iterable[Mapping[str, Any]]) -> "CleaningCounts":
        counts = cls()
        for entry in value:
            fields = dict(entry)
            name = fields.pop("step")
            counts.steps[name] = StepCounts(**fields)
        return counts


class Cleaner:
    """Cleans documents: document -> document, or None if a step drops it.

    A cleaner can be pickled. Its result depends on the document alone. The steps change the text, each
    message of a dialogue, and the `prompt`; filters judge the text, or all messages together. If a step leaves
    only white space of a document, or of a message of a dialogue, the step drops the document. The parts of a
    long document are cleaned separately and keep the white space at their ends, where they are joined.

    Attributes:
      profile: the spec, as `steps.parse_profile` takes it.
      steps: the names of the steps, in order.
      options: every option of the steps with its value.
      invertible: False if the original text cannot be restored, as after `stop_words`; a warning is logged.
    """

    def __init__(self, profile: str = "none", *, options: Mapping[str, Any] | None = None):
        """Raises UserError for an unknown profile, step or option."""
        self._set(profile, options)
        if not self.invertible:
            lossy = ", ".join(name for name in self.steps if not STEPS[name].invertible)
            logging.getLogger(__name__).warning(
                "cleaning %r reduces the text (%s): the original cannot be restored, and a model trained on it "
                "generates such text; use it for ablations",
                profile,
                lossy,
            )

    def _set(self, profile: str, options: Mapping[str, Any] | None) -> None:
        self.profile = profile
        self.steps, self.options = parse_profile(profile, options)
        self.invertible = all(STEPS[name].invertible for name in self.steps)

    def __getstate__(self) -> dict[str, Any]:
        return {"profile": self.profile, "options": self.options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._set(state["profile"], state["options"])

    def __call__(self, document: Document) -> Document | None:
        return self.clean(document, CleaningCounts())

    def clean(self, document: Document, counts: CleaningCounts) -> Document | None:
        """The cleaned document or None, with what each step did added to `counts`."""
        texts, before, after = _texts(document)
        size = _bytes(texts)
        for name in self.steps:
            step, counted = STEPS[name], counts.steps.setdefault(name, StepCounts())
            counted.documents_in += 1
            counted.bytes_in += size
            cleaned, reason = self._apply(step, texts, document.get("part"))
            if reason:
                _add_example(counted.removed, document, reason=reason, text=_excerpt(texts, 0))
                return None
            if cleaned != texts:
                counted.documents_changed += 1
                at = _first_difference(texts, cleaned)
                _add_example(counted.changed, document, before=_excerpt(texts, at), after=_excerpt(cleaned, at))
                texts, size = cleaned, _bytes(cleaned)
            counted.documents_out += 1
            counted.bytes_out += size
        return self._rebuilt(document, texts, before, after) if self.steps else document

    def text(self, text: str) -> str:
        """`text` after the steps that change text, without the filters."""
        for name in self.steps:
            if transform := STEPS[name].transform:
                text = transform(text, self.options)
        return text

    def _apply(self, step: Step, texts: list[str], part: int | None) -> tuple[list[str], str]:
        """The texts after the step, and the reason why it drops the document."""
        if step.transform:
            texts = [step.transform(text, self.options) for text in texts]
            return texts, "" if texts and all(map(_has_content, texts)) else _EMPTY
        assert step.reject
        text = "\n".join(texts)
        # A document in parts is longer than one part; its length up to here is used.
        characters = len(text) if part is None else max(PART_CHARACTERS, part * PART_CHARACTERS + len(text))
        return texts, step.reject(text, characters, self.options)

    def _rebuilt(self, document: Document, texts: list[str], before: str, after: str) -> Document:
        cleaned: dict[str, Any] = dict(document)
        if "messages" in document:
            rest = iter(texts)
            for side in _sides(document):
                cleaned[side] = [{**message, "content": next(rest)} for message in document[side]]
        else:
            cleaned["text"] = before + texts[0] + after
        if prompt := document.get("prompt"):
            inner = prompt.strip()
            start = len(prompt) - len(prompt.lstrip())
            cleaned["prompt"] = prompt[:start] + self.text(inner) + prompt[start + len(inner) :]
        return cast(Document, cleaned)


def _texts(document: Document) -> tuple[list[str], str, str]:
    """The texts that are cleaned, and the white space that is put back before and after."""
    if "messages" in document:
        return [message["content"] for side in _sides(document) for message in document[side]], "", ""
    text = document["text"]
    if "part" not in document:
        return [text], "", ""
    inner = text.strip()
    start = len(text) - len(text.lstrip())
    return [inner], text[:start], text[start + len(inner) :]


def _sides(document: Document) -> list[str]:
    """The fields that hold messages: both sides of a pair."""
    return [side for side in ("messages", "rejected") if side in document]


def _has_content(text: str) -> bool:
    return bool(text) and not text.isspace()


def _bytes(texts: list[str]) -> int:
    return sum(len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass")) for text in texts)


def _add_example(examples: list[dict[str, str]], document: Document, **fields: str) -> None:
    if len(examples) < MAX_EXAMPLES:
        examples.append({"id": document["id"], **fields})


def _excerpt(texts: list[str], start: int) -> str:
    text = "\n".join(texts)
    begin = max(0, start - _EXCERPT_CHARACTERS // 4)
    # An excerpt must be a text that JSON and UTF-8 can hold.
    return text[begin : begin + _EXCERPT_CHARACTERS].encode("utf-8", "replace").decode()


def _first_difference(before: list[str], after: list[str]) -> int:
    first, second = "\n".join(before), "\n".join(after)
    low, high = 0, min(len(first), len(second))
    while low < high:  # the longest common prefix, by halves: slices compare much faster than characters
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
