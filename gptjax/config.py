"""Every option, its default, its meaning, and what is checked before a run starts.

A config file starts from `get_default()`, changes what it needs and is read with
`--config=FILE[:ARG] --config.section.option=value`. `python -m gptjax.config` prints the table below.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import re
from collections.abc import Iterator
from typing import Any

import ml_collections
from ml_collections import config_dict

from gptjax.errors import UserError

Config = ml_collections.ConfigDict

ROW_AXES = ("data", "fsdp", "expert")  # axes of the mesh that the rows of a batch are split over


@dataclasses.dataclass(frozen=True)
class Option:
    """One option. A `duration` is a number of steps (int) or text such as "2%", "1 epoch", "10M tokens"."""

    default: Any
    help: str
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    duration: bool = False


def _probability(what: str) -> Option:
    return Option(0.0, f"augmentation: share of {what}; of dialogues only prompts", minimum=0, maximum=1)


OPTIONS: dict[str, dict[str, Option] | Option] = {
    "model": {
        "num_layers": Option(4, "transformer blocks", minimum=1),
        "num_heads": Option(4, "query heads", minimum=1),
        "num_kv_heads": Option(0, "key/value heads (grouped-query attention); 0 = num_heads", minimum=0),
        "embed_dim": Option(128, "width of the residual stream", minimum=1),
        "head_dim": Option(0, "width of a head; 0 = embed_dim / num_heads", minimum=0),
        "mlp_dim": Option(
            0,
            "hidden width of the MLP; 0 = 4 x embed_dim (8/3 x, to a multiple of 64, for swiglu)",
            minimum=0,
        ),
        "context_length": Option(256, "tokens the model sees at once", minimum=1),
        "vocab_size": Option(0, "0 = the tokenizer's", minimum=0),
        "vocab_multiple": Option(64, "the embedding table is padded to a multiple of this", minimum=1),
        "norm": Option("rmsnorm", "normalisation", choices=("rmsnorm", "layernorm")),
        "norm_epsilon": Option(1e-5, "added to the variance", minimum=0),
        "norm_placement": Option("pre", "before each branch of a block, or after its sum", choices=("pre", "post")),
        "activation": Option(
            "squared_relu",
            "MLP non-linearity",
            choices=("gelu", "gelu_tanh", "relu", "squared_relu", "swiglu"),
        ),
        "num_experts": Option(0, "MLPs of width mlp_dim in every block, mixture of experts; 0 = one MLP", minimum=0),
        "experts_per_token": Option(2, "experts that compute a token", minimum=1),
        "positions": Option("rope", "position information", choices=("rope", "learned", "alibi", "none")),
        "sliding_window": Option(0, "a token sees this many latest tokens, itself included; 0 = all", minimum=0),
        "ngram_order": Option(1, "embeddings of the 2, 3, ... this many latest tokens are added; 1 = off", minimum=1),
        "ngram_rows": Option(8192, "rows of the hashed embedding table of each such length", minimum=1),
        "rope_theta": Option(10000.0, "base of the rotary frequencies", minimum=1),
        "rope_scaling": Option(
            "none",
            "for contexts longer than trained on: frequencies / rope_factor, all (linear) or the low ones (llama3)",
            choices=("none", "linear", "llama3"),
        ),
        "rope_factor": Option(8.0, "scaled frequencies are divided by this", minimum=1),
        "rope_low_freq_factor": Option(
            1.0, "llama3: frequencies with fewer turns than this in rope_original_length are scaled whole", minimum=0
        ),
        "rope_high_freq_factor": Option(4.0, "llama3: those with more turns than this stay as they are", minimum=0),
        "rope_original_length": Option(8192, "llama3: the context length before scaling", minimum=1),
        "qk_norm": Option(True, "RMS-normalise queries and keys in each head"),
        "use_bias": Option(False, "biases in linear layers and layer norms"),
        "qkv_bias": Option(False, "biases of queries, keys and values alone"),
        "tie_embeddings": Option(True, "the output head is the transposed embedding table"),
        "logit_softcap": Option(0.0, "logits = c tanh(logits / c); 0 = off", minimum=0),
        "init_std": Option(
            0.02, "standard deviation of initial weights; residual outputs / sqrt(2 num_layers)", minimum=0
        ),
        "dropout": Option(0.0, "rate on embeddings and on both residual branches", minimum=0, maximum=0.99),
        "lora_rank": Option(0, "rank of low-rank adapters, which alone are then trained; 0 = none", minimum=0),
        "lora_alpha": Option(16.0, "adapters are scaled by lora_alpha / lora_rank", minimum=0),
        "lora_dropout": Option(0.0, "rate on the inputs of adapters", minimum=0, maximum=0.99),
        "lora_targets": Option(
            "attention/(query|value)",
            "regular expression of adapted layers: attention/(query|key|value|out), mlp/(up|gate|down)",
        ),
        "compute_dtype": Option("float32", "activations and matrix products", choices=("float32", "bfloat16")),
        "matmul": Option(
            "compute_dtype",
            "products of the linear layers in blocks; float8 = operands scaled to 8 bits (NVIDIA Hopper and later)",
            choices=("compute_dtype", "float8"),
        ),
        "attention": Option(
            "auto",
            "reference | xla (blocks) | cudnn (GPU, bfloat16) | splash (TPU); auto = the best for the device",
            choices=("auto", "reference", "xla", "cudnn", "splash"),
        ),
        "scan_unroll": Option(0, "layers unrolled in the scan over depth; 0 = all of them", minimum=0),
        "remat": Option(
            "none",
            "what the backward pass recomputes: all but matrix products (dots), each block (full), each block from "
            "inputs kept in the memory of the host (offload)",
            choices=("none", "dots", "full", "offload"),
        ),
    },
    "tokenizer": Option(
        "bpe:4096", "char | byte | bpe:VOCAB_SIZE | word:VOCAB_SIZE | jieba:VOCAB_SIZE | hf:DIR_OR_NAME"
    ),
    "data": {
        "source": Option(
            "python_docs",
            "python_docs | text:GLOB | html:GLOB | jsonl:GLOB#FIELD | csv:GLOB#FIELD | parquet:GLOB#FIELD | "
            "tfds:NAME[/CONFIG][:SPLIT][#FIELD] | hf:NAME[/CONFIG][:SPLIT][#FIELD] | messages:GLOB | "
            "sharegpt:GLOB | alpaca:GLOB | pairs:GLOB | chatterbot:GLOB | kdconv:GLOB | store:DIR | tokens:GLOB, "
            "or a mixture: SPEC@WEIGHT + SPEC@WEIGHT",
        ),
        "data_dir": Option("", "where prepared TFDS datasets are"),
        "cache_dir": Option("", "token stores and compiled programs; empty = $GPTJAX_CACHE or ~/.cache/gptjax"),
        "cleaning": Option(
            "none",
            "none | plain | web | code | dialogue | chinese | guide, or steps (nfc,spaces), or PROFILE+STEP-STEP",
        ),
        "cleaning_options": Option(
            "", "options of the steps, e.g. 'min_characters=200 languages=en,zh'; empty = the profile's"
        ),
        "deduplicate": Option(
            "none",
            "documents that repeat an earlier one are left out; near = also those that are nearly equal",
            choices=("none", "exact", "near"),
        ),
        "near_threshold": Option(
            0.8,
            "share of common word 5-grams (Jaccard) from which on documents are nearly equal",
            minimum=0.01,
            maximum=1,
        ),
        "decontaminate": Option(
            "",
            "JSONL files of evaluation sets, GLOB,GLOB: documents that share 13 words in a row are left out",
        ),
        "split_by": Option(
            "auto",
            "document = by a hash of the text; position = first part trains, last part validates; "
            "auto = document for 100 documents or more",
            choices=("auto", "document", "position"),
        ),
        "validation_fraction": Option(0.05, "share of documents or characters", minimum=0, maximum=0.9),
        "test_fraction": Option(0.05, "share of documents or characters", minimum=0, maximum=0.9),
        "decode_errors": Option("reject", "what to do with bytes that are not UTF-8", choices=("reject", "replace")),
        "on_error": Option(
            "raise",
            "what to do with documents that cannot be read; skip = count them",
            choices=("raise", "skip"),
        ),
        "workers": Option(0, "processes that read, clean and tokenise a large corpus; 0 = one a core", minimum=0),
        "isolate_documents": Option(True, "documents packed in one row do not see each other"),
        "token_dropout": _probability("input tokens blanked"),
        "token_replacement": _probability("input tokens replaced by any other"),
        "character_noise": _probability("input tokens misspelt in one character"),
        "word_swap": _probability("words that change places with their neighbour"),
        "span_shuffle": _probability("spans of 8 words that are shuffled"),
        "sentence_reorder": _probability("documents whose sentences are shuffled"),
    },
    "objective": {
        "z_loss": Option(0.0, "weight of the squared log-partition (PaLM, section 5)", minimum=0),
        "balance_loss": Option(0.01, "weight of the load-balancing loss of a mixture of experts", minimum=0),
        "logits_chunk": Option(
            0, "tokens of a row whose logits are held at once, computed again for the gradient; 0 = all", minimum=0
        ),
        "label_smoothing": Option(0.0, "share of the target spread over the vocabulary", minimum=0, maximum=0.9),
    },
    "optimizer": {
        "name": Option(
            "adamw", "muon = Muon for the matrices in blocks, AdamW for the rest", choices=("adamw", "muon")
        ),
        "learning_rate": Option(1e-3, "peak learning rate of AdamW", minimum=0),
        "muon_learning_rate": Option(0.02, "peak learning rate of Muon's matrices", minimum=0),
        "beta1": Option(0.9, "AdamW first moment", minimum=0, maximum=1),
        "beta2": Option(0.95, "AdamW second moment", minimum=0, maximum=1),
        "epsilon": Option(1e-8, "AdamW", minimum=0),
        "weight_decay": Option(0.1, "decoupled, on matrices and embedding tables only", minimum=0),
        "clip_norm": Option(1.0, "global gradient norm; 0 = no clipping", minimum=0),
    },
    "schedule": {
        "name": Option(
            "cosine",
            "learning rate over steps; wsd = warm-up, stable, linear decay",
            choices=("cosine", "linear", "wsd", "rsqrt", "constant"),
        ),
        "warmup": Option("2%", "linear warm-up from zero", duration=True),
        "decay": Option("20%", "length of the decay at the end (wsd only)", duration=True),
        "final_fraction": Option(0.1, "final learning rate / peak", minimum=0, maximum=1),
    },
    "mesh": {
        "data": Option(-1, "copies of the model, batch split over them; -1 = all remaining devices"),
        "fsdp": Option(1, "parameters, optimizer state and batch split over this axis", minimum=1),
        "expert": Option(1, "experts of a mixture and batch split over this axis", minimum=1),
        "context": Option(1, "sequence split over this axis", minimum=1),
        "tensor": Option(1, "heads, MLP width and vocabulary split over this axis", minimum=1),
        "allow_replicated": Option(False, "large parameters that fsdp does not divide may be whole on every device"),
    },
    "train": {
        "num_steps": Option(1000, "optimizer steps", duration=True),
        "batch_size": Option(32, "rows in the global batch", minimum=1),
        "accumulation": Option(1, "micro-batches in a step", minimum=1),
        "checkpoint_every": Option(
            "25%", "a checkpoint also follows every evaluation that is the best so far", duration=True
        ),
        "keep_checkpoints": Option(2, "newest checkpoints kept, beside the best", minimum=1),
        "early_stopping_patience": Option(0, "evaluations without improvement before stopping; 0 = never", minimum=0),
        "ema_decay": Option(0.0, "running average of parameters, used by evaluation; 0 = off", minimum=0, maximum=1),
        "divergence_threshold": Option(
            3.0, "stop when the training loss stays this many nats above its lowest", minimum=0
        ),
    },
    "evaluation": {
        "every": Option("10%", "steps between evaluations of the validation split", duration=True),
        "batch_size": Option(0, "rows in an evaluation batch; 0 = twice the training batch", minimum=0),
        "stride": Option(0, "tokens between strided windows; 0 = context_length (no overlap)", minimum=0),
        "max_tokens": Option(0, "validation tokens scored during training; 0 = all", minimum=0),
        "tasks": Option("perplexity,bleu", "what `evaluate` runs unless told"),
        "prompts": Option(
            "", "prompts with references for BLEU: FILE.jsonl; empty = python_docs questions for that source"
        ),
        "max_prompts": Option(200, "prompts scored at most; 0 = all", minimum=0),
        "max_new_tokens": Option(48, "tokens generated for a prompt", minimum=1),
    },
    "logging": {
        "every": Option(10, "steps between lines of metrics.jsonl", minimum=1),
        "samples": Option(3, "texts sampled at each evaluation", minimum=0),
        "sample_prompt": Option("", "how samples begin; empty = the start of a document"),
        "sample_tokens": Option(100, "tokens in a sample", minimum=1),
        "price_per_device_hour": Option(0.0, "for the cost in the report, in any currency; 0 = not said", minimum=0),
        "tensorboard": Option(True, "write TensorBoard events when tensorboardX is installed"),
    },
    "seed": Option(0, "of initialisation, data order, dropout and samples", minimum=0),
    "init_from": Option(
        "", "hf:DIR_OR_NAME, or a workdir or checkpoint: start from that model, which replaces the model section"
    ),
}


def get_default() -> Config:
    """A ConfigDict with every option at its default."""

    def value(option: Option):
        return config_dict.FieldReference(option.default, field_type=object) if option.duration else option.default

    config = Config()
    for name, entry in OPTIONS.items():
        config[name] = value(entry) if isinstance(entry, Option) else Config({k: value(o) for k, o in entry.items()})
    return config


def flat_options() -> dict[str, Option]:
    """{"section.option": Option} in the order of the table."""
    flat = {}
    for name, entry in OPTIONS.items():
        flat |= {name: entry} if isinstance(entry, Option) else {f"{name}.{k}": o for k, o in entry.items()}
    return flat


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
        config.schedule.update(warmup=2, decay=5)
        config.evaluation.update(every=10, max_tokens=4096, max_prompts=8, max_new_tokens=16, batch_size=8)
        config.logging.update(every=5, samples=1, sample_tokens=16)
        config.mesh.update(get_default().mesh)
        config.init_from = ""
    elif arg:
        raise UserError(f"--config=FILE:{arg}: unknown argument {arg!r}; this config takes 'runlocal' or nothing")
    return config


# Linear layers of a block that an adapter may be put beside; experts have none.
LORA_PATHS = (
    "attention/query",
    "attention/key",
    "attention/value",
    "attention/out",
    "mlp/up",
    "mlp/gate",
    "mlp/down",
)

UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}


def duration_problem(value: Any) -> str | None:
    """What is wrong with the text of a duration, or None."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        return f"is {value!r}, not a duration; use steps (500), '2%', '1 epoch' or '10M tokens'"
    try:
        if resolve_duration(value, total=100, tokens_per_step=1, steps_per_epoch=1.0) < 0:
            return f"is {value!r}; a duration is not negative"
    except ValueError:
        return f"is {value!r}, not a duration; use steps (500), '2%', '1 epoch' or '10M tokens'"
    return None


