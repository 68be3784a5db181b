"""`init_from`: the model that a run starts from, a Hugging Face directory (hf:DIR_OR_NAME) or a work directory.

The options that the weights depend on (sizes, norms, positions, vocabulary, ...) are those of that model, so that one
option is enough to fine-tune with any config. The config gives the options of training, and a context length that may
be shorter than the model's: a table of learned positions is then cut. The vocabulary may grow, for instance by the
special tokens of a chat template: the new rows start like those of a fresh model.
"""

import sys
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gptjax import config as config_lib
from gptjax.artifacts import checkpoints, integrity, loading
from gptjax.data.tokenization import huggingface as tokenizer_files
from gptjax.data.tokenization.tokenizer import Tokenizer, build_tokenizer
from gptjax.errors import UserError
from gptjax.model import lora
from gptjax.model.architecture import Architecture
from gptjax.model.huggingface import files as huggingface_files
from gptjax.model.huggingface import weights as huggingface
from gptjax.parameters import find as find_parameter
from gptjax.parameters import path_string
from gptjax.training.state import TrainState


class Origin(NamedTuple):
    """A model to start from.

    Attributes:
      init_from: as the config has it.
      model: options of the model.
      architecture: the same, resolved.
      tokenizer: the spec of its tokenizer; empty if it has no tokenizer file.
      directory: the Hugging Face directory, or the checkpoint.
      is_own: this is the last checkpoint of the run itself, which continues.
      generation: its published settings, as in `Trained`, without `begin_token_ids`: the token store says how a text
        begins.
    """

    init_from: str
    model: dict[str, Any]
    architecture: Architecture
    tokenizer: str
    directory: Path
    generation: dict[str, Any]
    is_own: bool = False

    @property
    def is_checkpoint(self) -> bool:
        return self.is_own or not self.init_from.startswith("hf:")


def find(init_from: str) -> Origin | None:
    """The model that `init_from` names; None if it is empty. Raises UserError if the model cannot be read."""
    if not init_from:
        return None
    model = config_lib.get_default().model
    if init_from.startswith("hf:"):
        directory = huggingface_files.locate(init_from.removeprefix("hf:"))
        model.update(huggingface.read_config(directory))
        tokenizer = init_from if tokenizer_files.has_tokenizer(directory) else ""
        generation = huggingface_files.read_generation_config(directory, model.vocab_size)
    else:
        directory = loading.find(init_from)
        model.update(loading.read_config(directory).model)
        model.lora_rank = 0  # `load` merges the adapters into the kernels
        workdirs = [path for path in (Path(init_from), directory.parents[1]) if tokenizer_files.has_tokenizer(path)]
        tokenizer = f"hf:{workdirs[0]}" if workdirs else ""
        generation = checkpoints.read_metadata(directory).get("generation") or {}
    generation = {name: value for name, value in generation.items() if name != "begin_token_ids"}
    return Origin(init_from, model.to_dict(), Architecture.from_config(model, 0), tokenizer, directory, generation)


def of_own(workdir: Path, config: config_lib.Config) -> Origin | None:
    """The last checkpoint of a run that continues. It replaces `init_from`, which is needed for step 0 only."""
    newest = integrity.newest_whole(workdir / "checkpoints", tell=False) if config.init_from else 0
    if newest == 0:
        return None
    directory = workdir / "checkpoints" / str(newest)
    own = loading.read_config(directory)
    generation = checkpoints.read_metadata(directory)["generation"]
    architecture = Architecture.from_config(own.model, 0)
    return Origin(
        config.init_from, own.model.to_dict(), architecture, own.tokenizer, directory, generation, is_own=True
    )


def own_tokenizer(origin: Origin | None, config: config_lib.Config) -> Tokenizer | None:
    """The tokenizer stored with a run that continues, if its files are no longer where the config says; else None."""
    if origin is None or not origin.is_own or not config.tokenizer.startswith("hf:"):
        return None
    try:
        build_tokenizer(config.tokenizer)
    except UserError:
        return loading.read_tokenizer(checkpoints.read_metadata(origin.directory))
    return None


