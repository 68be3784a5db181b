"""The outcomes of the cases: a table, and how to repeat each failure."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Outcome:
    """The outcome of one case. `wrong`: what did not end as required; empty if all did."""

    stage: str
    kind: str
    seed: int
    moments: list[str]
    wrong: str
    seconds: float

    @property
    def name(self) -> str:
        return f"{self.stage}:{self.kind}:{self.seed}"


def command(names: Sequence[str]) -> str:
    return f"python -m tools.torture --only={','.join(names)}"


def _cells(outcomes: Sequence[Outcome], kinds: Sequence[str]) -> list[list[str]]:
    """Rows of the table: the stage, and for each kind how many of the cases ended as required."""
    rows = []
    for stage in dict.fromkeys(outcome.stage for outcome in outcomes):
        row = [stage]
        for kind in kinds:
            tried = [outcome for outcome in outcomes if (outcome.stage, outcome.kind) == (stage, kind)]
            row.append(f"{sum(not outcome.wrong for outcome in tried)} of {len(tried)}" if tried else "-")
        rows.append(row)
    return rows


def show(outcomes: Sequence[Outcome], kinds: Sequence[str], notes: Sequence[str]) -> None:
    """Prints the table; failures were printed when they occurred."""
    table = Table("ended right", *kinds)
    for row in _cells(outcomes, kinds):
        table.add_row(*row)
    console = Console()
    console.print(table)
    for note in notes:
        console.print(note, highlight=False, markup=False)


def line(outcome: Outcome) -> str:
    return f"{outcome.name}  {'; '.join(outcome.moments)}: {outcome.wrong}"


def write(path: Path, outcomes: Sequence[Outcome], kinds: Sequence[str], notes: Sequence[str]) -> None:
    """Writes PATH as JSON and, beside it, PATH.md for readers."""
    failed = [outcome for outcome in outcomes if outcome.wrong]
    everything = {"cases": [asdict(outcome) for outcome in outcomes], "notes": list(notes)}
    path.write_text(json.dumps(everything, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = [f"| ended right | {' | '.join(kinds)} |", "|---" * (len(kinds) + 1) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in _cells(outcomes, kinds)]
    lines += ["", *notes] if notes else []
    for outcome in failed:
        lines += ["", f"* `{command([outcome.name])}`", f"  {'; '.join(outcome.moments)}:", f"  {outcome.wrong}"]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
