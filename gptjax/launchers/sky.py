"""A run by SkyPilot: one task file for GCP, AWS, Azure, Lambda, Kubernetes and TPU, as a managed job.

SkyPilot looks for machines that are available. After a preemption it starts the job again, elsewhere if needed, and the
run continues from its bucket. The current folder is copied to every machine.
"""

import argparse
import json
import shlex
import tempfile
from pathlib import Path

from gptjax.errors import UserError
from gptjax.launchers.arguments import NAME, WORD, add_run, call, in_bucket, matching, path, show, train_command, whole
from gptjax.launchers.tpu_slice import GENERATIONS

PORT = 9800  # port of process 0; JAX uses the port after it
# TPU machines know the others of their slice. For other machines, SkyPilot lists the addresses.
JOIN = (
    '--coordinator=$(head -n1 <<< "$SKYPILOT_NODE_IPS"):{port} '
    "--num_processes=$SKYPILOT_NUM_NODES --process_id=$SKYPILOT_NODE_RANK"
)
TASK = """\
name: {name}
workdir: .
num_nodes: {nodes}
resources:
  accelerators: {accelerators}
  use_spot: {spot}
{more}  job_recovery:
    max_restarts_on_errors: {restarts}
setup: |
  set -eu
  command -v uv || curl -LsSf https://astral.sh/uv/install.sh | sh
  export PATH="$HOME/.local/bin:$PATH"
  [ -d ~/gptjax-venv ] || uv venv --python=3.12 ~/gptjax-venv
  uv pip install --python ~/gptjax-venv/bin/python {package}
run: |
  set -eu
  exec ~/gptjax-venv/bin/python {command}
"""


def define(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument("--name", type=NAME, default="gptjax")
    parser.add_argument(
        "--accelerators",
        type=matching(r"[A-Za-z0-9][-A-Za-z0-9._]{0,60}(:\d{1,4})?", "accelerators of a machine such as H100:8"),
        required=True,
        help="of each machine, by SkyPilot's names, e.g. --accelerators=H100:8 or tpu-v5litepod-16",
    )
    parser.add_argument("--nodes", type=whole(1, 10_000), default=1)
    parser.add_argument("--spot", action="store_true", help="cheaper machines that may be preempted")
    parser.add_argument("--infra", type=WORD, help="where to look for machines, e.g. --infra=gcp/us-central1")
    parser.add_argument(
        "--restarts", type=whole(0, 1000), default=3, help="after failures of the run itself; preemptions do not count"
    )
    parser.add_argument(
        "--package",
        type=path,
        help="what pip installs, e.g. --package='gptjax[cuda,gcs]'; default: the checkout in this folder",
    )


def task(options: argparse.Namespace) -> str:
    """The task file, in YAML. Raises UserError for a local work directory, which another machine would not find."""
    if not in_bucket(options.workdir):
        raise UserError(f"--workdir={options.workdir[:200]}: expected gs://BUCKET/PATH, since machines may be replaced")
    tpu = options.accelerators.startswith("tpu-")
    more = [f"infra: {options.infra}"] if options.infra else []
    for generation in GENERATIONS.values():  # for some, Google's choice is not SkyPilot's default
        if options.accelerators.startswith(f"tpu-{generation.accelerator_type(0).removesuffix('0')}"):
            more.append(f"accelerator_args: {{runtime_version: {generation.runtime_version}}}")
    package = options.package or f".[{'tpu' if tpu else 'cuda'},gcs]"
    command = train_command(options, options.workdir, "python")[1:]
    return TASK.format(
        name=options.name,
        nodes=options.nodes,
        accelerators=json.dumps(options.accelerators),
        spot="true" if options.spot else "false",
        more="".join(f"  {line}\n" for line in more),
        restarts=options.restarts,
        package=shlex.quote(package),
        command=shlex.join(command) + ("" if tpu else f" {JOIN.format(port=PORT)}"),
    )


def run(options: argparse.Namespace) -> None:
    text = task(options)
    if options.dry_run:
        show(text)
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "task.yaml"
        file.write_text(text, encoding="utf-8")
        call(["sky", "jobs", "launch", "--yes", str(file)])
