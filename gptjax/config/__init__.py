"""Configs: made from defaults, changed by a file and flags, checked, and resolved for a run.

A config file starts from `get_default()`, changes what it needs and is read with
`--config=FILE[:ARG] --config.section.option=value`. `python -m gptjax.config` prints all options.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptjax import files, json_text
from gptjax.config import stages, values
from gptjax.config.durations import UNITS, resolve_duration
from gptjax.config.options import (
    AVERAGING,
    LORA_PATHS,
    MESH_AXES,
    OPTIONS,
    ROW_AXES,
    Config,
    Option,
    affecting,
    flat_options,
)
from gptjax.config.validation import assign, listed, normalise, steps_problems, suggestion, validate
from gptjax.errors import UserError

__all__ = [
    "LORA_PATHS",
    "MESH_AXES",
    "OPTIONS",
    "ROW_AXES",
    "UNITS",
    "Config",
    "Option",
    "affecting",
    "apply_arg",
    "averages",
    "cache_directory",
    "flat_options",
    "flat_values",
    "from_json",
    "get_default",
    "override",
    "resolve",
    "resolve_duration",
    "sha256",
    "suggestion",
    "to_json",
    "validate",
]


def get_default() -> Config:
    """A ConfigDict with every option at its default."""

    # ConfigDict checks no types here: `validate` accepts a value in any notation and has clearer messages.
    config = Config(type_safe=False)
    for name, entry in OPTIONS.items():
        if isinstance(entry, Option):
            config[name] = entry.default
        else:
            config[name] = Config({k: option.default for k, option in entry.items()}, type_safe=False)
    return config


def averages(config: Config) -> bool:
    """Whether a run keeps an average of its parameters, which evaluation, samples and export use."""
    return config.train.ema_decay > 0 or config.optimizer.name in AVERAGING


def override(config: Config, path: str, text: str) -> None:
    """Sets the option of --config.PATH=TEXT. A text that cannot be read is kept, and `validate` refuses it."""
    section, _, name = path.rpartition(".")
    held = config.get(section) if section else config
    if isinstance(held, Config):  # else `validate` says that the section is missing
        try:
            value = values.read(flat_options()[path], text)
        except ValueError:
            value = text
        assign(held, name, value)


def flat_values(config: Config) -> Iterator[tuple[str, Any]]:
    """("section.option", value) in the order of the table."""
    for path in flat_options():
        section, _, name = path.rpartition(".")
        yield path, (config[section] if section else config)[name]


def apply_arg(config: Config, arg: str) -> Config:
    """Applies what follows the colon of --config=FILE:ARG. `runlocal` shrinks a run to under a minute on a CPU."""
    if arg == "runlocal":
        model = config.model
        model.update(num_layers=2, num_heads=2, num_kv_heads=0, embed_dim=32, head_dim=0, mlp_dim=0)
        model.update(context_length=min(model.context_length, 32), compute_dtype="float32")
        if config.tokenizer.startswith(("bpe", "hf")) and not config.data.source.startswith("tokens:"):
            config.tokenizer, model.vocab_size = "byte", 0
        config.train.update(num_steps=20, batch_size=4, accumulation=1, checkpoint_every=10)
        config.schedule.update(warmup="10%", decay="25%")
        config.evaluation.update(every=10, max_tokens=4096, max_prompts=8, max_new_tokens=16, batch_size=8)
        config.logging.update(every=5, samples=1, sample_tokens=16)
        config.mesh.update(get_default().mesh)
        config.init_from = ""
    elif arg:
        raise UserError(f"--config=FILE:{arg}: unknown argument {arg!r}; this config takes 'runlocal' or nothing")
    return config


def resolve(config: Config, vocab_size: int, steps_per_epoch: float) -> Config:
    """The config with durations in steps, the vocabulary and the seed of data filled in.

    Raises UserError if the schedule is longer than the run, or the vocabulary smaller than the tokenizer's.
    """
    config = normalise(config.copy_and_resolve_references())
    if problems := list(steps_problems(config, steps_per_epoch)):
        raise UserError(listed("the config", problems))
    tokens_per_step = config.train.batch_size * config.model.context_length

    def steps(value, total):
        return resolve_duration(value, total=total, tokens_per_step=tokens_per_step, steps_per_epoch=steps_per_epoch)

    resolved = config.to_dict()
    num_steps = steps(config.train.num_steps, None)
    for path, option in flat_options().items():
        if option.duration:
            section, name = path.split(".")
            at_least = 0 if section == "schedule" else 1
            resolved[section][name] = max(steps(resolved[section][name], num_steps), at_least)
    for section, name in (("train", "num_steps"), ("train", "checkpoint_every"), ("evaluation", "every")):
        if resolved["objective"]["name"] == "reinforcement":  # nothing is saved between updates with the same answers
            each = resolved["objective"]["num_iterations"]
            resolved[section][name] = -(-resolved[section][name] // each) * each
    resolved["schedule"]["batch_stages"] = stages.resolve(
        config.schedule.batch_stages, total=num_steps, tokens_per_step=tokens_per_step, steps_per_epoch=steps_per_epoch
    )
    if resolved["data_seed"] < 0:
        resolved["data_seed"] = resolved["seed"]
    resolved["model"]["vocab_size"] = resolved["model"]["vocab_size"] or vocab_size
    if resolved["model"]["vocab_size"] < vocab_size:
        given = resolved["model"]["vocab_size"]
        raise UserError(f"model.vocab_size {given} is smaller than the tokenizer's {vocab_size}; leave it 0")
    return from_json(json.dumps(resolved))


def to_json(config: Config) -> str:
    """Canonical text of a config: the content of config.json, over which its sha256 is computed."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def from_json(text: str, where: object = "the config") -> Config:
    """A config from the text of `to_json`. Options that the text lacks take their defaults.

    Raises UserError that names `where` if the text is not a config.
    """
    config, stored = get_default(), json_text.parse_json(text, where)
    if not isinstance(stored, dict):
        raise UserError(f"{where} holds {json_text.show(stored)}, but must be an object: {{...}}")
    for name, entry in stored.items():
        section = config.get(name)
        if isinstance(section, Config) != isinstance(entry, dict):
            raise UserError(f"{where}: {name} is {json_text.show(entry)}, which is not a value for it")
        try:
            if isinstance(entry, dict):
                section.update(entry)
            else:
                config[name] = entry
        except (TypeError, ValueError, AttributeError):
            shown = json_text.show(entry, 200)
            raise UserError(f"{where}: {name} is {shown}; one of its values has another type than the option") from None
    for path, value in flat_values(config):
        try:
            values.read(flat_options()[path], value)
        except ValueError as error:
            raise UserError(f"{where}: {path} {error}") from None
    return normalise(config).lock()


def cache_directory(config: Config) -> Path:
    """Where token stores and compiled programs are kept (see `files.cache`)."""
    return files.cache(config.data.cache_dir)


def sha256(config: Config) -> str:
    return hashlib.sha256(to_json(config).encode()).hexdigest()
