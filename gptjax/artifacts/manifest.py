"""manifest.json: what produced a run, to answer why two runs differ."""

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from gptjax import __version__, parameters
from gptjax.config import Config, sha256
from gptjax.model import lora
from gptjax.model.architecture import FLOPS_CONVENTION, Architecture
from gptjax.optim.optimizers import updater
from gptjax.parallel import partition
from gptjax.parameters import path_string

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "ml-collections",
    "tokenizers",
    "numpy",
)


def build(
    config: Config, mesh: Mesh, params: Any, data: dict[str, Any], changes: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    """The manifest of a run.

    Args:
      params: may be abstract.
      data: the token store's manifest.
      changes: options that were changed while the run went on, with their steps (see `workdir.read_changes`).
    """
    return {
        "gptjax": __version__,
        "git": git_state(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "command": sys.argv,
        "environment": {
            k: os.environ[k] for k in ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_PLATFORMS") if k in os.environ
        },
        "devices": {
            "kind": mesh.devices.flat[0].device_kind,
            "platform": mesh.devices.flat[0].platform,
            "count": mesh.devices.size,
            "processes": jax.process_count(),
        },
        "mesh": dict(mesh.shape),
        "prng": {"implementation": str(jax.random.key_impl(jax.random.key(0))), "seed": config.seed},
        "config_sha256": sha256(config),
        "changes": list(changes),
        "flops_per_token": Architecture.from_config(config.model, config.model.vocab_size).flops_per_token(),
        "flops_convention": FLOPS_CONVENTION,
        "data": data,
        "parameters": parameter_table(config, mesh, params),
    }


def parameter_table(config: Config, mesh: Mesh, params: Any) -> list[dict[str, Any]]:
    """One row per parameter: path, shape, sharding, whether it is decayed, and which optimizer updates it."""
    trained = {path_string(path) for path, _ in jax.tree_util.tree_leaves_with_path(lora.split(params)[0])}
    rows = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = path_string(path)
        row = parameters.find(name)
        rows.append(
            {
                "path": name,
                "shape": list(leaf.shape),
                "sharding": str(partition.partition_spec(name, leaf.shape, mesh)),
                "init": initialisation(config, name),
                "decay": row.decayed and name in trained,
                "optimizer": updater(config.optimizer.name, row) if name in trained else "none",
            }
        )
    return rows


def initialisation(config: Config, name: str) -> str:
    """The initialisation of a parameter, as text."""
    std, layers, initial = config.model.init_std, config.model.num_layers, parameters.find(name).initial
    factor = parameters.multiplier(config.model.init_multipliers, name, "model.init_multipliers")
    times = "" if factor == 1 else f"{factor:g} x "
    return {
        "normal": f"normal({times}{std})",
        "residual": f"normal({times}{std} / sqrt(2 x {layers}))",
        "uniform": "uniform(1 / sqrt(inputs))",
    }.get(initial, initial)


def processor() -> str:
    """The processor's name and widest instructions: programs for different processors round differently."""
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        name = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
        wide = next((flag for flag in ("avx512f", "avx2", "avx") if re.search(rf"\b{flag}\b", text)), "")
        if name:
            return f"{name[1].strip()[:200]} {wide}".strip()
    return platform.processor() or platform.machine()


def git_state() -> dict[str, str] | None:
    """Commit of the checkout that this package runs from, and hash of its uncommitted changes; None without one."""
    root = Path(__file__).parent.parent.parent

    def git(*arguments: str) -> str:
        result = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
        return result.stdout

    try:
        if Path(git("rev-parse", "--show-toplevel").strip()) != root.resolve():
            return None
        diff = git("diff", "HEAD")
        return {
            "commit": git("rev-parse", "HEAD").strip(),
            "diff_sha256": hashlib.sha256(diff.encode()).hexdigest() if diff else "",
        }
    except (OSError, subprocess.CalledProcessError):
        return None
