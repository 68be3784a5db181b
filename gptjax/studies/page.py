"""report.html of a study: one file without network access or scripts, in a light and a dark theme."""

import html
import math
from collections.abc import Sequence

from gptjax.reporting import markup
from gptjax.reporting.page import document
from gptjax.studies import facts, figures, tables, timing
from gptjax.studies.cells import Plan
from gptjax.studies.tables import Table

_CSS = """
.claims td { padding-top: 10px; padding-bottom: 10px; }
.verdict { display: inline-block; padding: 1px 10px; border-radius: 10px; border: 1px solid var(--muted); }
.supported { color: var(--series-2); border-color: var(--series-2); }
.refuted { color: var(--series-1); border-color: var(--series-1); }
figure { margin: 0; } figcaption { margin-top: 8px; }
.panel p.note:first-child { margin-top: 0; }
"""


def text(plan: Plan, drawn: Sequence[figures.Drawn], command: Sequence[str] = ()) -> str:
    """The page. `command`: the arguments of the command that made the study, if known."""
    shown = {figure.name: _figure(figure) for figure in drawn}
    if not drawn and not figures.available():
        hint = f"Figures need matplotlib: {figures.INSTALL}, then the same command with --report."
        shown["loss"] = f'<p class="note">{html.escape(hint)}</p>'
    sections = [
        f"<header><h1>{html.escape(plan.study.question)}</h1>{_subtitle(plan)}</header>",
        _claims(plan),
        _table(tables.results(plan)),
        shown.get("differences", ""),
        "<h2>Loss</h2>" + shown["loss"] if "loss" in shown else "",
        "<h2>Scaling law</h2>" + shown["scaling"] if "scaling" in shown else "",
        _table(tables.scaling(plan)),
        _table(tables.optima(plan)),
        _table(tables.tuning(plan)),
        "<h2>Sensitivity</h2>" + shown["sensitivity"] if "sensitivity" in shown else "",
        _table(tables.sensitivity(plan), folded="the score of every point"),
        _table(tables.cost(plan)),
        _table(wall_clock(plan)),
        _table(tables.differences(plan)),
        _table(tables.parameter_groups(plan), folded="update, decay and initial values of each"),
        _table(tables.diverged(plan)),
        _table(tables.setting(plan)),
        _commands(facts.commands(plan, command)),
    ]
    body = "\n".join(filter(None, sections))
    return document(html.escape(plan.study.name or "study"), body, style=figures.CSS + _CSS)


def _subtitle(plan: Plan) -> str:
    cells = {cell.key: cell for cell in (*plan.tuning, *plan.cells)}.values()
    ended = sum(bool(cell.outcome()) for cell in cells)
    parts = [f"{len(plan.arms)} arms × {plan.study.seeds} seeds", f"{ended} of {plan.count} cells have ended"]
    return f'<div class="muted">{html.escape(" · ".join([plan.study.name, facts.sizes(plan), *parts]))}</div>'


def _claims(plan: Plan) -> str:
    """The source's finding beside our verdicts."""
    rows = []
    if source := facts.source(plan):
        rows.append(f'<tr><td class="key">the source</td><td></td><td>{html.escape(source)}</td></tr>')
    for claim, comparison, verdict in facts.findings(plan):
        kind, _, reason = verdict.partition(": ")
        told = f"{reason}{'. ' * bool(reason)}At {facts.scale(plan, claim)[3:]}. {facts.explained(plan, comparison)}"
        rows.append(
            f'<tr><td class="key"><b>{html.escape(claim.text)}</b></td>'
            f'<td class="key"><span class="verdict {kind.split()[0]}">{html.escape(kind)}</span></td>'
            f"<td>{html.escape(told)}</td></tr>"
        )
    joined = "\n".join(rows)
    return f'<h2>Verdict</h2>\n<div class="panel"><table class="claims">\n{joined}\n</table></div>' if rows else ""


def wall_clock(plan: Plan) -> Table:
    """Training time of the arms, and their scores at equal steps and at equal seconds."""
    limit, fastest, arms = timing.matched(plan)
    metric = plan.study.metric
    rows = []
    for one in arms:
        done = [cell for cell in plan.cells if cell.arm == one.arm and cell.outcome() == "done"]
        steps = [cell.score(metric, math.nan) for cell in done]
        rows.append(
            (
                one.arm,
                f"{one.seconds:,.1f}",
                str(one.together) if one.together > 1 else "no",
                f"{one.seconds / one.together:,.1f}",
                tables.number(one.tokens_per_second, ",.0f"),
                f"{sum(steps) / len(steps):.4f}",
                tables.number(one.reached, ".4f") or "none yet",
                f"{one.share:.0%}",
                str(one.cells),
            )
        )
    heads = (
        *(
            "arm",
            "seconds of training#",
            "packed#",
            "seconds per cell#",
            "tokens / second#",
            f"{metric} at equal steps#",
        ),
        *(f"{metric} at {limit:,.1f} s#", "share of its training by then#", "cells#"),
    )
    notes = (
        f"Medians over the finished cells. {fastest} is the fastest; the others are compared at its "
        f"{limit:,.1f} seconds, interpolated between two validations. An arm that is cut short has not reached the "
        "end of its schedule. Only training time counts: no start-up, compilation or validation, but it includes "
        "slowdowns by other programs. Packed cells share their time: seconds per cell are the seconds of the program "
        "over its cells; compare them with those of the same study with --pack=off to see what packing gains.",
    )
    return Table("Wall-clock time", heads, rows, notes)


def _table(table: Table, *, folded: str = "") -> str:
    """A section; `folded`: the label that opens a folded table."""
    if not table.rows:
        return ""
    notes = "".join(f'<p class="note">{html.escape(note)}</p>' for note in table.notes)
    panel = f'<div class="panel">{notes}{markup.table(table.columns(), table.rows)}</div>'
    if folded:
        panel = f"<details><summary>{html.escape(folded)}</summary>{panel}</details>"
    return f"<h2>{html.escape(table.title)}</h2>\n{panel}"


def _figure(figure: figures.Drawn) -> str:
    caption = f"<figcaption>{html.escape(figure.caption)}</figcaption>"
    return f'<div class="panel"><figure class="note">{figure.inline()}{caption}</figure></div>'


def _commands(lines: Sequence[str]) -> str:
    study = [line for line in lines if "gptjax.ablate" in line]
    cells = html.escape("\n".join(line for line in lines if line not in study))
    first = f"<pre>{html.escape(study[0])}</pre>" if study else ""
    folded = f"<details><summary>each cell alone</summary><pre>{cells}</pre></details>"
    return f'<h2>Commands that repeat it</h2>\n<div class="panel">{first}{folded}</div>'
