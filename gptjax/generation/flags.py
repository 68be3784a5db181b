"""The sampling flags that every verb that generates text has."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from absl import flags

from gptjax.generation.params import SamplingParams


def define(flag_values: flags.FlagValues) -> None:
    """Adds one flag for each field of SamplingParams."""
    default = SamplingParams()

    def number(kind, name: str, meaning: str) -> None:
        kind(name, getattr(default, name), meaning, flag_values=flag_values)

    number(flags.DEFINE_integer, "max_new_tokens", "largest number of generated tokens, e.g. --max_new_tokens=200")
    number(flags.DEFINE_float, "temperature", "0 = the most probable token, e.g. --temperature=0.8")
    number(flags.DEFINE_integer, "top_k", "draw from the k most probable tokens; 0 = all, e.g. --top_k=50")
    number(flags.DEFINE_float, "top_p", "draw from the smallest set with this probability, e.g. --top_p=0.95")
    number(flags.DEFINE_float, "min_p", "drop tokens less probable than this share of the best one, e.g. --min_p=0.05")
    number(
        flags.DEFINE_float,
        "repetition_penalty",
        "divides the scores of tokens that are in the text already, e.g. --repetition_penalty=1.2",
    )
    number(flags.DEFINE_integer, "seed", "the same seed gives the same text, e.g. --seed=1")
    number(flags.DEFINE_bool, "ignore_eos", "go on after the end of a document, e.g. --ignore_eos")
    flags.DEFINE_multi_string(
        "stop",
        None,
        "text that ends a completion; may be repeated, e.g. --stop='Q:'",
        flag_values=flag_values,
    )


def read(flag_values: flags.FlagValues) -> SamplingParams:
    """The parameters of the command line. Raises UserError for values out of range."""
    params = SamplingParams(
        max_new_tokens=flag_values.max_new_tokens,
        temperature=flag_values.temperature,
        top_k=flag_values.top_k,
        top_p=flag_values.top_p,
        min_p=flag_values.min_p,
        repetition_penalty=flag_values.repetition_penalty,
        stop=tuple(flag_values.stop or ()),
        seed=flag_values.seed,
        ignore_eos=flag_values.ignore_eos,
    )
    params.validate()
    return params


def with_published(
    flag_values: flags.FlagValues, params: SamplingParams, generation: Mapping[str, Any]
) -> SamplingParams:
    """`params` with the published settings of a pretrained model, except where a flag was given."""
    names = {field.name for field in dataclasses.fields(SamplingParams)}
    settings = {name: value for name, value in generation.items() if name in names and not flag_values[name].present}
    params = dataclasses.replace(params, **settings)
    params.validate()
    return params
