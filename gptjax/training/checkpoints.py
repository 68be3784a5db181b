"""Checkpoints on disk. Orbax is used here and nowhere else.

WORKDIR/checkpoints/STEP/ holds `state` (the TrainState) and `metadata` (config, tokenizer, metrics), so that the
directory of one step is self-contained. A save is asynchronous and atomic: it is written beside its place and
renamed, so what `steps()` lists can always be restored.
"""

import dataclasses
import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from gptjax import config as config_lib
from gptjax.data.templates import ChatTemplate
from gptjax.data.tokenizers import Tokenizer
from gptjax.errors import RunError, UserError
from gptjax.model import gpt, lora
from gptjax.model.architecture import Architecture
from gptjax.parallel import partition
from gptjax.training.state import TrainState

# Orbax logs every phase of a save, and every error that it raises as well.
for name in ("absl", "orbax", "asyncio"):
    logging.getLogger(name).setLevel(logging.CRITICAL)


class Checkpoints:
    """The checkpoints of one work directory: the newest `keep` and the best by validation loss are kept."""

    def __init__(self, workdir: Path, *, keep: int = 2):
        self.directory = Path(workdir).absolute() / "checkpoints"
        policy = checkpoint_managers.AnyPreservationPolicy(
            [
                checkpoint_managers.LatestN(keep),
                checkpoint_managers.BestN(
                    get_metric_fn=_validation_loss,
                    reverse=True,
                    n=1,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        )
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy,
                best_fn=_validation_loss,  # Orbax then stores the metrics: the best outlives a restart
                create=True,
                enable_async_checkpointing=True,
                cleanup_tmp_directories=True,
            ),
            item_handlers={"state": ocp.StandardCheckpointHandler(), "metadata": ocp.JsonCheckpointHandler()},
        )

    def steps(self) -> list[int]:
        """Steps that can be restored, ascending."""
        return sorted(self._manager.all_steps())

    def advice(self) -> str:
        """How a run that ended goes on, from what is on disk."""
        good = finished_steps(self.directory)
        where = f"step {good[-1]} ({self.directory / str(good[-1])})" if good else "the beginning: nothing is saved yet"
        return f"the same command continues from {where}"

    def save(
        self,
        step: int,
        state: TrainState,
        *,
        config: config_lib.Config,
        tokenizer: Tokenizer,
        template: ChatTemplate | None = None,
        generation: dict[str, Any] | None = None,
        metrics: dict[str, float],
    ) -> None:
        """Starts a save and returns; a failure of this save shows at the next call. Raises RunError."""
        metadata = {
            "step": step,
            "config": config.to_dict(),
            "config_sha256": config_lib.sha256(config),
            "tokenizer": {"json": tokenizer.to_str(), "eot_token": tokenizer.eot_token},
            "chat_template": template and template.to_json(),
            "generation": generation or {},
            "metrics": metrics,
        }
        items = {"state": ocp.args.StandardSave(state), "metadata": ocp.args.JsonSave(metadata)}
        with _disk_errors(self):
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics, force=True)

    def wait(self) -> None:
        """Returns when the last save is on disk. Raises RunError if it could not be written."""
        with _disk_errors(self):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def restore(self, step: int, abstract_state: Any) -> TrainState:
        """The state of a step, sharded as `abstract_state` says (not necessarily as it was saved)."""
        there, here = map(_shapes, (self._manager.item_metadata(step)["state"].tree, abstract_state))
        if names := sorted(name for name in there | here if there.get(name) != here.get(name)):
            known = [f"{name} is {there.get(name, 'not')} there and {here.get(name, 'not')} here" for name in names]
            more = f" and {len(known) - 3} more" if len(known) > 3 else ""
            raise UserError(
                f"the checkpoint {self.directory / str(step)} is of another model or optimizer ("
                f"{', '.join(known[:3])}{more}); use its own config or another --workdir"
            )
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
        return self._manager.restore(step, args=args)["state"]

    def close(self) -> None:
        """Waits for the last save. Raises RunError if it could not be written."""
        with _disk_errors(self):
            self._manager.close()


class _disk_errors:
    """Turns what Orbax raises when a disk is full or not writable into a RunError that says what is safe."""

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if error is None or isinstance(error, KeyboardInterrupt | RunError):
            return False
        directory = self._checkpoints.directory
        good = finished_steps(directory)
        safe = f"the last good checkpoint is {directory / str(good[-1])}" if good else "no checkpoint exists yet"
        free = shutil.disk_usage(directory.parent).free / 2**20
        raise RunError(
            f"a checkpoint could not be written to {directory} ({free:.0f} MiB free): {_first_line(error)}; {safe}. "
            "Free some space and run the same command to continue"
        ) from error


