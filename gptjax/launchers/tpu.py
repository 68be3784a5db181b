"""Cloud TPU virtual machines, created by a queued resource, with one process on each.

The action `keep` does everything: it creates the slices and trains; if spot machines are preempted, it creates new
ones and continues.
"""

import argparse
import shlex
import subprocess
import time

from gptjax.errors import RunError, UserError
from gptjax.launchers.arguments import BUCKET, NAME, WORD, add_run, call, in_bucket, show, train_command, whole
from gptjax.launchers.tpu_slice import Slice

MOUNT = "/mnt/gptjax"  # where the machines mount the bucket
QUEUED = ("gcloud", "compute", "tpus", "queued-resources")
ACTIONS = ("create", "describe", "setup", "train", "keep", "delete")
POLL = 30.0  # seconds between two queries of a queued resource
LATE = 10  # queries after which a failure counts as the run's own, because the machines still exist


def define(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=ACTIONS)
    add_run(parser, required=False)
    parser.add_argument("--name", type=NAME, required=True)
    parser.add_argument("--zone", type=WORD, required=True)
    parser.add_argument("--project", type=WORD)
    parser.add_argument("--topology", required=True, help="e.g. --topology=v5e:4x4")
    parser.add_argument("--slices", type=whole(1, 256), default=1)
    parser.add_argument("--spot", action="store_true")
    parser.add_argument(
        "--bucket", type=BUCKET, help="bucket that every machine mounts; not needed if --workdir is gs://..."
    )


def commands(options: argparse.Namespace) -> list[list[str]]:
    """The gcloud commands of an action."""
    tpu = Slice.parse(options.topology)
    place = [f"--zone={options.zone}", *([f"--project={options.project}"] if options.project else [])]
    nodes = [options.name] if options.slices == 1 else [f"{options.name}-{i}" for i in range(options.slices)]
    if options.action == "create":
        accelerator = tpu.generation.accelerator_type(tpu.chips)
        named = [f"--node-id={options.name}"]
        if options.slices > 1:
            named = [f"--node-count={options.slices}", f"--node-prefix={options.name}"]
        return [
            [
                *(*QUEUED, "create", options.name, *place, *named),
                *(f"--accelerator-type={accelerator}", f"--runtime-version={tpu.generation.runtime_version}"),
                *(["--spot"] if options.spot else []),
            ]
        ]
    if options.action == "describe":
        return [[*QUEUED, "describe", options.name, *place]]
    if options.action == "delete":
        return [[*QUEUED, "delete", options.name, *place, "--force", "--quiet"]]

    def on_all(command: str) -> list[list[str]]:
        ssh = ["gcloud", "compute", "tpus", "tpu-vm", "ssh"]
        return [[*ssh, node, *place, "--worker=all", f"--command={command}"] for node in nodes]

    if options.action == "setup":
        scp = ["gcloud", "compute", "tpus", "tpu-vm", "scp", "--recurse"]
        copies = [[*scp, ".", f"{node}:gptjax", *place, "--worker=all"] for node in nodes]
        install = (
            "curl -LsSf https://astral.sh/uv/install.sh | sh && cd gptjax && ~/.local/bin/uv venv --python=3.11 "
            "&& ~/.local/bin/uv pip install '.[tpu,gcs]'"
        )
        return [*copies, *on_all(install)]
    workdir, mount = options.workdir, ""
    if not in_bucket(workdir):
        workdir = f"{MOUNT}/{workdir}"
        mount = (
            f"sudo mkdir -p {MOUNT} && sudo chmod 777 {MOUNT} && "
            f"(mountpoint -q {MOUNT} || gcsfuse --implicit-dirs {shlex.quote(options.bucket)} {MOUNT}) && "
        )
    return on_all(f"{mount}cd gptjax && {shlex.join(train_command(options, workdir, '.venv/bin/python'))}")


def run(options: argparse.Namespace) -> None:
    bucket = options.bucket or in_bucket(options.workdir)
    if options.action in ("train", "keep") and not (options.config and options.workdir and bucket):
        raise UserError(
            f"tpu {options.action} needs --config and --workdir=gs://BUCKET/PATH, or --workdir=PATH with --bucket"
        )
    actions = ("create", "setup", "train") if options.action == "keep" else (options.action,)
    if options.dry_run:
        wanted = [command for action in actions for command in commands(_with(options, action))]
        show("".join(f"{shlex.join(command)}\n" for command in wanted))
    elif options.action == "keep":
        keep(options)
    else:
        act(options)


def _with(options: argparse.Namespace, action: str) -> argparse.Namespace:
    return argparse.Namespace(**vars(options) | {"action": action})


def act(options: argparse.Namespace) -> None:
    """Carries out one action. Raises RunError if it fails."""
    if options.action != "train":
        for command in commands(options):
            call(command)
        return
    try:
        running = [subprocess.Popen(command) for command in commands(options)]  # all slices at the same time
    except FileNotFoundError:
        raise RunError("gcloud is not on this machine; --dry_run prints what would be run") from None
    statuses = [process.wait() for process in running]
    if any(statuses):
        raise RunError("a slice failed; the last lines of its processes say why. The same command continues the run")


def state(options: argparse.Namespace) -> str:
    """The state of the queued resource: ACTIVE, SUSPENDED, WAITING_FOR_RESOURCES, ...; "" if it does not exist."""
    (command,) = commands(_with(options, "describe"))
    command = [*command, "--format=value(state.state)"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise RunError("gcloud is not on this machine; --dry_run prints what would be run") from None
    if asked.returncode and "NOT_FOUND" not in asked.stderr:
        raise RunError(f"gcloud cannot describe {options.name}: {' '.join(asked.stderr.split())[:500]}")
    return "" if asked.returncode else asked.stdout.strip()


def keep(options: argparse.Namespace) -> None:
    """Trains until the run has ended; if machines are preempted, it continues on new ones.

    Raises RunError if the run fails while its machines exist, or if no machine can be created.
    """
    while True:
        found = state(options)
        if found == "FAILED":
            raise RunError(f"the queued resource {options.name} has failed; `gptjax launch tpu describe` says why")
        if found == "SUSPENDED":
            act(_with(options, "delete"))
        elif not found:
            act(_with(options, "create"))
        elif found != "ACTIVE":
            time.sleep(POLL)
        elif _trained(options):
            return


def _trained(options: argparse.Namespace) -> bool:
    """Whether the run has ended; False if its machines were preempted. Raises RunError if it failed on them."""
    try:
        act(_with(options, "setup"))
        act(_with(options, "train"))
    except RunError:
        for _ in range(LATE):
            if state(options) != "ACTIVE":
                return False
            time.sleep(POLL)
        raise
    return True
