"""Disturbs every stage of gptjax, and compares the result bit by bit with an undisturbed run.

  python -m tools.torture --seed=0 --kills=100 --signals=50 --disks=50 --flips=50 --workers=2
  python -m tools.torture --only=train:kill:17

kills     killed at random times and before file operations, up to three times, with the same command after each
signals   INT, TERM, HUP, USR1, USR2, INT twice, STOP and CONT, from the first millisecond
disks     its directory, a part of it, the cache or TMPDIR is a small disk that is enlarged later (needs mount: root,
          or user namespaces)
flips     a file is truncated, emptied or has a flipped bit, and is then read

The number of each kind is divided among the stages. Exit status 1 if a case did not end as required.
"""

import argparse
import concurrent.futures
import os
import queue
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tools.torture import report
from tools.torture.disturbances import KINDS, Case, Undisturbed, undisturbed
from tools.torture.judge import Wrong
from tools.torture.processes import Hung, Server, environment
from tools.torture.report import Outcome
from tools.torture.stages import Stage, World, stages

STAGES = ("train", "prepare", "import", "export", "evaluate", "generate", "finetune")
_MOUNTS = "TORTURE_MOUNTS"  # set if this process has its own mount namespace


def main() -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: children are ended
    options = _options()
    cases, notes = _cases(options), []
    if any(kind == "disk" for _, kind, _ in cases) and os.environ.get(_MOUNTS) != "1":
        if enter := _mount_namespace():
            os.environ[_MOUNTS] = "1"
            os.execvp(enter[0], [*enter, sys.executable, __file__, *sys.argv[1:]])
        skipped = sum(kind == "disk" for _, kind, _ in cases)
        notes.append(f"{skipped} cases of full disks were skipped: mounting needs root")
        cases = [case for case in cases if case[1] != "disk"]
    os.environ["JAX_PLATFORMS"] = "cpu"  # for this process, which reads checkpoints
    scratch = Path(tempfile.mkdtemp(prefix="gptjax-torture-", dir=options.scratch)).resolve()
    try:
        outcomes = _torture(cases, options, scratch)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 1
    finally:
        if not options.keep:
            shutil.rmtree(scratch, ignore_errors=True)
    report.show(outcomes, list(KINDS), notes)
    if options.output:
        report.write(options.output, outcomes, list(KINDS), notes)
    if failed := [outcome.name for outcome in outcomes if outcome.wrong]:
        print(f"failed: {len(failed)} of {len(outcomes)}. Again: {report.command(failed[:20])}", file=sys.stderr)
    return bool(failed)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="seed of all random choices (default: 0)")
    for kind in KINDS:
        parser.add_argument(f"--{kind}s", type=int, default=0, help=f"number of cases of this kind, e.g. --{kind}s=50")
    parser.add_argument(
        "--stages", default=",".join(STAGES), help=f"e.g. --stages=train,prepare (default: {','.join(STAGES)})"
    )
    parser.add_argument("--only", default="", help="cases by name instead, e.g. --only=train:kill:17,prepare:disk:3")
    parser.add_argument("--workers", type=int, default=2, help="cases at once (default: 2)")
    parser.add_argument(
        "--output", type=Path, help="where the results are written, with .md beside, e.g. --output=torture.json"
    )
    parser.add_argument(
        "--scratch", type=Path, help="an existing directory to work in (default: the system's temporary directory)"
    )
    parser.add_argument("--programs", type=Path, help="a directory that keeps compiled programs (default: none)")
    parser.add_argument("--keep", action="store_true", help="keep the directories of the cases that failed")
    options = parser.parse_args()
    options.stages = options.stages.split(",")
    if wrong := [name for name in options.stages if name not in STAGES]:
        parser.error(f"--stages: there is no stage {wrong[0]!r}; there are {', '.join(STAGES)}")
    if options.workers < 1:
        parser.error(f"--workers={options.workers}: expected 1 or more")
    for name in filter(None, options.only.split(",")):
        stage, kind, seed = [*name.split(":"), "", ""][:3]
        if stage not in STAGES or kind not in KINDS or not seed.isdigit():
            parser.error(f"--only={name}: expected STAGE:KIND:SEED, e.g. train:kill:17")
    return options


