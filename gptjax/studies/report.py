"""Writes the report of a study: report.md, results.csv, figures; report.html and timing.csv with times, too.

The same cells give the same bytes. report.md, results.csv and the figures contain no times, so they are also the same
after a kill and a restart.
"""

from collections.abc import Sequence
from pathlib import Path

from gptjax.files import write_whole
from gptjax.studies import facts, figures, page, tables, timing
from gptjax.studies.cells import Plan
from gptjax.studies.facts import findings
from gptjax.studies.tables import Table


def write(plan: Plan, command: Sequence[str] = ()) -> Path:
    """Writes the report of the finished cells, and returns the path of report.md. `command`: see `page.text`."""
    drawn = figures.write(plan)
    for name, content in (
        ("results.csv", tables.of_cells(plan)),
        ("timing.csv", timing.table(plan)),
        ("report.html", page.text(plan, drawn, command)),
        ("report.md", text(plan, drawn, command)),
    ):
        write_whole(plan.workdir / name, content)
    return plan.workdir / "report.md"


def text(plan: Plan, drawn: Sequence[figures.Drawn] = (), command: Sequence[str] = ()) -> str:
    """report.md"""
    study = plan.study
    lines = [f"# {study.question}", ""]
    if source := facts.source(plan):
        lines += [f"Source: {source}", ""]
    for claim, comparison, verdict in findings(plan):
        told = f"**{claim.text}: {verdict}** ({facts.scale(plan, claim)}). {facts.explained(plan, comparison)}"
        lines += [told.rstrip(), ""]
    lines += [f"Scale: {facts.sizes(plan)}, seeds {', '.join(map(str, study.seed_values()[:20]))}.", ""]
    lines += _section(tables.results(plan))
    for figure in drawn:
        lines += [f"![{figure.caption}](figures/{figure.name}.svg)", ""]
    if not drawn and not figures.available():
        lines += [f"Figures need matplotlib: `{figures.INSTALL}`, then the same command with `--report`.", ""]
    for table in (
        tables.scaling(plan),
        tables.optima(plan),
        tables.tuning(plan),
        tables.sensitivity(plan),
        tables.differences(plan),
        tables.parameter_groups(plan),
        tables.cost(plan),
        tables.setting(plan),
        tables.diverged(plan),
    ):
        lines += _section(table)
    commands = facts.commands(plan, command)
    lines += ["## Commands", "", *(f"    {line}" for line in commands)]
    return "\n".join(lines) + "\n"


def _section(table: Table) -> list[str]:
    if not table.rows:
        return []
    rows = [[head.removesuffix("#") for head in table.heads], ["---"] * len(table.heads), *table.rows]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return [f"## {table.title}", "", *(line for note in table.notes for line in (note, "")), *lines, ""]
