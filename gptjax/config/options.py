"""The table of options: every option, its default, its meaning and its range."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import ml_collections

Config = ml_collections.ConfigDict

# Facts for packages that do not import each other. Devices along later axes exchange more data.
MESH_AXES = ("data", "fsdp", "expert", "context", "tensor")
ROW_AXES = ("data", "fsdp", "expert")  # the mesh axes over which the rows of a batch are split
# Optimizers that keep an average of the parameters, which evaluation uses like that of train.ema_decay.
AVERAGING = ("schedule_free_adamw",)
# Linear layers of a block that can have an adapter; experts cannot.
LORA_PATHS = (
    "attention/query",
    "attention/key",
    "attention/value",
    "attention/out",
    "mlp/up",
    "mlp/gate",
    "mlp/down",
)


AFFECTS = {
    "model": "which function the parameters compute; taken from the model that a run starts from",
    "training": "the trained values of the parameters",
    "hyper": "like training, but an input of the compiled step: one program serves all values",
    "course": "like training, but neither checkpoints nor the position in the data depend on it",
    "computation": "how results are computed; they differ by rounding at most",
    "place": "where the data are stored; a fingerprint identifies their content",
    "score": "on which tokens the validation loss is measured",
    "record": "what is measured, shown and kept, and when a run ends",
}
MOST_STEPS = 10_000_000  # the learning rate of every step is computed in advance
MOST_DEVICES = 1_048_576
MOST_SEED = 2**32 - 1  # JAX's keys are made of 32 bits
_OF_SECTION = {
    "model": "model",
    "data": "training",
    "objective": "hyper",
    "optimizer": "hyper",
    "schedule": "hyper",
    "mesh": "computation",
    "train": "training",
    "evaluation": "record",
    "logging": "record",
}


@dataclasses.dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
      affects: one of AFFECTS; "" means the entry of the option's section. Four questions are answered from it: which
        options may change when a run is continued, freely or on request, which are taken from the model that a run
        starts from, which must be equal for two runs to be comparable, and which are inputs of the compiled step.
      minimum, maximum: of a number; of a duration, in steps.
      duration: whether the value is a number of steps (int) or a text such as "2%", "1 epoch", "10M tokens".
    """

    default: Any
    help: str
    affects: str = ""
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    duration: bool = False


def _modules(room: str, *helpers: str) -> tuple[str, ...]:
    """The names of the modules of a package, without `helpers`, as choices of an option. Imports none of them."""
    files = (Path(__file__).parents[1] / room).glob("*.py")
    return tuple(sorted({file.stem for file in files} - {"__init__", *helpers}))


def _probability(what: str) -> Option:
    text = f"augmentation: share of {what}; in dialogues, only in the prompts"
    return Option(0.0, text, affects="course", minimum=0, maximum=1)


