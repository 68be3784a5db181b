"""Two evaluations of the same items: do they differ?

A paired bootstrap (Koehn 2004): items are drawn with replacement, the same for both, and the metric of each draw is
computed for both. Two metrics differ if the 95 % percentile interval of the difference excludes 0. The p-value is
two-sided: the share of draws whose difference is at least as far from the mean of the draws as the observed difference
is from 0. For BLEU, chrF and TER it is the one that `sacrebleu --paired-bs` prints, from the same draws.
"""

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.errors import UserError
from gptjax.evaluation import metrics as items
from gptjax.evaluation import references  # noqa: F401 (its formulas)
from gptjax.evaluation.confidence import finite
from gptjax.evaluation.metrics import Metric

SAMPLES = 1000
SEED = 12345  # sacrebleu's
ITEMS_SUFFIX = ".items.jsonl"

Key = tuple[str, str, str]  # task, metric, which items


@dataclasses.dataclass(frozen=True)
class Difference:
    """B - A of one metric over the same items.

    Attributes:
      ci95, p: NaN where the items are too few to say.
      n: items.
      verdict: which of the two is better, or that no difference was shown.
    """

    task: str
    metric: str
    a: float
    b: float
    difference: float
    ci95: list[float]
    p: float
    n: int
    signature: str
    verdict: str

    def to_json(self) -> dict[str, Any]:
        """What `evaluate --compare --output` writes; JSON has no NaN."""
        fields = {name: value for name, value in dataclasses.asdict(self).items() if name not in ("task", "metric")}
        fields["ci95"] = [finite(bound) for bound in self.ci95]
        return fields | {name: finite(fields[name]) for name in ("a", "b", "difference", "p")}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Differences of the metrics that both have; messages on those that cannot be compared; the items files of each."""

    differences: list[Difference]
    problems: list[str]
    files: tuple[list[Path], list[Path]]


def compare(a: Path, b: Path) -> Comparison:
    """Compares two work directories, or JSON files that `evaluate --output` wrote.

    In a work directory the newest evaluation of each task counts. Raises UserError if nothing can be compared.
    """
    (ours, our_files), (theirs, their_files) = _read(a), _read(b)
    used: tuple[list[Path], list[Path]] = ([], [])
    differences, problems = [], []
    names = dict.fromkeys((task, name) for task, name, _ in ours)
    for task, name in names:
        candidates = {key: metric for key, metric in ours.items() if key[:2] == (task, name)}
        others = {key: metric for key, metric in theirs.items() if key[:2] == (task, name)}
        common = [key for key in candidates if key in others]
        if others and not common:
            problems.append(_mismatch(f"{task} {name}", _last(candidates), _last(others)))
        for key in common:
            first, second = candidates[key], others[key]
            if first.unit != second.unit or first.formula != second.formula:
                problems.append(f"{task} {name}: {first.unit} in A, {second.unit} in B, which have no common scale")
            else:
                differences.append(_difference(task, name, first, second))
                used[0].append(our_files[key])
                used[1].append(their_files[key])
    if not differences:
        why = "; ".join(problems) or (f"A has {_tasks(ours) or 'nothing'}, B has {_tasks(theirs) or 'nothing'}")
        raise UserError(f"{a} and {b} cannot be compared: {why}. Evaluate both on the same data with the same tasks")
    return Comparison(differences, problems, tuple(list(dict.fromkeys(files)) for files in used))


def _read(path: Path) -> tuple[dict[Key, Metric], dict[Key, Path]]:
    """Every metric under `path` and its file; of metrics with the same task and items, the newest."""
    if path.is_dir():
        files = sorted(path.glob(f"evaluation/*{ITEMS_SUFFIX}"), key=lambda file: (file.stat().st_mtime_ns, file.name))
        if not files:
            raise UserError(f"{path} has no evaluation/*{ITEMS_SUFFIX}; run gptjax evaluate --workdir={path} first")
    else:
        files = [path if path.name.endswith(ITEMS_SUFFIX) else path.with_suffix(ITEMS_SUFFIX)]
        if not files[0].is_file():
            raise UserError(
                f"{path} is neither a work directory nor a result of gptjax evaluate --output: there is no {files[0]}"
            )
    found: dict[Key, Metric] = {}
    sources: dict[Key, Path] = {}
    for file in files:
        for task, metrics in items.read(file).items():
            for name, metric in metrics.items():
                which = hashlib.sha256("\n".join(sorted(metric.ids)).encode()).hexdigest()
                found[task, name, which], sources[task, name, which] = metric, file
    return found, sources


def _difference(task: str, name: str, a: Metric, b: Metric) -> Difference:
    place = {item: row for row, item in enumerate(b.ids)}
    pair = a.sums, b.sums[[place[item] for item in a.ids]]
    observed = [items.values(a.formula, sums.sum(axis=0, keepdims=True))[0] for sums in pair]
    difference = float(observed[1] - observed[0])
    counted = items.resamples(len(a.ids), SAMPLES, SEED)
    drawn = [[items.values(a.formula, counts @ sums) for sums in pair] for counts in counted]
    first, second = (np.concatenate(scores) for scores in zip(*drawn, strict=True))
    differences = second - first
    differences = differences[np.isfinite(differences)]
    signature = f"paired-bootstrap-{SAMPLES}|seed:{SEED}|p:{{}}" + (f"|{a.unit}" if a.unit else "")
    known = task, name, float(observed[0]), float(observed[1]), difference
    if len(a.ids) < 2 or not len(differences):
        return Difference(
            *known, [math.nan] * 2, math.nan, len(a.ids), signature.format("none"), "too few items to say"
        )
    low, high = (float(bound) for bound in np.quantile(differences, [0.025, 0.975]))
    if a.formula in ("ratio", "percent", "exp"):
        distance, kind = np.abs(differences - differences.mean()) >= abs(difference), "two-sided"
    else:  # sacrebleu.significance
        distance, kind = np.abs(differences) - np.abs(differences).mean() > abs(difference), "sacrebleu"
    p = float((distance.sum() + 1) / (len(differences) + 1)) if difference else 1.0
    verdict = "no difference shown"
    if low > 0 or high < 0:
        verdict = "A is better" if (difference < 0) != a.lower_is_better else "B is better"
    return Difference(*known, [low, high], p, len(a.ids), signature.format(kind), verdict)


def _mismatch(what: str, a: Metric, b: Metric) -> str:
    common = len(set(a.ids) & set(b.ids))
    return f"{what}: the items differ (A has {len(a.ids)}, B has {len(b.ids)}, {common} in common)"


def _last(metrics: Mapping[Key, Metric]) -> Metric:
    return list(metrics.values())[-1]


def _tasks(metrics: Mapping[Key, Metric]) -> str:
    return ", ".join(dict.fromkeys(task for task, _, _ in metrics))
