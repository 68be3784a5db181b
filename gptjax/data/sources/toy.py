"""Toy tasks: questions generated from a seed, each with one right answer, as dialogues.

    toy:copy      copy 3142         3142
    toy:reverse   reverse 3142      2413
    toy:sort      sort 3142         1234
    toy:count     count 7 in 3717   2
    toy:add       31+42             73
    toy:数数       数一数「天」：天地天人    2
    toy:反转       反转：天地人            人地天

Options follow a #, as in toy:reverse#length=4,size=5000. No question occurs twice, and `split_key` is the question.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from gptjax.data.documents import Document
from gptjax.data.sources.base import Faults, Piece, Source
from gptjax.errors import UserError

_VERSION = 1  # of the questions; a store of another version is built again
_DIGITS = "0123456789"
_CHARACTERS = "天地人日月山水火木土"
_MOST_LENGTH, _MOST_SIZE = 100, 1_000_000
_TRIES = 20  # most draws per question


class _Task(NamedTuple):
    alphabet: str
    ask: Callable[[str], tuple[str, str]]  # from the drawn symbols to question and answer


def _add(symbols: str) -> tuple[str, str]:
    half = len(symbols) // 2
    first, second = int(symbols[:half]), int(symbols[half:])
    return f"{first}+{second}", str(first + second)


_TASKS = {
    "copy": _Task(_DIGITS, lambda s: (f"copy {s}", s)),
    "reverse": _Task(_DIGITS, lambda s: (f"reverse {s}", s[::-1])),
    "sort": _Task(_DIGITS, lambda s: (f"sort {s}", "".join(sorted(s)))),
    "count": _Task(_DIGITS, lambda s: (f"count {s[0]} in {s[1:]}", str(s[1:].count(s[0])))),
    "add": _Task(_DIGITS, _add),
    "数数": _Task(_CHARACTERS, lambda s: (f"数一数「{s[0]}」：{s[1:]}", str(s[1:].count(s[0])))),
    "反转": _Task(_CHARACTERS, lambda s: (f"反转：{s}", s[::-1])),
}
NAMES = tuple(_TASKS)


@dataclass
class ToyTask(Source):
    """The source toy:NAME[#length=4,size=2000,seed=0]: one piece.

    Attributes:
      length: symbols in a question; for `add`, the most digits of each number.
      size: questions; fewer if there are not as many.
    """

    name: str
    length: int = 4
    size: int = 2000
    seed: int = 0
    faults: Faults = field(default_factory=Faults)

    @classmethod
    def of_spec(cls, spec: str) -> "ToyTask":
        """The task of a spec. Raises UserError for an unknown task or option."""
        name, _, options = spec.removeprefix("toy:").partition("#")
        if name not in _TASKS:
            raise UserError(f"unknown toy task {spec[:100]!r}: expected one of {', '.join(f'toy:{n}' for n in NAMES)}")
        most = {"length": (1, _MOST_LENGTH), "size": (1, _MOST_SIZE), "seed": (0, 2**32 - 1)}
        values = {}
        for option in filter(None, options.split(",")):
            key, _, value = option.partition("=")
            if key not in most or not re.fullmatch("[0-9]{1,10}", value):
                raise UserError(f"{spec[:100]!r}: found {option[:40]!r}; expected length=N, size=N or seed=N")
            values[key] = int(value)
            low, high = most[key]
            if not low <= values[key] <= high:
                raise UserError(f"{spec[:100]!r}: {key} must be between {low} and {high:,}")
        return cls(name, **values)

    @property
    def spec(self) -> str:
        return f"toy:{self.name}#length={self.length},size={self.size},seed={self.seed}"

    def key(self) -> str:
        return f"{self.spec} version {_VERSION}"

    def pieces(self) -> list[Piece]:
        return [Piece(self.spec, self.size * (self.length + 20), self.key())]

    def read(self, piece: Piece) -> Iterator[Document]:
        for number, (question, answer) in enumerate(self._questions(), start=1):
            yield {
                "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
                "id": f"{self.name}:{number}",
                "source": self.spec,
                "split_key": question,
                "prompt": question,
                "references": [answer],
            }

    def _questions(self) -> Iterator[tuple[str, str]]:
        task, random = _TASKS[self.name], np.random.default_rng(self.seed)
        symbols = {"add": 2 * self.length, "count": self.length + 1, "数数": self.length + 1}.get(
            self.name, self.length
        )
        seen: set[str] = set()
        for _ in range(_TRIES * self.size):
            # Raw words of the generator, since its methods may give other draws in other versions of NumPy.
            drawn = random.bit_generator.random_raw(symbols) >> np.uint64(32)
            question, answer = task.ask("".join(task.alphabet[i] for i in (drawn % len(task.alphabet)).tolist()))
            if question not in seen:
                seen.add(question)
                yield question, answer
            if len(seen) == self.size:
                return
