"""Reads a published model in the Hugging Face layout for inference."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from gptjax import config as config_lib
from gptjax.artifacts.loading import Trained
from gptjax.data.tokenization import huggingface as tokenizer_files
from gptjax.errors import UserError
from gptjax.model import lora
from gptjax.model.architecture import Architecture
from gptjax.model.huggingface import adapters, files, weights


def read_config(directory: Path, name: str = "", adapter: Path | None = None) -> config_lib.Config:
    """The default config with the options of `model`, without those of adapters, and the tokenizer of a directory.

    Arguments: see `read`. Raises UserError for a model that is not supported.
    """
    config = config_lib.get_default()
    config.model.update(weights.read_config(directory))
    source = _of_tokenizer(directory, adapter)
    config.tokenizer = f"hf:{name or directory}" if source == directory else f"hf:{source}"
    config_lib.validate(config)
    return config


def load(
    directory: Path,
    name: str = "",
    *,
    adapter: Path | None = None,
    shardings: Any = None,
    merge: bool = True,
    **options: Any,
) -> Trained:
    """`read`, with adapters merged into the kernels, on the devices that `shardings` names (see `loading.load`)."""
    trained = read(directory, name, adapter=adapter, **options)
    params, architecture = trained.params, trained.architecture
    if merge:
        params, architecture = lora.merge(params, architecture)
    if shardings is not None:
        params = jax.device_put(params, shardings(params))
    return dataclasses.replace(trained, params=params, architecture=architecture)


def read(
    directory: Path,
    name: str = "",
    *,
    adapter: Path | None = None,
    allow_pickle: bool = False,
    add_bos_token: str = "auto",
) -> Trained:
    """The model of a directory as the checkpoint of step 0, its adapters beside the kernels that they change.

    Args:
      name: the name of the directory in the command; default: itself.
      adapter: a directory of PEFT. Its tokenizer and template, if it has them, replace those of the model.
      allow_pickle: whether weights in a pickle are read.
      add_bos_token: whether prompts begin with the begin-of-text token: auto (as the tokenizer says), true, false.

    Raises UserError for files that cannot be read. A chat template that cannot be used is left out, with a warning.
    """
    config = read_config(directory, name, adapter)
    source = _of_tokenizer(directory, adapter)
    tokenizer = tokenizer_files.read_tokenizer(source)
    try:
        template = tokenizer_files.read_template(source, tokenizer)
    except UserError as error:
        template = None
        print(f"the chat template is left out: {error}", file=sys.stderr)
    tokenizer = tokenizer_files.fitted(tokenizer, config.model.vocab_size, source)
    generation = files.read_generation_config(directory, config.model.vocab_size)
    begin = {"true": list(tokenizer.begin_ids), "false": []}
    generation["begin_token_ids"] = begin.get(add_bos_token, tokenizer_files.begin_ids(tokenizer, template))
    architecture = Architecture.from_config(config.model, 0)
    params = weights.read_parameters(directory, architecture, allow_pickle=allow_pickle)
    if adapter is not None:
        options, params = adapters.read_adapter(adapter, architecture, params)
        config.model.update(options)
    architecture = Architecture.from_config(config.model, 0).for_inference()
    params = jax.tree.map(jnp.asarray, params)
    return Trained(directory, 0, config.lock(), tokenizer, architecture, params, template, generation)


def _of_tokenizer(directory: Path, adapter: Path | None) -> Path:
    """The directory whose tokenizer is used."""
    return adapter if adapter is not None and tokenizer_files.has_tokenizer(adapter) else directory
