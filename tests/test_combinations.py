"""What `validate` accepts runs: random combinations of options are trained three steps, validated and sampled.

python tests/test_combinations.py 0 200    (on eight virtual devices; prints what fails, with its options)
"""

import contextlib
import io
import json
import math
import random
import sys
import tempfile
import traceback
from pathlib import Path

import pytest

from gptjax import config as config_lib
from gptjax import train
from gptjax.errors import UserError

DEVICES = 8
# {option: values}, of which the first is taken half the time, so that an error is not always hidden by another.
CHOICES = {
    "model.num_layers": (2, 1, 3),
    "model.num_heads": (4, 2, 8),
    "model.num_kv_heads": (0, 1, 2, 4),
    "model.embed_dim": (32, 24),
    "model.head_dim": (0, 8, 10),
    "model.mlp_dim": (0, 16, 24),
    "model.context_length": (32, 128, 48, 1, 2),
    "model.vocab_multiple": (64, 1, 7),
    "model.norm": ("rmsnorm", "layernorm"),
    "model.norm_placement": ("pre", "post"),
    "model.activation": ("squared_relu", "gelu", "gelu_tanh", "relu", "swiglu"),
    "model.num_experts": (0, 4, 8),
    "model.experts_per_token": (2, 1, 4),
    "model.positions": ("rope", "learned", "alibi", "none"),
    "model.sliding_window": (0, 1, 5, 1000),
    "model.ngram_order": (1, 2, 4),
    "model.ngram_rows": (64, 1, 13),
    "model.rope_scaling": ("none", "linear", "llama3"),
    "model.rope_original_length": (16, 1, 8192),
    "model.qk_norm": (True, False),
    "model.use_bias": (False, True),
    "model.qkv_bias": (False, True),
    "model.tie_embeddings": (True, False),
    "model.logit_softcap": (0.0, 5.0),
    "model.value_embeddings": (0, 1, 2),
    "model.residual_scalars": (False, True),
    "model.attention_gate": (False, True),
    "model.init_std": (0.02, 0.0),
    "model.init_multipliers": ("", "blocks/attention/out/kernel=0"),
    "model.dropout": (0.0, 0.5, 0.99),
    "model.lora_rank": (0, 2, 3),
    "model.lora_dropout": (0.0, 0.5),
    "model.lora_targets": ("attention/(query|value)", ".*", "mlp/(up|down)", "attention/out"),
    "model.compute_dtype": ("float32", "bfloat16"),
    "model.matmul": ("compute_dtype", "float8"),
    "model.attention": ("auto", "reference", "xla", "ring", "splash"),
    "model.scan_unroll": (0, 1, 2, 5),
    "model.remat": ("none", "dots", "full", "offload"),
    "data.isolate_documents": (True, False),
    "data.token_dropout": (0.0, 0.5, 1.0),
    "data.token_replacement": (0.0, 1.0),
    "data.character_noise": (0.0, 0.5),
    "data.word_swap": (0.0, 0.5),
    "data.span_shuffle": (0.0, 1.0),
    "data.sentence_reorder": (0.0, 1.0),
    "data.validation_fraction": (0.2, 0.0),
    "objective.name": ("auto", "instruction", "language_modeling"),
    "objective.z_loss": (0.0, 1e-4),
    "objective.balance_loss": (0.01, 0.0),
    "objective.logits_chunk": (0, 1, 7, 16, 1000),
    "objective.label_smoothing": (0.0, 0.1),
    "optimizer.name": ("adamw", "lion", "muon"),
    "optimizer.beta1": (0.9, 0.0, 0.999999),
    "optimizer.beta2": (0.95, 0.0, 0.999999),
    "optimizer.epsilon": (1e-8, 1e-18),
    "optimizer.weight_decay": (0.1, 0.0),
    "optimizer.learning_rate": (1e-3, 0.0),
    "optimizer.learning_rate_multipliers": ("", "embedding/.*=0.5"),
    "optimizer.clip_norm": (1.0, 0.0),
    "schedule.name": ("cosine", "cosine_restarts", "linear", "wsd", "rsqrt", "constant"),
    "schedule.warmup": ("2%", 0, 3, "100%"),
    "schedule.decay": ("20%", 0, 3),
    "schedule.final_fraction": (0.1, 0.0, 1.0),
    "mesh.data": (-1, 1, 2),
    "mesh.fsdp": (1, 2, 4, 8),
    "mesh.expert": (1, 2, 4),
    "mesh.context": (1, 2, 4),
    "mesh.tensor": (1, 2, 4),
    "train.batch_size": (16, 8, 64),
    "train.accumulation": (1, 2, 8),
    "train.ema_decay": (0.0, 0.5),
    "train.checkpoint_every": (3, 1),
    "evaluation.batch_size": (0, 1, 3),
    "evaluation.stride": (0, 1, 5),
    "evaluation.max_tokens": (200, 1),
    "logging.norms_every": (0, 1),
    "logging.sample_prompt": ("", "a"),
    "logging.sample_tokens": (3, 40),
    "tokenizer": ("byte", "char", "word:50"),
}
DIALOGUES = [
    {"messages": [{"role": "user", "content": f"what is {i}?"}, {"role": "assistant", "content": f"It is {i}. Yes."}]}
    for i in range(60)
]


