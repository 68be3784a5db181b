"""Finds what is wrong with a config before anything starts."""

import contextlib
import difflib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gptjax.config import stages, values
from gptjax.config.durations import in_epochs, is_zero, resolve_duration
from gptjax.config.options import AVERAGING, LORA_PATHS, MOST_STEPS, ROW_AXES, Config, Option, flat_options
from gptjax.errors import UserError

_LONGEST_MESSAGE = 1500  # characters of all problems together


def validate(config: Config) -> None:
    """Raises one UserError, of one line, with every problem that can be seen without data or devices.

    Right values in another notation ("1e3", 8.0, a NumPy scalar) are converted to the option's type.
    """
    if found := problems(config):
        raise UserError(listed("the config", found))


def problems(config: Config) -> list[str]:
    """What is wrong with a config. Also converts its values to the types of their options."""
    normalise(config)
    wrong = dict(_option_problems(config))
    told = dict.fromkeys(wrong.values())  # a broken section is one problem, not one for each option
    return [*told, *_relation_problems(config, set(wrong))]


def listed(what: str, found: Sequence[str]) -> str:
    """All problems in one line, the last one on stderr; if it gets too long, the rest are only counted."""
    told, length = [], 0
    for problem in found:
        length += len(problem) + 2
        if told and length > _LONGEST_MESSAGE:
            break
        told.append(problem)
    more = [f"and {len(found) - len(told)} more"] if len(told) < len(found) else []
    return f"{what} has {len(found)} problem{'s' * (len(found) != 1)}: " + "; ".join([*told, *more])


def normalise(config: Config) -> Config:
    """Converts values to the types of their options; what cannot be converted stays, and `validate` refuses it."""
    for path, option in flat_options().items():
        with contextlib.suppress(KeyError, ValueError):
            section, name = _place(config, path)
            value = _held(section, name)
            put = values.read(option, value)
            if type(put) is not type(value):
                assign(section, name, put)
    return config


def assign(section: Config, name: str, value: Any) -> None:
    """Sets an option, also where the config file gave it another type, or a reference to one."""
    with contextlib.suppress(TypeError):
        section[name] = value
        if type(section[name]) is type(value):  # an int in the place of a float becomes one
            return
    with section.unlocked():
        del section[name]
        section[name] = value


def _place(config: Config, path: str) -> tuple[Config, str]:
    """The section of an option and its name there. Raises KeyError where the config lacks it."""
    section, _, name = path.rpartition(".")
    held = config[section] if section else config
    if not isinstance(held, Config) or name not in held:
        raise KeyError(path)
    return held, name


def _held(section: Config, name: str) -> Any:
    """The value of an option. Raises ValueError for a reference to another option that cannot be computed."""
    try:
        return section[name]
    except (TypeError, ValueError, ArithmeticError):
        raise ValueError("is a reference to another option, and cannot be computed from its value") from None


def option_problem(path: str, option: Option, value: Any) -> str | None:
    """What is wrong with the value of one option by itself, or None. The message calls the option `path`."""
    if value is None:
        return f"{path} is missing; the default is {option.default!r}"
    try:
        value = values.read(option, value)
    except ValueError as error:
        return f"{path} {error}"
    if option.duration:
        return _duration_problem(path, option, value)
    if option.choices and value not in option.choices:
        told = values.shown(value)
        return f"{path} is {told}; choose from {', '.join(option.choices)}{suggestion(value, option.choices)}"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{path} is {value}; it must be a finite number"
    if option.minimum is not None and value < option.minimum:
        return f"{path} is {values.shown(value)}; it must be at least {option.minimum}"
    if option.maximum is not None and value > option.maximum:
        return f"{path} is {values.shown(value)}; it must be at most {option.maximum}"
    return None


