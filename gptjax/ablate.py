"""Run an ablation: a study file -> cells, a table, and a verdict on its claim. Or search for the best values.

  python -m gptjax.ablate --study=experiments/optimizers.py:smoke --workdir=runs/optimizers --plan
  python -m gptjax.ablate --study=experiments/optimizers.py:smoke --workdir=runs/optimizers
  python -m gptjax.ablate --study=experiments/optimizers.py --workdir=runs/optimizers --study.seeds=5
  python -m gptjax.ablate --study=experiments/optimizers.py --workdir=runs/optimizers --noise
  python -m gptjax.ablate --study=experiments/optimizers.py --workdir=runs/optimizers --report
  python -m gptjax.ablate --study=experiments/optimizers.py --workdir=SHARED/optimizers --launcher=slurm
      --slurm.partition=gpu --slurm.gpus=1 --slurm.time=1:00:00
  python -m gptjax.ablate --search --config=configs/quickstart.py --workdir=runs/rates --search.trials=20
      --search.optimizer.learning_rate=1e-4..1e-2 --search.optimizer.weight_decay=0,0.1,0.3 --search.method=random
  python -m gptjax.ablate --coordinates --config=configs/quickstart.py --config.model.mup_base_width=192
      --workdir=runs/coordinates
  python -m gptjax.ablate --reproduce=runs/a
  python -m gptjax.ablate --diff runs/a runs/b

--plan shows the cells that would run, their cost and how the arms differ. The same command again runs missing cells.
"""

import contextlib
import dataclasses
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from gptjax import cli
from gptjax import config as config_lib
from gptjax.buckets import is_url
from gptjax.config import Config, Option, values
from gptjax.config.validation import option_problem
from gptjax.errors import RunError, UserError
from gptjax.studies import study as studies
from gptjax.studies.study import Study, set_options

MOST_PACKED = 16  # cells in one program
# What --study.NAME=VALUE sets; --study.base.section.option=VALUE changes the base config.
SETTINGS = {
    "seeds": Option(3, "seeds of every arm", minimum=1, maximum=studies.MOST_SEEDS),
    "first_seed": Option(0, "the first seed", minimum=0, maximum=2**31),
    "tuning_seeds": Option(1, "seeds of every point of a tuning grid", minimum=1, maximum=studies.MOST_SEEDS),
    "vary": Option("both", "what a seed changes", choices=studies.VARY),
    "margin": Option(0.0, "margin of claims", minimum=0),
    "metric": Option("loss", "metric of the last validation; lower is better"),
}


# The flags that each mode takes.
MODES = {
    "search": ("config", "workdir", "workers"),
    "reproduce": ("workdir", "steps"),
    "coordinates": ("config", "workdir", "widths", "steps", "seeds"),
    "study": ("workdir", "plan", "noise", "report", "workers", "pack", "launcher", "launcher.wait", "dry_run"),
}


def main(argv: list[str]) -> None:
    if "--diff" in argv[1:]:
        difference([argument for argument in argv[1:] if argument != "--diff"])
        return
    given = [argument.lstrip("-") for argument in argv[1:] if argument.startswith("-")]
    specs = [text.removeprefix("study=") for text in given if text.startswith("study=")]
    chosen = [text.removeprefix("study.") for text in given if text.startswith("study.")]
    searched = [text.removeprefix("search.") for text in given if text.startswith("search.")]
    asked_of_slurm = [text.removeprefix("slurm.") for text in given if text.startswith("slurm.")]
    words, command = _config_words(argv[1:]), argv[1:]
    argv = [a for a in argv if not a.lstrip("-").startswith(("study=", "study.", "search.", "slurm."))]
    flag_values = flags.FlagValues()
    _define(flag_values)
    cli.parse(flag_values, argv, __doc__)
    modes = {"search": flag_values.search or bool(searched), "reproduce": bool(flag_values.reproduce)}
    modes |= {"coordinates": flag_values.coordinates, "study": bool(specs or chosen)}
    _check_modes(flag_values, [mode for mode, asked in modes.items() if asked])
    slurm_options = _slurm_options(flag_values, asked_of_slurm)
    if modes["reproduce"]:
        reproduce(flag_values.reproduce, flag_values.workdir, steps=flag_values.steps)
        return
    if modes["search"] and not flag_values.search:
        raise UserError(f"--search.{searched[0].partition('=')[0][:100]} needs --search")
    if not (modes["search"] or modes["coordinates"] or specs):
        raise UserError("--study is missing; e.g. --study=experiments/optimizers.py:smoke")
    if not flag_values.workdir:
        raise UserError("--workdir is missing; e.g. --workdir=runs/optimizers")
    workdir = _place(flag_values, [f"--{mode}" for mode in ("search", "coordinates") if modes[mode]])
    if modes["coordinates"]:
        coordinates(cli.read_config(flag_values), workdir, flag_values)
        return
    if modes["search"]:
        search(cli.read_config(flag_values), workdir, searched, words, workers=flag_values.workers)
        return
    study = with_settings(studies.read(specs[-1]), chosen)
    asked = {name: flag_values[name].value for name in ("noise", "report", "workers", "pack", "dry_run")}
    asked |= {"slurm": slurm_options, "wait": flag_values["launcher.wait"].value}
    ablate(study, workdir, look=flag_values.plan, command=command, **asked)


