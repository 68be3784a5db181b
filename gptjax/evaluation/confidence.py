"""Bootstrap confidence intervals over documents.

Tokens of one document are not independent of each other; documents nearly are. So the unit that is resampled
is the document. Intervals are percentile intervals (Efron and Tibshirani, An Introduction to the Bootstrap,
1993, chapter 13); with fewer than about 30 units they are too narrow.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

_CHUNK_ELEMENTS = 2**20  # indices drawn at once: 8 MiB


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A metric with its 95 % confidence interval.

    Attributes:
      value: the metric, in its own unit.
      ci95: [low, high]; [nan, nan] for a single unit, where no spread was seen (which is not a spread of 0).
      n: how many items the value is over (tokens, prompts).
      signature: everything one needs to compute the same number elsewhere.
    """

    value: float
    ci95: list[float]
    n: int
    signature: str

    def to_json(self) -> dict[str, Any]:
        """What evaluation files hold. JSON has no NaN and no infinity: they become null."""
        return {
            "value": finite(self.value),
            "ci95": [finite(bound) for bound in self.ci95],
            "n": self.n,
            "signature": self.signature,
        }


def finite(number: float) -> float | None:
    """The number, or None where it is NaN or infinite."""
    return float(number) if math.isfinite(number) else None


def ratio_interval(
    numerators: Sequence[float] | np.ndarray,
    denominators: Sequence[float] | np.ndarray,
    *,
    samples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    transform: Callable[[float], float] | None = None,
) -> tuple[float, float]:
    """Percentile bootstrap interval of transform(sum(numerators) / sum(denominators)) over units.

    Args:
      numerators: one number a unit, e.g. the nats of a document.
      denominators: the weight of each unit, e.g. its tokens; zero or more.
      samples: bootstrap samples; one that drew no weight has no ratio and is left out.
      seed: of the resampling; the same seed gives the same interval.
      level: probability that the interval covers the truth.
      transform: a monotone function of the ratio, e.g. `math.exp` for perplexity. Quantiles commute with it.

    Returns (low, high), or (nan, nan) for a single unit. Raises ValueError where the two are not equal
    vectors, a weight is negative, or all are zero.
    """
    numerators, denominators = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    if numerators.shape != denominators.shape or numerators.ndim != 1:
        raise ValueError(f"expected two equal vectors, not {numerators.shape} and {denominators.shape}")
    if (denominators < 0).any():
        raise ValueError(f"unit {denominators.argmin()} has the negative weight {denominators.min()}")
    if not denominators.any():
        raise ValueError(f"none of {len(denominators)} units has weight")
    units = len(numerators)
    if units == 1:
        return math.nan, math.nan
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK_ELEMENTS // units)
    sums = np.empty((2, samples))
    for start in range(0, samples, rows):
        drawn = rng.integers(units, size=(min(rows, samples - start), units))
        sums[0, start : start + rows] = numerators[drawn].sum(axis=1)
        sums[1, start : start + rows] = denominators[drawn].sum(axis=1)
    totals, weights = sums[:, sums[1] > 0]
    bounds = np.quantile(totals / weights, [(1 - level) / 2, (1 + level) / 2])
    low, high = sorted(float(transform(bound) if transform else bound) for bound in bounds)
    return low, high
