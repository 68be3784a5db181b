"""The arguments of launchers: formats of names, numbers and times, and the command that they start."""

import argparse
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence

from gptjax.errors import RunError, UserError

SAVE_SECONDS = 120  # seconds for a last checkpoint before the machines are taken away


class Parser(argparse.ArgumentParser):
    """Raises UserError where argparse would print the usage and exit."""

    def error(self, message: str):
        raise UserError(message[:1000])


def whole(least: int, most: int) -> Callable[[str], int]:
    """A reader of whole numbers within limits: 8, 8.0, 1e3. argparse puts the flag before the message."""

    def read(text: str) -> int:
        number = float(text) if re.fullmatch(r"[+-]?\d{1,20}(\.\d*)?([eE]\+?\d{1,2})?", text, re.ASCII) else math.nan
        if not number.is_integer():
            raise argparse.ArgumentTypeError(f"{text[:60]!r} is not a whole number")
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"{text[:60]} is not between {least} and {most}")
        return int(number)

    return read


def matching(pattern: str, words: str) -> Callable[[str], str]:
    """A reader of texts that match a pattern; `words` describe it in messages."""

    def read(text: str) -> str:
        if not re.fullmatch(pattern, text, re.ASCII):
            raise argparse.ArgumentTypeError(f"{text[:60]!r} is not {words}")
        return text

    return read


def path(text: str) -> str:
    """Reads a path or name that a script can contain: not empty, without line breaks."""
    if not text.strip() or len(text) > 4000 or any(ord(character) < 32 for character in text):
        raise argparse.ArgumentTypeError(f"{text[:60]!r} is not a name")
    return text


# The names of jobs, nodes and pods: what Slurm, gcloud and Kubernetes all accept.
NAME = matching("[a-z]([-a-z0-9]{0,46}[a-z0-9])?", "a name of lower-case letters, digits and hyphens, at most 48")
SLURM_NAME = matching("[A-Za-z0-9][-+.A-Za-z0-9_@]{0,127}", "a name of letters, digits and -+._@")
BUCKET = matching("[a-z0-9]([-a-z0-9_.]{0,220}[a-z0-9])?", "the name of a bucket, without gs://")
WORD = matching("[A-Za-z0-9][-A-Za-z0-9_.:/@]{0,250}", "a name of letters, digits and -_.:/@")
TIME = matching(r"\d{1,6}(:\d{1,2}){0,2}|\d{1,4}-\d{1,2}(:\d{1,2}){0,2}", "a time such as 24:00:00 or 2-12")


def add_run(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Adds the arguments of every launcher."""
    parser.add_argument("--config", type=path, required=required, help="e.g. --config=configs/gpt2_124m.py")
    parser.add_argument(
        "--workdir",
        type=path,
        required=required,
        help="work directory on a file system that every machine has, or gs://BUCKET/PATH",
    )
    add_dry_run(parser)


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry_run", action="store_true", help="only print what would be started, e.g. --dry_run")


def train_command(options: argparse.Namespace, workdir: str, python: str) -> list[str]:
    """The command of each machine; `options.arguments` are passed on unchanged."""
    return [python, "-m", "gptjax.train", f"--config={options.config}", f"--workdir={workdir}", *options.arguments]


def in_bucket(workdir: str | None) -> bool:
    """Whether the run writes to a bucket itself, so that machines need not mount it."""
    return bool(workdir) and workdir.startswith("gs://")


def call(command: Sequence[str], text: str | None = None) -> None:
    """Runs an external command with `text` on its standard input. Raises RunError if it is missing or fails."""
    try:
        subprocess.run(command, input=text, text=True, check=True)
    except FileNotFoundError:
        raise RunError(f"{command[0]} is not on this machine; --dry_run prints what would be run") from None
    except subprocess.CalledProcessError as error:
        raise RunError(f"{shlex.join(command)[:300]} ended with status {error.returncode}, see above") from None


def show(text: str) -> None:
    sys.stdout.write(text)
