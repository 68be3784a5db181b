"""The findings of a study, from the files of its cells: verdicts, curves, sensitivity, differences, setting."""

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from gptjax import config as config_lib
from gptjax.reporting.markup import short
from gptjax.studies import differences, statistics
from gptjax.studies.cell import Cell
from gptjax.studies.cells import Plan
from gptjax.studies.statistics import Comparison
from gptjax.studies.study import Claim

UNITS = {"loss": "loss (nats per token)", "bits_per_byte": "bits per byte", "perplexity": "perplexity (per token)"}
MOST_POINTS = 200  # points per curve
# The group of an option, by its path: the first pattern that matches.
GROUPS = {
    "algorithm": r"optimizer\.(name|orthogonalization|soap_refresh)",
    "learning rate": r".*learning_rate.*|schedule\..*",
    "weight decay": r".*weight_decay.*|.*cautious.*",
    "moments": r"optimizer\..*(beta|momentum|epsilon).*",
    "clipping": r".*clip.*",
    "initial values": r"model\..*init.*",
    "model": r"model\..*",
    "data": r"(data|tokenizer|objective|language_modeling|instruction)\b.*",
    "other": r".*",
}


def findings(plan: Plan) -> list[tuple[Claim, Comparison | None, str]]:
    """Each claim with its comparison and verdict; the comparison is None if cells are missing.

    A verdict is "supported", "refuted", "inconclusive", or "inconclusive: " and why no scores could decide it.
    """
    claims = plan.study.parsed_claims()
    compared: dict[str, Comparison] = {}
    tests = sum(len(_directions(claim)) for claim in claims)
    for claim in claims:
        for key, ours, theirs in _directions(claim):
            one, other = plan.scores(ours), plan.scores(theirs)
            if len(one) == len(other) == plan.study.seeds:
                compared[key] = statistics.compare(one, other, margin=claim.margin, alpha=statistics.ALPHA / tests)
    words = statistics.verdicts(compared, tests)
    found = []
    for claim in claims:
        keys = [key for key, *_ in _directions(claim)]
        if reason := plan.no_verdict(claim):
            found.append((claim, compared.get(keys[0]), f"inconclusive: {reason}"))
            continue
        if any(key not in compared for key in keys):
            found.append((claim, None, "cells are missing"))
            continue
        told = {words[key] for key in keys}
        verdict = "refuted" if "refuted" in told else "supported" if told == {"supported"} else "inconclusive"
        deciding = max(compared[key].p_supported for key in keys), min(compared[key].p_refuted for key in keys)
        numbers = dict(zip(("p_supported", "p_refuted"), deciding, strict=True))
        found.append((claim, dataclasses.replace(compared[keys[0]], **numbers), verdict))
    return found


def _directions(claim: Claim) -> list[tuple[str, str, str]]:
    there = (claim.text, claim.ours, claim.theirs)
    return [there, (claim.text + " (the other way)", claim.theirs, claim.ours)] if claim.both_ways else [there]


def source(plan: Plan) -> str:
    """The source of the claim, and what it found."""
    study = plan.study
    found = f" It found: {study.found.rstrip('.')}." if study.found else ""
    return f"{study.source.rstrip('.')}.{found}" if study.source else ""


def scale(plan: Plan, claim: Claim) -> str:
    """The size for which the verdict on a claim holds, in short."""
    first = plan.arms[plan.opponent(claim.theirs)]
    return f"at {short(first.parameters)} parameters, {short(first.tokens)} tokens"


def sizes(plan: Plan) -> str:
    """The size of the study: that of its baseline, on a ladder from the first rung to the last."""
    if not plan.rungs:
        return plan.scale()
    last = plan.arms[plan.at(plan.families[0], plan.rungs[-1])]
    return f"{plan.scale()}, to {last.parameters:,} parameters, {last.tokens:,} tokens"


def noise_in_words(plan: Plan) -> str:
    noise = plan.noise()
    return f"N{noise.in_words()[1:]}." if noise else "Noise: the deviation between seeds is not measured; see --noise."


