"""WORKDIR/report.html: curves, results, samples and settings of a run in one file that needs no network.

Everything is read from the work directory; what is missing or damaged there is left out.
"""

import html
import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gptjax.files import sweep, write_whole
from gptjax.reporting import bands, charts, costs, markup, norms
from gptjax.reporting.charts import Area, Mark, Series

Line = dict[str, Any]

CSS = """
:root {
  color-scheme: light dark;
  --text: #1b1f24; --muted: #626b76; --page: #f5f6f8; --surface: #ffffff; --grid: #e6e9ed;
  --series-0: #8fa8d8; --series-1: #c2410c; --series-2: #15803d; --series-3: #7e22ce; --accent: #1d4ed8;
}
@media (prefers-color-scheme: dark) {
  :root {
    --text: #e6e9ed; --muted: #98a2ae; --page: #101418; --surface: #181d23; --grid: #2a313a;
    --series-0: #5b78b5; --series-1: #fb923c; --series-2: #4ade80; --series-3: #c084fc; --accent: #8ab4ff;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { margin: 0; font-size: 28px; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 40px 0 12px; font-size: 18px; }
h3 { margin: 0 0 8px; font-size: 14px; font-weight: 600; }
.muted, .note { color: var(--muted); }
.panel, .card { background: var(--surface); border: 1px solid var(--grid); border-radius: 10px; }
.panel { padding: 16px 20px; }
.card { padding: 12px 16px; font-size: 13px; }
.panel { margin: 0 0 16px; overflow-x: auto; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 12px; }
.cards { margin-top: 24px; }
.card .figure { font-size: 22px; font-weight: 600; font-variant-numeric: tabular-nums; line-height: 1.35; }
.card .note { font-size: 12px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 16px; }
.charts .panel { margin: 0; overflow: hidden; }
table { border-collapse: collapse; width: 100%; font-size: 13px; }
th, td { padding: 5px 16px 5px 0; border-bottom: 1px solid var(--grid); }
th, td { text-align: left; vertical-align: top; }
tr:last-child td { border-bottom: 0; }
th { color: var(--muted); font-weight: 500; white-space: nowrap; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.code { font: 12px/1.6 ui-monospace, monospace; overflow-wrap: anywhere; min-width: 12em; }
td.key { white-space: nowrap; }
details { margin: 0 0 12px; }
summary { cursor: pointer; color: var(--accent); margin-bottom: 8px; }
pre { margin: 0 0 16px; font: 13px/1.6 ui-monospace, monospace; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; }
pre:last-child { margin-bottom: 0; }
pre b { color: var(--accent); font-weight: 600; }
"""


def write_report(workdir: Path) -> Path:
    """Writes WORKDIR/report.html atomically and returns its path."""
    workdir = Path(workdir)
    path = workdir / "report.html"
    sweep(workdir)
    write_whole(path, _page(workdir), errors="replace")  # a sampled text may contain half a surrogate pair
    return path


def _page(workdir: Path) -> str:
    metrics = _read_metrics(workdir / "metrics.jsonl")
    manifest = _read_object(workdir / "manifest.json")
    config = _read_object(workdir / "config.json")
    band = bands.find(config, markup.as_object(manifest.get("data")))
    name = html.escape(workdir.resolve().name)
    sections = [
        f"<header><h1>{name}</h1>{_subtitle(manifest)}</header>",
        _cards(metrics),
        _curves(metrics, band),
        norms.section(metrics["train"]),
        _evaluations(sorted(workdir.glob("evaluation/*.json"))),
        _samples(_read_lines(workdir / "samples.jsonl")),
        _time(metrics["train"] + metrics["validation"]),
        _costs(metrics, manifest, config),
        _data_card(workdir / "data_card.md"),
        _settings(manifest, config),
    ]
    body = "\n".join(filter(None, sections))
    return document(name, body, style=charts.CSS, script=charts.SCRIPT)


def document(name: str, body: str, *, style: str = "", script: str = "") -> str:
    """A page that needs no network. `name`: its title, as HTML."""
    scripts = f"<script>{script}</script>\n" if script else ""
    allowed = "default-src 'none'; style-src 'unsafe-inline'" + "; script-src 'unsafe-inline'" * bool(script)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{allowed}">
