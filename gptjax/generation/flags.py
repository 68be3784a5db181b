"""The sampling flags that every verb that generates text has."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from absl import flags

from gptjax.config import Option, values
from gptjax.errors import UserError
from gptjax.generation.beam_params import BeamParams
from gptjax.generation.params import SamplingParams


class Number(flags.ArgumentParser):
    """Parses a number within limits, with plain error messages."""

    def __init__(self, lowest: float, highest: float, *, whole: bool = True):
        self.lowest, self.highest, self.whole = lowest, highest, whole
        self.syntactic_help = f"{'a whole number' if whole else 'a number'} from {lowest:g} to {highest:.10g}"

    def parse(self, argument: str | int | float) -> int | float:
        try:
            value = values.read(Option(0 if self.whole else 0.0, ""), argument)
        except ValueError:
            value = math.nan
        if not self.lowest <= value <= self.highest:
            raise ValueError(f"expected {self.syntactic_help}")
        return value

    def flag_type(self) -> str:
        return "int" if self.whole else "float"


def define_number(
    flag_values: flags.FlagValues,
    name: str,
    default: float | None,
    meaning: str,
    limits: tuple[float, float],
    *,
    whole: bool = True,
) -> None:
    """A flag --name that takes a number from limits[0] to limits[1]."""
    parser = Number(*limits, whole=whole)
    flags.DEFINE(parser, name, default, meaning, flag_values=flag_values, serializer=flags.ArgumentSerializer())


def define_model(flag_values: flags.FlagValues) -> None:
    """Adds the flags that `artifacts.models.find` reads."""
    define = {"flag_values": flag_values}
    where = "a run, a checkpoint or hf:DIR_OR_NAME, e.g. --workdir=runs/quickstart or --workdir=hf:models/gpt2"
    flags.DEFINE_string("workdir", None, where, **define)
    flags.DEFINE_string("checkpoint", "best", "of a run: best, last or a step, e.g. --checkpoint=2000", **define)
    flags.DEFINE_string("adapter", "", "directory of PEFT adapters for hf:DIR, e.g. --adapter=adapters/mine", **define)


def define_draft(flag_values: flags.FlagValues) -> None:
    """Adds --draft and --draft_tokens."""
    meaning = "a small model for speculative decoding, e.g. --draft=runs/small"
    flags.DEFINE_string("draft", None, meaning, flag_values=flag_values)
    meaning = "tokens that --draft proposes at a time, e.g. --draft_tokens=4"
    define_number(flag_values, "draft_tokens", 4, meaning, (1, 64))


def define(flag_values: flags.FlagValues, default: SamplingParams = SamplingParams()) -> None:  # noqa: B008 (frozen)
    """Adds one flag for each field of SamplingParams except `logit_bias`."""

    def number(name: str, meaning: str, limits: tuple[float, float], *, whole: bool = False) -> None:
        define_number(flag_values, name, getattr(default, name), meaning, limits, whole=whole)

    number("max_new_tokens", "largest number of generated tokens, e.g. --max_new_tokens=200", (1, 2**24), whole=True)
    number("temperature", "0 = the most probable token, e.g. --temperature=0.8", (0, 1000))
    number("top_k", "sample from the k most probable tokens; 0 = all, e.g. --top_k=50", (0, 2**31 - 1), whole=True)
    number("top_p", "sample from the fewest tokens with this total probability, e.g. --top_p=0.95", (1e-9, 1))
    number("min_p", "drop tokens less probable than this times the most probable one, e.g. --min_p=0.05", (0, 1))
    number(
        "repetition_penalty",
        "divides the scores of tokens that are in the text already, e.g. --repetition_penalty=1.2",
        (1e-3, 1000),
    )
    number("presence_penalty", "subtracted once if a token was generated before, e.g. --presence_penalty=0.5", (-2, 2))
    number("frequency_penalty", "subtracted each time a token was generated, e.g. --frequency_penalty=0.5", (-2, 2))
    number("seed", "the same seed gives the same text, e.g. --seed=1", (0, 2**32 - 1), whole=True)
    meaning = "continue after an end-of-text token, e.g. --ignore_eos"
    flags.DEFINE_bool("ignore_eos", False, meaning, flag_values=flag_values)
    flags.DEFINE_multi_string(
        "stop",
        None,
        "text that ends a completion; may be repeated, e.g. --stop='Q:'",
        flag_values=flag_values,
    )


def define_beams(flag_values: flags.FlagValues, *, default: int | None = 1) -> None:
    """Adds --beams and --length_penalty."""
    meaning = "beam search with so many beams instead of sampling, e.g. --beams=4"
    define_number(flag_values, "beams", default, meaning, (1, 1024))
    meaning = "beam search ranks by log-probability / length ** this, e.g. --length_penalty=0.8"
    penalty = None if default is None else 1.0
    define_number(flag_values, "length_penalty", penalty, meaning, (-100, 100), whole=False)


def define_search(flag_values: flags.FlagValues) -> None:
    """Adds the flags of BeamParams that `define` does not have."""
    define_beams(flag_values)
    define_number(flag_values, "num_best", 1, "completions that a beam search returns, e.g. --num_best=4", (1, 1024))
    flags.DEFINE_enum(
        "early_stopping",
        "false",
        ["false", "true", "never"],
        "with --beams completions finished, end a beam search: false = when no beam is better now, true = at once, "
        "never = when no beam can become better, e.g. --early_stopping=never",
        flag_values=flag_values,
    )


def read_search(flag_values: flags.FlagValues) -> BeamParams | None:
    """The beam search of the command line; None for sampling. Raises UserError for flags of the other one."""
    own = [name for name in ("num_best", "length_penalty", "early_stopping") if flag_values[name].present]
    if flag_values.beams == 1:
        if own:
            raise UserError(f"--{own[0]} is for beam search; add --beams=4")
        return None
    names = {field.name for field in dataclasses.fields(SamplingParams)} | {"num_samples", "draft", "logprobs"}
    drawing = [
        f"--{name}"
        for name in sorted(names - {"max_new_tokens", "ignore_eos"})
        if name in flag_values and flag_values[name].present and (name, flag_values[name].value) != ("temperature", 0)
    ]
    if drawing:
        raise UserError(f"--beams={flag_values.beams} does not sample; leave out {', '.join(drawing)}")
    params = BeamParams(**{field.name: flag_values[field.name].value for field in dataclasses.fields(BeamParams)})
    params.validate()
    return params


def read(flag_values: flags.FlagValues) -> SamplingParams:
    """The parameters of the command line. Raises UserError for values out of range."""
    params = SamplingParams(
        max_new_tokens=flag_values.max_new_tokens,
        temperature=flag_values.temperature,
        top_k=flag_values.top_k,
        top_p=flag_values.top_p,
        min_p=flag_values.min_p,
        repetition_penalty=flag_values.repetition_penalty,
        presence_penalty=flag_values.presence_penalty,
        frequency_penalty=flag_values.frequency_penalty,
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
