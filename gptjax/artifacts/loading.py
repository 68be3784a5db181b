"""A checkpoint read for use: the model, its tokenizer and its template, without what training needs beside them."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from gptjax import config as config_lib
from gptjax.artifacts.checkpoints import finished_steps, quiet_orbax, read_metadata
from gptjax.data.tokenization.templates import ChatTemplate
from gptjax.data.tokenization.tokenizer import Tokenizer
from gptjax.errors import UserError
from gptjax.model import gpt, lora
from gptjax.model.architecture import Architecture


@dataclasses.dataclass(frozen=True)
class Trained:
    """A checkpoint read for use: everything that evaluation and generation need.

    Attributes:
      architecture: for inference; how the run computed is in `config`.
      template: of the dialogues that the model was trained on; None where it was trained on text.
      generation: what came with a pretrained model: `eos_token_ids`, each of which ends a text; `begin_token_ids`,
        which begin one; and the sampling that it was published with, by the names of SamplingParams.
    """

    path: Path
    step: int
    config: config_lib.Config
    tokenizer: Tokenizer
    architecture: Architecture
    params: gpt.Params
    template: ChatTemplate | None = None
    generation: dict[str, Any] = dataclasses.field(default_factory=dict)


def find(workdir: Path, which: str = "best") -> Path:
    """The directory of a checkpoint: `best` (by validation), `last` or a step. Raises UserError."""
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
        known = {step: read_metadata(directory / str(step)) for step in steps}
        monitor, lower_is_better = known[steps[-1]]["monitor"]
        values = {step: metadata["metrics"].get(monitor) for step, metadata in known.items()}
        scored = {step: value for step, value in values.items() if value is not None and math.isfinite(value)}
        best = min if lower_is_better else max
        return directory / str(best(scored, key=scored.get) if scored else steps[-1])
    if which not in map(str, steps):
        raise UserError(f"--checkpoint={which}: choose best, last or one of {', '.join(map(str, steps))}")
    return directory / which


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
    architecture = Architecture.from_config(config.model, 0).for_inference()
    abstract = gpt.abstract_params(architecture)
    if shardings is None:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        tree = jax.tree.map(lambda _: device, abstract)
    else:
        tree = shardings(abstract)
    target = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, tree)
    item = "ema_params" if config.train.ema_decay > 0 else "params"
    with quiet_orbax(), ocp.PyTreeCheckpointer() as checkpointer:
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
    return Trained(
        path,
        metadata["step"],
        config,
        read_tokenizer(metadata),
        architecture,
        params,
        read_template(metadata),
        metadata.get("generation") or {},
    )