<title>{name}</title>
<style>{CSS}{style}</style>
</head>
<body>
<main>
{body}
</main>
{scripts}</body>
</html>
"""


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError):
        return {}
    return markup.as_object(value)


def _read_lines(path: Path) -> list[Line]:
    """The objects of a JSONL file that have a step; a line cut short by a kill is left out."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    lines = []
    for row in text.split("\n"):
        try:
            line = markup.as_object(json.loads(row))
        except ValueError:
            continue
        if math.isfinite(markup.as_number(line.get("step"))):
            lines.append(line)
    return lines


def _read_metrics(path: Path) -> dict[str, list[Line]]:
    """Lines by split, by ascending step; of several lines for a step the last one counts."""
    latest: dict[str, dict[float, Line]] = {"train": {}, "validation": {}}
    for line in _read_lines(path):
        if line.get("split") in ("train", "validation"):
            latest[line["split"]][line["step"]] = line
    return {split: [lines[step] for step in sorted(lines)] for split, lines in latest.items()}


def _finite(lines: Iterable[Line], key: str) -> list[tuple[Line, float]]:
    """The lines in which `key` is a finite number, each with this number."""
    pairs = ((line, markup.as_number(line.get(key))) for line in lines)
    return [(line, value) for line, value in pairs if math.isfinite(value)]


def _best(validation: list[Line]) -> tuple[Line, float] | None:
    """The line with the lowest validation loss, whose checkpoint is the best; the first of equal ones."""
    return min(_finite(validation, "loss"), key=lambda pair: pair[1], default=None)


def _subtitle(manifest: dict[str, Any]) -> str:
    devices, packages, git = (markup.as_object(manifest.get(key)) for key in ("devices", "packages", "git"))
    parts = []
    if sizes := [_num_elements(row) for row in _parameters(manifest)]:
        parts.append(f"{markup.short(sum(sizes))} parameters")
    if "kind" in devices:
        parts.append(f"{devices.get('count', 1)} × {devices['kind']}")
    if "jax" in packages:
        parts.append(f"JAX {packages['jax']}")
    if "gptjax" in manifest:
        parts.append(f"gptjax {manifest['gptjax']}")
    if "commit" in git:
        parts.append(f"commit {str(git['commit'])[:10]}" + (" with changes" if git.get("diff_sha256") else ""))
    return f'<div class="muted">{html.escape(" · ".join(parts))}</div>' if parts else ""


def _cards(metrics: dict[str, list[Line]]) -> str:
    """The last numbers of a run, from the training split if the run has no validation."""
    train, validation = metrics["train"], metrics["validation"]
    split, lines = ("validation", validation) if _finite(validation, "loss") else ("training", train)
    best = _best(validation)
    cards: list[tuple[str, str, str]] = []  # label, number, note
    for key, label, unit in (
        ("loss", f"{split} loss", "nats per token"),
        ("perplexity", "perplexity", split),
        ("bits_per_byte", "bits per byte", split),
    ):
        for line, value in _finite(lines, key)[-1:]:
            cards.append((label, markup.significant(value), f"{unit}, step {line['step']:,}"))
    if best:
        cards.insert(1, ("best loss", markup.significant(best[1]), f"validation, step {best[0]['step']:,}"))
    if seen := [value for _, value in _finite(train + validation, "tokens_seen")]:
        cards.append(("tokens seen", markup.short(max(seen)), "in training"))
    if speeds := [value for _, value in _finite(train, "tokens_per_second")]:
        cards.append(("tokens / second", f"{statistics.median(speeds):,.0f}", "median"))
    if seconds := _wall_time(train + validation):
        cards.append(("wall time", markup.duration(seconds), "with evaluation"))
    if not cards:
        return ""
    items = "\n".join(
        f'<div class="card"><div class="muted">{html.escape(label)}</div>'
        f'<div class="figure">{html.escape(number)}</div><div class="note">{html.escape(note)}</div></div>'
        for label, number, note in cards
    )
    return f'<div class="cards">\n{items}\n</div>'


