"""Several sources in one run: each row comes from one of them, in fixed proportions."""

import math
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from gptjax.data.pipeline.batches import Batch, BatchSource
from gptjax.data.pipeline.randomness import shuffled_epochs
from gptjax.errors import UserError

_WEIGHT_RANGE = 10_000  # the largest weight, and 1 over the smallest
_PLUS = re.compile(r"\s\+\s")
_GLOB = re.compile(r"[*?\[]")


class Component(NamedTuple):
    """One source of a mixture: "poems", "text:data/poems/*.txt", 0.3."""

    name: str
    spec: str
    weight: Fraction


def parse_mixture(source: str) -> list[Component]:
    """The sources of `SPEC@WEIGHT + SPEC@WEIGHT`; a spec by itself has the weight 1.

    A source is named after its file or directory, or what else its spec says; equal names are numbered.

    Raises:
      UserError: a weight is missing or out of range.
    """
    specs = _PLUS.split(source.strip())
    if len(specs) == 1:
        return [Component(_name(source), source, Fraction(1))]
    components: list[Component] = []
    for entry in specs:
        spec, _, weight = entry.strip().rpartition("@")
        try:
            share = Fraction(weight).limit_denominator(_WEIGHT_RANGE)
        except (ValueError, ZeroDivisionError):
            share = Fraction(0)
        if not spec or not 0 < share <= _WEIGHT_RANGE:
            raise UserError(
                f"data.source={source!r}: {entry.strip()!r} has no weight from {1 / _WEIGHT_RANGE} to {_WEIGHT_RANGE}; "
                "a mixture is 'SPEC@WEIGHT + SPEC@WEIGHT', for example 'store:stores/poems@0.3 + python_docs@0.7'"
            )
        name = _name(spec)
        taken = {component.name for component in components}
        name = next(n for n in [name, *(f"{name}-{i}" for i in range(2, len(specs) + 1))] if n not in taken)
        components.append(Component(name, spec, share))
    return components


def _name(spec: str) -> str:
    scheme, _, rest = spec.partition(":")
    parts = [part for part in rest.partition("#")[0].split("/") if part and not _GLOB.search(part)]
    return re.sub(r"[^\w.-]+", "-", parts[-1].split(".")[0] or parts[-1]) if parts else scheme


class Mixture(BatchSource):
    """The rows of several sources, interleaved by weight.

    The sequence of rows is cut into blocks, the shortest in which the weights give each source a whole number
    of rows. Every block has exactly that number of each, in its own random order, and each source's rows are
    read one after another: so the origin of any row is computed directly, at any step.

    An epoch has as many rows as the epochs of all sources together.
    """

    def __init__(
        self,
        sources: Mapping[str, BatchSource],
        weights: Mapping[str, Fraction],
        *,
        batch_size: int,
        seed: int,
        rows: slice | np.ndarray | None = None,
    ):
        """`weights` are relative, above 0; `rows` are those of this process (default: all)."""
        self.sources = dict(sources)
        self.seed = seed
        scale = math.lcm(*(weights[name].denominator for name in sources))
        counts = [int(weights[name] * scale) for name in sources]
        self._rows_of_block = np.array(counts, np.int64) // math.gcd(*counts)
        rows_per_epoch = sum(source.rows_per_epoch for source in sources.values())
        super().__init__(rows_per_epoch, batch_size=batch_size, rows=rows)

    @property
    def block_size(self) -> int:
        return int(self._rows_of_block.sum())

    @property
    def notes(self) -> list[str]:
        return [f"{name}: {note}" for name, source in self.sources.items() for note in source.notes]

    def epochs(self, step: int) -> dict[str, float]:
        """Epochs of each source done before `step`, exact to one row."""
        rows = step * self.batch_size * self._rows_of_block / self.block_size
        return {
            name: float(done) / source.rows_per_epoch
            for done, (name, source) in zip(rows, self.sources.items(), strict=True)
        }

    def assign(self, rows: Int64[np.ndarray, " rows"]) -> tuple[Int64[np.ndarray, " rows"], Int64[np.ndarray, " rows"]]:
        """(number of the source, number in its own sequence of rows) of each row."""
        ends = np.cumsum(self._rows_of_block)
        blocks, places = shuffled_epochs(rows, self.block_size, self.seed)
        sources = np.searchsorted(ends, places, side="right")
        own = self._rows_of_block[sources]
        return sources, blocks * own + places - (ends[sources] - own)

    def tokens_before(self, row: int) -> int:
        blocks, rest = divmod(row, self.block_size)
        begun = np.bincount(self.assign(np.arange(row - rest, row))[0], minlength=len(self.sources))
        own = blocks * self._rows_of_block + begun  # the rows of each source that come before
        return sum(source.tokens_before(n) for source, n in zip(self.sources.values(), own.tolist(), strict=True))

    def read_rows(self, rows: Int64[np.ndarray, " rows"]) -> Batch:
        of_source, numbers = self.assign(rows)
        batch: Batch = {}
        for index, source in enumerate(self.sources.values()):
            mine = of_source == index
            if mine.any():
                for name, values in source.read_rows(numbers[mine]).items():
                    batch.setdefault(name, np.empty((len(rows), *values.shape[1:]), values.dtype))[mine] = values
        return batch