def _duration_problem(path: str, option: Option, value: int | str) -> str | None:
    told = values.shown(value)
    if path == "train.num_steps" and "%" in str(value):
        return f"{path} is {told}, a share of itself; use steps (500), '1 epoch' or '10M tokens'"
    if option.minimum and is_zero(value):
        return f"{path} is {told}; it must be more than 0"
    if "%" in str(value):
        if resolve_duration(value, total=10**6, tokens_per_step=1, steps_per_epoch=1.0) > 10**6:
            return f"{path} is {told}; it must be at most 100%"
        return None
    steps = 0 if "token" in str(value) else resolve_duration(value, total=None, tokens_per_step=1, steps_per_epoch=1.0)
    if option.maximum and steps > option.maximum:
        return f"{path} is {told}; it must be at most {option.maximum} steps"
    return None


def _option_problems(config: Config) -> Iterator[tuple[str, str]]:
    """(path, what is wrong) for every option that is wrong by itself."""
    flat = flat_options()
    sections = dict.fromkeys(path.rpartition(".")[0] for path in flat if "." in path)
    broken = {name for name in sections if name in config and not isinstance(config[name], Config)}
    for path, option in flat.items():
        if (section := path.rpartition(".")[0]) in broken:
            yield (
                path,
                f"{section} is {values.shown(config[section])}; it is a section of options, such as {section}.NAME",
            )
            continue
        try:
            value = _held(*_place(config, path))
        except KeyError:
            value = None
        except ValueError as error:
            yield path, f"{path} {error}"
            continue
        if problem := option_problem(path, option, value):
            yield path, problem
    for name, entry in config.items():
        names = [f"{name}.{key}" for key in entry] if isinstance(entry, Config) else [name]
        for path in names:
            if path not in flat and path not in broken:
                yield path, f"{path[:100]} is not an option" + suggestion(path, flat)


def steps_problems(config: Config, steps_per_epoch: float | None = None) -> Iterator[str]:
    """Conflicts between the length of the run and its schedule; without `steps_per_epoch`, epochs are not checked."""
    tokens_per_step = config.train.batch_size * config.model.context_length

    def steps(path: str, total: int | None) -> int | None:
        section, name = _place(config, path)
        if steps_per_epoch is None and in_epochs(section[name]):
            return None
        return resolve_duration(
            section[name], total=total, tokens_per_step=tokens_per_step, steps_per_epoch=steps_per_epoch or 0
        )

    try:
        begins = [begin for begin, _ in stages.read(config.schedule.batch_stages)]
    except ValueError as error:
        yield f"schedule.batch_stages {error}"
        begins = []
    num_steps = steps("train.num_steps", None)
    if num_steps is not None and begins and (steps_per_epoch is not None or not any(map(in_epochs, begins))):
        units = {"tokens_per_step": tokens_per_step, "steps_per_epoch": steps_per_epoch or 0}
        try:
            stages.resolve(config.schedule.batch_stages, total=num_steps, **units)
        except ValueError as error:
            yield f"schedule.batch_stages {error}"
    if num_steps is None:
        shares = [str(config.schedule[name]) for name in ("warmup", "decay") if config.schedule.name == "wsd"]
        parts = [resolve_duration(s, total=10**6, tokens_per_step=1, steps_per_epoch=0) for s in shares if "%" in s]
        if sum(parts) > 10**6:
            yield f"schedule.warmup {shares[0]} and schedule.decay {shares[1]} are together longer than the run"
        return
    if num_steps > MOST_STEPS:
        given = values.shown(config.train.num_steps)
        yield f"train.num_steps is {given}, {num_steps} steps; a run has at most {MOST_STEPS}"
        return
    if num_steps == 0:
        yield (
            f"train.num_steps is {values.shown(config.train.num_steps)}, less than half a step of {tokens_per_step} "
            "tokens; train longer"
        )
        return
    if config.schedule.name == "cosine_restarts" and config.schedule.cycles > num_steps:
        yield f"schedule.cycles {config.schedule.cycles} is more than train.num_steps, {num_steps}"
    warmup = steps("schedule.warmup", num_steps)
    decay = steps("schedule.decay", num_steps) if config.schedule.name == "wsd" else 0
    if warmup is not None and warmup > num_steps:
        yield (
            f"schedule.warmup is {values.shown(config.schedule.warmup)}, {warmup} steps, and train.num_steps is "
            f"{num_steps}: the peak would never be reached; shorten the warm-up"
        )
    elif warmup is not None and decay is not None and warmup + decay > num_steps + 1:  # both may be rounded up
        yield (
            f"schedule.warmup ({warmup} steps) and schedule.decay ({decay} steps) are together longer than "
            f"train.num_steps {num_steps}; shorten one of them"
        )