def _place(flag_values: flags.FlagValues, modes: Sequence[str]) -> Path:
    """The directory of --workdir, or the mirror of a bucket. Raises UserError for a mode that needs a disk."""
    from gptjax.artifacts import mirror

    needing = [*modes, *["--launcher=slurm"] * (flag_values.launcher == "slurm")]
    needing += ["--pack=on"] * (flag_values.pack == "on")
    if is_url(flag_values.workdir) and needing:
        raise UserError(f"--workdir={flag_values.workdir} is in a bucket, and {needing[0]} needs a directory on a disk")
    return (mirror.opened if flag_values.plan or flag_values.report else mirror.writable)(flag_values.workdir)


def _define(flag_values: flags.FlagValues) -> None:
    cli.define_config(flag_values)
    flag_values["config"].help = "config of --search or --coordinates, e.g. --config=configs/quickstart.py"
    flags.DEFINE_string(
        "workdir", None, "where cells and report are written, e.g. --workdir=runs/optimizers", flag_values=flag_values
    )
    for name, meaning in (
        ("plan", "show what would be run, and run nothing"),
        ("noise", "run the baseline with other seeds, and record how much the metric varies with the seed"),
        ("report", "write the report of the finished cells, and run nothing"),
        ("coordinates", "the coordinate check of muP: how far activations move in a few steps, by width"),
        ("search", "search in --search.section.option=LOW..HIGH or VALUE,VALUE; see --search.method, trials, seeds"),
    ):
        flags.DEFINE_bool(name, False, meaning, flag_values=flag_values)
    flags.DEFINE_string(
        "reproduce", None, "run this work directory again and compare, e.g. --reproduce=runs/a", flag_values=flag_values
    )
    for name, meaning, most in (
        ("workers", "cells at once; 0 = one per core, or one per GPU", 4096),
        ("steps", "with --reproduce: steps to run, 0 = all; with --coordinates: steps to run, 0 = 10", 10**9),
        ("seeds", "with --coordinates: seeds to average over; 0 = 3", 1000),
    ):
        flags.DEFINE_integer(name, 0, meaning, lower_bound=0, upper_bound=most, flag_values=flag_values)
    flags.DEFINE_list(
        "widths",
        ["1", "2", "4", "8"],
        "with --coordinates: widths, as multiples of model.embed_dim",
        flag_values=flag_values,
    )
    flags.DEFINE_enum(
        "launcher",
        "local",
        ["local", "slurm"],
        "where cells run; slurm = as a job array; --slurm.partition=gpu and so on are passed to sbatch",
        flag_values=flag_values,
    )
    flags.DEFINE_bool("launcher.wait", True, "with --launcher=slurm: wait for the cells", flag_values=flag_values)
    flags.DEFINE_bool(
        "dry_run", False, "with --launcher=slurm: print the script, and submit nothing", flag_values=flag_values
    )
    flags.DEFINE_enum(
        "pack",
        "auto",
        ["auto", "on", "off"],
        "train cells that differ only in seeds and hyper-parameters as one program; auto = on a GPU or TPU",
        flag_values=flag_values,
    )


def _slurm_options(flag_values: flags.FlagValues, chosen: Sequence[str]) -> dict[str, str] | None:
    """Options of sbatch; None: the study runs on this machine. Raises UserError for flags without --launcher=slurm."""
    from gptjax.studies import slurm

    if flag_values.launcher == "slurm":
        return slurm.read_options(chosen)
    given = [f"slurm.{text.partition('=')[0][:60]}" for text in chosen]
    given += [name for name in ("launcher.wait", "dry_run") if flag_values[name].present]
    if given:
        raise UserError(f"--{given[0]} needs --launcher=slurm")
    return None


