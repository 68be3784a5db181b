"""Preferences in the formats in which they are published: pairs, rankings and single judgements of answers.

    {"prompt": P, "chosen": A, "rejected": B}                 P, A, B are texts or lists of messages (TRL)
    {"chosen": [..., A], "rejected": [..., B]}                the messages that both begin with are the prompt (TRL)
    {"chosen": "\\n\\nHuman: ...\\n\\nAssistant: ...", ...}        the same as text (Anthropic's HH)
    {"question": Q, "chosen": A, "rejected": B}
    {"instruction": I, "input": J, "chosen": A, "rejected": B}             LLaMA-Factory, as are the next four
    {"conversations": [...], "chosen": {"from": "gpt", "value": A}, "rejected": {...}}
    {"instruction": I, "input": J, "output": [A, B, ...]}                  ranked, the best first
    {"instruction": I, "output": A, "kto_tag": true}
    {"conversations": [...], "kto_tag": false}
    {"prompt": P, "completion": A, "label": true}                          TRL's form for KTO
    {"prompt": {"text": P, "replies": [{"text": A, "rank": 0}, ...]}}      a tree of OpenAssistant's

The keys of a record decide which format it has. A ranking of n answers gives all n (n - 1) / 2 pairs (Ouyang et al.
2022), which share their `split_key`. Only the answer counts in the loss, not assistant's turns of the prompt.
"""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gptjax.data.documents import Document, Message
from gptjax.data.sources import schemas
from gptjax.data.sources.base import Faults, Reading
from gptjax.data.sources.dialogues import DialogueReader, advised, check_messages
from gptjax.data.sources.record import Damaged, Record
from gptjax.data.sources.records import read_records, shown_names
from gptjax.errors import UserError
from gptjax.foreign import check
from gptjax.json_text import show

Answer = list[Message]
_SPOKEN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}
_LABELS = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}


class Ranking(NamedTuple):
    """Answers to one prompt, the best first; or, with a label, one answer that is good or bad."""

    prompt: list[Message]
    answers: list[Answer]
    label: bool | None = None
    tools: Sequence[dict[str, Any]] = ()


def read_preferences(
    path: str | Path,
    *,
    source: str,
    name: str | None = None,
    faults: Faults | None = None,
    reading: Reading = Reading(),  # noqa: B008 (frozen)
    open_file: Callable[[str | Path], Any] | None = None,
) -> Iterator[Document]:
    """The preferences of one file, in its order: documents with `messages` and `rejected`, or with a `label`.

    Ids are NAME:NUMBER, and NAME:NUMBER/BETTER-WORSE for the pairs of a ranking. Arguments as for `read_dialogues`.

    Raises:
      UserError: the file cannot be opened; unless `faults` skips, also at the first bad record, with its place and
        number: no prompt, an empty or missing side, equal sides, a ranking of one, a wrong label, or messages that
        `check_messages` refuses.
    """
    faults = faults or Faults()
    name = name if name is not None else Path(path).name
    reader = _Reader(reading, faults)
    for record in read_records(path, open_file, delimiter=reading.delimiter, has_option=True):
        try:
            documents = [
                {**document, "id": f"{name}:{record.number}{suffix}", "source": source}
                for ranking, place in reader.rankings(record)
                for document, suffix in _documents(ranking, place)
            ]
        except (Damaged, UserError) as problem:
            faults.skip(advised(problem, record, faults))
            continue
        yield from documents


