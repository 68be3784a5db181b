"""The deviation between seeds: an A/A study of one arm with seeds of its own. Sigma is written to noise.json."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scipy import special

from gptjax.files import write_whole
from gptjax.studies.statistics import ALPHA, Scores, summary


@dataclasses.dataclass(frozen=True)
class Noise:
    """The standard deviation between seeds of the score of one arm.

    Attributes:
      sigma: of the score of one run; `low` to `high` is its 95 % interval, by the chi-squared distribution.
      seeds: the seeds that were run, none of them used by the study.
      metric, scale: what was measured, and at which size ("0.8M parameters, 1.5M tokens").
      key: of the arm and the code; noise with another key does not apply.
    """

    arm: str
    sigma: float
    low: float
    high: float
    n: int
    seeds: tuple[int, ...]
    metric: str
    scale: str
    key: str
    code: str

    def in_words(self) -> str:
        return (
            f"noise: one run of {self.arm} deviates by {self.sigma:.4f} in {self.metric} from seed to seed "
            f"[{self.low:.4f}, {self.high:.4f}], {self.n} seeds, at {self.scale}"
        )


def deviation(scores: Scores) -> tuple[float, float, float]:
    """Sigma and the ends of its interval, from at least two scores of a normal distribution."""
    found = summary(scores)
    freedom = found.count - 1
    low, high = (found.deviation * math.sqrt(freedom / special.chdtri(freedom, p)) for p in (ALPHA, 1 - ALPHA))
    return found.deviation, float(low), float(high)


def write(workdir: Path, noise: Noise) -> None:
    write_whole(workdir / "noise.json", json.dumps(dataclasses.asdict(noise), indent=1) + "\n")


def read(workdir: Path, wanted: Mapping[str, Any]) -> Noise | None:
    """The noise in a work directory; None if there is none, or its keys differ from `wanted`."""
    try:
        stored = json.loads((workdir / "noise.json").read_text(encoding="utf-8"))
        noise = Noise(**stored | {"seeds": tuple(stored["seeds"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None
    same = all(getattr(noise, name) == value for name, value in wanted.items())
    numbers = all(isinstance(value, int | float) for value in (noise.sigma, noise.low, noise.high, noise.n))
    return noise if same and numbers else None