def _check_modes(flag_values: flags.FlagValues, asked: Sequence[str]) -> None:
    """Raises UserError for flags that do not belong together."""
    if len(asked) > 1:
        raise UserError(f"--{asked[0]} and --{asked[1]} are two commands; give one of them")
    for one, other in (("plan", "noise"), ("plan", "report"), ("noise", "report")):
        if flag_values[one].value and flag_values[other].value:
            raise UserError(f"--{one} and --{other} are two commands; give one of them")
    mode = asked[0] if asked else "study"
    for name in flag_values:
        if flag_values[name].present and name not in (*MODES[mode], mode):
            raise UserError(f"--{name} does not go with --{mode}, which takes --{', --'.join(MODES[mode])}")


def _config_words(argv: Sequence[str]) -> list[str]:
    """The arguments --config=... and --config.section.option=..., as they were given."""
    found: list[str] = []
    waiting = iter([*argv, "-"])
    for argument in waiting:
        if re.match(r"--?(no)?config(\.|=|$)", argument):
            found.append(argument)
            following = "-" if "=" in argument else next(waiting)
            found += [] if following.startswith("-") else [following]
    return found


def search(config: Config, workdir: Path, chosen: Sequence[str], words: Sequence[str], *, workers: int) -> None:
    """Runs the trials of a search that are missing, and prints them, the best first."""
    from gptjax.studies import search as searching

    one = searching.Search(config, searching.read(chosen), workdir)
    one.run(workers=workers, show=_show)
    print(one.text(["python", "-m", "gptjax.train", *words]))


def coordinates(config: Config, workdir: Path, flag_values: flags.FlagValues) -> None:
    """Measures, prints and writes the coordinate check. Raises UserError for wrong widths."""
    from gptjax.studies import coordinates as checking

    words = flag_values.widths
    if not all(word.isdecimal() and 0 < int(word) <= 1024 for word in words) or len(set(map(int, words))) < 2:
        raise UserError(f"--widths={','.join(words)}: expected two or more multiples of the width, e.g. --widths=1,2,4")
    factors = sorted(set(map(int, words)))
    steps, seeds = flag_values.steps or 10, flag_values.seeds or 3
    found = checking.check(config, factors, steps=steps, seeds=seeds, show=lambda line: print(line, file=sys.stderr))
    print(found.text())
    print("written: " + ", ".join(map(str, checking.write(found, workdir))))


def reproduce(run: str, workdir: str | None, *, steps: int) -> None:
    """Trains a run again and prints how the two compare. Raises RunError if they differ."""
    from gptjax.artifacts import mirror
    from gptjax.artifacts.lock import Lock
    from gptjax.studies import reproduction

    first = mirror.opened(run)
    if is_url(run) and not workdir:
        workdir = f"{run.rstrip('/')}-reproduced"
    place = mirror.writable(workdir) if workdir else reproduction.beside(first)
    if mirror.bucket_of(place):
        lock = Lock.take(place)  # no other process writes there while the mirror is updated
        try:
            mirror.pull(place)
        finally:
            lock.release()
    print(f"{mirror.shown(first)} is compared with {mirror.shown(place)}, where it is run again", file=sys.stderr)
    found = reproduction.rerun(first, place, steps=steps, show=_show)
    if not found.holds:
        raise RunError(found.in_words())
    print(found.in_words())


def with_settings(study: Study, chosen: Sequence[str]) -> Study:
    """The study with NAME=VALUE of the command line. Raises UserError for an unknown name or a wrong value."""
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


def difference(workdirs: list[str]) -> None:
    """Prints why two runs differ. Raises UserError unless there are two."""
    from gptjax.artifacts import mirror
    from gptjax.studies import differences

    if len(workdirs) != 2:
        raise UserError(f"--diff takes two work directories, not {len(workdirs)}: --diff runs/a runs/b")
    found, parting = differences.compare(*map(mirror.opened, workdirs))
    for one in found:
        print(f"{one.name}: {one.ours!r} in the first, {one.theirs!r} in the second: {one.effect}")
    if not found:
        print("config, data, code, packages and devices are the same")
    print(parting.in_words())


