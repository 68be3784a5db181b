"""Fine-tuning of pretrained models: import, train, export, in each layout; with and without torch."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import cli, convert, train
from gptjax import config as config_lib
from gptjax.artifacts import loading
from gptjax.data.tokenization import huggingface as tokenizer_files
from gptjax.data.tokenization.tokenizer import build_tokenizer
from gptjax.model import gpt, lora
from gptjax.model.architecture import Architecture
from gptjax.model.huggingface import weights as huggingface

CONFIG = """
from gptjax.config import apply_arg, get_default

def get_config(arg=""):
    config = get_default()
    config.data.update(source="text:{corpus}/*.txt", split_by="position", validation_fraction=0.1)
    config.model.update(num_layers=3, embed_dim=24, num_heads=3, context_length=16)
    config.optimizer.learning_rate = 1e-2
    config.train.update(num_steps=20, batch_size=8, checkpoint_every=10)
    config.evaluation.update(every=10, max_tokens=512)
    config.logging.update(every=10, samples=0, tensorboard=False)
    return apply_arg(config, arg)
"""
SHAPE = {"num_layers": 2, "num_heads": 2, "embed_dim": 16, "context_length": 24, "vocab_size": 257, "init_std": 0.2}
LLAMA = {"positions": "rope", "norm": "rmsnorm", "activation": "swiglu", "mlp_dim": 32, "num_kv_heads": 1}
LAYOUTS = {
    "gpt2": {
        "positions": "learned",
        "norm": "layernorm",
        "activation": "gelu_tanh",
        "qk_norm": False,
        "use_bias": True,
    },
    "llama": LLAMA | {"qk_norm": False, "tie_embeddings": False, "rope_theta": 500.0},
    "qwen3": LLAMA | {"qk_norm": True, "head_dim": 16},
}
# What transformers makes; of texts of 16 tokens and more, so that a scaled context and a window are left behind.
SCALED = {"rope_type": "llama3", "rope_theta": 50.0, "factor": 4.0, "low_freq_factor": 0.15, "high_freq_factor": 1.5}
DECODERS = {
    "llama": {"model_type": "llama"},
    "llama 3.2": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "rope_parameters": SCALED | {"original_max_position_embeddings": 10},
    },
    "mistral": {"model_type": "mistral", "sliding_window": 5, "head_dim": 12},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True},
}


@pytest.fixture(scope="module")
def config_file(tiny_corpus, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(CONFIG.format(corpus=tiny_corpus))
    return path


def write_model(directory: Path, layout: str, tokenizer="byte", **options) -> Path:
    """A Hugging Face directory by our own exporter."""
    model = config_lib.get_default().model
    model.update(SHAPE | LAYOUTS[layout] | options)
    architecture = Architecture.from_config(model, 0)
    params = gpt.initialise(architecture, jax.random.key(1))
    tokenizer = build_tokenizer(tokenizer)
    huggingface.write_directory(directory, architecture, params, eot_id=tokenizer.eot_id)
    tokenizer_files.write(directory, tokenizer, None, context_length=architecture.context_length)
    return directory


def write_transformers_model(directory: Path, layout: str) -> Path:
    """A Hugging Face directory saved by transformers, in shards of bfloat16."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if layout == "gpt2":
        config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=24, vocab_size=257)
    else:
        shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 16}
        shape |= {"intermediate_size": 32, "max_position_embeddings": 24, "vocab_size": 257, "head_dim": 8}
        shape["rope_parameters"] = {"rope_type": "default", "rope_theta": 500.0}
        config = transformers.AutoConfig.for_model(**shape | DECODERS[layout])
    config.initializer_range = 0.2
    config.bos_token_id = config.eos_token_id = 256
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    model = model.to(torch.bfloat16)
    model.save_pretrained(directory, max_shard_size="8KB")
    build_tokenizer("byte").save(directory / "tokenizer.json")
    return directory


def run(verb, *options: str) -> None:
    assert cli.run(verb.main, [verb.__name__, *options]) == 0


def losses(workdir: Path, split: str) -> list[float]:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["split"] == split]


