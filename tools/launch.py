"""Starts a training run on several machines: Slurm, Cloud TPU VMs, or GKE.

  python tools/launch.py slurm --nodes=2 --gpus_per_node=8 --config=configs/gpt2_124m.py --workdir=/shared/runs/a
  python tools/launch.py tpu create --name=a --zone=us-west4-a --topology=v5e:4x4      (setup, describe, delete)
  python tools/launch.py tpu train --name=a --zone=us-west4-a --topology=v5e:4x4 --bucket=B --config=C --workdir=runs/a
  python tools/launch.py gke --name=a --topology=v5e:4x4 --image=IMAGE --bucket=B --config=C --workdir=runs/a

Arguments after `--` are passed to `gptjax train` unchanged: `... -- --config.train.num_steps=500`. With --dry_run the
script, the commands or the manifest are only printed. All processes of a run share one work directory, so it
must be on a file system that every machine has; on Cloud TPU that is a bucket (with hierarchical namespace, whose
renames are atomic), mounted by Cloud Storage FUSE. The same command again continues the run.
"""

import argparse
import dataclasses
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Callable

MOUNT = "/mnt/gptjax"  # where Cloud TPU machines mount the bucket
MOST_CHIPS = 8960  # of a v5p
SAVE_SECONDS = 120  # time before the limit of the job for a last checkpoint


@dataclasses.dataclass(frozen=True)
class Generation:
    """A TPU generation under its names in gcloud and GKE.

    Attributes:
      accelerator_type: makes gcloud's name from a number of chips; v4 and v5p count cores, two per chip.
      dimensions: number of dimensions of a topology.
      largest_host: chips of the largest machine that is a slice by itself. In larger slices, machines have four chips.
    """

    accelerator_type: Callable[[int], str]
    runtime_version: str
    gke_accelerator: str
    dimensions: int
    largest_host: int