def adopt(config: config_lib.Config, origin: Origin | None, chosen: Collection[str] = ()) -> config_lib.Config:
    """The config of a run that starts from `origin`: with its model, and its tokenizer where there is one.

    The context is that of the config, or that of the model where this is shorter.

    Args:
      config: of the run.
      origin: None leaves the config as it is.
      chosen: options that were set on the command line, "model.num_layers". Raises UserError where one of them is
        not that of the model; a chosen tokenizer is kept, and checked by `with_vocabulary`.
    """
    if origin is None:
        return config
    kept = config_lib.affecting("model")
    taken = {name: value for name, value in origin.model.items() if f"model.{name}" in kept}
    problems = [
        f"  --config.model.{name}={config.model[name]}: the model has {getattr(origin.architecture, name)}"
        for name in taken
        if f"model.{name}" in chosen and config.model[name] not in (taken[name], getattr(origin.architecture, name))
    ]
    given, longest = config.model.context_length, origin.architecture.context_length
    if given > longest and "model.context_length" in chosen:
        problems.append(f"  --config.model.context_length={given}: the model has {longest}; use at most that")
    if problems:
        raise UserError(
            f"options do not fit the model of init_from={origin.init_from}; leave them out:\n" + "\n".join(problems)
        )
    config = config.copy_and_resolve_references().unlock()
    config.model.update(taken)
    if given > longest:
        config.model.context_length = longest
        if not origin.is_own:
            print(
                f"model.context_length is {longest}, as in init_from={origin.init_from}; the config has {given}",
                file=sys.stderr,
            )
    if origin.tokenizer and "tokenizer" not in chosen:
        config.tokenizer = origin.tokenizer
    config_lib.validate(config)
    return config.lock()


def with_vocabulary(config: config_lib.Config, origin: Origin | None, tokenizer: Tokenizer) -> config_lib.Config:
    """The config with the vocabulary of the model, or of the tokenizer of the data if that is larger.

    Raises UserError unless the tokenizer is that of `origin`, perhaps with tokens added at its end. A Hugging Face
    directory without a tokenizer is not checked.
    """
    if origin is None:
        return config
    theirs = tokenizer
    if origin.is_checkpoint:
        theirs = loading.read_tokenizer(checkpoints.read_metadata(origin.directory))
    elif origin.tokenizer:
        theirs = tokenizer_files.read_tokenizer(origin.directory)
    if not tokenizer.extends(theirs):
        raise UserError(
            f"init_from={origin.init_from} was trained with another tokenizer than that of {config.data.source}; use "
            f"its own, --config.tokenizer={origin.tokenizer or 'hf:DIR'}, or prepare the data with it"
        )
    config = config.copy_and_resolve_references().unlock()
    config.model.vocab_size = max(origin.architecture.vocab_size, tokenizer.vocab_size)
    new = config.model.vocab_size - origin.architecture.vocab_size
    if new and config.model.lora_rank:
        print(
            f"warning: {new} tokens are new to init_from={origin.init_from}; adapters do not train their embeddings. "
            "To learn them, leave out --config.model.lora_rank",
            file=sys.stderr,
        )
    return config.lock()


def load(origin: Origin, state: TrainState, optimizer: optax.GradientTransformation) -> TrainState:
    """The fresh state with the parameters of `origin`, in the same sharding.

    The optimizer's state is initialised again, since some optimizers keep a copy of the parameters.
    """
    if origin.is_checkpoint:
        params = jax.tree.map(np.asarray, loading.load(origin.directory).params)
    else:
        params = huggingface.read_parameters(origin.directory, origin.architecture)

    def replace(path, fresh):
        name = path_string(path)
        if name.endswith(("lora_a", "lora_b")):
            return fresh
        return _placed(name, huggingface.lookup(params, name), fresh, origin.architecture.vocab_size)

    params = jax.tree_util.tree_map_with_path(replace, state.params)
    averages = ("ema_params", "reference_params")
    copies = {n: jax.tree.map(jnp.copy, params) for n in averages if getattr(state, n) is not None}
    placed = jax.tree.map(lambda leaf: leaf.sharding, state.opt_state)
    opt_state = jax.jit(optimizer.init, out_shardings=placed)(lora.split(params)[0])
    return state.replace(params=params, opt_state=opt_state, **copies)


def _placed(name: str, values: np.ndarray, fresh: jax.Array, vocab_size: int) -> jax.Array:
    """`values` in the shape of `fresh`: further rows of the vocabulary are those of `fresh`, all else is cut."""
    if (axis := find_parameter(name).vocabulary) is not None:
        values = np.take(values, range(vocab_size), axis=axis)
        update = partial(jax.lax.dynamic_update_slice, start_indices=(0, 0))
        return jax.jit(update, out_shardings=fresh.sharding)(fresh, values)
    values = values[tuple(map(slice, fresh.shape))]
    return jax.make_array_from_callback(fresh.shape, fresh.sharding, lambda index: values[index])