def logits(workdir: Path, tokens: np.ndarray) -> np.ndarray:
    trained = loading.load(workdir, "last")
    model = gpt.bind(trained.architecture, trained.params)
    positions = jnp.tile(jnp.arange(tokens.shape[1]), (len(tokens), 1))
    hidden, _ = model.hidden(jnp.asarray(tokens), positions=positions)
    return np.asarray(model.logits(hidden)[..., : trained.architecture.vocab_size])


def transformers_logits(directory: Path, tokens: np.ndarray) -> np.ndarray:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


@pytest.fixture
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 257, (2, 16))


@pytest.mark.parametrize("layout", ["gpt2", *DECODERS])
def test_a_model_of_transformers_comes_in_trains_and_goes_out(layout, config_file, tmp_path, tokens):
    directory = write_transformers_model(tmp_path / "hf", layout)
    assert len(list(directory.glob("model-*.safetensors"))) > 1
    run(convert, f"--from=hf:{directory}", f"--to={tmp_path / 'in'}")
    np.testing.assert_allclose(logits(tmp_path / "in", tokens), transformers_logits(directory, tokens), atol=1e-4)

    run(train, f"--config={config_file}", f"--workdir={tmp_path / 'run'}", f"--config.init_from=hf:{directory}")
    before, *_, after = losses(tmp_path / "run", "train")
    assert after < before
    run(convert, f"--from={tmp_path / 'run'}", f"--to=hf:{tmp_path / 'out'}", "--checkpoint=last")
    configs = [json.loads((place / "config.json").read_text()) for place in (directory, tmp_path / "out")]
    assert configs[0]["model_type"] == configs[1]["model_type"]
    assert configs[0].get("rope_parameters") == configs[1].get("rope_parameters")
    ours = logits(tmp_path / "run", tokens)
    np.testing.assert_allclose(ours, transformers_logits(tmp_path / "out", tokens), atol=1e-4)
    assert np.abs(ours - logits(tmp_path / "in", tokens)).max() > 0.1, "nothing was trained"


@pytest.mark.parametrize("layout", ["gpt2", *DECODERS])
def test_greedy_tokens_are_those_of_transformers(layout, tmp_path):
    directory = write_transformers_model(tmp_path / "hf", layout)
    import torch
    import transformers

    from gptjax.generation.completion import Generator
    from gptjax.generation.params import SamplingParams

    run(convert, f"--from=hf:{directory}", f"--to={tmp_path / 'in'}")
    prompt = np.array([256, 84, 104, 101], np.int32)
    generator = Generator.from_trained(loading.load(tmp_path / "in"))
    ours = generator.complete_tokens([prompt], SamplingParams(max_new_tokens=16, temperature=0, ignore_eos=True))
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    theirs = model.generate(torch.tensor(prompt[None]).long(), max_new_tokens=16, do_sample=False, eos_token_id=-1)
    assert ours[0].tokens.tolist() == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    "layout", ["gpt2", *(pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS if name != "gpt2")]
)
def test_a_run_takes_model_and_tokenizer_from_a_directory(layout, config_file, tmp_path, tokens):
    directory = write_model(tmp_path / "hf", layout)
    options = [f"--config.init_from=hf:{directory}", "--config.optimizer.learning_rate=0.0"]
    options += ["--config.optimizer.weight_decay=0.0", "--config.train.num_steps=2"]
    run(train, f"--config={config_file}", f"--workdir={tmp_path / 'run'}", *options)
    run(convert, f"--from=hf:{directory}", f"--to={tmp_path / 'in'}")
    np.testing.assert_allclose(logits(tmp_path / "run", tokens), logits(tmp_path / "in", tokens), atol=1e-6)
    config = loading.load(tmp_path / "run", "last").config
    assert config.model.context_length == 16 and config.tokenizer == f"hf:{directory}"


