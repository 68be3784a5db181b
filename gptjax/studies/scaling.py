"""The scaling law of a ladder of runs: loss against training compute, L(C) = floor + scale (C / unit)^-exponent.

Kaplan et al. 2020, arXiv:2001.08361, and Hoffmann et al. 2022, arXiv:2203.15556, section 3. The floor is the
irreducible loss: fitted ("free", at least 0) or given ("pinned").

Intervals come from a bootstrap over seeds with Student's tails: each draw moves the mean of every rung by the
deviations of its seeds under random weights, the same on all rungs and arms, and the law is fitted again. So seeds
that arms share stay paired, and with one rung and nothing fitted the interval is Student's own. It covers the choice
of seeds, not whether the law holds.
"""

import dataclasses
import math

import numpy as np
from jaxtyping import Float
from numpy import ndarray as Array

from gptjax.studies.statistics import ALPHA

DRAWS = 1000
SMALLEST, LARGEST = 0.005, 3.0  # range of exponents that are tried
ROUNDS = 11  # each narrows the exponent fivefold


@dataclasses.dataclass(frozen=True)
class Law:
    """floor + scale (C / unit)^-exponent, in units of the score; one law, or one for each draw, [draws]."""

    floor: Float[Array, "*draws"]
    scale: Float[Array, "*draws"]
    exponent: Float[Array, "*draws"]
    unit: float

    def loss(self, compute: float) -> Float[Array, "*draws"]:
        return np.asarray(self.floor + self.scale * (compute / self.unit) ** -self.exponent)

    def compute(self, loss: Float[Array, "*draws"] | float) -> Float[Array, "*draws"]:
        """The compute at which the law reaches a loss; infinite at the floor or below."""
        above = np.asarray(loss) - self.floor
        reached = (above > 0) & (self.scale > 0)
        ratio = np.where(reached, self.scale, 1.0) / np.where(reached, above, 1.0)
        return np.where(reached, self.unit * ratio ** (1 / self.exponent), np.where(above > 0, 0.0, np.inf))


def fit(compute: Float[Array, " rungs"], losses: Float[Array, "*draws rungs"], floor: float | None = None) -> Law:
    """The least-squares law of one row of losses, or of each of many.

    For a given exponent the law is linear, so only the exponent is searched: on a geometric grid that is narrowed
    around its best point, the same way for all rows.

    Args:
      floor: the pinned floor; None: it is fitted, at least 0.

    Raises ValueError if there are fewer rungs than free numbers of the law.
    """
    compute, losses = np.asarray(compute, np.float64), np.asarray(losses, np.float64)
    if len(compute) < fewest_rungs(floor):
        raise ValueError(f"{len(compute)} rungs do not determine a law; at least {fewest_rungs(floor)} do")
    unit = float(np.exp(np.log(compute).mean()))
    rows = losses.reshape(-1, 1, len(compute))
    logs = np.log(compute / unit)
    exponents = np.geomspace(SMALLEST, LARGEST, 40)[None, :]  # [1 or rows, tried]
    step = math.log(LARGEST / SMALLEST) / 39
    for _ in range(ROUNDS):
        floors, scales, errors = _linear(np.exp(-exponents[..., None] * logs), rows, floor)
        best = errors.argmin(-1)[:, None]
        exponent = np.take_along_axis(np.broadcast_to(exponents, errors.shape), best, 1)
        exponents = np.clip(exponent * np.exp(step * np.linspace(-1, 1, 11)), SMALLEST, LARGEST)
        step /= 5
    shape = losses.shape[:-1]
    found = (np.take_along_axis(values, best, 1) for values in (floors, scales))
    return Law(*(values.reshape(shape) for values in (*found, exponent)), unit)


def fewest_rungs(floor: float | None) -> int:
    return 3 if floor is None else 2


def _linear(
    basis: Float[Array, "#rows tried rungs"], losses: Float[Array, "rows 1 rungs"], floor: float | None
) -> tuple[Float[Array, "rows tried"], ...]:
    """(floor, scale, sum of squared errors) of the best law at each exponent, with scale and floor at least 0."""
    if floor is None:
        centre, mean = basis - basis.mean(-1, keepdims=True), losses.mean(-1)
        scales = np.maximum((centre * losses).sum(-1) / np.square(centre).sum(-1), 0.0)
        floors = mean - scales * basis.mean(-1)
        through = (basis * losses).sum(-1) / np.square(basis).sum(-1)  # the best scale with floor 0
        floors, scales = np.maximum(floors, 0.0), np.where(floors < 0, through, scales)
    else:
        scales = np.maximum((basis * (losses - floor)).sum(-1) / np.square(basis).sum(-1), 0.0)
        floors = np.full_like(scales, floor)
    errors = np.square(floors[..., None] + scales[..., None] * basis - losses).sum(-1)
    return floors, scales, errors


def draws(scores: Float[Array, "seeds *rungs"], stream: int = 0) -> Float[Array, "draws *rungs"]:
    """Random means over seeds: multivariate Student, with the covariance of the mean.

    The same seeds get the same weights at each call, so that arms that share them stay paired; another `stream` gives
    weights that are independent. Raises ValueError for a single seed.
    """
    scores = np.asarray(scores, np.float64)
    if (seeds := len(scores)) < 2:
        raise ValueError("one seed has no deviation")
    random = np.random.default_rng(stream)
    tails = np.sqrt(random.chisquare(seeds - 1, DRAWS) / (seeds - 1))
    weights = random.standard_normal((DRAWS, seeds)) / tails[:, None] / math.sqrt(seeds * (seeds - 1))
    mean = scores.mean(0)
    return mean + np.tensordot(weights, scores - mean, 1)


def interval(values: Float[Array, " draws"]) -> tuple[float, float]:
    """The central 95 % of draws; the ends may be infinite."""
    low, high = np.quantile(values, [ALPHA, 1 - ALPHA], method="inverted_cdf")
    return float(low), float(high)