def _cases(options: argparse.Namespace) -> list[tuple[str, str, int]]:
    """(stage, kind, seed) of all cases, in an order that mixes them."""
    if options.only:
        return [(stage, kind, int(seed)) for stage, kind, seed in (name.split(":") for name in options.only.split(","))]
    cases = [
        (options.stages[number % len(options.stages)], kind, 10_000 * options.seed + number)
        for kind in KINDS
        for number in range(getattr(options, f"{kind}s"))
    ]
    random.Random(options.seed).shuffle(cases)
    return cases


def _mount_namespace() -> list[str]:
    """The command prefix that runs another command where it may mount; empty if there is none."""
    with tempfile.TemporaryDirectory() as directory:
        for enter in (["unshare", "--mount"], ["unshare", "--mount", "--map-root-user"]):
            trial = [*enter, "mount", "-t", "tmpfs", "-o", "size=4096", "tmpfs", directory]
            try:
                if subprocess.run(trial, capture_output=True, timeout=60).returncode == 0:
                    return enter
            except (OSError, subprocess.TimeoutExpired):
                continue
    return []


def _torture(cases: list[tuple[str, str, int]], options: argparse.Namespace, scratch: Path) -> list[Outcome]:
    """The outcomes of all cases, in the order in which they ended."""
    programs = options.programs.resolve() if options.programs else scratch / "programs"
    programs.mkdir(parents=True, exist_ok=True)
    world = World(scratch / "world")
    known = stages(world)
    wanted = [known[name] for name in dict.fromkeys(stage for stage, _, _ in cases)]
    console = Console(stderr=True, highlight=False)
    free: queue.SimpleQueue[Server] = queue.SimpleQueue()
    servers: list[Server] = []

    def open_server(number: int) -> None:
        server = Server(environment(programs), scratch / f"server-{number}.log")
        servers.append(server)
        free.put(server)

    def usual(stage: Stage) -> Undisturbed:
        server = free.get()
        try:
            return undisturbed(stage, world, server, scratch / f"usual-{stage.name}")
        finally:
            free.put(server)

    def run(case: tuple[str, str, int]) -> Outcome:
        stage, kind, seed = case
        server = free.get()
        try:
            return _run(known[stage], kind, seed, world, server, usuals[stage], scratch, keep=options.keep)
        finally:
            free.put(server)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    progress = Progress(*columns, console=console, disable=not console.is_terminal)
    threads = concurrent.futures.ThreadPoolExecutor(options.workers)
    try:
        with progress:
            inputs = progress.add_task("inputs", total=1 + len(wanted))
            list(threads.map(open_server, range(options.workers)))
            if any(stage.inputs for stage in wanted):
                world.build(servers[0])
            progress.advance(inputs)
            usuals: dict[str, Undisturbed] = {}
            for stage, found in zip(wanted, threads.map(usual, wanted), strict=True):
                usuals[stage.name] = found
                progress.advance(inputs)
            bar = progress.add_task("cases", total=len(cases))
            outcomes = []
            for future in concurrent.futures.as_completed([threads.submit(run, case) for case in cases]):
                outcomes.append(future.result())
                progress.advance(bar)
                if outcomes[-1].wrong:
                    console.print(report.line(outcomes[-1]), markup=False, soft_wrap=True)
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        for server in servers:
            server.close()
        threads.shutdown(wait=True)
    return outcomes


def _run(
    stage: Stage, kind: str, seed: int, world: World, server: Server, usual: Undisturbed, scratch: Path, *, keep: bool
) -> Outcome:
    """Runs one case, in a directory that is removed unless `keep` is set and the case failed."""
    name = f"{stage.name}:{kind}:{seed}"
    directory = scratch / name.replace(":", "-")
    case = Case(stage, seed, random.Random(name), directory, server, usual)
    begin, wrong = time.perf_counter(), ""
    world.fill(stage, directory)
    try:
        KINDS[kind](case)
    except (Wrong, Hung) as error:
        wrong = str(error).replace(str(directory), "CASE")
    if wrong and keep:
        wrong += f" (kept: {directory})"
    else:
        shutil.rmtree(directory, ignore_errors=True)
    return Outcome(stage.name, kind, seed, case.moments, wrong, time.perf_counter() - begin)


if __name__ == "__main__":
    raise SystemExit(main())