@pytest.mark.slow
def test_a_context_that_is_longer_than_the_models_is_cut_to_it(config_file, tmp_path, capsys):
    directory = write_model(tmp_path / "hf", "gpt2", context_length=12)
    options = [f"--config.init_from=hf:{directory}", "--config.train.num_steps=2", f"--workdir={tmp_path / 'run'}"]
    run(train, f"--config={config_file}", *options)
    assert "model.context_length is 12, as in init_from=hf:" in capsys.readouterr().err
    assert loading.load(tmp_path / "run", "last").config.model.context_length == 12
    run(train, f"--config={config_file}", *options)  # continues
    assert "model.context_length" not in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_takes_model_and_tokenizer_from_a_workdir(config_file, tmp_path):
    run(train, f"--config={config_file}", f"--workdir={tmp_path / 'first'}", "--config.tokenizer=byte")
    options = [f"--config.init_from={tmp_path / 'first'}", "--config.model.dropout=0.1", "--config.train.ema_decay=0.9"]
    run(train, f"--config={config_file}", f"--workdir={tmp_path / 'second'}", *options)
    assert losses(tmp_path / "second", "train")[0] < losses(tmp_path / "first", "train")[0]
    config = loading.load(tmp_path / "second", "last").config
    assert config.tokenizer == f"hf:{tmp_path / 'first'}" and config.model.dropout == 0.1


@pytest.mark.parametrize("kind", ["hf", pytest.param("workdir", marks=pytest.mark.slow)])
def test_a_run_continues_without_the_model_that_it_started_from(kind, config_file, tmp_path):
    """The origin is needed only for step 0; everything else is in the work directory."""
    origin = tmp_path / "origin"
    if kind == "hf":
        write_model(origin, "gpt2", context_length=16)
    else:
        run(train, f"--config={config_file}", f"--workdir={origin}", "--config.tokenizer=byte")
    options = [f"--config.init_from={'hf:' * (kind == 'hf')}{origin}", f"--workdir={tmp_path / 'run'}"]
    run(train, f"--config={config_file}", *options)
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    shutil.rmtree(origin)
    run(train, f"--config={config_file}", *options)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    assert loading.load(tmp_path / "run", "last").config.tokenizer == f"hf:{origin}"


def test_a_chat_template_adds_its_tokens_to_the_vocabulary(config_file, tmp_path):
    directory = write_model(tmp_path / "hf", "qwen3", vocab_multiple=1)
    turns = [{"role": "user", "content": "Good morning"}, {"role": "assistant", "content": "Good morning to you"}]
    dialogues = tmp_path / "dialogues.jsonl"
    dialogues.write_text("".join(json.dumps({"messages": [*turns, *turns[: 2 * (i % 2)]]}) + "\n" for i in range(40)))
    options = [f"--config.init_from=hf:{directory}", f"--config.data.source=messages:{dialogues}"]
    run(train, f"--config={config_file}", f"--workdir={tmp_path / 'run'}", *options, "--config.model.context_length=24")
    trained = loading.load(tmp_path / "run", "last")
    assert trained.architecture.vocab_size == 259 and trained.template is not None
    run(convert, f"--from={tmp_path / 'run'}", f"--to=hf:{tmp_path / 'out'}")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [256, 258]
    run(convert, f"--from=hf:{tmp_path / 'out'}", f"--to={tmp_path / 'again'}")
    assert loading.load(tmp_path / "again").template.to_json() == trained.template.to_json()


LORA = ("--config.model.lora_rank=2", "--config.model.lora_targets=.*", "--config.model.lora_dropout=0.1")


@pytest.fixture(scope="module")
def lora_run(config_file, tmp_path_factory) -> tuple[Path, Path]:
    """(Hugging Face directory, work directory of adapters trained on it)."""
    directory = tmp_path_factory.mktemp("lora")
    base = write_model(directory / "hf", "gpt2")
    options = [f"--config.init_from=hf:{base}", "--config.optimizer.weight_decay=0.5", *LORA]
    run(train, f"--config={config_file}", f"--workdir={directory / 'run'}", *options)
    return base, directory / "run"