def _wall_time(lines: Iterable[Line]) -> float:
    """Total seconds of the run; the clock in its lines restarts whenever the run was continued."""
    total = last = 0.0
    for _, seconds in _finite(sorted(lines, key=lambda line: line["step"]), "wall_time_s"):
        if seconds < last:
            total += last
        last = seconds
    return total + last


def _curves(metrics: dict[str, list[Line]], band: bands.Band | None) -> str:
    """Curves of loss, learning rate, gradient norm and speed, with the config's reference band if there is one."""
    train, validation = metrics["train"], metrics["validation"]
    best = _best(validation)
    marks = [Mark(best[0]["step"], f"best {markup.significant(best[1])} at step {best[0]['step']:,}")] if best else []
    area = Area("expected validation", band.steps, band.low, band.high) if band else None
    figures = [
        _curve("Reward", "reward", "of an answer", {"training": train, "validation": validation}),
        _curve("Loss", "loss", "nats per token", {"training": train, "validation": validation}, marks=marks, area=area),
        _curve("Learning rate", "learning_rate", "", {"training": train}),
        _curve("Gradient norm", "gradient_norm", "before clipping, log scale", {"training": train}, log_y=True),
        _curve("Speed", "tokens_per_second", "tokens per second", {"training": train}),
    ]
    drawn = "\n".join(f'<div class="panel">{figure}</div>' for figure in figures if figure)
    losses = [(line["step"], value) for line, value in _finite(validation, "loss")]
    verdict = html.escape(band.verdict(losses)) if band else ""
    note = f'<p class="note">Validation loss {verdict}.</p>\n' if verdict else ""
    return f'<h2>Curves</h2>\n{note}<div class="charts">\n{drawn}\n</div>' if drawn else ""


def _curve(title: str, key: str, y_label: str, splits: dict[str, list[Line]], **options: Any) -> str:
    series = []
    for name, lines in splits.items():
        if points := [(line["step"], markup.as_number(line[key])) for line in lines if key in line]:
            series.append(Series(name, *zip(*points, strict=True)))
    return charts.line_chart(series, title=title, x_label="step", y_label=y_label, **options) if series else ""


def _evaluations(paths: Iterable[Path]) -> str:
    panels = []
    for path in paths:
        evaluation = _read_object(path)
        rows = [
            (task, metric, *_result(entry))
            for task, entries in markup.as_object(evaluation.get("results")).items()
            for metric, entry in markup.as_object(entries).items()
        ]
        if rows:
            step = markup.as_object(evaluation.get("checkpoint")).get("step")
            heading = path.stem if step is None else f"{path.stem}: checkpoint of step {step}"
            columns = {
                "task": "key", "metric": "key", "value": "number", "95 % interval": "number", "n": "number",
                "signature": "code",
            }  # fmt: skip
            panels.append(f'<div class="panel"><h3>{html.escape(heading)}</h3>{markup.table(columns, rows)}</div>')
    return "<h2>Evaluation</h2>\n" + "\n".join(panels) if panels else ""


def _result(entry: Any) -> tuple[str, str, str, str]:
    """Value, interval, n and signature of a metric as text; for a bare number only the value."""
    entry = entry if isinstance(entry, dict) else {"value": entry}
    value, bounds = markup.as_number(entry.get("value")), entry.get("ci95")
    bounds = [markup.as_number(bound) for bound in bounds] if isinstance(bounds, list) else []
    known = len(bounds) == 2 and all(map(math.isfinite, bounds))
    return (
        markup.significant(value) if math.isfinite(value) else "",
        " – ".join(map(markup.significant, bounds)) if known else "",
        f"{entry['n']:,}" if math.isfinite(markup.as_number(entry.get("n"))) else "",
        markup.cell(entry.get("signature")),
    )


def _samples(lines: list[Line]) -> str:
    """The texts of the last step; a click shows those of earlier steps."""
    by_step: dict[float, list[Line]] = {}
    for line in lines:
        by_step.setdefault(line["step"], []).append(line)
    if not by_step:
        return ""
    last, *earlier = sorted(by_step, reverse=True)
    parts = ["<h2>Samples</h2>", _samples_of(last, by_step[last])]
    if earlier:
        panels = "\n".join(_samples_of(step, by_step[step]) for step in earlier)
        parts.append(f"<details><summary>Earlier samples ({len(earlier)} steps)</summary>\n{panels}\n</details>")
    return "\n".join(parts)