def _documents(ranking: Ranking, place: str) -> Iterator[tuple[dict[str, Any], str]]:
    """(document without id and source, suffix of its id). `place`: of the ranking within its record."""
    prompt = [{**m, "train": False} if m["role"] == "assistant" else m for m in ranking.prompt]
    if not prompt or prompt[-1]["role"] in ("assistant", "system"):
        raise Damaged(f"{place}no prompt: a turn of the user must come before the answers")
    about: dict[str, Any] = {"split_key": "\n".join(message["content"] for message in prompt)}
    if ranking.tools:
        about["tools"] = list(ranking.tools)
    sides = [[*prompt, *answer] for answer in ranking.answers]
    for number, (side, answer) in enumerate(zip(sides, ranking.answers, strict=True), start=1):
        if not answer or any(not message["content"].strip() and "tool_calls" not in message for message in answer):
            raise Damaged(f"{place}answer {number} is empty")
        if answer[0]["role"] != "assistant" or answer[-1]["role"] != "assistant":
            raise Damaged(f"{place}answer {number} must begin and end with a turn of the assistant")
        check_messages(side)
    if ranking.label is not None:
        yield {"messages": sides[0], "label": ranking.label, **about}, ""
        return
    if len(sides) < 2:
        raise Damaged(f"{place}a ranking needs two or more answers and has {len(sides)}")
    for (i, better), (j, worse) in itertools.combinations(enumerate(ranking.answers, start=1), 2):
        if better == worse:
            raise Damaged(f"{place}answers {i} and {j} are equal, so neither is the better one")
        suffix = "" if len(sides) == 2 and not place else f"/{place.removesuffix(': ')}{i}-{j}"
        yield {"messages": sides[i - 1], "rejected": sides[j - 1], **about}, suffix