OPTIONS: dict[str, dict[str, Option] | Option] = {
    "model": {
        "num_layers": Option(4, "transformer blocks", minimum=1, maximum=10_000),
        "num_heads": Option(4, "query heads", minimum=1, maximum=65_536),
        "num_kv_heads": Option(
            0, "key/value heads (grouped-query attention); 0 = num_heads", minimum=0, maximum=65_536
        ),
        "embed_dim": Option(128, "width of the residual stream", minimum=1, maximum=1_048_576),
        "head_dim": Option(0, "width of a head; 0 = embed_dim / num_heads", minimum=0, maximum=65_536),
        "mlp_dim": Option(
            0,
            "hidden width of the MLP; 0 = 4 x embed_dim (8/3 x, to a multiple of 64, for swiglu)",
            minimum=0,
            maximum=16_777_216,
        ),
        "context_length": Option(
            256, "tokens the model sees at once", affects="training", minimum=1, maximum=16_777_216
        ),
        "vocab_size": Option(0, "tokens in the vocabulary; 0 = the tokenizer's", minimum=0, maximum=16_777_216),
        "vocab_multiple": Option(
            64,
            "the embedding table is padded to a multiple of this",
            affects="training",
            minimum=1,
            maximum=65_536,
        ),
        "norm": Option("rmsnorm", "normalisation", choices=("rmsnorm", "layernorm")),
        "norm_epsilon": Option(1e-5, "added to the variance", minimum=1e-20, maximum=1),
        "norm_placement": Option(
            "pre", "pre = before each branch of a block; post = after each residual sum", choices=("pre", "post")
        ),
        "activation": Option(
            "squared_relu",
            "MLP non-linearity",
            choices=("gelu", "gelu_tanh", "relu", "squared_relu", "swiglu"),
        ),
        "num_experts": Option(
            0, "mixture of experts: MLPs of width mlp_dim per block; 0 = one MLP", minimum=0, maximum=65_536
        ),
        "experts_per_token": Option(2, "experts that process each token", minimum=1, maximum=65_536),
        "positions": Option("rope", "position information", choices=("rope", "learned", "alibi", "none")),
        "sliding_window": Option(
            0, "a token attends to this many latest tokens, itself included; 0 = all", minimum=0, maximum=2**30
        ),
        "ngram_order": Option(
            1, "adds embeddings of the last 2, 3, ..., ngram_order tokens; 1 = off", minimum=1, maximum=32
        ),
        "ngram_rows": Option(
            8192, "rows of the hashed embedding table for each n-gram length", minimum=1, maximum=2**30
        ),
        "rope_theta": Option(10000.0, "base of the rotary frequencies", minimum=1, maximum=1e15),
        "rope_scaling": Option(
            "none",
            "for longer contexts than trained on: rope_factor divides all (linear) or only low frequencies (llama3)",
            choices=("none", "linear", "llama3"),
        ),
        "rope_factor": Option(8.0, "divisor of the scaled frequencies", minimum=1, maximum=1e6),
        "rope_low_freq_factor": Option(
            1.0,
            "llama3: frequencies with fewer turns than this in rope_original_length are divided by rope_factor",
            minimum=0,
            maximum=1e6,
        ),
        "rope_high_freq_factor": Option(
            4.0, "llama3: frequencies with more turns than this are not scaled", minimum=0, maximum=1e6
        ),
        "rope_original_length": Option(8192, "llama3: the context length before scaling", minimum=1, maximum=2**30),
        "qk_norm": Option(True, "RMS-normalise queries and keys in each head"),
        "use_bias": Option(False, "biases in linear layers and layer norms"),
        "qkv_bias": Option(False, "biases only for queries, keys and values"),
        "tie_embeddings": Option(True, "the output head is the transposed embedding table"),
        "logit_softcap": Option(0.0, "logits = c tanh(logits / c); 0 = off", minimum=0, maximum=1e6),
        "value_embeddings": Option(
            0,
            "embedding tables whose rows are added, with a gate, to the values of attention; layer i uses table i mod "
            "this number; 0 = off",
            minimum=0,
            maximum=10_000,
        ),
        "residual_scalars": Option(
            False, "the input of a block is a x + b x0; x0 = normalised embedding; a, b are learned and start at 1, 0"
        ),
        "attention_gate": Option(False, "the output of each head is multiplied by a learned sigmoid gate of the input"),
        "init_std": Option(
            0.02,
            "standard deviation of initial weights; for residual outputs, divided by sqrt(2 num_layers)",
            affects="training",
            minimum=0,
            maximum=100,
        ),
        "init_multipliers": Option(
            "",
            "PATTERN=FACTOR PATTERN=FACTOR: factors of init_std for parameters whose path matches; "
            "'blocks/(attention/out|mlp/down)/kernel=0' = output projections start at zero",
            affects="training",
        ),
        "mup_base_width": Option(
            0,
            "muP (maximal update parametrisation): the embed_dim at which learning rates were tuned; they stay the "
            "best for a model m times as wide (initial matrices / sqrt(m), Adam's rates of matrices / m, logits / m); "
            "0 = off",
            minimum=0,
            maximum=1_048_576,
        ),
        "dropout": Option(
            0.0,
            "dropout rate on embeddings and on both residual branches",
            affects="course",
            minimum=0,
            maximum=0.99,
        ),
        "lora_rank": Option(
            0,
            "rank of low-rank adapters; only they are then trained; 0 = no adapters",
            affects="training",
            minimum=0,
            maximum=65_536,
        ),
        "lora_alpha": Option(
            16.0, "adapters are scaled by lora_alpha / lora_rank", affects="training", minimum=0, maximum=1e6
        ),
        "lora_dropout": Option(0.0, "dropout rate on inputs of adapters", affects="course", minimum=0, maximum=0.99),
        "lora_targets": Option(
            "attention/(query|value)",
            "regular expression of adapted layers: attention/(query|key|value|out), mlp/(up|gate|down)",
            affects="training",
        ),
        "compute_dtype": Option(
            "float32",
            "activations and matrix products; float32 is exact on every device (no TF32), bfloat16 fast on GPU and TPU",
            affects="course",
            choices=("float32", "bfloat16"),
        ),
        "matmul": Option(
            "compute_dtype",
            "products of the linear layers in blocks; float8 = operands scaled to 8 bits (NVIDIA Hopper and later)",
            affects="course",
            choices=("compute_dtype", "float8"),
        ),
        "attention": Option(
            "auto",
            "reference, xla (blocks), ring (mesh.context), cudnn (GPU, bfloat16) or splash (TPU); auto = the best",
            affects="computation",
            choices=("auto", "reference", "xla", "ring", "cudnn", "splash"),
        ),
        "scan_unroll": Option(
            0,
            "layers unrolled in the scan over depth; 0 = all of them",
            affects="computation",
            minimum=0,
            maximum=10_000,
        ),
        "remat": Option(
            "none",
            "what the backward pass recomputes: dots = all but matrix products; full = whole blocks; offload = whole "
            "blocks, whose inputs are kept in host memory",
            affects="computation",
            choices=("none", "dots", "full", "offload"),
        ),
    },
    "tokenizer": Option(
        "bpe:4096",
        "char | byte | bpe:VOCAB_SIZE[:digits=N] | word:VOCAB_SIZE | jieba:VOCAB_SIZE | hf:DIR_OR_NAME",
        "training",
    ),
    "data": {
        "source": Option(
            "python_docs",
            "python_docs | python_docs:dialogues | text:GLOB | html:GLOB | jsonl:GLOB#FIELD | csv:GLOB#FIELD | "
            "parquet:GLOB#FIELD | tfds:NAME[/CONFIG][:SPLIT][#FIELD] | hf:NAME[/CONFIG][:SPLIT][#FIELD] | "
            "messages:GLOB | sharegpt:GLOB | alpaca:GLOB | pairs:GLOB | chatterbot:GLOB | kdconv:GLOB | "
            "preference:GLOB | toy:TASK | store:DIR | tokens:GLOB, "
            "or a mixture: SPEC@WEIGHT + SPEC@WEIGHT",
            affects="place",
        ),
        "data_dir": Option("", "directory of prepared TFDS datasets", affects="place"),
        "cache_dir": Option(
            "",
            "where token stores and compiled programs are; empty = $GPTJAX_CACHE or ~/.cache/gptjax",
            affects="place",
        ),
        "cleaning": Option(
            "none",
            "none | plain | web | code | dialogue | chinese | guide, or steps (nfc,spaces), or PROFILE+STEP-STEP",
        ),
        "cleaning_options": Option(
            "", "options of the steps, e.g. 'min_characters=200 languages=en,zh'; empty = those of the profile"
        ),
        "cleaned_splits": Option(
            "all",
            "train = held-out text is not cleaned, so that models of differently cleaned text are scored on the same "
            "text; needs split_by=document",
            choices=("all", "train"),
        ),
        "deduplicate": Option(
            "none",
            "exact = leave out documents that are equal to an earlier one; near = also those that are nearly equal",
            choices=("none", "exact", "near"),
        ),
        "near_threshold": Option(
            0.8,
            "documents are nearly equal if they share at least this part of their word 5-grams (Jaccard)",
            minimum=0.01,
            maximum=1,
        ),
        "decontaminate": Option(
            "",
            "files of evaluation sets, GLOB,GLOB: leaves out documents that share 13 words in a row with them",
        ),
        "split_by": Option(
            "auto",
            "document = by a hash of the text; position = the first part trains, the last part validates; "
            "auto = document for 100 documents or more",
            choices=("auto", "document", "position"),
        ),
        "validation_fraction": Option(0.05, "share of documents or characters for validation", minimum=0, maximum=0.9),
        "test_fraction": Option(0.05, "share of documents or characters for the test split", minimum=0, maximum=0.9),
        "decode_errors": Option("reject", "what to do with bytes that are not UTF-8", choices=("reject", "replace")),
        "encoding": Option(
            "utf-8",
            "encoding of text files: utf-8, gb18030, big5, latin-1, ... (Python's names); a byte-order mark wins",
        ),
        "delimiter": Option(
            "auto",
            "of CSV columns; auto = comma if the first line has one, else the most frequent delimiter there",
            choices=("auto", "comma", "semicolon", "tab", "pipe"),
        ),
        "null_fields": Option(
            "reject", "what to do with records whose field is null; empty = an empty text", choices=("reject", "empty")
        ),
        "tool_turns": Option(
            "reject",
            "tool calls and their results in dialogues: template = written as the tokenizer's chat template does; "
            "leave_out = dropped and counted",
            choices=("reject", "template", "leave_out"),
        ),
        "same_speaker": Option(
            "reject",
            "dialogues in which one speaker has two turns in a row; join = merge them, with an empty line between",
            choices=("reject", "join"),
        ),
        "assistant_turns": Option(
            "all",
            "which of the assistant's turns in a dialogue are trained on; last = only the last one",
            choices=("all", "last"),
        ),
        "token_dtype": Option(
            "auto",
            "type of the ids in tokens:GLOB files without a header; auto = uint16, or uint32 for more than 65,536 ids",
            affects="place",
            choices=("auto", "uint16", "uint32"),
        ),
        "on_error": Option(
            "raise",
            "what to do with documents that cannot be read; skip = leave them out and count them",
            choices=("raise", "skip"),
        ),
        "workers": Option(
            0,
            "processes that read, clean and tokenise a large corpus; 0 = one per core",
            affects="computation",
            minimum=0,
            maximum=1024,
        ),
        "isolate_documents": Option(True, "tokens attend only to their own document where a row packs several"),
        "token_dropout": _probability("input tokens blanked"),
        "token_replacement": _probability("input tokens replaced by a random one"),
        "character_noise": _probability("input tokens misspelt in one character"),
        "word_swap": _probability("words that are swapped with their neighbour"),
        "span_shuffle": _probability("spans of 8 words that are shuffled"),
        "sentence_reorder": _probability("documents whose sentences are shuffled"),
    },
    "objective": {
        "name": Option(
            "auto",
            "language_modeling = every token of windows of text; instruction = the assistant's turns of whole "
            "dialogues; preference = better against worse answers; reward_model = rewards of answers, learned from "
            "preferences; distillation = a teacher's probabilities of next tokens; reinforcement = the model's own "
            "answers and their rewards (GRPO); auto = preference or instruction for data of that kind",
            affects="training",
            choices=(
                "auto",
                *_modules(
                    "objectives", "objective", "cross_entropy", "preference_losses", "policy_gradient", "teacher"
                ),
            ),
        ),
        "z_loss": Option(0.0, "weight of the squared log-partition (PaLM, section 5)", minimum=0, maximum=1e6),
        "balance_loss": Option(
            0.01, "weight of the load-balancing loss of a mixture of experts", minimum=0, maximum=1e6
        ),
        "logits_chunk": Option(
            0,
            "tokens per row whose logits are in memory at once; 0 = all",
            affects="computation",
            minimum=0,
            maximum=16_777_216,
        ),
        "label_smoothing": Option(
            0.0,
            "share of the target probability spread over the vocabulary; for dpo and simpo: the share of pairs that is "
            "assumed to be in the wrong order",
            minimum=0,
            maximum=0.9,
        ),
        # Preferences.
        "preference_loss": Option(
            "dpo",
            "dpo, ipo (pairs, with a reference model), kto (single judged answers, with a reference model), orpo, "
            "simpo (pairs, without one)",
            affects="training",
            choices=("dpo", "ipo", "kto", "orpo", "simpo"),
        ),
        "beta": Option(
            0.1,
            "preferences: reward per unit of log-probability; for orpo, the weight of the odds ratio",
            minimum=1e-6,
            maximum=1e6,
        ),
        "simpo_margin": Option(0.5, "simpo: by how much the better answer's reward must lead", minimum=0, maximum=1e6),
        "desirable_weight": Option(1.0, "kto: weight of good answers", minimum=0, maximum=1e6),
        "undesirable_weight": Option(1.0, "kto: weight of bad answers", minimum=0, maximum=1e6),
        # Reinforcement.
        "reward": Option(
            "exact_match",
            "exact_match, number (after ####, GSM8K), format, length, expression (must evaluate to the answer), "
            "FILE.py:function, model:WORKDIR (a reward model), or a sum: 'exact_match + 0.2*format'",
            affects="training",
        ),
        "reward_pattern": Option(
            r".*####\s*-?[0-9][0-9.,]*", "reward format: regular expression of a whole answer", affects="training"
        ),
        "reward_length": Option(
            400, "reward length: answers with more characters lose reward", "training", minimum=1, maximum=10**9
        ),
        "reward_errors": Option(
            "raise",
            "raise = a reward that fails, hangs or is not a number ends the run; skip = that question has no loss",
            affects="training",
            choices=("raise", "skip"),
        ),
        "reward_seconds": Option(
            5.0, "time that FILE.py:function may take for an answer", "training", minimum=0.01, maximum=86_400
        ),
        "reward_workers": Option(
            2, "processes that call FILE.py:function", affects="computation", minimum=1, maximum=1024
        ),
        "group_size": Option(
            8, "answers to each question, compared with each other", affects="training", minimum=2, maximum=65_536
        ),
        "max_new_tokens": Option(64, "tokens of an answer", affects="training", minimum=1, maximum=1_048_576),
        "num_iterations": Option(
            1,
            "updates with the same answers; steps of evaluations and checkpoints are multiples of it",
            "training",
            minimum=1,
            maximum=1000,
        ),
        "clip_low": Option(0.2, "probability ratios below 1 - clip_low get no gradient", minimum=0, maximum=1),
        "clip_high": Option(
            0.2, "the same above 1 + clip_high; 0.28 lets rare tokens grow (DAPO)", minimum=0, maximum=1e6
        ),
        "advantage": Option(
            "normalized",
            "reward minus the mean of the group, divided by its deviation (normalized) or not (centered: Dr. GRPO)",
            affects="training",
            choices=("normalized", "centered"),
        ),
        "loss_mean": Option(
            "token",
            "token = over all tokens of the batch (DAPO); sequence = over the means of answers (GRPO); constant = "
            "sums of answers / max_new_tokens (Dr. GRPO)",
            affects="training",
            choices=("token", "sequence", "constant"),
        ),
        "truncated": Option(
            "count",
            "answers cut off at max_new_tokens: count = trained on like others; mask = without loss",
            affects="training",
            choices=("count", "mask"),
        ),
        "kl_weight": Option(
            0.0, "weight of the KL divergence from the initial model; 0 = keep no copy of it", minimum=0, maximum=1e6
        ),
        # Distillation.
        "teacher": Option(
            "", "distillation: the teacher, a workdir or checkpoint, or hf:DIR_OR_NAME", affects="training"
        ),
        "teacher_top_k": Option(
            64,
            "distillation: how many of the teacher's most probable tokens are used; the others count as one more token",
            affects="training",
            minimum=1,
            maximum=16_777_216,
        ),
        "distillation_temperature": Option(
            1.0, "distillation: divides the logits of both models", affects="training", minimum=1e-3, maximum=1e3
        ),
        "distillation_weight": Option(
            0.5, "distillation: share of the divergence in the loss, beside the cross-entropy", minimum=0, maximum=1
        ),
    },
    "optimizer": {
        "name": Option(
            "adamw",
            "adamw | lion | sgd | adafactor | schedule_free_adamw (with schedule.name=constant); and for the matrices "
            "in blocks, with AdamW for the rest: muon | normuon | muonh | soap",
            affects="training",
            choices=_modules("optim/algorithms"),
        ),
        "learning_rate": Option(1e-3, "peak learning rate of everything but Muon's matrices", minimum=0, maximum=1e10),
        "muon_learning_rate": Option(
            0.02, "peak learning rate of the matrices in blocks, of muon, normuon and muonh", minimum=0, maximum=1e10
        ),
        "beta1": Option(
            0.9,
            "decay rate of the first moment, momentum of sgd",
            minimum=0,
            maximum=0.999999,
        ),
        "muon_momentum": Option(0.95, "momentum of muon, normuon and muonh; 0 = none", minimum=0, maximum=0.999999),
        "beta2": Option(0.95, "decay rate of the second moment", minimum=0, maximum=0.999999),
        "epsilon": Option(1e-8, "AdamW: added to the root of the second moment", minimum=1e-18, maximum=1),
        "weight_decay": Option(
            0.1, "decoupled weight decay, only for matrices and embedding tables", minimum=0, maximum=1e6
        ),
        "cautious_weight_decay": Option(
            False, "weight decay only where the update and the parameter have the same sign", affects="course"
        ),
        "orthogonalization": Option(
            "newton_schulz",
            "coefficients of muon, normuon and muonh: Newton-Schulz as first published, or Polar Express",
            affects="training",
            choices=("newton_schulz", "polar_express"),
        ),
        "soap_refresh": Option(
            10, "steps between two QR decompositions of soap", affects="course", minimum=1, maximum=1_000_000
        ),
        "learning_rate_multipliers": Option(
            "",
            "PATTERN=FACTOR PATTERN=FACTOR: factors for parameters whose path matches, e.g. 'embedding/.*=0.5'",
            affects="course",
        ),
        "weight_decay_multipliers": Option("", "the same for weight decay, e.g. 'embedding/.*=0'", affects="course"),
        "clip_norm": Option(1.0, "gradients are clipped to this global norm; 0 = no clipping", minimum=0, maximum=1e10),
    },
    "schedule": {
        "name": Option(
            "cosine",
            "shape of the learning rate; wsd = warm-up, stable, decay; cosine_restarts = `cycles` cosines",
            choices=("cosine", "cosine_restarts", "linear", "wsd", "rsqrt", "constant"),
        ),
        "warmup": Option("2%", "linear warm-up from zero", duration=True, minimum=0, maximum=MOST_STEPS),
        "decay": Option(
            "20%", "length of the decay at the end (wsd only)", duration=True, minimum=0, maximum=MOST_STEPS
        ),
        "decay_shape": Option(
            "linear",
            "shape of the decay (wsd only); sqrt = 1 - sqrt(share of the decay done)",
            choices=("linear", "sqrt"),
        ),
        "cycles": Option(4, "number of successive cosines (cosine_restarts only)", minimum=1, maximum=100),
        "final_fraction": Option(0.1, "final learning rate / peak", minimum=0, maximum=1),
        "batch_stages": Option(
            "",
            "growing batches: '50%:2,80%:4' = two batches per update from half of the run on, four from 80% on; the "
            "gradients of these steps are averaged, weighted by their tokens",
            affects="training",
        ),
    },
    "mesh": {
        "data": Option(
            -1, "copies of the model, over which the batch is split; -1 = all remaining devices", maximum=MOST_DEVICES
        ),
        "fsdp": Option(
            1, "devices over which parameters, optimizer state and batch are split", minimum=1, maximum=MOST_DEVICES
        ),
        "expert": Option(1, "devices over which experts and batch are split", minimum=1, maximum=MOST_DEVICES),
        "context": Option(1, "devices over which the sequence is split", minimum=1, maximum=MOST_DEVICES),
        "tensor": Option(
            1, "devices over which heads, MLP width and vocabulary are split", minimum=1, maximum=MOST_DEVICES
        ),
        "allow_replicated": Option(False, "allows large parameters that fsdp does not divide to be replicated"),
    },
    "train": {
        "num_steps": Option(1000, "optimizer steps", affects="course", duration=True, minimum=1, maximum=MOST_STEPS),
        "batch_size": Option(32, "rows in the global batch", minimum=1, maximum=1_048_576),
        "accumulation": Option(1, "micro-batches per step", affects="computation", minimum=1, maximum=1_048_576),
        "checkpoint_every": Option(
            "25%",
            "steps between checkpoints; each best evaluation so far is saved, too",
            affects="record",
            duration=True,
            minimum=1,
            maximum=MOST_STEPS,
        ),
        "keep_checkpoints": Option(
            2,
            "number of newest checkpoints kept, besides the best",
            affects="record",
            minimum=1,
            maximum=1_000_000,
        ),
        "early_stopping_patience": Option(
            0,
            "evaluations without improvement before stopping; 0 = never",
            affects="record",
            minimum=0,
            maximum=MOST_STEPS,
        ),
        "early_stopping_min_delta": Option(
            1e-5,
            "a smaller improvement of the validation loss does not count",
            affects="record",
            minimum=0,
            maximum=1e6,
        ),
        "ema_decay": Option(
            0.0,
            "decay rate of a running average of the parameters, which evaluation uses; 0 = off",
            affects="hyper",
            minimum=0,
            maximum=0.999999,
        ),
        "divergence_threshold": Option(
            3.0,
            "stop when the training loss stays this many nats above its lowest",
            affects="record",
            minimum=0,
            maximum=1e9,
        ),
    },
    "evaluation": {
        "every": Option(
            "10%", "steps between evaluations of the validation split", duration=True, minimum=1, maximum=MOST_STEPS
        ),
        "batch_size": Option(
            0, "rows in an evaluation batch; 0 = twice the training batch", minimum=0, maximum=2_097_152
        ),
        "stride": Option(
            0,
            "tokens between strided windows; 0 = context_length (no overlap)",
            affects="score",
            minimum=0,
            maximum=16_777_216,
        ),
        "max_tokens": Option(
            0, "validation tokens scored during training; 0 = all", affects="score", minimum=0, maximum=10**15
        ),
        "tasks": Option("perplexity,bleu", "tasks of `gptjax evaluate` without --tasks"),
        "prompts": Option(
            "", "prompts with references for BLEU: FILE.jsonl; empty = the built-in questions, for source python_docs"
        ),
        "max_prompts": Option(200, "prompts scored at most; 0 = all", minimum=0, maximum=10**9),
        "max_new_tokens": Option(48, "tokens generated per prompt", minimum=1, maximum=1_048_576),
        "beams": Option(1, "beams of the search for a completion; 1 = greedy", minimum=1, maximum=1024),
        "length_penalty": Option(
            1.0, "beam search: scores are log-probability / length ** length_penalty", minimum=-100, maximum=100
        ),
    },
    "logging": {
        "every": Option(10, "steps between lines of metrics.jsonl", minimum=1, maximum=MOST_STEPS),
        "norms_every": Option(
            0,
            "steps between norms of each layer's parameters, gradients, updates; 0 = never",
            minimum=0,
            maximum=MOST_STEPS,
        ),
        "samples": Option(3, "texts sampled at each evaluation", minimum=0, maximum=1000),
        "sample_prompt": Option("", "how samples begin; empty = the start of a document"),
        "sample_tokens": Option(100, "tokens in a sample", minimum=1, maximum=1_048_576),
        "price_per_device_hour": Option(
            0.0, "price for the cost in the report, in any currency; 0 = none", minimum=0, maximum=1e9
        ),
        "tensorboard": Option(True, "write TensorBoard events when tensorboardX is installed"),
        "trackers": Option("", "where else metrics are sent: wandb, trackio, mlflow, or several with commas"),
    },
    "seed": Option(0, "seed of initialisation, data order, dropout and samples", "hyper", minimum=0, maximum=MOST_SEED),
    "data_seed": Option(
        -1, "seed of data order and augmentation; -1 = the value of seed", "training", minimum=-1, maximum=MOST_SEED
    ),
    "init_from": Option(
        "",
        "hf:DIR_OR_NAME, or a workdir or checkpoint: starts from that model and takes its model options",
        "training",
    ),
}


@functools.cache
def flat_options() -> dict[str, Option]:
    """{"section.option": Option} in the order of the table; `affects` is filled in from the section."""
    flat = {}
    for name, entry in OPTIONS.items():
        options = {name: entry} if isinstance(entry, Option) else {f"{name}.{k}": o for k, o in entry.items()}
        flat |= {k: o if o.affects else dataclasses.replace(o, affects=_OF_SECTION[name]) for k, o in options.items()}
    return flat


def affecting(*kinds: str) -> frozenset[str]:
    """The names of the options whose `affects` is one of these kinds."""
    return frozenset(path for path, option in flat_options().items() if option.affects in kinds)