def write_parameters(
    workdir: Path,
    params: gpt.Params,
    *,
    config: config_lib.Config,
    tokenizer: Tokenizer,
    template: ChatTemplate | None = None,
    generation: dict[str, Any] | None = None,
) -> Path:
    """Writes parameters that were trained elsewhere as the checkpoint of step 0; returns its directory."""
    state = TrainState(
        step=jnp.zeros((), jnp.int32), params=jax.tree.map(jnp.asarray, params), opt_state=(), ema_params=None
    )
    checkpoints = Checkpoints(workdir)
    about = {"config": config, "tokenizer": tokenizer, "template": template, "generation": generation}
    checkpoints.save(0, state, **about, metrics={})
    checkpoints.wait()
    checkpoints.close()
    return checkpoints.directory / "0"


@dataclasses.dataclass(frozen=True)
class Trained:
    """A checkpoint read for use: everything that evaluation and generation need.

    Attributes:
      template: of the dialogues that the model was trained on; None where it was trained on text.
      generation: what came with a pretrained model: `eos_token_ids`, each of which ends a text; `begin_token_ids`,
        which begin one; and the sampling that it was published with, by the names of SamplingParams.
    """

    path: Path
    step: int
    config: config_lib.Config
    tokenizer: Tokenizer
    architecture: Architecture
    graphdef: Any
    params: gpt.Params
    template: ChatTemplate | None = None
    generation: dict[str, Any] = dataclasses.field(default_factory=dict)


def finished_steps(directory: Path) -> list[int]:
    """Steps under a checkpoints directory whose save was completed, ascending."""
    if not directory.is_dir():
        return []
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit() and (p / "metadata").exists())


def find(workdir: Path, which: str = "best") -> Path:
    """The directory of a checkpoint: `best` (lowest validation loss), `last` or a step. Raises UserError."""
    workdir = Path(workdir)
    if (workdir / "metadata").exists():
        return workdir.absolute()
    directory = workdir.absolute() / "checkpoints"
    steps = finished_steps(directory)
    if not steps:
        raise UserError(f"no checkpoint in {directory}; train one with `python -m gptjax.train --workdir={workdir}`")
    if which == "last":
        return directory / str(steps[-1])
    if which == "best":
        losses = {step: read_metadata(directory / str(step))["metrics"].get("validation_loss") for step in steps}
        scored = {step: loss for step, loss in losses.items() if loss is not None and math.isfinite(loss)}
        return directory / str(min(scored, key=scored.get) if scored else steps[-1])
    if which not in map(str, steps):
        raise UserError(f"--checkpoint={which}: choose best, last or one of {', '.join(map(str, steps))}")
    return directory / which


def read_metadata(checkpoint: Path) -> dict[str, Any]:
    """Config, tokenizer and metrics stored with a checkpoint."""
    path = checkpoint / "metadata" / "metadata"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{checkpoint} is not a readable gptjax checkpoint: {error}") from None


def read_config(checkpoint: Path) -> config_lib.Config:
    """The config stored with a checkpoint, locked."""
    return config_lib.from_json(json.dumps(read_metadata(checkpoint)["config"]))


def read_tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    """The tokenizer stored with a checkpoint."""
    stored = metadata["tokenizer"]
    return Tokenizer.from_str(stored["json"], eot_token=stored["eot_token"])


def read_template(metadata: dict[str, Any]) -> ChatTemplate | None:
    """The chat template stored with a checkpoint, if any."""
    description = metadata.get("chat_template")
    return ChatTemplate.from_json(description) if description else None


def load(workdir: Path, which: str = "best", *, shardings: Any = None, merge: bool = True) -> Trained:
    """Reads the evaluation parameters (averaged ones if kept) of a checkpoint, without the optimizer state.

    Args:
      workdir: a work directory or the directory of one checkpoint.
      which: best, last or a step.
      shardings: function from abstract parameters to their shardings; default: all on one device.
      merge: adapters become a part of the kernels beside them, and the model one without adapters.
    """
    path = find(workdir, which)
    metadata = read_metadata(path)
    config = read_config(path)
    architecture = Architecture.from_config(config.model, 0)
    graphdef, abstract = gpt.abstract_model(architecture)
    if shardings is None:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        tree = jax.tree.map(lambda _: device, abstract)
    else:
        tree = shardings(abstract)
    target = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, tree)
    item = "ema_params" if config.train.ema_decay > 0 else "params"
    with ocp.PyTreeCheckpointer() as checkpointer:
        restored = checkpointer.restore(
            path / "state",
            args=ocp.args.PyTreeRestore(
                item={item: target},
                restore_args={item: ocp.checkpoint_utils.construct_restore_args(target)},
                partial_restore=True,
            ),
        )
    params = restored[item]
    if merge and architecture.lora_rank:
        params, architecture = lora.merge(params, architecture)
        graphdef, _ = gpt.abstract_model(architecture)
    return Trained(
        path,
        metadata["step"],
        config,
        read_tokenizer(metadata),
        architecture,
        graphdef,
        params,
        read_template(metadata),
        metadata.get("generation") or {},
    )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """The shape of each array of a state, or of what Orbax knows about a stored one."""
    return {partition.path_string(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _validation_loss(metrics: dict[str, float]) -> float:
    loss = metrics.get("validation_loss", math.inf)
    return loss if math.isfinite(loss) else math.inf


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]