def notes(plan: Plan) -> tuple[str, ...]:
    """Notes that belong to the results."""
    changed = [
        f"Changed after cells had run: claims, margin and metric were {'; '.join(before.get('claims') or ['none'])}, "
        f"{before.get('margin')}, {before.get('metric')}."
        for before in plan.changes
    ]
    return (noise_in_words(plan), *changed, *_mixed_versions(plan))


def _mixed_versions(plan: Plan) -> list[str]:
    """A note if cells were run with several versions of JAX, which is not part of their keys."""
    stored = (differences.manifest(cell.workdir) for cell in (*plan.tuning, *plan.cells))
    found = sorted({str(version) for m in stored if (version := _part(m, "packages").get("jax"))})
    told = f"Cells were run with several versions of JAX, {' and '.join(found)}: losses may differ by rounding."
    return [told] if len(found) > 1 else []


def explained(plan: Plan, comparison: Comparison | None) -> str:
    """The numbers behind a verdict, in sentences."""
    if comparison is None:
        return ""
    found = comparison.difference
    text = (
        f"The difference in {plan.study.metric} is {found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}] with the "
        f"margin {comparison.margin:g}, {found.count} seeds, p = {comparison.p_supported:.2g}, p of the opposite "
        f"{comparison.p_refuted:.2g}."
    )
    if (claims := len(plan.study.claims)) > 1:
        text += (
            f" These numbers are of this claim alone; the verdict, the power and the seeds needed are corrected for "
            f"{claims} claims."
        )
    if not math.isnan(comparison.effect_size):
        needed = comparison.seeds_needed or f"more than {statistics.MAX_SEEDS}"
        text += (
            f" Effect size {comparison.effect_size:+.1f}; power {comparison.power:.0%} for a difference of this size; "
            f"seeds needed for {statistics.POWER:.0%}: {needed}."
        )
    return text


def diverged(plan: Plan) -> list[Cell]:
    """The cells that diverged, those of tuning included; each once."""
    cells = {cell.key: cell for cell in (*plan.tuning, *plan.cells)}
    return [cell for cell in cells.values() if cell.outcome() not in ("", "done")]


def paired(plan: Plan, arm: str) -> list[float]:
    """Scores of an arm minus those of its opponent, for the seeds that both have."""
    metric, other, found = plan.study.metric, plan.opponent(arm), {}
    for cell in plan.cells:
        if cell.arm in (arm, other) and cell.outcome():
            found.setdefault(cell.seed, {})[cell.arm] = cell.score(metric, plan.uniform(cell.arm))
    both = [scores for _, scores in sorted(found.items()) if len(scores) == 2]
    return [scores[arm] - scores[other] for scores in both]


# ---- Curves ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Curve:
    """A metric of an arm over its training tokens: mean, lowest and highest of its cells.

    Attributes:
      cells: number of averaged cells, without diverged ones. strays: the diverged cells, as (tokens, values).
    """

    tokens: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    cells: int
    strays: list[tuple[np.ndarray, np.ndarray]]


def curves(plan: Plan, split: str, metric: str) -> dict[str, Curve]:
    """The curve of each arm, reduced to MOST_POINTS points; only steps that all its cells have."""
    found = {}
    for name, arm in plan.arms.items():
        per_step = arm.config.train.batch_size * arm.config.model.context_length
        kept, strays = [], []
        for cell in (cell for cell in plan.cells if cell.arm == name):
            values = _values(cell, split, metric)
            if cell.outcome() in ("", "done"):
                kept.append(values)
            else:
                strays.append((np.array([*values]) * per_step, np.array([*values.values()], np.float64)))
        kept = [values for values in kept if values]
        steps = sorted(set.intersection(*map(set, kept))) if kept else []
        bins = np.array_split(np.array(steps), min(len(steps), MOST_POINTS)) if steps else []
        tokens = np.array([one.mean() for one in bins]) * per_step
        table = np.array([[np.mean([values[step] for step in one]) for one in bins] for values in kept])
        table = table if steps else np.zeros((1, 0))
        found[name] = Curve(tokens, table.mean(0), table.min(0), table.max(0), len(kept), strays)
    return found


def _values(cell: Cell, split: str, metric: str) -> dict[int, float]:
    lines = ((line["step"], line.get(metric)) for line in cell.lines(split))
    return {step: value for step, value in lines if isinstance(value, int | float) and math.isfinite(value)}


