"""Log-probabilities of a run's examples under its initial model, computed once and kept in the cache.

The file name of a table is a hash of what it depends on: the parameters, what is computed with them, and the
fingerprint of the examples (tokens and context length). A table is written whole or not at all. A run that continues
finds it by the fingerprint of the parameters, which its work directory keeps; if it is gone, the initial parameters are
made again.
"""

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from gptjax import config as config_lib
from gptjax.data.opening import RunData
from gptjax.data.pipeline.preferences import Examples, InOrder
from gptjax.errors import UserError
from gptjax.files import read_json, whole_file, write_json
from gptjax.model import gpt, lora
from gptjax.objectives.objective import Referenced
from gptjax.parallel import partition
from gptjax.parameters import path_string
from gptjax.processes import distributed
from gptjax.training.program import Program
from gptjax.training.step import first_model

FILE = "reference.json"  # in the work directory: {"parameters": fingerprint}
_SALTS = (0x9E3779B9, 0x85EBCA6B)


def fill(
    program: Program, data: RunData, workdir: Path, beginning: Callable[[], gpt.Params], *, continues: bool
) -> list[str]:
    """Writes the log-probabilities into the examples of a run. Every process of it calls this.

    Args:
      workdir: of the run.
      continues: the run is past step 0.
      beginning: makes the parameters before the first step; called only if they are needed.

    Returns:
      Lines for the user; empty where the objective needs no reference.

    Raises:
      UserError: the run continues, its table is gone, and `beginning` makes other parameters than at its start.
    """
    group = distributed.current()
    parts = program.objective.referenced(data, program.config) if isinstance(program.objective, Referenced) else []
    if not parts:
        return []
    beginning = functools.cache(beginning)
    known = group.first(lambda: _known(workdir / FILE)) if continues else ""
    parameters = known or fingerprint(beginning())
    folder = _folder(program.config)
    computed = 0
    for part in parts:
        path = folder / f"{_name(program.config, parameters, part)}.npy"
        values = group.first(lambda path=path, part=part: _read(path, len(part)))
        if values is None:
            if known and fingerprint(beginning()) != known:
                raise UserError(
                    f"the reference log-probabilities of the run in {workdir} are no longer in {folder}, and "
                    f"init_from={program.config.init_from!r} is no longer the model that the run started with; put "
                    "that model back, or start in another --workdir"
                )
            values = _compute(program, beginning(), part)
            computed += 1
            group.first(lambda path=path, values=values: _write(path, values))
        part.reference[:] = values
    if not known:
        group.first(lambda: write_json(workdir / FILE, {"parameters": parameters}))
    model = program.config.init_from or "the untrained model (init_from is not set)"
    where = "computed, and kept" if computed else "found"
    return [f"reference: {model}; its log-probabilities of {sum(map(len, parts)):,} examples {where} in {folder}"]


def fingerprint(params: gpt.Params) -> str:
    """A hash of the paths, shapes and values of the parameters without adapters, computed on the shards."""
    fixed = lora.split(params)[1] or params
    leaves = jax.tree_util.tree_leaves_with_path(fixed)
    hashes = jax.device_get([jax.jit(_hash)(leaf) for _, leaf in leaves])
    told = [
        (path_string(path), leaf.shape, *map(int, value)) for (path, leaf), value in zip(leaves, hashes, strict=True)
    ]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _hash(leaf: Array) -> UInt32[Array, "salts"]:
    """For each salt, the sum modulo 2^32 of hash(value, index) times an odd number that depends on the index."""
    words = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32)

    def summed(salt: int) -> Array:
        place = jnp.uint32(salt)
        for axis in range(leaf.ndim):
            place = _mixed(place ^ jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis))
        return (_mixed(words ^ place) * (place | 1)).sum(dtype=jnp.uint32)

    return jnp.stack([summed(salt) for salt in _SALTS])


def _mixed(bits: Array) -> Array:
    """The finaliser of MurmurHash3 (Appleby 2011)."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)


def read(config: config_lib.Config, workdir: Path, part: Examples) -> np.ndarray | None:
    """The log-probabilities under the initial model of the run in `workdir`; None if they are not in the cache."""
    parameters = _known(workdir / FILE)
    return _read(_folder(config) / f"{_name(config, parameters, part)}.npy", len(part)) if parameters else None


def _folder(config: config_lib.Config) -> Path:
    return config_lib.cache_directory(config) / "references"


def _name(config: config_lib.Config, parameters: str, part: Examples) -> str:
    """The file name of a table, without its ending."""
    names = config_lib.affecting("model") | {"model.compute_dtype", "model.matmul"}
    model = {name: config.model[name.partition(".")[2]] for name in sorted(names) if name.startswith("model.")}
    identity = [parameters, model, part.fingerprint]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def _known(path: Path) -> str:
    return read_json(path)["parameters"] if path.exists() else ""


def _read(path: Path, rows: int) -> np.ndarray | None:
    try:
        values = np.load(path)
    except (OSError, ValueError, EOFError):
        return None
    return values if values.shape == (rows, 2) and np.isfinite(values).all() else None


def _write(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        np.save(file, values)


def _compute(program: Program, params: gpt.Params, part: Examples) -> np.ndarray:
    """Log-probabilities, float32 [examples, pair], in micro-batches as large as those of the training."""
    train, mesh, objective = program.config.train, program.mesh, program.objective
    rows = train.batch_size // train.accumulation
    batches = InOrder([part], batch_size=rows, rows=partition.process_rows(rows, mesh))

    @functools.partial(jax.jit, out_shardings=partition.replicated(mesh))
    def scored(params: gpt.Params, batch: dict[str, Any]) -> Array:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            model = first_model(program.architecture, lora.split(params)[1] or params)
            return objective.log_probabilities(model, batch)

    values = []
    with jax.set_mesh(mesh):
        for number in range(int(batches.steps_per_epoch)):
            batch = {name: batches[number][name] for name in ("tokens", "targets", "weights")}
            placed = partition.to_device(batch, mesh, batch_size=rows, specs=program.batch_specs)
            values.append(np.asarray(scored(params, placed)))
    return np.concatenate(values)[: len(part)].astype(np.float32)
