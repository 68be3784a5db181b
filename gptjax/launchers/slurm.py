"""A run as a Slurm job, with one process per node."""

import argparse
import shlex
import sys

from gptjax import files
from gptjax.launchers.arguments import (
    SAVE_SECONDS,
    SLURM_NAME,
    TIME,
    add_run,
    call,
    in_bucket,
    path,
    show,
    train_command,
    whole,
)

# If a process fails, it ends the others with a message; after a minute srun ends those that are left.
MOST_RESTARTS = 100  # of a job with --requeue
ONCE = "exec srun --label --wait=60 {command}"
# Before the time limit Slurm signals this shell, which makes the processes save and then requeues the job. If a node
# fails or a job of higher priority needs it, Slurm itself requeues. A run that fails is not requeued, nor is one that
# was restarted too often, e.g. because its time limit is too short to save anything.
AGAIN = """\
if [ "${{SLURM_RESTART_COUNT:-0}}" -gt {restarts} ]; then
  echo "failed: the job has begun again $SLURM_RESTART_COUNT times, and may {restarts}; see why, and submit it anew" >&2
  exit 1
fi
srun --label --wait=60 {command} &
step=$! limit=
trap 'limit=reached; kill -USR1 $step' USR1
status=0; wait $step || status=$?
if [ "$limit" ]; then
  status=0; wait $step || status=$?
  [ $status = 0 ] || scontrol requeue "$SLURM_JOB_ID"
fi
exit $status"""


def define(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument("--name", type=SLURM_NAME, default="gptjax")
    parser.add_argument("--nodes", type=whole(1, 100_000), default=1)
    parser.add_argument("--gpus_per_node", type=whole(0, 64), default=0)
    parser.add_argument("--cpus_per_node", type=whole(0, 4096), default=0)
    parser.add_argument("--partition", type=path)
    parser.add_argument("--account", type=path)
    parser.add_argument("--time", type=TIME, help="e.g. --time=24:00:00")
    parser.add_argument(
        "--requeue",
        action="store_true",
        help=f"continue the job after its time limit, a preemption or a node failure, at most {MOST_RESTARTS} times",
    )
    parser.add_argument("--log", type=path, help="default: WORKDIR/slurm-JOB.log")
    parser.add_argument("--python", type=path, default=sys.executable)


def script(options: argparse.Namespace) -> str:
    """The script of a job whose processes use all GPUs of their nodes."""
    folder = "" if in_bucket(options.workdir) else f"{options.workdir}/"
    settings = {
        "job-name": options.name,
        "nodes": options.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": options.gpus_per_node or None,
        "cpus-per-task": options.cpus_per_node or None,
        "partition": options.partition,
        "account": options.account,
        "time": options.time,
        "output": options.log or f"{folder}slurm-%j.log",
        "open-mode": "append",
        "signal": f"{'B:USR1' if options.requeue else 'TERM'}@{SAVE_SECONDS}",
    }
    header = [f"#SBATCH --{name}={value}" for name, value in settings.items() if value is not None]
    header += ["#SBATCH --requeue"] if options.requeue else []
    command = shlex.join(train_command(options, options.workdir, options.python))
    body = (AGAIN if options.requeue else ONCE).format(command=command, restarts=MOST_RESTARTS)
    return "\n".join(["#!/bin/bash", *header, "set -eu", body, ""])


def run(options: argparse.Namespace) -> None:
    if options.dry_run:
        show(script(options))
        return
    if not options.log and not in_bucket(options.workdir):
        files.expand(options.workdir).mkdir(parents=True, exist_ok=True)
    call(["sbatch"], script(options))