def _lora_problem(model: Config) -> str | None:
    """What is wrong with the pattern of adapted layers, or None."""
    there = [path for path in LORA_PATHS if path.startswith("attention") or not model.num_experts]
    there = [path for path in there if model.activation == "swiglu" or path != "mlp/gate"]
    try:
        matched = [path for path in there if re.fullmatch(model.lora_targets, path)]
    except (re.error, OverflowError, RecursionError) as error:
        return f"model.lora_targets {values.shown(model.lora_targets)} is not a regular expression: {error}"
    return (
        None if matched else f"model.lora_targets {values.shown(model.lora_targets)} matches none of {', '.join(there)}"
    )


def _matrix_of_zeros(multipliers: str) -> str | None:
    """The first matrix in blocks that starts at zero, or None. A text that is no list of factors is refused later."""
    paths = [f"blocks/{path}/kernel" for path in (*LORA_PATHS, *(f"mlp/expert_{n}" for n in ("up", "gate", "down")))]
    entries = [entry.rpartition("=") for entry in multipliers.split()]
    with contextlib.suppress(ValueError, re.error, OverflowError, RecursionError):
        for path in paths:  # the first pattern that matches counts
            if next((float(factor) == 0 for pattern, _, factor in entries if re.fullmatch(pattern, path)), False):
                return path
    return None


def _reinforcement_problems(config: Config, right: Callable[..., bool]) -> Iterator[str]:
    """What is wrong with a config of reinforcement, where the model writes the answers it is trained on."""
    objective, train, model = config.objective, config.train, config.model
    if right("train.batch_size", "objective.group_size") and train.batch_size % objective.group_size:
        yield (
            f"train.batch_size {train.batch_size} is not divisible by objective.group_size {objective.group_size}: the "
            "rows of a batch are the answers to batch_size / group_size questions"
        )
    lengths = right("objective.max_new_tokens", "model.context_length")
    if lengths and objective.max_new_tokens >= model.context_length:
        yield (
            f"objective.max_new_tokens {objective.max_new_tokens} leaves no room for a question in "
            f"model.context_length {model.context_length}"
        )
    unread = [f"model.{name}" for name in ("dropout", "lora_dropout")]
    unread += ["objective.z_loss", "objective.label_smoothing"]
    unread += [f"data.{name}" for name in config.data if flat_options()[f"data.{name}"].help.startswith("augmentation")]
    for path in filter(right, unread):
        section, name = _place(config, path)
        if section[name]:
            yield f"{path} is {section[name]} with objective.name=reinforcement, which does not use it; set it to 0"


