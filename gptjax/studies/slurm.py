"""Runs the cells of a study as a Slurm job array, with one array element per job.

WORKDIR must be on a file system that all nodes share. A submission writes WORKDIR/slurm/NAME.json, the list of its
jobs, and NAME.sh, the script. NAME is also the name of the array, so that a command that was killed finds its array
again. If a node fails, Slurm queues its elements again (--requeue), and their cells continue from the last checkpoint;
run the same command for cells that are still missing.

  python -m gptjax.studies.slurm LIST [INDEX]        runs an element; default INDEX: SLURM_ARRAY_TASK_ID
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from gptjax import config as config_lib
from gptjax.errors import RunError, UserError
from gptjax.files import write_whole
from gptjax.json_text import read_json
from gptjax.studies import local
from gptjax.studies.cell import Cell
from gptjax.studies.local import Job

POLL = 2.0  # seconds between two queries of the queue
PATIENCE = 600.0  # seconds to wait for an answer of Slurm
SAVE_SECONDS = 120  # seconds before its time limit at which an element gets SIGTERM, so that its cells save
MOST_ELEMENTS = 1000  # per array; Slurm's MaxArraySize is 1001 by default
COMMAND_SECONDS = 60
TIMED_OUT = "Slurm timed out"
# Options of sbatch that this module sets.
RESERVED = (
    "array",
    "dependency",
    "error",
    "job-name",
    "nodes",
    "ntasks",
    "open-mode",
    "output",
    "parsable",
    "wait",
    "wrap",
)
UNREACHABLE = re.compile("unable to contact|timed out|fetch_config|DNS SRV|connection refused", re.IGNORECASE)


def read_options(chosen: Sequence[str]) -> dict[str, str]:
    """{"partition": "gpu"} of --slurm.NAME=VALUE, for any long option of sbatch. Raises UserError for others."""
    found = {}
    for text in chosen:
        name, _, value = text.partition("=")
        name = name.replace("_", "-")
        if not re.fullmatch(r"[a-z][a-z0-9-]{0,40}", name):
            raise UserError(f"--slurm.{name[:60]}: expected a long option of sbatch, e.g. --slurm.partition=gpu")
        if name in RESERVED:
            raise UserError(f"--slurm.{name}: gptjax sets --{name} itself; leave it out")
        if len(value) > 1000 or not value.isprintable():
            raise UserError(f"--slurm.{name} must be a single line")
        found[name] = value
    return found


def script(name: str, count: int, workdir: Path, options: Mapping[str, str], *, at_once: int = 0) -> str:
    """The script of an array of `count` elements, of which `at_once` run at a time (0: no limit)."""
    folder = workdir.absolute() / "slurm"
    limit = f"%{at_once}" if at_once else ""
    settings = {"cpus-per-task": "1", "signal": f"TERM@{SAVE_SECONDS}", "requeue": ""} | options
    settings |= {"job-name": name, "array": f"0-{count - 1}{limit}", "nodes": "1", "ntasks": "1"}
    settings |= {"open-mode": "append", "output": f"{str(folder).replace('%', '%%')}/%A_%a.log"}
    lines = [f"#SBATCH --{key}{'=' + shlex.quote(value) if value else ''}" for key, value in settings.items()]
    command = shlex.join([sys.executable, "-m", "gptjax.studies.slurm", str(folder / f"{name}.json")])
    place = shlex.quote(str(Path.cwd()))
    return "\n".join(
        [
            "#!/bin/bash",
            *lines,
            "set -eu",
            f"cd {place}",
            f"exec srun --ntasks=1 --cpus-per-task=${{SLURM_CPUS_PER_TASK:-1}} {command}",
            "",
        ]
    )


def run(
    jobs: Sequence[Job],
    workdir: Path,
    options: Mapping[str, str],
    *,
    workers: int = 0,
    wait: bool = True,
    show: Callable[[dict[str, str]], None] = lambda states: None,
) -> None:
    """Submits the jobs that are not in the queue yet, and waits for all of them.

    Raises UserError where sbatch is missing or refuses, RunError where Slurm does not answer.
    """
    if not shutil.which("sbatch"):
        raise UserError("--launcher=slurm needs sbatch, which is not on this machine; use a login node of the cluster")
    names = [path.stem for path in sorted((workdir / "slurm").glob("*.json"))]
    queued = _queued(workdir, names)
    fresh = [job for job in jobs if not any(str(cell.workdir.absolute()) in queued for cell in job)]
    for first in range(0, len(fresh), MOST_ELEMENTS):
        part = fresh[first : first + MOST_ELEMENTS]
        names.append(submit(part, workdir, options, at_once=workers))
        print(f"submitted {names[-1]}, an array of {len(part)} elements", file=sys.stderr)
    if len(fresh) < len(jobs):
        print(f"{len(jobs) - len(fresh)} jobs are already in the queue of Slurm", file=sys.stderr)
    if not wait:
        return
    try:
        _wait([cell for job in jobs for cell in job], workdir, names, show)
    except KeyboardInterrupt:
        raise RunError(
            "stopped waiting; the cells continue in Slurm. The same command waits for them again; scancel --name="
            f"{','.join(names)} cancels them"
        ) from None


def submit(jobs: Sequence[Job], workdir: Path, options: Mapping[str, str], *, at_once: int = 0) -> str:
    """Writes the list and the script, and submits them. Returns the name of the array."""
    folder, name = workdir / "slurm", new_name()
    folder.mkdir(parents=True, exist_ok=True)
    for cell in (cell for job in jobs for cell in job):
        cell.prepare()
    listed = [[_entry(cell) for cell in job] for job in jobs]
    write_whole(folder / f"{name}.json", json.dumps(listed, indent=1) + "\n")
    text = script(name, len(jobs), workdir, options, at_once=at_once)
    write_whole(folder / f"{name}.sh", text)
    result = _slurm(["sbatch", "--parsable"], text)
    if result.returncode and result.stderr == TIMED_OUT:
        raise RunError("sbatch has not answered; the same command checks whether the array is in the queue")
    if result.returncode:
        (folder / f"{name}.json").unlink()
        said = result.stderr.strip().splitlines()
        told = "; ".join(line.removeprefix("sbatch: error: ") for line in said)[:500] or f"status {result.returncode}"
        raise (RunError if UNREACHABLE.search(told) else UserError)(f"sbatch refuses the job: {told}")
    return name


def new_name() -> str:
    """A name for an array by which it is found again in the queue."""
    return f"gptjax-{uuid.uuid4().hex[:10]}"


def _entry(cell: Cell) -> dict[str, str | int]:
    place = str(cell.workdir.absolute())
    return {"arm": cell.arm, "seed": cell.seed, "point": cell.point, "workdir": place, "num_steps": cell.num_steps}


def _slurm(command: Sequence[str], text: str = "") -> subprocess.CompletedProcess[str]:
    """Runs a Slurm command. One that hangs counts as failed."""
    # Without these variables Slurm would treat the command as a step of the job in which gptjax runs.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_J", "SBATCH_"))}
    try:
        return subprocess.run(
            command, input=text, capture_output=True, text=True, timeout=COMMAND_SECONDS, env=environment
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", TIMED_OUT)
    except FileNotFoundError:
        return subprocess.CompletedProcess(command, 1, "", f"{command[0]} is not on this machine")


def _queued(workdir: Path, names: Sequence[str]) -> dict[str, str]:
    """{work directory of a cell: state} of the elements of these arrays that wait or run. Raises RunError.

    An element that is no longer in the queue has ended.
    """
    if not names:
        return {}
    asked = _slurm(["squeue", "--noheader", "--array", f"--name={','.join(names)}", "--format=%j|%K|%T"])
    if asked.returncode:
        raise RunError(f"Slurm does not answer: {asked.stderr.strip()[:300]}; run the same command again")
    found = {}
    for line in asked.stdout.splitlines():
        name, index, state = line.strip().split("|")
        jobs = read_json(workdir / "slurm" / f"{name}.json")
        if index.isdecimal():
            found |= {entry["workdir"]: state.lower() for entry in jobs[int(index)]}
    return found


def _wait(cells: Sequence[Cell], workdir: Path, names: Sequence[str], show: Callable[[dict[str, str]], None]) -> None:
    """Shows the states of the cells until no element of the arrays is left in the queue."""
    left, heard = {cell.name: cell for cell in cells}, time.monotonic()
    while left:
        try:
            queued, heard = _queued(workdir, names), time.monotonic()
        except RunError:
            if time.monotonic() - heard > PATIENCE:
                raise
            time.sleep(POLL)
            continue
        at_work, ended = {}, {}
        for name, cell in left.items():
            state = queued.get(str(cell.workdir.absolute()))
            if state == "running":
                at_work[name] = f"step {cell.step()} of {cell.num_steps}"
            elif state is None:
                ended[name] = cell.outcome() or f"no result ({cell.workdir / 'log.txt'}, {workdir / 'slurm'})"
        if at_work:
            show(at_work)
        if ended:
            show(ended)
        left = {name: cell for name, cell in left.items() if name not in ended}
        if left:
            time.sleep(POLL)


def main(arguments: list[str]) -> None:
    """Runs the cells of an array element, as a study on one machine would."""
    path, index = Path(arguments[0]), int(arguments[1] if len(arguments) > 1 else os.environ["SLURM_ARRAY_TASK_ID"])
    cells = []
    for entry in read_json(path)[index]:
        workdir = Path(entry["workdir"])
        config = config_lib.from_json((workdir / "cell.json").read_text(encoding="utf-8"))
        named = {name: entry[name] for name in ("arm", "seed", "point", "num_steps")}
        cells.append(Cell(**named, config=config, resolved=config, key="", workdir=workdir))
    if hasattr(os, "sched_setaffinity"):  # if the cluster does not bind: as many cores as were requested
        count, cores = int(os.environ.get("SLURM_CPUS_PER_TASK", "1")), sorted(os.sched_getaffinity(0))
        first = index * count % len(cores)
        os.sched_setaffinity(0, (cores[first:] + cores[:first])[:count])
    if waiting := [cell for cell in cells if not cell.outcome()]:
        local.run([waiting], workers=1, show=_say)
    if left := [cell.name for cell in cells if not cell.outcome()]:
        raise RunError(f"no result: {', '.join(left)}; the command of the study runs them again")


def _say(states: dict[str, str]) -> None:
    for name, words in states.items():
        if not words.startswith("step "):
            print(f"{name}: {words}", flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (RunError, UserError) as failure:
        sys.exit(f"failed: {failure}")