# ---- Sensitivity -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Series:
    """The score against the value of one option.

    Attributes:
      points: (value, scores by seed), by ascending value. chosen: the value that was chosen; None: it was not tuned.
      diverged: values at which a seed diverged; its score is that of a uniform model.
    """

    option: str
    name: str
    points: list[tuple[float, list[float]]]
    chosen: float | None = None
    diverged: frozenset[float] = frozenset()

    @property
    def by_factors(self) -> bool:
        """Whether the values span decades, so that a logarithmic axis fits."""
        values = [value for value, _ in self.points]
        return values[0] > 0 and values[-1] >= 4 * values[0]


def sensitivity(plan: Plan) -> list[Series]:
    """Scores against numeric options: from grids, and from three or more arms that differ in one option only.

    If a grid has several options, each value has the scores of its best point over the other options.
    """
    return [*_of_grids(plan), *_of_arms(plan)]


def _of_grids(plan: Plan) -> Iterable[Series]:
    for arm in plan.points:
        tried = [point for point in plan.sensitivity(arm) if point.scores]
        chosen = next((point.point for point in tried if point.chosen), {})
        for option in plan.study.grids(arm):
            best: dict[float, list[float]] = {}
            bad = {_number(point.point[option]) for point in tried if point.diverged}
            for point in tried:
                value = _number(point.point[option])
                if value is not None and (value not in best or np.mean(point.scores) < np.mean(best[value])):
                    best[value] = point.scores
            if len(best) > 1:
                yield Series(option, arm, sorted(best.items()), _number(chosen.get(option)), frozenset(bad - {None}))


def _of_arms(plan: Plan) -> Iterable[Series]:
    values = {name: dict(config_lib.flat_values(arm.config)) for name, arm in plan.arms.items()}
    base = values[plan.study.baseline]
    for option in sorted({path for name in values for path in values[name] if values[name][path] != base[path]}):
        families: dict[str, list[str]] = {}
        for name, own in values.items():
            if _number(own[option]) is not None:
                rest = {path: value for path, value in own.items() if path != option}
                families.setdefault(json.dumps(rest, sort_keys=True, default=str), []).append(name)
        for names in families.values():
            points = sorted((_number(values[n][option]), plan.scores(n)) for n in names if plan.scores(n))
            if len(points) > 2:
                others = {p: v for p, v in values[names[0]].items() if p != option and v != base[p]}
                called = ", ".join(f"{path.rpartition('.')[2]} {value}" for path, value in others.items())
                cells = [cell for cell in diverged(plan) if cell.arm in names and not cell.point]
                bad = {_number(values[cell.arm][option]) for cell in cells}
                yield Series(option, called or "arms", points, diverged=frozenset(bad))


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value)


# ---- What differs, setting ---------------------------------------------------------------------------------------


def grouped(plan: Plan) -> list[tuple[str, str, str, str, str]]:
    """(arm, group, option, value of the baseline, value of the arm) of all differences, by group."""
    rows = []
    for arm, changed in plan.differences().items():
        kinds = {path: next(g for g, pattern in GROUPS.items() if re.fullmatch(pattern, path)) for path in changed}
        for path in sorted(changed, key=lambda path: list(GROUPS).index(kinds[path])):
            rows.append((arm, kinds[path], path, *map(_shown, changed[path])))
    return rows


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, str) else str(value)


def parameter_groups(plan: Plan) -> list[tuple[str, str, str, str, str]]:
    """(arm, updated by, decayed, initial values, parameters) of each parameter group of the arms that have run."""
    rows = []
    for name in plan.arms:
        cells = [cell for cell in plan.cells if cell.arm == name]
        listed = next((table for cell in cells if (table := differences.manifest(cell.workdir).get("parameters"))), [])
        sizes: dict[tuple[str, str, str], int] = {}
        for row in listed if isinstance(listed, list) else []:
            if isinstance(row, dict) and isinstance(row.get("shape"), list):
                key = str(row.get("optimizer")), "yes" if row.get("decay") else "no", str(row.get("init"))
                sizes[key] = sizes.get(key, 0) + math.prod(row["shape"])
        rows += [(name, *key, f"{size:,}") for key, size in sorted(sizes.items())]
    return rows