def test_adapters_learn_and_the_rest_stays(lora_run, tmp_path):
    base, workdir = lora_run
    before, *_, after = losses(workdir, "train")
    assert after < before
    run(convert, f"--from=hf:{base}", f"--to={tmp_path / 'in'}")
    trained = loading.load(workdir, "last", merge=False)
    _, frozen = lora.split(trained.params)
    theirs = loading.load(tmp_path / "in").params
    frozen["position_embedding"]["embedding"] = np.concatenate(
        [frozen["position_embedding"]["embedding"], theirs["position_embedding"]["embedding"][16:]]
    )
    vocabulary = frozen["embedding"]["embedding"], theirs["embedding"]["embedding"]
    frozen["embedding"]["embedding"], theirs["embedding"]["embedding"] = (table[:257] for table in vocabulary)
    for (path, ours), value in zip(jax.tree_util.tree_leaves_with_path(frozen), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(ours, value, err_msg=str(path))


def test_adapters_resume_exactly(lora_run, config_file, tmp_path):
    base, workdir = lora_run
    shutil.copytree(workdir, tmp_path / "run")
    for step in (path for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name == "20"):
        shutil.rmtree(step)
    options = [f"--config.init_from=hf:{base}", "--config.optimizer.weight_decay=0.5", *LORA]
    run(train, f"--config={config_file}", f"--workdir={tmp_path / 'run'}", *options)
    ours, theirs = (loading.load(place, "last", merge=False) for place in (tmp_path / "run", workdir))
    assert ours.step == theirs.step == 20
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)


def test_adapters_are_merged_for_use_and_for_export(lora_run, tmp_path, tokens):
    base, workdir = lora_run
    apart = loading.load(workdir, "last", merge=False)
    model = gpt.bind(apart.architecture, apart.params)
    positions = jnp.tile(jnp.arange(16), (2, 1))
    expected = np.asarray(model.logits(model.hidden(jnp.asarray(tokens), positions=positions)[0])[..., :257])
    np.testing.assert_allclose(logits(workdir, tokens), expected, atol=1e-5)
    run(convert, f"--from={workdir}", f"--to=hf:{tmp_path / 'out'}", "--checkpoint=last")
    run(convert, f"--from=hf:{tmp_path / 'out'}", f"--to={tmp_path / 'again'}")
    np.testing.assert_allclose(logits(tmp_path / "again", tokens), expected, atol=1e-5)
    run(convert, f"--from={workdir}", f"--to=peft:{tmp_path / 'peft'}", "--checkpoint=last")
    run(convert, f"--from=hf:{base}", f"--adapter={tmp_path / 'peft'}", f"--to={tmp_path / 'both'}")
    np.testing.assert_allclose(logits(tmp_path / "both", tokens), expected, atol=1e-4)
    assert loading.load(tmp_path / "both", merge=False).architecture.lora_rank == 6  # query, key and value in one


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        (
            ["--config.model.num_layers=3"],
            ["do not fit the model of init_from=", "--config.model.num_layers=3: the model has 2"],
        ),
        (["--config.model.context_length=64"], ["--config.model.context_length=64: the model has 24; use at most"]),
        (["--config.tokenizer=bpe:300"], ["was trained with another tokenizer", "--config.tokenizer=hf:"]),
        (["--config.model.qk_norm=False", "--config.model.num_heads=2"], ["model.qk_norm=False: the model has True"]),
    ],
)
def test_a_run_that_contradicts_its_origin_is_refused(options, messages, config_file, tmp_path, capsys):
    directory = write_model(tmp_path / "hf", "qwen3")
    arguments = [f"--config={config_file}", f"--workdir={tmp_path / 'run'}", f"--config.init_from=hf:{directory}"]
    assert cli.run(train.main, ["train", *arguments, *options]) == 2
    printed = capsys.readouterr().err
    for message in messages:
        assert message in printed
    assert "num_heads" not in printed


def test_a_name_without_network_or_cache(config_file, tmp_path, capsys, monkeypatch):
    import huggingface_hub

    def unreachable(*arguments, **options):
        raise OSError("no route to the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    arguments = [f"--config={config_file}", f"--workdir={tmp_path}", "--config.init_from=hf:gpt2-medium"]
    assert cli.run(train.main, ["train", *arguments]) == 2
    printed = capsys.readouterr().err
    assert "hf:gpt2-medium: there is no such directory" in printed and "no route to the hub" in printed
    assert "`hf download gpt2-medium`" in printed