def _relation_problems(config: Config, wrong: set[str]) -> Iterator[str]:
    """Conflicts between options. Rules that read an option in `wrong` are skipped."""

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
            yield (
                f"the head dimension is {head_dim}; rotary positions need an even one "
                "(model.head_dim, or model.embed_dim / model.num_heads)"
            )
    if right("model.rope_scaling", "model.rope_low_freq_factor", "model.rope_high_freq_factor"):
        low, high = model.rope_low_freq_factor, model.rope_high_freq_factor
        if model.rope_scaling == "llama3" and low >= high:
            yield f"model.rope_low_freq_factor {low} is not less than model.rope_high_freq_factor {high}"
    if right("model.rope_scaling", "model.positions") and model.rope_scaling != "none" and model.positions != "rope":
        yield (
            f"model.rope_scaling is {model.rope_scaling}, which needs model.positions rope; "
            f"model.positions is {model.positions}"
        )
    if (
        right("model.sliding_window", "model.context_length", "init_from")
        and model.sliding_window > model.context_length
        and not config.init_from  # that model's window may be longer than the rows of this run
    ):
        yield (
            f"model.sliding_window {model.sliding_window} is larger than model.context_length {model.context_length}; "
            "use 0 for no window"
        )
    if right("model.use_bias", "model.qkv_bias") and model.use_bias and model.qkv_bias:
        yield "model.qkv_bias is True together with model.use_bias, which includes those biases; set only one of them"
    mup = right("model.mup_base_width") and model.mup_base_width
    if mup and right("optimizer.name") and (name := config.optimizer.name) in ("sgd", "adafactor"):
        yield (
            f"model.mup_base_width is set with optimizer.name={name}, whose learning rates it cannot scale; use "
            "another optimizer"
        )
    for name in ("attention_gate", "value_embeddings", "num_experts", "lora_rank"):
        if mup and right(f"model.{name}") and model[name]:
            yield f"model.mup_base_width is set with model.{name}, whose parameters it does not scale; use one of them"
    pinned = right("model.init_multipliers", "optimizer.name") and config.optimizer.name == "muonh"
    if pinned and (path := _matrix_of_zeros(model.init_multipliers)):
        yield (
            f"model.init_multipliers starts {path} at zero, and optimizer.name muonh keeps the norm that a matrix "
            "starts with: it would never learn; use another optimizer"
        )
    if heads and right("model.num_kv_heads") and model.num_kv_heads and model.num_heads % model.num_kv_heads:
        yield f"model.num_heads {model.num_heads} is not divisible by model.num_kv_heads {model.num_kv_heads}"
    if right("model.value_embeddings", "model.num_layers") and model.value_embeddings > model.num_layers:
        yield (
            f"model.value_embeddings {model.value_embeddings} is more than model.num_layers {model.num_layers}: some "
            "tables would have no layer that reads them"
        )
    if right("model.lora_rank", "model.lora_dropout") and model.lora_dropout and not model.lora_rank:
        yield f"model.lora_dropout is {model.lora_dropout}, and model.lora_rank is 0: there are no adapters"
    adapted = right("model.lora_rank", "model.lora_targets", "model.activation", "model.num_experts")
    if adapted and model.lora_rank and (problem := _lora_problem(model)):
        yield problem
    if right("optimizer.name") and (name := config.optimizer.name) in AVERAGING:
        if config.schedule.batch_stages:
            yield (
                f"schedule.batch_stages is set, and optimizer.name {name} averages the parameters of every step; use "
                "one of them"
            )
        if right("optimizer.beta1") and not config.optimizer.beta1:
            yield f"optimizer.beta1 is 0; optimizer.name {name} needs more than 0: its average is found from beta1"
        if right("train.ema_decay") and config.train.ema_decay:
            yield (
                f"train.ema_decay is {config.train.ema_decay}, and optimizer.name {name} keeps an average of its own; "
                "set train.ema_decay to 0"
            )
    if right("objective.name") and config.objective.name == "reinforcement":
        yield from _reinforcement_problems(config, right)
    # mesh.data is checked before the rules that divide the batch: one wrong value must give one message.
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
    lengths = ("train.num_steps", "train.batch_size", "model.context_length")
    if right(*lengths, "schedule.name", "schedule.cycles", "schedule.warmup", "schedule.decay"):
        yield from steps_problems(config)
    if (
        right("data.validation_fraction", "data.test_fraction")
        and config.data.validation_fraction + config.data.test_fraction >= 1
    ):
        yield "data.validation_fraction + data.test_fraction leave nothing to train on"


def suggestion(name: str, known) -> str:
    """'; did you mean X?' with the nearest known name, or "" where none is near."""
    if len(str(name)) > 100:
        return ""
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""
