"""Statistics of a claim: paired differences by seed, their interval, a verdict and its power.

Arms of a study share their seeds, so arms are compared seed by seed: the effect of a seed on both cancels. All scores
are lower-is-better. The interval is Student's; a claim is supported if the whole interval is on
its side of the margin, refuted if the whole interval is on the other side, and inconclusive otherwise. With one claim
that is a one-sided test at 2.5 %; with several, Holm's correction keeps the chance of one false verdict there.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import special

LEVEL = 0.95  # of intervals
ALPHA = (1 - LEVEL) / 2  # of one-sided tests
POWER = 0.8  # the power for which `seeds_needed` is computed
MAX_SEEDS = 1000  # above this, seeds are not counted

Scores = Sequence[float] | np.ndarray


@dataclasses.dataclass(frozen=True)
class Summary:
    """The mean of some values, with its interval; a single value has none (NaN)."""

    mean: float
    deviation: float
    low: float
    high: float
    count: int


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A claim that the score of one arm is below that of another, by a margin.

    Attributes:
      difference: of the paired scores, the first arm minus the second.
      effect_size: the mean difference in units of its deviation (Cohen's d of paired samples).
      p_supported: probability of differences at least as favourable if the true one were at the margin.
      p_refuted: the same for the opposite of the claim.
      power: to find a true difference of `effect` beyond the margin with this many seeds.
      seeds_needed: for a power of POWER; None: more than MAX_SEEDS.
    """

    difference: Summary
    margin: float
    effect_size: float
    p_supported: float
    p_refuted: float
    effect: float
    power: float
    seeds_needed: int | None


def summary(values: Scores) -> Summary:
    """Mean, standard deviation (n - 1) and Student's interval of the mean."""
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        return Summary(float(values.mean()) if len(values) else math.nan, math.nan, math.nan, math.nan, len(values))
    mean, deviation = float(values.mean()), float(values.std(ddof=1))
    half = special.stdtrit(len(values) - 1, 1 - ALPHA) * deviation / math.sqrt(len(values))
    return Summary(mean, deviation, mean - half, mean + half, len(values))


def compare(
    ours: Scores, theirs: Scores, *, margin: float = 0.0, effect: float | None = None, alpha: float = ALPHA
) -> Comparison:
    """The claim that the true mean of `ours - theirs` is below the margin.

    Args:
      ours, theirs: scores of the same seeds, in the same order; at least two.
      margin: 0 for "better", above 0 for "no worse by more than this", below 0 for "better by more than this".
      effect: the difference beyond the margin for which power is computed; default: the observed one.
      alpha: of the one-sided test for power; with several claims that of Holm's first step.
    """
    differences = np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)
    difference = summary(differences)
    n, deviation = difference.count, difference.deviation
    if n < 2:
        raise ValueError(f"{n} pairs have no deviation")
    effect = abs(difference.mean - margin) if effect is None else abs(effect)
    if deviation == 0:  # the same difference for every seed
        below, above = float(difference.mean >= margin), float(difference.mean <= margin)
        certain = 1.0 if effect else alpha
        return Comparison(difference, margin, math.nan, below, above, effect, certain, 2 if effect else None)
    statistic = (difference.mean - margin) / (deviation / math.sqrt(n))
    below = float(special.stdtr(n - 1, statistic))
    return Comparison(
        difference,
        margin,
        difference.mean / deviation,
        p_supported=below,
        p_refuted=1 - below,
        effect=effect,
        power=power(effect, deviation, n, alpha),
        seeds_needed=seeds_needed(effect, deviation, alpha),
    )


def power(effect: float, deviation: float, seeds: int, alpha: float = ALPHA) -> float:
    """The probability that a one-sided paired test with `seeds` seeds finds a true difference of `effect`."""
    if seeds < 2:
        return 0.0
    critical = special.stdtrit(seeds - 1, 1 - alpha)
    return float(1 - special.nctdtr(seeds - 1, effect / deviation * math.sqrt(seeds), critical))


def seeds_needed(effect: float, deviation: float, alpha: float = ALPHA) -> int | None:
    """The fewest seeds with which a true difference of `effect` is found with probability POWER."""
    low, high = 2, 2
    while power(effect, deviation, high, alpha) < POWER:
        if high >= MAX_SEEDS:
            return None
        low, high = high, 2 * high
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if power(effect, deviation, middle, alpha) >= POWER else (middle + 1, high)
    return low if low <= MAX_SEEDS else None


def verdicts(comparisons: Mapping[str, Comparison], count: int = 0) -> dict[str, str]:
    """supported | refuted | inconclusive for each claim of a study, corrected for their number (Holm 1979).

    Args:
      count: number of claims of the study, including those with missing cells; 0: those given.
    """
    count = max(count, len(comparisons))
    tests = {
        (name, word): p
        for name, comparison in comparisons.items()
        for word, p in (("supported", comparison.p_supported), ("refuted", comparison.p_refuted))
    }
    found = dict.fromkeys(comparisons, "inconclusive")
    smallest = sorted(((p, name, word) for (name, word), p in tests.items() if p < 0.5), key=lambda test: test[0])
    for rank, (p, name, word) in enumerate(smallest):
        if p > ALPHA / (count - rank):
            break
        found[name] = word
    return found
