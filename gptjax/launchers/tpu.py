"""Cloud TPU virtual machines: made by a queued resource, one process on each."""

import argparse
import shlex
import subprocess

from gptjax.errors import RunError, UserError
from gptjax.launchers.arguments import BUCKET, NAME, WORD, add_run, call, in_bucket, show, train_command, whole
from gptjax.launchers.tpu_slice import Slice

MOUNT = "/mnt/gptjax"  # where the machines mount the bucket
QUEUED = ("gcloud", "compute", "tpus", "queued-resources")
ACTIONS = ("create", "describe", "setup", "train", "delete")


def define(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=ACTIONS)
    add_run(parser, required=False)
    parser.add_argument("--name", type=NAME, required=True)
    parser.add_argument("--zone", type=WORD, required=True)
    parser.add_argument("--project", type=WORD)
    parser.add_argument("--topology", required=True, help="e.g. --topology=v5e:4x4")
    parser.add_argument("--slices", type=whole(1, 256), default=1)
    parser.add_argument("--spot", action="store_true")
    parser.add_argument("--bucket", type=BUCKET, help="mounted by every machine; a --workdir of gs:// needs none")


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
    if options.action == "train" and not (options.config and options.workdir and bucket):
        raise UserError("tpu train needs --config and --workdir=gs://BUCKET/PATH, or --workdir=PATH with --bucket")
    wanted = commands(options)
    if options.dry_run:
        show("".join(f"{shlex.join(command)}\n" for command in wanted))
        return
    if options.action != "train":
        for command in wanted:
            call(command)
        return
    try:
        running = [subprocess.Popen(command) for command in wanted]  # all slices at the same time
    except FileNotFoundError:
        raise RunError("gcloud is not on this machine; --dry_run prints what it would be given") from None
    statuses = [process.wait() for process in running]
    if any(statuses):
        raise RunError("a slice failed; the last lines of its processes say why. The same command continues the run")
