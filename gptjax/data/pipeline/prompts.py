"""Questions with reference answers, read from the dialogues of token stores, and which of them a step asks."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Int32, Int64

from gptjax.data.pipeline.batches import Batch, BatchSource
from gptjax.data.pipeline.randomness import shuffled_epochs
from gptjax.data.store.shards import TokenSplit
from gptjax.data.tokenization.tokenizer import Tokenizer
from gptjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Question:
    """A dialogue up to its last answer, and that answer.

    Attributes:
      id: SOURCE:NUMBER, the number of the dialogue in its split, from 0.
      tokens: what the model continues: the tokens that begin a text, then all that the chat template writes before the
        answer.
      prompt: the same as text, with special tokens written out.
      reference: the text of the answer.
    """

    id: str
    tokens: Int32[np.ndarray, " length"]
    prompt: str
    reference: str


@dataclasses.dataclass
class Questions:
    """The questions of a split.

    Attributes:
      too_long: how many were left out, because prompt and answer would not fit into the context.
      most_tokens: tokens that a prompt may have.
    """

    questions: list[Question]
    too_long: int
    most_tokens: int

    @classmethod
    def read(cls, splits: Mapping[str, TokenSplit], tokenizer: Tokenizer, *, most_tokens: int) -> "Questions":
        """The questions of all sources that have at most `most_tokens` tokens, in their order.

        Raises UserError if there are none, or a source has no dialogues.
        """
        found: list[Question] = []
        for name, split in splits.items():
            if not split.has_mask:
                raise UserError(
                    f"the source {name!r} has texts without answers; reinforcement needs dialogues, such as "
                    "pairs:FILE.jsonl#QUESTION,ANSWER"
                )
            found += _read(name, split, tokenizer)
        kept = [question for question in found if len(question.tokens) <= most_tokens]
        if not kept:
            shortest = min((len(question.tokens) for question in found), default=0)
            why = f"; the shortest of {len(found)} has {shortest}, so raise model.context_length" if found else ""
            raise UserError(
                f"no question of {', '.join(splits)} has at most {most_tokens} tokens, which is model.context_length - "
                f"objective.max_new_tokens{why}"
            )
        return cls(kept, len(found) - len(kept), most_tokens)

    def __len__(self) -> int:
        return len(self.questions)


class PromptBatches(BatchSource):
    """Which questions are asked at each step: a batch has `questions`, int64 [batch_size / group_size].

    A row is one answer: in an epoch, each question takes group_size * num_iterations rows.
    """

    def __init__(self, questions: Questions, *, batch_size: int, group_size: int, num_iterations: int, seed: int):
        self.questions = questions
        self._group_size, self._num_iterations, self._seed = group_size, num_iterations, seed
        self._lengths = np.array([len(question.tokens) for question in questions.questions])
        super().__init__(len(questions) * group_size * num_iterations, batch_size=batch_size)

    def __getitem__(self, step: int) -> Batch:
        return self.read_rows(step * self.batch_size + np.arange(self.batch_size))

    def read_rows(self, rows: Int64[np.ndarray, " rows"]) -> Batch:
        """The questions of the rows of whole steps."""
        steps = np.unique(rows // self.batch_size)
        per_step = self.batch_size // self._group_size
        sequence = (steps[:, None] // self._num_iterations * per_step + np.arange(per_step)).ravel()
        return {"questions": shuffled_epochs(sequence, len(self.questions), self._seed)[1]}

    def tokens_before(self, row: int) -> int:
        """Tokens of the prompts; the lengths of answers are not known before they are written."""
        asked = self.read_rows(np.arange(row))["questions"] if row else np.zeros(0, np.int64)
        return self._group_size * int(self._lengths[asked].sum())

    @property
    def notes(self) -> list[str]:
        notes = [f"{len(self.questions):,} questions"]
        if self.questions.too_long:
            notes.append(
                f"{self.questions.too_long:,} questions of more than {self.questions.most_tokens} tokens are left out "
                "(model.context_length - objective.max_new_tokens)"
            )
        return notes


def _read(name: str, split: TokenSplit, tokenizer: Tokenizer) -> Iterator[Question]:
    ends = np.append(split.document_starts[1:], split.num_tokens)
    begin = np.array(tokenizer.begin_ids, np.int32)
    for number, (start, end) in enumerate(zip(split.document_starts.tolist(), ends.tolist(), strict=True)):
        tokens, trained = split.read(start, end - start), split.read_mask(start, end - start)
        answered = np.flatnonzero(trained)
        if not len(answered):
            continue
        gaps = np.flatnonzero(np.diff(answered) > 1)
        first = answered[gaps[-1] + 1] if len(gaps) else answered[0]
        prompt = tokens[1:first]  # the first token of a document of a store is the end of the text before
        yield Question(
            id=f"{name}:{number}",
            tokens=np.concatenate([begin, prompt]),
            prompt=spell(prompt, tokenizer),
            reference=tokenizer.decode(tokens[first : answered[-1] + 1]),
        )


def spell(tokens: Sequence[int] | np.ndarray, tokenizer: Tokenizer) -> str:
    """The text of tokens, with special tokens written out."""
    spelled = {i: text for text, i in tokenizer.special_tokens.items()}
    special = [i for i, token in enumerate(tokens) if int(token) in spelled]
    pieces, start = [], 0
    for i in special:
        pieces += [tokenizer.decode(tokens[start:i]), spelled[int(tokens[i])]]
        start = i + 1
    return "".join([*pieces, tokenizer.decode(tokens[start:])])