def write_corpora(directory: Path) -> None:
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "it."]
    generator = random.Random(0)
    for i in range(40):
        (directory / f"{i}.txt").write_text(" ".join(generator.choices(words, k=120)), encoding="utf-8")
    lines = [json.dumps(dialogue) for dialogue in DIALOGUES]
    (directory / "dialogues.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def combination(generator: random.Random, directory: Path) -> tuple[config_lib.Config, dict[str, object]]:
    """A config that `validate` accepts, and its options that are not the first of CHOICES."""
    while True:
        config = config_lib.get_default()
        config.data.update(source=f"text:{directory}/*.txt", cache_dir=str(directory / "cache"), split_by="position")
        config.data.test_fraction = 0.0
        config.train.update(num_steps=3, keep_checkpoints=1)
        config.evaluation.update(every=3, max_prompts=2, max_new_tokens=3)
        config.logging.update(every=1, samples=1, tensorboard=False)
        share = generator.choice((0.15, 0.3, 0.5))  # of the options that change
        chosen = {}
        for path, choices in CHOICES.items():
            value = generator.choice(choices[1:]) if generator.random() < share else choices[0]
            section, _, name = path.rpartition(".")
            (config[section] if section else config)[name] = value
            if value != choices[0]:
                chosen[path] = value
        if config.objective.name == "instruction":
            config.data.source = f"messages:{directory}/dialogues.jsonl"
        others = math.prod(config.mesh[axis] for axis in config_lib.MESH_AXES if axis != "data")
        if DEVICES % others or config.mesh.data * others > DEVICES:
            continue
        on_devices = config.copy_and_resolve_references()
        on_devices.mesh.data = DEVICES // others if config.mesh.data == -1 else config.mesh.data
        with contextlib.suppress(UserError):
            config_lib.validate(on_devices)
            return config, chosen


def problem(config: config_lib.Config, workdir: Path) -> str | None:
    """The error within three steps, or None. A UserError does not count."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            train.train(config, workdir)
    except UserError as error:
        return f"refused late: {error}" if str(error).startswith(("the config has", "the mesh")) else None
    except Exception as error:
        if "materialize symbols" in str(error):  # float8 on a processor that XLA has no half precision for
            return None
        return traceback.format_exc()
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for line in lines:
        for name, value in line.items():
            if isinstance(value, float) and "loss" in name and not math.isfinite(value):
                return f"{name} is {value} at step {line.get('step')}"
    return None if any("train_loss" in line or "loss" in line for line in lines) else f"no loss in {lines}"


def check(seeds: range, directory: Path) -> list[str]:
    failures = []
    for seed in seeds:
        config, chosen = combination(random.Random(seed), directory)
        if found := problem(config, directory / f"run-{seed}"):
            failures.append(f"seed {seed}: {found}\n{chosen}")
    return failures


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("corpora")
    write_corpora(directory)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_is_accepted_runs(corpora, seed):
    assert not check(range(seed, seed + 1), corpora)


@pytest.mark.slow
def test_what_is_accepted_runs_whatever_is_combined(corpora):
    assert not check(range(10, 15), corpora)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        write_corpora(Path(temporary))
        for number in range(int(sys.argv[1]), int(sys.argv[2])):
            settings, changed = combination(random.Random(number), Path(temporary))
            what = problem(settings, Path(temporary) / "run" / str(number))
            print(f"seed {number}: {'fine' if what is None else what + str(changed)}", flush=True)