def setting(plan: Plan) -> list[tuple[str, str]]:
    """(name, text) of the setting: size, data, seeds, hardware, versions, commit, over all machines that ran cells."""
    study, first = plan.study, plan.arms[plan.study.baseline]
    config = first.config
    stored = [differences.manifest(cell.workdir) for cell in (*plan.tuning, *plan.cells)]
    model, per_step = config.model, config.train.batch_size * config.model.context_length
    source = str(config.data.source)
    fingerprint = next((d["source_fingerprint"] for m in stored if "source_fingerprint" in (d := _part(m, "data"))), "")
    seeds = study.seed_values()
    told = [
        ("model", f"{first.parameters:,} parameters: {model.num_layers} layers, width {model.embed_dim}"),
        ("training", f"{first.tokens:,} tokens: {config.train.num_steps:,} steps of {per_step:,}"),
        ("data", f"{source} (fingerprint {str(fingerprint)[:12]})" if fingerprint else source),
        ("tokenizer", f"{config.tokenizer}, {first.vocab_size:,} tokens"),
        ("seeds", f"{len(seeds)} for every arm, {seeds[0]} to {seeds[-1]}; what a seed changes: {study.vary}"),
        ("score", f"{UNITS.get(study.metric, study.metric)} of the last validation; lower is better"),
        ("hardware", _all_of(_device(manifest) for manifest in stored if manifest)),
        ("versions", _all_of(_versions(manifest) for manifest in stored if manifest)),
        ("code", "; ".join([*sorted({_commit(m) for m in stored} - {""}), f"sha256 of the modules {plan.code[:12]}"])),
    ]
    return [(what, words) for what, words in told if words]


def _all_of(texts: Iterable[str]) -> str:
    return "; ".join(sorted(set(texts)))


def _part(manifest: dict[str, Any], name: str) -> dict[str, Any]:
    part = manifest.get(name)
    return part if isinstance(part, dict) else {}


def _device(manifest: dict[str, Any]) -> str:
    devices = _part(manifest, "devices")
    kind = manifest.get("processor") if devices.get("platform") == "cpu" else devices.get("kind")
    return f"{devices.get('count', 1)} x {kind or devices.get('kind', 'device')} per cell"


def _versions(manifest: dict[str, Any]) -> str:
    packages = _part(manifest, "packages")
    known = [("gptjax", manifest.get("gptjax")), ("Python", manifest.get("python"))]
    known += [(name, packages.get(name)) for name in ("jax", "jaxlib", "flax", "optax", "numpy")]
    return ", ".join(f"{name} {version}" for name, version in known if version)


def _commit(manifest: dict[str, Any]) -> str:
    git = _part(manifest, "git")
    return (
        f"commit {str(git['commit'])[:10]}{' with changes' if git.get('diff_sha256') else ''}"
        if "commit" in git
        else ""
    )


def commands(plan: Plan, given: Sequence[str]) -> list[str]:
    """The commands that repeat the study and each of its cells, from the directory of the code.

    Args:
      given: the arguments of the original command, if known.
    """
    steered = re.compile(r"--?(no)?(workdir|plan|report|noise|launcher|slurm|workers|dry_run)\b")
    kept, keeps = [], False
    for argument in given:  # a word after a flag without "=" is its value
        keeps = not steered.match(argument) if argument.startswith("-") else keeps
        kept += [argument] if keeps else []
    lines = [" ".join(["python -m gptjax.ablate", *map(_quoted, kept), f"--workdir=runs/{plan.study.name}"])]
    cells = {cell.key: cell for cell in (*plan.tuning, *plan.cells)}.values()
    for cell in cells:
        place = cell.workdir.relative_to(plan.workdir)
        lines.append(
            f"python -m gptjax.train --config=runs/{plan.study.name}/{place}/cell.py --workdir=runs/{place.name}"
        )
    return lines if kept else lines[1:]


def _quoted(argument: str) -> str:
    return argument if re.fullmatch(r"[-\w=./:,%+@]+", argument) else "'" + argument.replace("'", "'\\''") + "'"
