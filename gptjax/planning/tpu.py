"""The environment that holds the TPU compiler, and the process that compiles in it.

libtpu is not installed in the environment of the runs: with it, every JAX process on a machine without TPUs prints
warnings at start-up.
"""

import contextlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import gptjax
from gptjax import config as config_lib
from gptjax import files
from gptjax.errors import RunError, UserError
from gptjax.planning.facts import Facts

# The packages that a train step needs; gptjax's other dependencies are not needed to compile it.
PACKAGES = ("absl-py", "flax", "jaxtyping", "ml-collections", "numpy", "optax")


def environment_directory() -> Path:
    """The directory of the environment, in $GPTJAX_CACHE or ~/.cache/gptjax."""
    return files.cache() / "tpu-venv"


def install_commands(directory: Path) -> list[list[str]]:
    """The commands that create the environment, with the package versions of this one."""
    version = importlib.metadata.version
    requirements = [f"jax[tpu]=={version('jax')}", *(f"{name}=={version(name)}" for name in PACKAGES)]
    return [
        [sys.executable, "-m", "venv", str(directory)],
        [str(directory / "bin" / "python"), "-m", "pip", "install", "--quiet", *requirements],
    ]


def set_up() -> Path:
    """Creates the environment (about 600 MB); returns its interpreter."""
    directory = environment_directory()
    for command in install_commands(directory):
        print(" ".join(command), file=sys.stderr, flush=True)
        status = subprocess.run(command, check=False).returncode
        if status:
            raise RunError(f"{command[0]} ended with status {status}; the lines above say why")
    return directory / "bin" / "python"


def find_python() -> Path:
    """The environment's interpreter: $GPTJAX_TPU_PYTHON or the default. Raises UserError if it is missing."""
    if given := os.environ.get("GPTJAX_TPU_PYTHON"):
        if not Path(given).is_file():
            raise UserError(f"$GPTJAX_TPU_PYTHON is {given}; there is no such interpreter")
        return Path(given)
    python = environment_directory() / "bin" / "python"
    if not _has_libtpu(python):
        commands = " && ".join(" ".join(_quoted(word) for word in c) for c in install_commands(python.parents[1]))
        raise UserError(
            f"the TPU compiler (libtpu) is not in {python.parents[1]}. `gptjax plan --setup` installs it there, like "
            f"`{commands}`; for another environment that has it, set GPTJAX_TPU_PYTHON=DIR/bin/python"
        )
    return python


def _has_libtpu(python: Path) -> bool:
    return python.is_file() and any(python.parents[1].glob("lib/python*/site-packages/libtpu/libtpu.so"))


def _quoted(word: str) -> str:
    return f"'{word}'" if "[" in word else word


class TpuProcess:
    """A process with the TPU compiler, which serves requests one after the other.

    Use as a context manager; `compile` raises UserError for mistakes in the request and RunError if the compiler
    fails.
    """

    def __init__(self, python: Path):
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed by __exit__
        unwanted = ("XLA_FLAGS", "JAX_PLATFORMS", "PYTHONHOME", "VIRTUAL_ENV")  # they concern the caller's own device
        environment = {name: value for name, value in os.environ.items() if name not in unwanted}
        environment["PYTHONPATH"] = str(Path(gptjax.__file__).parents[1])
        self._process = subprocess.Popen(
            [str(python), "-m", "gptjax.planning.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            text=True,
        )

    def __enter__(self) -> "TpuProcess":
        return self

    def __exit__(self, *error) -> None:
        with contextlib.suppress(BrokenPipeError):  # the process may have died with a request in the pipe
            self._process.stdin.close()
        if error[0] is not None:
            self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def compile(self, config: config_lib.Config, topology: str) -> Facts:
        """The facts of a resolved config on a topology such as "v5e:4x4"."""
        request = {"config": config_lib.to_json(config), "topology": topology}
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # reported below as the missing answer
        line = self._process.stdout.readline()
        if not line:
            said = self._last_lines()
            print(said, file=sys.stderr)
            last = said.strip().rpartition("\n")[2] or "no output"
            raise RunError(f"the TPU compiler ended without an answer; the last of the lines above is: {last[:300]}")
        answer = json.loads(line)
        if "user_error" in answer:
            raise UserError(answer["user_error"])
        if "bug" in answer:
            print(answer["bug"].strip(), file=sys.stderr)
            raise RunError("the TPU compiler failed; the lines above say where")
        return Facts.from_json(json.dumps(answer["facts"]))

    def _last_lines(self, count: int = 12) -> str:
        self._errors.seek(0)
        return "\n".join(self._errors.read().decode(errors="replace").splitlines()[-count:])
