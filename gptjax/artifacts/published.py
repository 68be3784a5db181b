"""A published model, in the Hugging Face layout, read for use."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from gptjax import config as config_lib
from gptjax.artifacts.loading import Trained
from gptjax.data.tokenization import huggingface as tokenizer_files
from gptjax.errors import UserError
from gptjax.model.architecture import Architecture
from gptjax.model.huggingface import adapters, files, weights


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
      name: by which the directory was asked for; default: itself.
      adapter: a directory of PEFT.
      allow_pickle: whether weights in a pickle are read.
      add_bos_token: whether prompts begin with the token that begins a text: auto (the tokenizer says it), true, false.

    Raises UserError for what cannot be read. A chat template that cannot be used is left out, which is said on stderr.
    """
    config = config_lib.get_default()
    config.model.update(weights.read_config(directory))
    config.tokenizer = f"hf:{name or directory}"
    config_lib.validate(config)
    tokenizer = tokenizer_files.read_tokenizer(directory)
    try:
        template = tokenizer_files.read_template(directory, tokenizer)
    except UserError as error:
        template = None
        print(f"the chat template is left out: {error}", file=sys.stderr)
    tokenizer = tokenizer_files.fitted(tokenizer, config.model.vocab_size, directory)
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
