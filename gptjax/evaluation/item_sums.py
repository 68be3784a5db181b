"""What each item adds to a corpus score: many systems against the same references, on all cores."""

import tempfile
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from gptjax.data.building.runners import LocalRunner, num_cores
from gptjax.evaluation.metrics import Progress

Systems = Sequence[Sequence[str]]  # for each system, the text of each item
References = Sequence[Sequence[str]]
Sums = Float[np.ndarray, "items sums"]

PIECE = 250  # items per task of a process; statistics of their references are computed once for all systems
_MANY_CHARACTERS = 1_000_000  # seconds of work; with less, starting processes takes longer


@runtime_checkable
class Counter(Hashable, Protocol):
    """Computes sums of each item. Picklable; equal if it computes the same."""

    def __call__(self, systems: Systems, references_list: References) -> list[Sums]:
        """The sums of the items of each system."""
        ...


def compute(
    counters: Sequence[Counter],
    systems: Systems,
    references_list: References,
    *,
    workers: int = 0,
    progress: Progress | None = None,
) -> list[dict[Counter, Sums]]:
    """For each system, the sums of its items by counter.

    Args:
      workers: processes; 0: one per core if the texts are long enough, otherwise this process alone.
      progress: called with the number of finished pieces, and of all.
    """
    items = len(references_list)
    pieces = [(number, start) for number in range(len(counters)) for start in range(0, items, PIECE)]
    characters = sum(map(len, (text for system in systems for text in system))) * len(counters)
    runner = LocalRunner(workers or (num_cores() if characters > _MANY_CHARACTERS else 1))
    with tempfile.TemporaryDirectory(prefix="gptjax-scores-") as directory:
        tasks = [
            (counters[number], [system[start : start + PIECE] for system in systems],
             references_list[start : start + PIECE], str(Path(directory, f"{number}-{start}.npz")))
            for number, start in pieces
        ]  # fmt: skip
        done: list[object] = []

        def note(task: object) -> None:
            done.append(task)
            if progress:
                progress(len(done), len(tasks))

        runner.run(_count, tasks, note)
        return [
            {
                counter: np.concatenate([
                    _load(Path(directory, f"{n}-{start}.npz"), system) for n, start in pieces if n == number
                ])
                for number, counter in enumerate(counters)
            }
            for system in range(len(systems))
        ]  # fmt: skip


def _count(task: tuple[Counter, Systems, References, str]) -> None:
    counter, systems, references_list, path = task
    np.savez(path, *counter(systems, references_list))


def _load(path: Path, system: int) -> Sums:
    with np.load(path) as arrays:
        return arrays[f"arr_{system}"]
