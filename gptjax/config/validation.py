"""Finds what is wrong with a config before anything starts."""

import difflib
import math
import re
from collections.abc import Iterator
from typing import Any

from gptjax.config.durations import duration_problem
from gptjax.config.options import LORA_PATHS, ROW_AXES, Config, Option, flat_options
from gptjax.errors import UserError


def validate(config: Config) -> None:
    """Raises one UserError with every problem that can be seen without data or devices."""
    problems = dict(_option_problems(config))
    found = [*problems.values(), *_relation_problems(config, set(problems))]
    if found:
        plural = "problem" if len(found) == 1 else "problems"
        raise UserError(f"the config has {len(found)} {plural}:\n" + "\n".join(f"  {p}" for p in found))


def option_problem(path: str, option: Option, value: Any) -> str | None:
    """What is wrong with the value of one option by itself, or None. The message calls the option `path`."""
    if value is None:
        return f"{path} is missing; the default is {option.default!r}"
    if option.duration:
        if problem := duration_problem(value):
            return f"{path} {problem}"
        if path == "train.num_steps" and "%" in str(value):
            return f"{path} is {value!r}, a share of itself; use steps (500), '1 epoch' or '10M tokens'"
    elif option.choices and value not in option.choices:
        return f"{path} is {value!r}; choose from {', '.join(option.choices)}{suggestion(value, option.choices)}"
    elif isinstance(value, float) and not math.isfinite(value):
        return f"{path} is {value}; it must be a finite number"
    elif option.minimum is not None and value < option.minimum:
        return f"{path} is {value}; it must be at least {option.minimum}"
    elif option.maximum is not None and value > option.maximum:
        return f"{path} is {value}; it must be at most {option.maximum}"
    return None


def _option_problems(config: Config) -> Iterator[tuple[str, str]]:
    """(path, what is wrong) for every option that is wrong by itself."""
    flat = flat_options()
    for path, option in flat.items():
        section, _, name = path.rpartition(".")
        value = (config.get(section) or {}).get(name) if section else config.get(name)
        if problem := option_problem(path, option, value):
            yield path, problem
    for name, entry in config.items():
        names = [f"{name}.{key}" for key in entry] if isinstance(entry, Config) else [name]
        for path in names:
            if path not in flat:
                yield path, f"{path} is not an option" + suggestion(path, flat)


def _lora_problem(model: Config) -> str | None:
    """What is wrong with the pattern of adapted layers, or None."""
    there = [path for path in LORA_PATHS if path.startswith("attention") or not model.num_experts]
    there = [path for path in there if model.activation == "swiglu" or path != "mlp/gate"]
    try:
        matched = [path for path in there if re.fullmatch(model.lora_targets, path)]
    except re.error as error:
        return f"model.lora_targets {model.lora_targets!r} is not a regular expression: {error}"
    return None if matched else f"model.lora_targets {model.lora_targets!r} matches none of {', '.join(there)}"


