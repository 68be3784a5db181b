"""The entry point of a container in managed training: Vertex AI, SageMaker and Huawei ModelArts.

One run uses all machines of the job (`processes/managed.py`). Without --workdir it writes to the service's folder for
checkpoints, so that a restarted job continues. In the arguments after `--`, {input:NAME} stands for the folder of an
input: a channel of SageMaker, an input of ModelArts, or `data` of Vertex AI. Options may also be given as
hyper-parameters: SageMaker starts the container with the single argument `train`, and ModelArts appends
--NAME=FOLDER for each of its inputs and outputs to the command.
"""

import argparse
import json
import os
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from gptjax.errors import UserError
from gptjax.launchers.arguments import add_run, show, train_command
from gptjax.processes import managed

CHANNELS = "/opt/ml/input/data"  # of SageMaker
CHECKPOINTS = "/opt/ml/checkpoints"  # exists if the job has a place for checkpoints
MODEL = "/opt/ml/model"  # kept after the end of the job


def define(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("verb", nargs="?", choices=["train"], default="train", help="added by SageMaker")
    add_run(parser, required=False)


def run(options: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> None:
    command = resolve(options, environment)
    if options.dry_run:
        show(f"{shlex.join(command)}\n")
        return
    sys.stdout.flush()
    os.execv(command[0], command)  # so that the signals of the service reach the run itself


def resolve(options: argparse.Namespace, environment: Mapping[str, str]) -> list[str]:
    """The command of this machine. Raises UserError if there is no job, no work directory or no such input."""
    job = managed.find(environment)
    if job is None:
        raise UserError("this is not a job of Vertex AI, SageMaker or ModelArts: none of their variables is set")
    given, inputs, outputs = {}, {}, {}
    if job.service == managed.SAGEMAKER:
        given, inputs, outputs = _sagemaker(environment)
    elif job.service == managed.VERTEX:
        inputs = {"data": uri} if (uri := environment.get("AIP_TRAINING_DATA_URI")) else {}
        outputs = {name: environment[name] for name in ("AIP_CHECKPOINT_DIR", "AIP_MODEL_DIR") if environment.get(name)}
    else:
        options.arguments, inputs, outputs = _modelarts(options.arguments, environment)
    options.config = options.config or given.pop("config", None)
    workdir = options.workdir or given.pop("workdir", None)
    options.arguments = [*(f"--{name}={value}" for name, value in given.items()), *options.arguments]
    if not options.config:
        raise UserError("--config is missing; e.g. --config=configs/quickstart.py")
    if not workdir:
        workdir = next(iter(outputs.values()), None)
        if workdir is None:
            raise UserError(f"--workdir is missing, and {job.service} gives no folder for checkpoints")
        if len(job.hosts) > 1 and "://" not in workdir:
            raise UserError(
                f"--workdir is missing, and {workdir} of {job.service} is local to each machine; a run on "
                f"{len(job.hosts)} machines needs a shared one, such as a mounted file system or gs://BUCKET/PATH"
            )
    workdir = workdir.rstrip("/") or workdir
    options.arguments = [_filled(argument, inputs, job.service) for argument in options.arguments]
    return train_command(options, _filled(workdir, inputs, job.service), sys.executable)


def _filled(text: str, inputs: Mapping[str, str], service: str) -> str:
    """The text with {input:NAME} replaced."""

    def folder(match: re.Match[str]) -> str:
        if match[1] not in inputs:
            raise UserError(f"{text[:200]}: {service} has no input {match[1]!r}; inputs: {sorted(inputs) or 'none'}")
        return inputs[match[1]].rstrip("/")

    return re.sub(r"\{input:([\w.-]+)\}", folder, text)


def _sagemaker(environment: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """Hyper-parameters, channels by name, and output folders by name."""
    path = Path(managed.SAGEMAKER_CONFIG) / "hyperparameters.json"
    given = managed.read(str(path), path.read_text(encoding="utf-8")) if path.exists() else {}
    # The service's own hyper-parameters begin with sagemaker_; its Python library writes texts as JSON.
    given = {name: _text(value) for name, value in given.items() if not name.startswith("sagemaker_")}
    channels = {folder.name: str(folder) for folder in Path(CHANNELS).glob("*") if folder.is_dir()}
    for name, value in environment.items():
        if name.startswith("SM_CHANNEL_"):
            channels[name.removeprefix("SM_CHANNEL_").lower()] = value
    places = [CHECKPOINTS] if Path(CHECKPOINTS).is_dir() else []
    places.append(environment.get("SM_MODEL_DIR", MODEL))
    return given, channels, {place: place for place in places}


def _text(value: object) -> str:
    try:
        read = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        read = value
    return read if isinstance(read, str) else str(value)


def _modelarts(
    arguments: list[str], environment: Mapping[str, str]
) -> tuple[list[str], dict[str, str], dict[str, str]]:
    """The arguments of the run, and inputs and outputs by name, which ModelArts passes as arguments or variables."""
    mount = environment.get("MA_MOUNT_PATH", "/home/ma-user/modelarts")
    inputs, outputs, rest = {}, {}, []
    for name, value in environment.items():
        for folder, found in (("inputs", inputs), ("outputs", outputs)):
            if value.startswith(f"{mount}/{folder}/"):
                found[name] = value
    for argument in arguments:
        match = re.fullmatch(rf"--(\w+)=({re.escape(mount)}/(inputs|outputs)/.*)", argument)
        if match:
            (inputs if match[3] == "inputs" else outputs)[match[1]] = match[2]
        else:
            rest.append(argument)
    return rest, inputs, outputs
