"""The slots of an engine: which are free, and what the caches of free ones still hold (prefix caching).

A slot keeps the keys and values of its prompt when its text has ended. Of a new prompt that begins with the same
tokens, only the rest is read. Only whole chunks of prompts are reused: the same program would read them again in the
same chunks, so that the result has the same bits. Generated tokens are not reused, since they were read one by one.
"""

import itertools
from collections.abc import Iterator

import numpy as np

from gptjax.generation.request import Request


class Slots:
    """The requests of an engine, by slot."""

    def __init__(self, count: int, chunk: int):
        self.requests: list[Request | None] = [None] * count
        self._chunk = chunk
        self._kept = [np.empty(0, np.int32) for _ in range(count)]
        self._used = [0] * count
        self._clock = itertools.count(1)

    def __len__(self) -> int:
        return len(self.requests)

    def __iter__(self) -> Iterator[tuple[int, Request]]:
        """(slot, request) of the slots in use, the oldest request first."""
        used = [(slot, request) for slot, request in enumerate(self.requests) if request]
        return iter(sorted(used, key=lambda pair: pair[1].handle))

    @property
    def free(self) -> bool:
        return None in self.requests

    def put(self, request: Request) -> None:
        """Gives a request the free slot that holds the most of its prompt; else the least recently used one."""
        free = [slot for slot, other in enumerate(self.requests) if other is None]
        reusable = {slot: 0 if request.scored else self._reusable(slot, request.prompt) for slot in free}
        slot = max(free, key=lambda slot: (reusable[slot], -self._used[slot]))
        request.read = request.cached = reusable[slot]
        self.requests[slot] = request
        self._kept[slot] = request.prompt[: request.read]
        self._used[slot] = next(self._clock)

    def has_read(self, slot: int, request: Request) -> None:
        """Records how much of the prompt the slot holds now."""
        self._kept[slot] = request.prompt[: request.read]

    def leave(self, slot: int) -> None:
        self.requests[slot] = None

    def forget(self) -> list[Request]:
        """Empties all slots, whose caches are lost; returns the requests that were in them."""
        lost = [request for _, request in self]
        self.requests = [None] * len(self)
        self._kept = [np.empty(0, np.int32) for _ in self.requests]
        return lost

    def _reusable(self, slot: int, prompt: np.ndarray) -> int:
        """Number of tokens that need not be read again: whole chunks, never the last token, whose logits are needed."""
        kept = self._kept[slot]
        most = min(len(kept), len(prompt) - 1)
        if most < self._chunk:  # the usual case; skips the slow comparison
            return 0
        differs = np.flatnonzero(kept[:most] != prompt[:most])
        same = int(differs[0]) if len(differs) else most
        return same - same % self._chunk