GENERATIONS = {
    "v4": Generation(lambda chips: f"v4-{2 * chips}", "tpu-ubuntu2204-base", "tpu-v4-podslice", 3, 4),
    "v5e": Generation(lambda chips: f"v5litepod-{chips}", "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice", 2, 8),
    "v5p": Generation(lambda chips: f"v5p-{2 * chips}", "v2-alpha-tpuv5", "tpu-v5p-slice", 3, 4),
    "v6e": Generation(lambda chips: f"v6e-{chips}", "v2-alpha-tpuv6e", "tpu-v6e-slice", 2, 8),
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """A slice of TPU chips: "v5e:4x4" has 16 chips on 4 hosts."""

    generation: Generation
    topology: str

    @classmethod
    def parse(cls, text: str) -> "Slice":
        name, _, topology = text.partition(":")
        if name not in GENERATIONS:
            raise ValueError(f"--topology={text[:60]}: the generations are {', '.join(GENERATIONS)}, as in v5e:4x4")
        dimensions = GENERATIONS[name].dimensions
        if not re.fullmatch("x".join([r"[1-9]\d{0,3}"] * dimensions), topology, re.ASCII):
            example = "4x4x4" if dimensions == 3 else "4x4"
            raise ValueError(
                f"--topology={text[:60]}: one of {name} has {dimensions} dimensions, as in {name}:{example}"
            )
        found = cls(GENERATIONS[name], topology)
        if found.chips > MOST_CHIPS:
            raise ValueError(f"--topology={text}: {found.chips} chips; the largest slice has {MOST_CHIPS}")
        if found.chips > found.generation.largest_host and found.chips % 4:
            raise ValueError(f"--topology={text}: {found.chips} chips are not a whole number of machines with 4 each")
        return found

    @property
    def chips(self) -> int:
        return math.prod(map(int, self.topology.split("x")))

    @property
    def hosts(self) -> int:
        return 1 if self.chips <= self.generation.largest_host else self.chips // 4

    @property
    def chips_per_host(self) -> int:
        return self.chips // self.hosts


def train_command(options: argparse.Namespace, workdir: str, python: str) -> str:
    return shlex.join(
        [python, "-m", "gptjax.train", f"--config={options.config}", f"--workdir={workdir}", *options.arguments]
    )


# ---- Slurm -------------------------------------------------------------------------------------------------------


def slurm_script(options: argparse.Namespace) -> str:
    """The script of a job with one process per node, which uses all GPUs of the node."""
    settings = {
        "job-name": options.name,
        "nodes": options.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": options.gpus_per_node or None,
        "cpus-per-task": options.cpus_per_node or None,
        "partition": options.partition,
        "account": options.account,
        "time": options.time,
        "output": options.log or f"{options.workdir}/slurm-%j.log",
        "open-mode": "append",
        "signal": f"TERM@{SAVE_SECONDS}",
    }
    header = [f"#SBATCH --{name}={value}" for name, value in settings.items() if value is not None]
    command = train_command(options, options.workdir, options.python)
    return "\n".join(
        [
            "#!/bin/bash",
            *header,
            "set -eu",
            # The processes end each other and say why; a minute later, srun ends those that are left.
            f"exec srun --label --wait=60 {command}",
            "",
        ]
    )


def slurm(options: argparse.Namespace) -> None:
    script = slurm_script(options)
    if options.dry_run:
        print(script, end="")
        return
    if not options.log:
        subprocess.run(["mkdir", "-p", options.workdir], check=True)
    subprocess.run(["sbatch"], input=script, text=True, check=True)


# ---- Cloud TPU VMs -----------------------------------------------------------------------------------------------


def tpu_commands(options: argparse.Namespace) -> list[list[str]]:
    """The gcloud commands of an action."""
    tpu = Slice.parse(options.topology)
    place = [f"--zone={options.zone}", *([f"--project={options.project}"] if options.project else [])]
    queued = ["gcloud", "compute", "tpus", "queued-resources"]
    nodes = [options.name] if options.slices == 1 else [f"{options.name}-{i}" for i in range(options.slices)]
    if options.action == "create":
        accelerator = tpu.generation.accelerator_type(tpu.chips)
        named = [f"--node-id={options.name}"]
        if options.slices > 1:
            named = [f"--node-count={options.slices}", f"--node-prefix={options.name}"]
        return [
            [
                *(*queued, "create", options.name, *place, *named),
                *(f"--accelerator-type={accelerator}", f"--runtime-version={tpu.generation.runtime_version}"),
                *(["--spot"] if options.spot else []),
            ]
        ]
    if options.action == "describe":
        return [[*queued, "describe", options.name, *place]]
    if options.action == "delete":
        return [[*queued, "delete", options.name, *place, "--force", "--quiet"]]

    def on_all(command: str) -> list[list[str]]:
        ssh = ["gcloud", "compute", "tpus", "tpu-vm", "ssh"]
        return [[*ssh, node, *place, "--worker=all", f"--command={command}"] for node in nodes]

    if options.action == "setup":
        scp = ["gcloud", "compute", "tpus", "tpu-vm", "scp", "--recurse"]
        copies = [[*scp, ".", f"{node}:gptjax", *place, "--worker=all"] for node in nodes]
        install = (
            "curl -LsSf https://astral.sh/uv/install.sh | sh && cd gptjax && ~/.local/bin/uv venv --python=3.11 "
            "&& ~/.local/bin/uv pip install '.[tpu]'"
        )
        return [*copies, *on_all(install)]
    mount = (
        f"sudo mkdir -p {MOUNT} && sudo chmod 777 {MOUNT} && "
        f"(mountpoint -q {MOUNT} || gcsfuse --implicit-dirs {shlex.quote(options.bucket)} {MOUNT})"
    )
    return on_all(f"{mount} && cd gptjax && {train_command(options, f'{MOUNT}/{options.workdir}', '.venv/bin/python')}")


def tpu(options: argparse.Namespace) -> None:
    if options.action == "train" and not (options.config and options.workdir and options.bucket):
        raise ValueError("tpu train needs --config, --workdir and --bucket")
    commands = tpu_commands(options)
    if options.dry_run:
        print("\n".join(shlex.join(command) for command in commands))
        return
    if options.action != "train":
        for command in commands:
            subprocess.run(command, check=True)
        return
    running = [subprocess.Popen(command) for command in commands]  # all slices at the same time
    statuses = [process.wait() for process in running]
    if any(statuses):
        raise subprocess.SubprocessError("a slice failed; the last lines of its processes say why")


# ---- GKE ---------------------------------------------------------------------------------------------------------

# GKE gives every pod TPU_WORKER_ID, TPU_WORKER_HOSTNAMES and, with several slices, the MEGASCALE variables.
JOBSET = """\
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: {name}
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: {restarts}
  replicatedJobs:
  - name: slice
    replicas: {slices}
    template:
      spec:
        parallelism: {hosts}
        completions: {hosts}
        backoffLimit: 0
        template:
          metadata:
            annotations:
              gke-gcsfuse/volumes: "true"
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: {grace}
            serviceAccountName: {service_account}
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: {accelerator}
              cloud.google.com/gke-tpu-topology: {topology}
            containers:
            - name: gptjax
              image: {image}
              command: {command}
              resources:
                requests:
                  google.com/tpu: {chips}
                limits:
                  google.com/tpu: {chips}
              volumeMounts:
              - name: bucket
                mountPath: {mount}
            volumes:
            - name: bucket
              csi:
                driver: gcsfuse.csi.storage.gke.io
                volumeAttributes:
                  bucketName: {bucket}
                  mountOptions: implicit-dirs
"""


def jobset(options: argparse.Namespace) -> str:
    """The manifest: one job per slice, one pod per host. If a pod fails, all pods restart and continue the run."""
    tpu = Slice.parse(options.topology)
    command = shlex.split(train_command(options, f"{MOUNT}/{options.workdir}", "python"))
    return JOBSET.format(
        name=options.name,
        restarts=options.restarts,
        slices=options.slices,
        hosts=tpu.hosts,
        chips=tpu.chips_per_host,
        accelerator=tpu.generation.gke_accelerator,
        topology=tpu.topology,
        grace=SAVE_SECONDS,
        service_account=options.service_account,
        image=options.image,
        command="[" + ", ".join("'" + word.replace("'", "''") + "'" for word in command) + "]",
        mount=MOUNT,
        bucket=options.bucket,
    )


def gke(options: argparse.Namespace) -> None:
    manifest = jobset(options)
    if options.dry_run:
        print(manifest, end="")
        return
    subprocess.run(["kubectl", "apply", "-f", "-"], input=manifest, text=True, check=True)


def whole(least: int, most: int) -> Callable[[str], int]:
    """Reads a whole number within limits: 8, 8.0, 1e3. argparse puts the flag before the message."""

    def read(text: str) -> int:
        number = float(text) if re.fullmatch(r"[+-]?\d{1,20}(\.\d*)?([eE]\+?\d{1,2})?", text, re.ASCII) else math.nan
        if not number.is_integer():
            raise argparse.ArgumentTypeError(f"{text[:60]!r} is not a whole number")
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"{text[:60]} is not within {least} and {most}")
        return int(number)

    return read


