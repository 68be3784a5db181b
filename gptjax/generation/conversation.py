"""A conversation with a model: its turns, which of them fit in the context, and saving and loading."""

import bisect
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gptjax import files
from gptjax.data.documents import Message
from gptjax.data.sources.dialogues import read_dialogues
from gptjax.errors import RunError, UserError
from gptjax.generation.completion import STREAMING_ROUNDS, Generator
from gptjax.generation.params import SamplingParams

SUFFIX = ".jsonl"


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer of the model.

    Attributes:
      finish_reason: as in `Event`; "cancelled" after `stop`.
      prompt_tokens: tokens of the prompt.
      left_out: number of the oldest messages, which no longer fit in the context.
      lacking: characters of the question that are not in the vocabulary (`Tokenizer.lacking`).
    """

    text: str
    finish_reason: str
    tokens: int
    seconds: float
    prompt_tokens: int
    left_out: int
    lacking: str = ""


class _Question(NamedTuple):
    """A question, the number of turns before it, and how many answers to it were sampled before."""

    text: str
    place: int
    draw: int


class Conversation:
    """Turns of a user and a model. A method that raises leaves the conversation unchanged.

    A model with a chat template answers each question. A model without one was trained on plain text: it continues the
    text so far, in which a question begins on a new line.

    An answer depends only on the messages, the parameters and how often it was sampled again.

    Attributes:
      messages: the system's, if there is one, then questions and answers in turn.
      params: how answers are sampled.
      answers: those of this session.
    """

    def __init__(self, generator: Generator, params: SamplingParams, *, system: str = ""):
        """Raises UserError if the model does not support a system text."""
        self.messages: list[Message] = []
        self.params = params
        self.answers: list[Answer] = []
        self._generator = generator
        # One slot, and one engine for all turns.
        self._engine = generator.engine(slots=1, rounds=STREAMING_ROUNDS)
        self._last: _Question | None = None
        self._left_out = 0  # messages after the system's that the model no longer sees
        self._stopped = False
        self._saved: Path | None = None
        if system:
            self.set_system(system)

    @property
    def context_length(self) -> int:
        return self._generator.model.architecture.context_length

    @property
    def context_used(self) -> int:
        """Tokens of the turns that the model still sees."""
        head, turns = self._split(self.messages)
        return len(self._encode([*head, *turns[self._left_out :]])) if turns else 0

    def set_system(self, text: str) -> None:
        """Sets the text before all turns; "" removes it. Raises UserError if the template does not support one."""
        head: list[Message] = [{"role": "system", "content": text}] if text.strip() else []
        if head and self._generator.template is None:
            raise UserError("this model was trained without a chat template, so it does not support a system text")
        self._encode([*head, {"role": "user", "content": "question"}])
        self.messages = head + self._split(self.messages)[1]

    def reset(self) -> None:
        """Forgets all turns; the system text stays."""
        self.messages, self._last, self._left_out = self._split(self.messages)[0], None, 0

    def ask(self, question: str, on_text: Callable[[str], None] | None = None) -> Answer:
        """The answer to a question; both become part of the conversation, unless the answer is empty.

        `on_text` is called with each piece of it. Raises UserError where the question is too long for the context, or
        the template refuses the turns.
        """
        return self._answer(_Question(question, len(self._split(self.messages)[1]), 0), on_text)

    def regenerate(self, on_text: Callable[[str], None] | None = None) -> Answer:
        """Replaces the last answer by a new one. Raises UserError where there is no question."""
        if self._last is None:
            raise UserError("there is no question to answer again")
        return self._answer(self._last._replace(draw=self._last.draw + 1), on_text)

    def stop(self) -> None:
        """Ends the answer that is being written. May be called from a signal handler or another thread."""
        self._stopped = True

    def save(self, path: str | Path) -> None:
        """Writes the conversation as one JSON line with `messages`, which data.source=messages:FILE reads.

        Raises UserError if the file exists and is not this conversation's; RunError if it cannot be written.
        """
        path = files.expand(path)
        if path.suffix != SUFFIX:
            raise UserError(f"{path}: name a file that ends in {SUFFIX}")
        if not self._split(self.messages)[1]:
            raise UserError("there is nothing to save yet")
        if path.exists() and path.absolute() != self._saved:
            raise UserError(f"{path} exists; name a new file")
        try:
            files.write_whole(path, json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
        except OSError as error:
            error.filename = error.filename or str(path)
            raise RunError(f"the conversation could not be written: {files.explain(error)}") from None
        self._saved = path.absolute()

    def load(self, path: str | Path) -> None:
        """Replaces this conversation by that of a file, which is checked like training data. Raises UserError."""
        path = files.expand(path)
        found = list(read_dialogues(files.regular(path), "messages", source=str(path)))
        if len(found) != 1:
            raise UserError(f"{path} has {len(found)} conversations; a file with one is needed")
        messages = list(found[0]["messages"])
        turns = self._split(messages)[1]
        asked = [place for place, message in enumerate(turns) if message["role"] == "user"]
        answered = bool(asked) and asked[-1] < len(turns) - 1
        self._encode(messages)
        self._last = _Question(turns[asked[-1]]["content"], asked[-1], 0 if answered else -1) if asked else None
        # A question without an answer is left to `regenerate`.
        self.messages = messages if answered or not asked else messages[:-1]
        self._left_out = 0

    # ---- One turn ----------------------------------------------------------------------------------------------------

    def _answer(self, question: "_Question", on_text: Callable[[str], None] | None) -> Answer:
        head, turns = self._split(self.messages)
        messages: list[Message] = [*head, *turns[: question.place], {"role": "user", "content": question.text}]
        prompt, left_out = self._fit(messages)
        self._stopped, start, events = False, time.perf_counter(), []
        handle = self._engine.submit(prompt, self.params, index=question.draw)
        while self._engine.busy:
            if self._stopped:
                self._engine.cancel(handle)
            for event in self._engine.step():
                if event.error is not None:
                    raise event.error
                events.append(event)
                if on_text and event.text:
                    on_text(event.text)
        text = "".join(event.text for event in events)
        answer = Answer(
            text=text,
            finish_reason=str(events[-1].finish_reason),
            tokens=sum(len(event.tokens) for event in events),
            seconds=time.perf_counter() - start,
            prompt_tokens=len(prompt),
            left_out=max(left_out - self._left_out, 0),
            lacking=self._generator.tokenizer.lacking([question.text]),
        )
        self.messages, self._last, self._left_out = messages[:-1], question, left_out
        if text.strip():  # templates and training data have no empty turns
            self.messages = [*messages, {"role": "assistant", "content": text}]
        self.answers.append(answer)
        return answer

    def _fit(self, messages: list[Message]) -> tuple[np.ndarray, int]:
        """(the prompt, number of messages after the system's that are left out). The last question always stays.

        Up to half of the context is kept free for the answer. Raises UserError where a question alone fills the
        context.
        """
        head, turns = self._split(messages)
        room = self.context_length - min(self.params.max_new_tokens, self.context_length // 2)
        # Try all messages first, then leave out one question after the other with its answer.
        starts = [0, *(place for place, message in enumerate(turns) if place and message["role"] == "user")]
        first = bisect.bisect_left(starts[:-1], True, key=lambda i: len(self._encode([*head, *turns[i:]])) <= room)
        prompt = self._encode([*head, *turns[starts[first] :]])
        if len(prompt) >= self.context_length:
            beside = " with the system text" if head else ""
            raise UserError(
                f"the message has {len(prompt):,} tokens{beside}, and the context of the model "
                f"{self.context_length:,}; shorten it"
            )
        return prompt, starts[first]

    def _encode(self, messages: list[Message]) -> np.ndarray:
        """The tokens before the next answer. Raises UserError where the template refuses the messages."""
        template, tokenizer = self._generator.template, self._generator.tokenizer
        if template is not None:
            ids = template.encode_prompt(messages, tokenizer)
        else:
            texts = [("\n" if i and m["role"] == "user" else "") + m["content"] for i, m in enumerate(messages)]
            ids = tokenizer.encode("".join(texts))
        return np.concatenate([np.array(self._generator.begin_ids, np.int32), ids])

    @staticmethod
    def _split(messages: list[Message]) -> tuple[list[Message], list[Message]]:
        """The system's message, if there is one, and the turns."""
        start = int(bool(messages) and messages[0]["role"] == "system")
        return messages[:start], messages[start:]