def resolve_duration(value: int | str, *, total: int | None, tokens_per_step: int, steps_per_epoch: float) -> int:
    """Steps in a duration. A percentage is of `total` steps. Raises ValueError if the text is not a duration."""
    if isinstance(value, int):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([KMB]?)\s*(%|epochs?|tokens?|steps?|)\s*", value)
    if not match or (match[3] == "%" and (total is None or match[2])):
        raise ValueError(value)
    number = float(match[1]) * UNITS[match[2]]
    if match[3] == "%":
        return round(number / 100 * total)
    if match[3].startswith("epoch"):
        return round(number * steps_per_epoch)
    if match[3].startswith("token"):
        return round(number / tokens_per_step)
    return round(number)


def resolve(config: Config, vocab_size: int, steps_per_epoch: float) -> Config:
    """The config with durations in steps and the vocabulary filled in: what config.json holds."""
    config = config.copy_and_resolve_references()
    tokens_per_step = config.train.batch_size * config.model.context_length

    def steps(value, total):
        return resolve_duration(value, total=total, tokens_per_step=tokens_per_step, steps_per_epoch=steps_per_epoch)

    resolved = config.to_dict()
    num_steps = max(steps(config.train.num_steps, None), 1)
    for path, option in flat_options().items():
        if option.duration:
            section, name = path.split(".")
            at_least = 0 if section == "schedule" else 1
            resolved[section][name] = max(steps(resolved[section][name], num_steps), at_least)
    resolved["model"]["vocab_size"] = resolved["model"]["vocab_size"] or vocab_size
    if resolved["model"]["vocab_size"] < vocab_size:
        given = resolved["model"]["vocab_size"]
        raise UserError(f"model.vocab_size {given} is smaller than the tokenizer's {vocab_size}; leave it 0")
    return from_json(json.dumps(resolved))


