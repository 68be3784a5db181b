"""Is my loss normal? The validation loss of a config over several seeds, as a band to compare a run with.

Bands are JSON files in `reference_bands`, made by tools/make_band.py from finished runs. A run has a band if its data
and all options that decide the loss are the same.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.config import flat_options

DIRECTORY = Path(__file__).parent / "reference_bands"
Point = tuple[float, float]  # step, validation loss

# The kinds of options that decide the losses of a run. A band shows how much the seed alone changes them.
DECISIVE = ("model", "training", "hyper", "course", "score")
SEEDS = ("seed", "data_seed")
ON_TEXT = ("objective.name", "language_modeling")  # what objective.name "auto" means for text


@dataclasses.dataclass(frozen=True)
class Band:
    """The interval at each step in which 95 % of runs with other seeds are expected."""

    name: str
    about: str  # seeds, versions, machine, date
    steps: tuple[int, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]

    def verdict(self, points: Sequence[Point]) -> str:
        """A sentence that compares the validation losses of a run with the band, or "" if no step can be compared."""
        compared = [(step, loss) for step, loss in points if self.steps[0] <= step <= self.steps[-1]]
        if not compared:
            return ""
        lows, highs = (np.interp([step for step, _ in compared], self.steps, edge) for edge in (self.low, self.high))
        losses = np.array([loss for _, loss in compared])
        inside = int(((losses >= lows) & (losses <= highs)).sum())
        sentence = f"inside the band of {self.name} ({self.about}) at {inside} of {len(compared)} evaluations"
        step, loss = compared[-1]
        if loss > highs[-1]:
            return f"{sentence}; at step {step:,} it is {loss - highs[-1]:.4f} nats above: not normal"
        if loss < lows[-1]:
            return f"{sentence}; at step {step:,} it is {lows[-1] - loss:.4f} nats below: better than expected"
        return f"{sentence}; at step {step:,} the loss is normal"


def identity(config: dict[str, Any], data: dict[str, Any]) -> str:
    """sha256 over what decides the loss: the options that are not at their defaults, and the text.

    Args:
      config: the content of config.json.
      data: the "data" entry of the manifest. All versions of the Python documentation count as the same text.
    """
    options = {}
    for path, option in flat_options().items():
        section, _, name = path.rpartition(".")
        value = config.get(section, {}).get(name, option.default) if section else config.get(name, option.default)
        if value != option.default and option.affects in DECISIVE and path not in SEEDS and (path, value) != ON_TEXT:
            options[path] = value
    source = str(config.get("data", {}).get("source", ""))
    text = source if source == "python_docs" else data.get("source_fingerprint")
    return hashlib.sha256(json.dumps([options, text], sort_keys=True).encode()).hexdigest()


def find(config: dict[str, Any], data: dict[str, Any]) -> Band | None:
    """The band of this config on this data, or None."""
    wanted = identity(config, data)
    for path in sorted(DIRECTORY.glob("*.json")):
        entry = json.loads(path.read_text(encoding="utf-8"))
        if entry.pop("identity") == wanted:
            return Band(path.stem, **{key: tuple(v) if isinstance(v, list) else v for key, v in entry.items()})
    return None


def fit(runs: Sequence[Iterable[Point]]) -> dict[str, list[float]]:
    """Steps, low and high from the validation losses of several seeds: 95 % prediction intervals for one more run.

    mean +- t s sqrt(1 + 1/n), with Student's t of n - 1 degrees of freedom. The standard deviation s of a step is at
    least the median over steps, because a few numbers may be close by chance. Raises ValueError for fewer
    than two runs or runs evaluated at different steps.
    """
    from scipy import stats

    steps = [[step for step, _ in run] for run in runs]
    if len(runs) < 2 or any(other != steps[0] for other in steps):
        raise ValueError("a band needs two runs or more, evaluated at the same steps")
    losses = np.array([[loss for _, loss in run] for run in runs])
    spread = losses.std(axis=0, ddof=1)
    spread = np.maximum(spread, np.median(spread))
    margin = stats.t.ppf(0.975, len(runs) - 1) * spread * math.sqrt(1 + 1 / len(runs))
    mean = losses.mean(axis=0)
    return {"steps": steps[0], "low": [*np.round(mean - margin, 5)], "high": [*np.round(mean + margin, 5)]}
