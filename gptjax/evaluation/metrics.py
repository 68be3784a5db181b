"""Metrics with the sums of each item, so that two evaluations can be compared.

A metric is a formula of sums over items (documents, questions, prompts). The sums of every item are written beside
the results, as JSON lines: for each task one line that describes its metrics, then one line per item, with its texts
if there are any.
"""

import dataclasses
import hashlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped

from gptjax.errors import UserError
from gptjax.evaluation.confidence import Estimate, ratio_interval

Sums = Float[np.ndarray, "samples sums"]
Progress = Callable[[int, int], None]  # (done, total)


@dataclasses.dataclass(frozen=True)
class Metric(Estimate):
    """An estimate with the sums of each item.

    Attributes:
      ids: of the items; items with equal ids are the same, whatever the model.
      sums: one row per item.
      formula: name of the function from summed rows to the value, see `values`.
      unit: values are comparable only if it is equal (for perplexities it names the tokenizer).
      lower_is_better: true of losses and error rates.
    """

    ids: Sequence[str]
    sums: Float[np.ndarray, "items sums"]
    formula: str
    unit: str
    lower_is_better: bool = False


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a task found.

    Attributes:
      metrics: by name; those that are a `Metric` can be compared.
      texts: what to show of an item, by its id: prompt, references, hypothesis.
      warnings: what a reader of the numbers must know, as sentences.
    """

    metrics: dict[str, Estimate]
    texts: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    warnings: list[str] = dataclasses.field(default_factory=list)


# Metrics that are no ratio of two sums: name -> function from a row of sums to the score. Other modules add theirs.
FORMULAS: dict[str, Callable[[Float[np.ndarray, " sums"]], float]] = {}


def values(formula: str, sums: Sums) -> Float[np.ndarray, " samples"]:
    """The metric of each row of sums; NaN where it is not defined."""
    if formula in _RATIOS:
        with np.errstate(divide="ignore", invalid="ignore"):
            return _RATIOS[formula](sums[:, 0] / sums[:, 1])
    return np.array([FORMULAS[formula](row) for row in sums])


def _exp(ratio: Any) -> Any:
    with np.errstate(over="ignore"):  # the word perplexity of a bad model may be infinite
        return np.exp(ratio)


_RATIOS: dict[str, Callable[[Any], Any]] = {
    "ratio": lambda ratio: ratio,
    "percent": lambda ratio: 100 * ratio,
    "exp": _exp,
}


def ratio_metric(
    ids: Sequence[str],
    numerators: Shaped[np.ndarray, " items"],
    denominators: Shaped[np.ndarray, " items"] | None = None,
    *,
    signature: str,
    formula: str = "ratio",
    unit: str = "",
    lower_is_better: bool = False,
    n: int | None = None,
    seed: int = 0,
) -> Metric:
    """sum(numerators) / sum(denominators) through a formula, with a bootstrap interval over items.

    Args:
      denominators: default: 1 per item, so that the ratio is a mean.
      formula: ratio, percent (x 100) or exp (of the ratio).
      n: the number of scored units to report; default: the number of items.
    """
    denominators = np.ones(len(ids)) if denominators is None else np.asarray(denominators, np.float64)
    sums = np.stack([np.asarray(numerators, np.float64), denominators], axis=1)
    value = values(formula, sums.sum(axis=0, keepdims=True))[0]
    interval = ratio_interval(sums[:, 0], sums[:, 1], seed=seed, transform=_RATIOS[formula])
    return Metric(
        float(value), list(interval), len(ids) if n is None else n, signature,
        ids, sums, formula, unit, lower_is_better,
    )  # fmt: skip


def item_ids(keys: Sequence[Any]) -> list[str]:
    """An id for each key, which is JSON; equal keys are numbered."""
    digests = [
        hashlib.sha256(json.dumps(key, ensure_ascii=False).encode(errors="surrogatepass")).hexdigest()[:16]
        for key in keys
    ]
    seen: Counter[str] = Counter()
    ids = []
    for digest in digests:
        seen[digest] += 1
        ids.append(digest if seen[digest] == 1 else f"{digest}-{seen[digest]}")
    return ids


def lines(outcomes: Mapping[str, Outcome]) -> Iterator[str]:
    """The lines of an items file."""
    for task, outcome in outcomes.items():
        metrics = {name: metric for name, metric in outcome.metrics.items() if isinstance(metric, Metric)}
        described = {
            name: {
                "value": metric.value if math.isfinite(metric.value) else None,
                "formula": metric.formula,
                "unit": metric.unit,
                "lower_is_better": metric.lower_is_better,
            }
            for name, metric in metrics.items()
        }
        yield _line({"task": task, "metrics": described})
        rows: dict[str, dict[str, list[float]]] = {}
        for name, metric in metrics.items():
            for item, sums in zip(metric.ids, metric.sums.tolist(), strict=True):
                rows.setdefault(item, {})[name] = sums
        for item, sums in rows.items():
            yield _line({"task": task, "item": item, **outcome.texts.get(item, {}), "sums": sums})


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def read(path: Path) -> dict[str, dict[str, Metric]]:
    """The metrics of each task in an items file; their intervals and signatures are not in it."""
    described: dict[str, dict[str, Any]] = {}
    rows: dict[tuple[str, str], list[tuple[str, list[float]]]] = {}
    number = 0
    try:
        with path.open(encoding="utf-8") as file:
            for text in file:
                number += 1
                line = json.loads(text)
                if "metrics" in line:
                    described[line["task"]] = line["metrics"]
                    continue
                for name, sums in line["sums"].items():
                    rows.setdefault((line["task"], name), []).append((line["item"], sums))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; evaluate again to write it") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}:{number}: not a line of an items file ({error}); evaluate again") from None
    found: dict[str, dict[str, Metric]] = {task: {} for task in described}
    for (task, name), items in rows.items():
        about = described[task][name]
        value = math.nan if about["value"] is None else about["value"]
        ids, sums = [item for item, _ in items], np.array([sums for _, sums in items], np.float64)
        found[task][name] = Metric(
            value, [math.nan, math.nan], len(ids), "", ids, sums,
            about["formula"], about["unit"], about["lower_is_better"],
        )  # fmt: skip
    return found


def resamples(num_items: int, samples: int, seed: int) -> Iterator[np.ndarray]:
    """Bootstrap samples as counts: float64 [chunk, items], how often each sample has each item.

    The draws are those of sacrebleu's paired bootstrap with the same seed.
    """
    rng = np.random.default_rng(seed)
    chunk = max(1, 2**20 // num_items)
    for size in itertools.chain([chunk] * (samples // chunk), [samples % chunk]):
        if size:
            drawn = rng.choice(num_items, size=(size, num_items), replace=True)
            yield np.stack([np.bincount(row, minlength=num_items) for row in drawn]).astype(np.float64)