class _Reader:
    """Reads one record."""

    def __init__(self, reading: Reading, faults: Faults):
        self._dialogues = DialogueReader("messages", None, reading, faults)
        self._faults = faults

    def rankings(self, record: Record) -> Iterator[tuple[Ranking, str]]:
        """(ranking, its place within the record if that has several). Raises `Damaged` or UserError."""
        if isinstance(record.value, Damaged):
            raise record.value
        if not isinstance(record.value, Mapping):
            raise Damaged(f"expected a JSON object, not {show(record.value)}")
        entry = check(schemas.Preference, dict(record.value), record.place)
        entry.check_keys("", self._faults)
        if entry.margin:
            raise Damaged(
                f"margin is {entry.margin:g}, which is not supported: no loss here has a margin for each pair"
            )
        if isinstance(entry.prompt, schemas.Reply):
            yield from self._tree(entry.prompt, [])
            return
        yield self._ranking(entry, record), ""

    def _ranking(self, entry: schemas.Preference, record: Record) -> Ranking:
        label = _label(entry)
        tools: Sequence[dict[str, Any]] = ()
        if label is None and not isinstance(entry.output, list):
            for side in ("chosen", "rejected"):
                if getattr(entry, side) in (None, ""):
                    raise Damaged(f"{side} is missing or empty; fields: {shown_names(record.value)}")
            prompt, answers = self._sides(entry, record.place)
        elif label is None:
            prompt, answers = self._prompt(entry, record.place), [self._answer(text) for text in entry.output]
        else:
            prompt = self._prompt(entry, record.place)
            answer = entry.completion if entry.completion is not None else entry.output
            if answer is not None:
                answers = [self._answer(answer)]
            elif prompt and prompt[-1]["role"] == "assistant":
                prompt, answers = prompt[:-1], [prompt[-1:]]
            else:
                raise Damaged(f"no answer to which the label belongs; fields: {shown_names(record.value)}")
        if entry.tools or entry.functions:
            tools = self._dialogues.tools(entry)
        return Ranking(prompt, answers, label, tools)

    def _sides(self, entry: schemas.Preference, place: str) -> tuple[list[Message], list[Answer]]:
        """The prompt and the two answers; both sides may begin with the prompt."""
        prompt = self._prompt(entry, place)
        sides = [self._answer(side) for side in (entry.chosen, entry.rejected)]
        if all(side and side[0]["role"] != "assistant" for side in sides):
            shared = sum(1 for _ in itertools.takewhile(lambda two: two[0] == two[1], zip(*sides, strict=False)))
            asked, sides = sides[0][:shared], [side[shared:] for side in sides]
            if not any(sides):
                raise Damaged("chosen and rejected are equal, so neither is the better one")
            if not all(sides):
                raise Damaged("one side is the beginning of the other, so it has no answer of its own")
            questions = [m for m in prompt if m["role"] != "system"]
            if questions and questions != [m for m in asked if m["role"] != "system"][-len(questions) :]:
                raise Damaged("the prompt differs from the turns with which chosen and rejected begin")
            system = [m for m in prompt if m["role"] == "system" and m not in asked]
            prompt = system + asked
        return prompt, sides

    def _prompt(self, entry: schemas.Preference, place: str) -> list[Message]:
        turns = entry.messages or entry.conversations
        if turns is None and entry.instruction is not None:
            text = f"{entry.instruction}\n{entry.input}" if entry.input else entry.instruction
            said = [*itertools.chain.from_iterable(entry.history or []), text]
            roles = itertools.cycle(("user", "assistant"))
            messages: Any = [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]
        elif turns is None:
            messages = next((one for one in (entry.prompt, entry.question, entry.query) if one is not None), [])
        else:
            messages = turns
        prompt = self._turns(messages, "user")
        system = [text for text in (entry.system, entry.system_prompt) if text]
        if system and prompt and prompt[0]["role"] == "system":
            raise Damaged("there are two system texts: in a field of its own, and as the first turn")
        return [*({"role": "system", "content": text} for text in dict.fromkeys(system)), *prompt]

    def _answer(self, side: Any) -> Answer:
        return self._turns(side, "assistant")

    def _turns(self, side: Any, role: str) -> list[Message]:
        """The messages of a side; a text is one message of `role`, or a dialogue in the format of HH."""
        if isinstance(side, str):
            if not _SPOKEN.match(side):
                return [{"role": role, "content": side}] if side else []
            _, *parts = _SPOKEN.split(side)
            said = [(_ROLES[who], text.strip()) for who, text in zip(parts[::2], parts[1::2], strict=True)]
            if role == "user" and said[-1] == ("assistant", ""):
                said.pop()  # a prompt ends with an open assistant turn
            side = [{"role": who, "content": text} for who, text in said]
        elif isinstance(side, schemas.Turn):
            side = [side]
        turns = [turn if isinstance(turn, schemas.Turn) else schemas.Turn(**turn) for turn in side]
        return [{k: v for k, v in message.items() if k != "train"} for message in self._dialogues.messages(turns)]

    def _tree(self, node: schemas.Reply, before: list[Message]) -> Iterator[tuple[Ranking, str]]:
        """The rankings below a message of OpenAssistant, each with its place: "1.2: " is below the second reply."""
        yield from self._replies(node, before, "")

    def _replies(self, node: schemas.Reply, before: list[Message], place: str) -> Iterator[tuple[Ranking, str]]:
        role = "assistant" if node.role == "assistant" else "user"
        said = [*before, {"role": role, "content": node.text}]
        replies = [reply for reply in node.replies or [] if not reply.deleted]
        ranked = sorted((r for r in replies if r.rank is not None), key=lambda reply: reply.rank)
        if role == "user" and len(ranked) > 1:
            yield Ranking(said, [[{"role": "assistant", "content": r.text}] for r in ranked]), place or "1: "
        for number, reply in enumerate(replies, start=1):
            yield from self._replies(reply, said, f"{place.removesuffix(': ') or '1'}.{number}: ")


def _label(entry: schemas.Preference) -> bool | None:
    """Whether the answer is good; None if the record does not judge a single answer."""
    said = [value for value in (entry.label, entry.kto_tag) if value not in (None, "")]
    if not said:
        return None
    value = said[0].strip().lower() if isinstance(said[0], str) else said[0]
    if len(said) > 1 or value not in _LABELS:
        raise Damaged(f"the label is {show(said[-1])}; expected true (a good answer) or false")
    return _LABELS[value]
