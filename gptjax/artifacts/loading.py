"""Reads a checkpoint for inference: the model, its tokenizer and its template, without the state of training."""

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from gptjax import config as config_lib
from gptjax.artifacts import integrity, mirror
from gptjax.artifacts.checkpoints import quiet_orbax, read_metadata, reading
from gptjax.artifacts.mirror import shown
from gptjax.data.tokenization.templates import ChatTemplate
from gptjax.data.tokenization.tokenizer import Tokenizer
from gptjax.errors import UserError
from gptjax.model import gpt, lora
from gptjax.model.architecture import Architecture


@dataclasses.dataclass(frozen=True)
class Trained:
    """A checkpoint for inference: everything that evaluation and generation need.

    Attributes:
      architecture: for inference; `config` has the kernel and precision of the training run.
      template: of the dialogues that the model was trained on; None if it was trained on text.
      generation: settings of a pretrained model: `eos_token_ids`, each of which ends a text; `begin_token_ids`, which
        begin one; and its published sampling, by the names of SamplingParams.
    """

    path: Path
    step: int
    config: config_lib.Config
    tokenizer: Tokenizer
    architecture: Architecture
    params: gpt.Params
    template: ChatTemplate | None = None
    generation: dict[str, Any] = dataclasses.field(default_factory=dict)


def find(workdir: str | Path, which: str = "best") -> Path:
    """The directory of a checkpoint that is whole: `best` (by validation), `last` or a step, of a work directory.

    The directory of a checkpoint is returned as it is. If the last or the best one is damaged, another is used, with a
    warning. Raises UserError, also for a damaged one that is asked for by its step.
    """
    workdir = mirror.opened(workdir)
    if (workdir / "metadata").exists() or workdir.absolute().parent.name == "checkpoints":
        return _whole(workdir.absolute())
    directory = workdir.absolute() / "checkpoints"
    steps = integrity.step_directories(directory)
    if not steps:
        raise UserError(
            f"no checkpoint in {shown(directory)}; train one with "
            f"`gptjax train --config=FILE --workdir={shown(workdir)}`"
        )
    if which == "last":
        return directory / str(integrity.newest_whole(directory))
    if which == "best":
        return _best(directory)
    if which not in map(str, steps):
        raise UserError(f"--checkpoint={which}: choose best, last or one of {', '.join(map(str, steps))}")
    return _whole(directory / which)


def _whole(checkpoint: Path) -> Path:
    if not checkpoint.is_dir():
        raise UserError(f"no checkpoint in {shown(checkpoint)}")
    if reason := integrity.fault(checkpoint):
        raise UserError(f"{shown(checkpoint)} is not a readable gptjax checkpoint: it is damaged: {reason}")
    return checkpoint


def _best(directory: Path) -> Path:
    """The best checkpoint that is whole; the newest if none was validated."""
    faults = []
    known = {}
    for step in integrity.step_directories(directory):
        try:
            known[step] = read_metadata(directory / str(step))
        except UserError as error:
            faults.append(str(error))
    while known:
        monitor, lower_is_better = known[max(known)]["monitor"]
        values = {step: metadata["metrics"].get(str(monitor)) for step, metadata in known.items()}
        numbers = {step: value for step, value in values.items() if type(value) in (int, float)}
        scored = {step: value for step, value in numbers.items() if math.isfinite(value)}
        best = (min if lower_is_better else max)(scored, key=scored.get) if scored else max(known)
        reason = integrity.fault(directory / str(best))
        if reason is None:
            if faults:
                print(f"warning: {'; '.join(faults[:3])}; step {best} is used instead", file=sys.stderr)
            return directory / str(best)
        faults.append(f"the checkpoint {shown(directory / str(best))} is damaged: {reason}")
        del known[best]
    integrity.newest_whole(directory)  # raises UserError with all faults
    raise UserError(f"no checkpoint in {directory} is whole")


def read_config(checkpoint: Path) -> config_lib.Config:
    """The config stored with a checkpoint, locked. Raises UserError."""
    return integrity.read_config(read_metadata(checkpoint), checkpoint)


def read_tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    """The tokenizer stored with a checkpoint."""
    stored = metadata["tokenizer"]
    return Tokenizer.from_str(stored["json"], eot_token=stored["eot_token"])


def read_template(metadata: dict[str, Any]) -> ChatTemplate | None:
    """The chat template stored with a checkpoint, if any."""
    description = metadata.get("chat_template")
    return ChatTemplate.from_json(description) if description else None


def load(workdir: str | Path, which: str = "best", *, shardings: Any = None, merge: bool = True) -> Trained:
    """Reads the evaluation parameters (averaged ones if kept) of a checkpoint, without the optimizer state.

    Args:
      workdir: a work directory or the directory of one checkpoint.
      which: best, last or a step.
      shardings: function from abstract parameters to their shardings; default: all on one device.
      merge: whether adapters are merged into their kernels, which gives a model without adapters.
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
    item = "ema_params" if config_lib.averages(config) else "params"
    with quiet_orbax(), reading(path), ocp.PyTreeCheckpointer() as checkpointer:
        restored = checkpointer.restore(
            mirror.arrays(path),
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