def validate(config: Config) -> None:
    """Raises one UserError with every problem that can be seen without data or devices."""
    problems = dict(_option_problems(config))
    found = [*problems.values(), *_relation_problems(config, set(problems))]
    if found:
        plural = "problem" if len(found) == 1 else "problems"
        raise UserError(f"the config has {len(found)} {plural}:\n" + "\n".join(f"  {p}" for p in found))


def _option_problems(config: Config) -> Iterator[tuple[str, str]]:
    """(path, what is wrong) for every option that is wrong by itself."""
    flat = flat_options()
    for path, option in flat.items():
        section, _, name = path.rpartition(".")
        value = (config.get(section) or {}).get(name) if section else config.get(name)
        if value is None:
            yield path, f"{path} is missing; the default is {option.default!r}"
        elif option.duration:
            if problem := duration_problem(value):
                yield path, f"{path} {problem}"
            elif path == "train.num_steps" and "%" in str(value):
                yield (
                    path,
                    f"{path} is {value!r}, a share of itself; use steps (500), '1 epoch' or '10M tokens'",
                )
        elif option.choices and value not in option.choices:
            hint = suggestion(value, option.choices)
            yield path, f"{path} is {value!r}; choose from {', '.join(option.choices)}{hint}"
        elif isinstance(value, float) and not math.isfinite(value):
            yield path, f"{path} is {value}; it must be a finite number"
        elif option.minimum is not None and value < option.minimum:
            yield path, f"{path} is {value}; it must be at least {option.minimum}"
        elif option.maximum is not None and value > option.maximum:
            yield path, f"{path} is {value}; it must be at most {option.maximum}"
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
    """What is wrong between options, where none of them is already known to be wrong."""

    def right(*paths: str) -> bool:
        return not wrong.intersection(paths)

    model, train, mesh = config.get("model"), config.get("train"), config.get("mesh")
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
        yield "model.qkv_bias is True beside model.use_bias, which has those biases; set one of them"
    if heads and right("model.num_kv_heads") and model.num_kv_heads and model.num_heads % model.num_kv_heads:
        yield f"model.num_heads {model.num_heads} is not divisible by model.num_kv_heads {model.num_kv_heads}"
    adapted = right("model.lora_rank", "model.lora_targets", "model.activation", "model.num_experts")
    if adapted and model.lora_rank and (problem := _lora_problem(model)):
        yield problem
    if right("mesh.data") and (mesh.data == 0 or mesh.data < -1):
        yield f"mesh.data is {mesh.data}; it must be a number of devices or -1"
        wrong = wrong | {"mesh.data"}
    if right("train.batch_size", "train.accumulation"):
        if train.batch_size % train.accumulation:
            yield (f"train.batch_size {train.batch_size} is not divisible by train.accumulation {train.accumulation}")
        elif right(*(f"mesh.{axis}" for axis in ROW_AXES)):
            micro_batch = train.batch_size // train.accumulation
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
    """'; did you mean X?' for the nearest known name, or nothing."""
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def to_json(config: Config) -> str:
    """Canonical text of a config: what config.json holds and what its sha256 is taken over."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def from_json(text: str) -> Config:
    """A config from `to_json`; options that came later take their defaults."""
    config = get_default()
    for name, entry in json.loads(text).items():
        if isinstance(entry, dict):
            config[name].update(entry)
        else:
            config[name] = entry
    return config.lock()


def sha256(config: Config) -> str:
    return hashlib.sha256(to_json(config).encode()).hexdigest()


def main() -> int:
    from rich.console import Console
    from rich.table import Table

    table = Table("option", "default", "meaning", title="gptjax options")
    for path, option in flat_options().items():
        choices = f" [{' | '.join(option.choices)}]" if option.choices else ""
        table.add_row(path, str(option.default), (option.help + choices).replace("[", r"\["))
    Console().print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