def ablate(
    study: Study,
    workdir: Path,
    *,
    look: bool = False,
    noise: bool = False,
    report: bool = False,
    workers: int = 0,
    pack: str = "auto",
    command: Sequence[str] = (),
    slurm: dict[str, str] | None = None,
    wait: bool = True,
    dry_run: bool = False,
) -> None:
    """Shows the plan of a study, runs its missing cells, and writes its report.

    Args:
      command: the arguments of the command line, for the report.
      slurm: options of sbatch for cells that run in Slurm; None: they run here.
      wait: whether to wait for the cells in Slurm.
      dry_run: only print the script of the job array.
    """
    from gptjax.artifacts import mirror
    from gptjax.studies import ladder, local, progress
    from gptjax.studies import report as reports
    from gptjax.studies import slurm as cluster
    from gptjax.studies.cells import Plan

    with _held(workdir, runs=not (look or report or dry_run), writes=not (look or dry_run)):
        plan = Plan(study, workdir)
        together = pack == "on" or (pack == "auto" and slurm is None and not local.computes_on_cores())
        together &= mirror.bucket_of(workdir) is None
        most = MOST_PACKED if together else 1
        if dry_run:
            plan.check_matched()
            jobs = local.packs(plan.noise_missing() if noise else ladder.due(plan), most=most)
            if not jobs:
                print("no cell is missing: nothing would be submitted", file=sys.stderr)
                return
            print(cluster.script(cluster.new_name(), len(jobs), workdir, slurm or {}, at_once=workers), end="")
            return
        print(describe(plan))
        plan.check_matched()
        if look:
            return
        plan.claim()
        mirror.push(workdir)
        ran: set[str] = set()

        def run(missing: Callable[[], list[Any]]) -> None:
            """Runs missing cells until none is left: tuning grids first, since they decide what runs next."""
            while cells := [cell for cell in missing() if cell.key not in ran]:
                ran.update(cell.key for cell in cells)
                jobs = local.packs(cells, most=most)
                with progress.shown(plan, cells) as show:
                    if slurm is None:
                        local.run(jobs, workers=workers, show=show)
                    else:
                        cluster.run(jobs, workdir, slurm, workers=workers, wait=wait, show=show)

        def rung_by_rung() -> list[Any]:
            """The cells that can run now. What the rungs below predict for them is recorded first."""
            ladder.predict(plan)
            mirror.push(workdir)
            return ladder.due(plan)

        if not report:
            run(plan.noise_missing if noise else rung_by_rung)
        if slurm is not None and not wait and (plan.noise_missing() if noise else plan.missing()):
            print("the cells are in the queue of Slurm; repeat this command when they are done")
            return
        if noise:
            print(plan.measure_noise().in_words())
            return
        path = reports.write(plan, command)
        print()
        print(path.read_text(encoding="utf-8"))
        print(f"report: {mirror.shown(path)}")
        if missing := plan.missing():
            raise RunError(f"{len(missing)} of {plan.count} cells are missing; the same command runs them")


@contextlib.contextmanager
def _held(workdir: Path, *, runs: bool, writes: bool) -> Iterator[None]:
    """If `runs`, locks the directory of a study and updates its mirror; if `writes`, uploads the mirror at the end."""
    from gptjax.artifacts import mirror
    from gptjax.artifacts.lock import Lock
    from gptjax.training.run import Ending

    with Ending() as ending:
        if runs:
            ending.add(Lock.take(workdir).release)
            mirror.pull(workdir)
        if writes:
            ending.add(lambda: mirror.push(workdir))
        yield


def describe(plan: Any) -> str:
    """The plan: arms with their sizes and differences, cells, cost."""
    missing = len(plan.missing())
    lines = [plan.study.question, ""]
    for arm in plan.arms.values():
        changes = plan.differences()[arm.name]
        open_grids = {} if plan.chosen(arm.name) else plan.study.grids(arm.name)
        told = ", ".join(f"{name} {a!r} -> {b!r}" for name, (a, b) in changes.items() if name not in open_grids)
        told = ", ".join([told] * bool(told) + [f"{name} one of {list(grid)}" for name, grid in open_grids.items()])
        told = told or "the baseline"
        lines.append(f"  {arm.name}: {arm.parameters:,} parameters, {arm.flops_per_token:.3g} FLOPs per token; {told}")
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
        lines += [f"warning: {sentence}: its claims get no verdict; widen the grid" for sentence in plan.censored(name)]
    lines += [f"claim: {claim.text}" for claim in study.parsed_claims()]
    return "\n".join(lines)


def _show(states: dict[str, str]) -> None:
    for name, words in states.items():
        if not words.startswith("step"):
            print(f"{name}: {words}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(cli.run(main))