def matching(pattern: str, words: str) -> Callable[[str], str]:
    """Reads a text of a form, which `words` tell."""

    def read(text: str) -> str:
        if not re.fullmatch(pattern, text, re.ASCII):
            raise argparse.ArgumentTypeError(f"{text[:60]!r} is not {words}")
        return text

    return read


def path(text: str) -> str:
    """Reads a path or another name that a script can hold: not empty, without line breaks."""
    if not text.strip() or len(text) > 4000 or any(ord(character) < 32 for character in text):
        raise argparse.ArgumentTypeError(f"{text[:60]!r} is not a name")
    return text


# The names of jobs, nodes and pods: what Slurm, gcloud and Kubernetes all accept.
NAME = matching("[a-z]([-a-z0-9]{0,46}[a-z0-9])?", "a name of lower-case letters, digits and hyphens, at most 48")
SLURM_NAME = matching("[A-Za-z0-9][-+.A-Za-z0-9_@]{0,127}", "a name of letters, digits and -+._@")
BUCKET = matching("[a-z0-9]([-a-z0-9_.]{0,220}[a-z0-9])?", "the name of a bucket, without gs://")
WORD = matching("[A-Za-z0-9][-A-Za-z0-9_.:/@]{0,250}", "a name of letters, digits and -_.:/@")
TIME = matching(r"\d{1,6}(:\d{1,2}){0,2}|\d{1,4}-\d{1,2}(:\d{1,2}){0,2}", "a time such as 24:00:00 or 2-12")


class Parser(argparse.ArgumentParser):
    """What is wrong stands in the last line, in the form of the other tools."""

    def error(self, message: str):
        self.print_usage(sys.stderr)
        self.exit(2, f"error: {message[:1000]}\n")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    places = parser.add_subparsers(dest="place", required=True)

    def place(name: str, run: Callable[[argparse.Namespace], None], *, required: bool) -> argparse.ArgumentParser:
        one = places.add_parser(name)
        one.set_defaults(run=run)
        one.add_argument("--config", type=path, required=required, help="e.g. --config=configs/gpt2_124m.py")
        one.add_argument(
            "--workdir", type=path, required=required, help="work directory on a file system that every machine has"
        )
        one.add_argument("--dry_run", action="store_true", help="only print the script, commands or manifest")
        return one

    one = place("slurm", slurm, required=True)
    one.add_argument("--name", type=SLURM_NAME, default="gptjax")
    one.add_argument("--nodes", type=whole(1, 100_000), default=1)
    one.add_argument("--gpus_per_node", type=whole(0, 64), default=0)
    one.add_argument("--cpus_per_node", type=whole(0, 4096), default=0)
    one.add_argument("--partition", type=path)
    one.add_argument("--account", type=path)
    one.add_argument("--time", type=TIME, help="e.g. --time=24:00:00")
    one.add_argument("--log", type=path, help="default: WORKDIR/slurm-JOB.log")
    one.add_argument("--python", type=path, default=sys.executable)

    one = place("tpu", tpu, required=False)
    one.add_argument("action", choices=["create", "describe", "setup", "train", "delete"])
    one.add_argument("--zone", type=WORD, required=True)
    one.add_argument("--project", type=WORD)
    one.add_argument("--spot", action="store_true")

    two = place("gke", gke, required=True)
    two.add_argument(
        "--image", type=WORD, required=True, help="image with gptjax[tpu] whose working directory is the checkout"
    )
    two.add_argument("--restarts", type=whole(0, 100_000), default=10)
    two.add_argument(
        "--service_account", type=WORD, default="default", help="service account that may write to the bucket"
    )
    two.add_argument("--bucket", type=BUCKET, required=True)
    one.add_argument("--bucket", type=BUCKET)
    for both in (one, two):
        both.add_argument("--name", type=NAME, required=True)
        both.add_argument("--topology", required=True, help="e.g. --topology=v5e:4x4")
        both.add_argument("--slices", type=whole(1, 256), default=1)
    own, rest = arguments, []
    if "--" in arguments:
        own, rest = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
    options = parser.parse_args(own)
    options.arguments = rest
    return options


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    try:
        options.run(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, subprocess.SubprocessError) as error:  # sbatch, gcloud or kubectl is missing or failed
        print(f"failed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
