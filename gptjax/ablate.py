"""Run an ablation: a study file -> cells, a table, and a verdict on its claim.

  python -m gptjax.ablate --study=experiments/optimizers.py:smoke --workdir=runs/optimizers --plan
  python -m gptjax.ablate --study=experiments/optimizers.py:smoke --workdir=runs/optimizers
  python -m gptjax.ablate --study=experiments/optimizers.py --workdir=runs/optimizers --study.seeds=5
  python -m gptjax.ablate --study=experiments/optimizers.py --workdir=runs/optimizers --report
  python -m gptjax.ablate --diff runs/a runs/b

--plan shows what would be run, what it costs and what the arms differ in. The same command runs what is missing.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from gptjax import cli
from gptjax import config as config_lib
from gptjax.config import Option, values
from gptjax.config.validation import option_problem
from gptjax.errors import RunError, UserError
from gptjax.studies.study import Study, set_options

MOST_PACKED = 16  # cells in one program
# What --study.NAME=VALUE sets, beside --study.base.section.option=VALUE.
SETTINGS = {
    "seeds": Option(3, "seeds of every arm", minimum=1, maximum=1000),
    "first_seed": Option(0, "the first seed", minimum=0, maximum=2**31),
    "margin": Option(0.0, "margin of claims", minimum=0),
    "metric": Option("loss", "of the last validation; lower is better"),
}


def main(argv: list[str]) -> None:
    from gptjax.studies import study as studies

    if "--diff" in argv[1:]:
        difference([Path(argument) for argument in argv[1:] if argument != "--diff"])
        return
    specs = [value for flag, _, value in (a.partition("=") for a in argv) if flag.lstrip("-") == "study"]
    chosen = [a.lstrip("-").removeprefix("study.") for a in argv if a.lstrip("-").startswith("study.")]
    argv = [a for a in argv if not a.lstrip("-").startswith(("study=", "study."))]
    flag_values = flags.FlagValues()
    flags.DEFINE_string(
        "workdir", None, "where cells and report are, e.g. --workdir=runs/optimizers", flag_values=flag_values
    )
    flags.DEFINE_bool("plan", False, "show what would be run, and run nothing", flag_values=flag_values)
    flags.DEFINE_bool("report", False, "write the report of what is there, and run nothing", flag_values=flag_values)
    flags.DEFINE_integer(
        "workers",
        0,
        "cells at once; 0 = one a core, or one a GPU",
        lower_bound=0,
        upper_bound=4096,
        flag_values=flag_values,
    )
    flags.DEFINE_enum(
        "pack",
        "auto",
        ["auto", "on", "off"],
        "cells that differ in seeds and hyper-parameters as one program; auto = on a GPU or TPU",
        flag_values=flag_values,
    )
    cli.parse(flag_values, argv, __doc__)
    if not specs:
        raise UserError("--study is missing; e.g. --study=experiments/optimizers.py:smoke")
    if not flag_values.workdir:
        raise UserError("--workdir is missing; e.g. --workdir=runs/optimizers")
    study = with_settings(studies.read(specs[-1]), chosen)
    modes = {"look": flag_values.plan, "report": flag_values.report}
    ablate(study, Path(flag_values.workdir), **modes, workers=flag_values.workers, pack=flag_values.pack)


def with_settings(study: Study, chosen: Sequence[str]) -> Study:
    """The study with NAME=VALUE of the command line. Raises UserError for a name or a value that is none."""
    known = [*SETTINGS, *(f"base.{path}" for path in config_lib.flat_options())]
    for text in chosen:
        name, equals, value = text.partition("=")
        if name not in known or not equals:
            raise UserError(f"unknown option --study.{name[:100]}{config_lib.suggestion(name, known)}")
        if name.startswith("base."):
            set_options(study.base, {name.removeprefix("base."): value}, f"--study.{name}")
            continue
        if problem := option_problem(f"--study.{name}", SETTINGS[name], value):
            raise UserError(problem)
        study = dataclasses.replace(study, **{name: values.read(SETTINGS[name], value)})
    return study


def difference(workdirs: list[Path]) -> None:
    """Prints why two runs differ. Raises UserError unless there are two."""
    from gptjax.studies import differences

    if len(workdirs) != 2:
        raise UserError(f"--diff compares two work directories, and there are {len(workdirs)}: --diff runs/a runs/b")
    found, parting = differences.compare(*workdirs)
    for one in found:
        print(f"{one.name}: {one.ours!r} in the first, {one.theirs!r} in the second: {one.effect}")
    if not found:
        print("config, data, code, packages and devices are the same")
    print(parting.in_words())


def ablate(study: Study, workdir: Path, *, look: bool, report: bool, workers: int, pack: str = "auto") -> None:
    """Shows the plan of a study, runs what is missing of it, and writes its report."""
    from gptjax.studies import local
    from gptjax.studies import report as reports
    from gptjax.studies.cells import Plan

    plan = Plan(study, workdir)
    print(describe(plan))
    plan.check_matched()
    if look:
        return
    plan.claim()
    if not report:
        together = pack == "on" or (pack == "auto" and not local.computes_on_cores())
        ran: set[str] = set()
        while jobs := local.packs(
            _new(plan, ran), most=MOST_PACKED if together else 1
        ):  # grids, then the chosen points
            local.run(jobs, workers=workers, show=_show)
    path = reports.write(plan)
    print()
    print(path.read_text(encoding="utf-8"))
    print(f"report: {path}")
    if missing := plan.missing():
        raise RunError(f"{len(missing)} of {plan.count} cells are missing; the same command runs them")


def _new(plan: Any, ran: set[str]) -> list[Any]:
    """The cells that are missing and were not tried by this command: `ran`, to which they are added."""
    found = [cell for cell in plan.missing() if cell.key not in ran]
    ran.update(cell.key for cell in found)
    return found


def describe(plan: Any) -> str:
    """The plan: arms with their sizes and differences, cells, cost."""
    missing = len(plan.missing())
    lines = [plan.study.question, ""]
    for arm in plan.arms.values():
        changes = plan.differences()[arm.name]
        told = ", ".join(f"{name} {a!r} -> {b!r}" for name, (a, b) in changes.items()) or "the baseline"
        lines.append(f"  {arm.name}: {arm.parameters:,} parameters, {arm.flops_per_token:.3g} FLOPs a token; {told}")
    first, study = plan.arms[plan.study.baseline], plan.study
    flops = sum(plan.arms[cell.arm].training_flops for cell in plan.missing())
    later = sum(study.seeds for name in plan.points if plan.chosen(name) is None)
    flops += sum(study.seeds * arms[0].training_flops for name, arms in plan.points.items() if not plan.chosen(name))
    lines += [
        "",
        f"{plan.count} cells ({len(plan.arms)} arms x {study.seeds} seeds"
        f"{f' + {len(plan.tuning)} of tuning' if plan.tuning else ''}) of {first.tokens:,} tokens; "
        f"{missing + later} to run, {flops:.3g} FLOPs",
    ]
    for name in plan.points:
        if budget := study.tuning_budget(name):
            seeds = len(study.tuning_seed_values())
            lines.append(f"tuning of {name}: {budget} cells ({budget // seeds} points x {seeds} seeds)")
        lines += [f"warning: {sentence}: it gives no verdict; widen the grid" for sentence in plan.censored(name)]
    lines += [f"claim: {claim.text}" for claim in study.parsed_claims()]
    return "\n".join(lines)


def _show(states: dict[str, str]) -> None:
    for name, words in states.items():
        if not words.startswith("step"):
            print(f"{name}: {words}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(cli.run(main))