def _samples_of(step: float, lines: list[Line]) -> str:
    texts = "\n".join(
        f"<pre><b>{html.escape(markup.cell(line.get('prompt')))}</b>{html.escape(markup.cell(line.get('text')))}</pre>"
        for line in lines
    )
    return f'<div class="panel samples"><h3>step {step:,}</h3>\n{texts}</div>'


def _time(lines: list[Line]) -> str:
    """The seconds that the run spent on each activity, from the line with the largest sum."""
    seconds = max(map(_seconds, lines), key=lambda found: sum(found.values()), default={})
    total = sum(seconds.values())
    if not total:
        return ""
    rows = [(name, f"{spent:,.1f}", f"{spent / total:.1%}") for name, spent in seconds.items()]
    columns = {"activity": "key", "seconds": "number", "share": "number"}
    return (
        f'<h2>Where the time went</h2>\n<div class="panel"><p>goodput {seconds.get("step", 0) / total:.1%}: '
        f"the share of the time spent in steps</p>{markup.table(columns, rows)}</div>"
    )


def _seconds(line: Line) -> dict[str, float]:
    named = ((key.removeprefix("seconds/"), value) for key, value in line.items() if key.startswith("seconds/"))
    numbers = {name: markup.as_number(value) for name, value in named}
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


def _costs(metrics: dict[str, list[Line]], manifest: dict[str, Any], config: dict[str, Any]) -> str:
    seconds = max((sum(_seconds(line).values()) for lines in metrics.values() for line in lines), default=0.0)
    rows = costs.rows(metrics["train"], seconds, manifest, config)
    columns = {"what": "key", "how much": "code"}
    return f'<h2>Cost</h2>\n<div class="panel">{markup.table(columns, rows)}</div>' if rows else ""


def _data_card(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return (
        "<h2>Data</h2>\n<details><summary>Data card: documents read, removed and kept</summary>"
        f'<div class="panel"><pre>{html.escape(text)}</pre></div></details>'
    )


def _settings(manifest: dict[str, Any], config: dict[str, Any]) -> str:
    pairs = {"name": "key", "value": "code"}
    provenance = {key: value for key, value in manifest.items() if key not in ("parameters", "changes")}
    parameters = _parameters(manifest)
    columns = dict.fromkeys(dict.fromkeys(key for row in parameters for key in row), "code")
    total = sum(map(_num_elements, parameters))
    folded = (
        (
            "Options changed during the run",
            {"step": "number", "option": "key", "before": "code", "now": "code"},
            _changes(manifest),
        ),
        ("Manifest: what produced this run", pairs, list(markup.flat(provenance))),
        ("Config", pairs, list(markup.flat(config))),
        (
            f"Parameters: {total:,} in {len(parameters)} arrays",
            columns,
            [[markup.cell(row.get(column)) for column in columns] for row in parameters],
        ),
    )
    details = "\n".join(
        f"<details><summary>{html.escape(title)}</summary>"
        f'<div class="panel">{markup.table(columns, rows)}</div></details>'
        for title, columns, rows in folded
        if rows
    )
    return f"<h2>Settings</h2>\n{details}" if details else ""


def _changes(manifest: dict[str, Any]) -> list[list[str]]:
    """Step, option, value before and now."""
    listed = manifest.get("changes")
    rows = []
    for change in map(markup.as_object, listed if isinstance(listed, list) else []):
        for name, values in markup.as_object(change.get("options")).items():
            if isinstance(values, list) and len(values) == 2:
                rows.append([markup.cell(change.get("step")), name, *map(markup.cell, values)])
    return rows


def _parameters(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    rows = manifest.get("parameters")
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _num_elements(row: dict[str, Any]) -> int:
    shape = row.get("shape")
    valid = isinstance(shape, list) and all(isinstance(size, int) for size in shape)
    return math.prod(shape) if valid else 0