def _relation_problems(config: Config, wrong: set[str]) -> Iterator[str]:
    """What is wrong between options. An option in `wrong` is not looked at again."""

    # One mistake gives one message: every rule below first asks whether the options it reads are right by themselves.
    def right(*paths: str) -> bool:
        return not wrong.intersection(paths)

    model, train, mesh = config.get("model"), config.get("train"), config.get("mesh")
    # Rules within the model come first, in the order of its options: heads, positions, biases, adapters.
    heads = right("model.num_heads")
    if heads and right("model.head_dim", "model.embed_dim"):
        if not model.head_dim and model.embed_dim % model.num_heads:
            yield (
                f"model.embed_dim {model.embed_dim} is not divisible by model.num_heads {model.num_heads}; "
                "change one of them or set model.head_dim"
            )
        head_dim = model.head_dim or model.embed_dim // model.num_heads
        if right("model.positions") and model.positions == "rope" and head_dim % 2:
            yield f"the head dimension is {head_dim}; rotary positions need an even one"
    if right("model.rope_scaling", "model.rope_low_freq_factor", "model.rope_high_freq_factor"):
        low, high = model.rope_low_freq_factor, model.rope_high_freq_factor
        if model.rope_scaling == "llama3" and low >= high:
            yield f"model.rope_low_freq_factor {low} is not less than model.rope_high_freq_factor {high}"
    if right("model.use_bias", "model.qkv_bias") and model.use_bias and model.qkv_bias:
        yield "model.qkv_bias is True beside model.use_bias, which includes those biases; set only one of them"
    if heads and right("model.num_kv_heads") and model.num_kv_heads and model.num_heads % model.num_kv_heads:
        yield f"model.num_heads {model.num_heads} is not divisible by model.num_kv_heads {model.num_kv_heads}"
    adapted = right("model.lora_rank", "model.lora_targets", "model.activation", "model.num_experts")
    if adapted and model.lora_rank and (problem := _lora_problem(model)):
        yield problem
    # mesh.data has to be known before the batch is divided: a value that fails here must not fail a second rule.
    if right("mesh.data") and (mesh.data == 0 or mesh.data < -1):
        yield f"mesh.data is {mesh.data}; it must be a number of devices or -1"
        wrong = wrong | {"mesh.data"}
    if right("train.batch_size", "train.accumulation"):
        if train.batch_size % train.accumulation:
            yield (f"train.batch_size {train.batch_size} is not divisible by train.accumulation {train.accumulation}")
        elif right(*(f"mesh.{axis}" for axis in ROW_AXES)):
            micro_batch = train.batch_size // train.accumulation
            # -1, all remaining devices, counts as 1: a run checks again once it knows its devices.
            shards = math.prod(max(mesh[axis], 1) for axis in ROW_AXES)
            if micro_batch % shards:
                yield (
                    f"a micro-batch of {micro_batch} rows (train.batch_size / train.accumulation) is not "
                    f"divisible by {' x '.join(f'mesh.{axis}' for axis in ROW_AXES)} = {shards}"
                )
    if right("model.context_length", "mesh.context") and model.context_length % mesh.context:
        yield f"model.context_length {model.context_length} is not divisible by mesh.context {mesh.context}"
    if right("model.num_experts", "model.experts_per_token") and model.num_experts:
        if model.experts_per_token > model.num_experts:
            count = model.experts_per_token
            yield f"model.experts_per_token {count} is more than model.num_experts {model.num_experts}"
        if right("model.use_bias") and model.use_bias:
            yield "model.use_bias is True; experts have no biases"
    # What the tensor and expert axes split; num_kv_heads 0 (= num_heads) and num_experts 0 (none) divide by anything.
    for name in ("num_heads", "num_kv_heads"):
        if right(f"model.{name}", "mesh.tensor") and model[name] % mesh.tensor:
            yield f"model.{name} {model[name]} is not divisible by mesh.tensor {mesh.tensor}"
    if right("model.num_experts", "mesh.expert", "mesh.tensor"):
        experts, owners = model.num_experts, mesh.expert * mesh.tensor
        if experts % owners:
            yield f"model.num_experts {experts} is not divisible by mesh.expert x mesh.tensor = {owners}"
        if mesh.expert > 1 and not experts:
            yield (
                f"mesh.expert is {mesh.expert}, and a model without experts (model.num_experts 0) has nothing to "
                "split over it; use mesh.data or mesh.fsdp"
            )
    if right("evaluation.stride", "model.context_length") and config.evaluation.stride > model.context_length:
        yield (
            f"evaluation.stride {config.evaluation.stride} is larger than model.context_length "
            f"{model.context_length}; tokens between windows would never be scored"
        )
    if (
        right("data.validation_fraction", "data.test_fraction")
        and config.data.validation_fraction + config.data.test_fraction >= 1
    ):
        yield "data.validation_fraction + data.test_fraction leave nothing to train on"


def suggestion(name: str, known) -> str:
    """'; did you mean X?' with the nearest known name, or "" where none is near."""
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""
