"""A model trained with any attention kernel is evaluated and generates anywhere: inference chooses its own kernel."""

import json

import jax
import optax
import pytest

from gptjax import cli, evaluate, generate, train
from gptjax import config as config_lib
from gptjax.artifacts.checkpoints import Checkpoints
from gptjax.data.tokenization.tokenizer import build_tokenizer
from gptjax.model import gpt
from gptjax.model.architecture import Architecture
from gptjax.training.state import create_state

QUESTIONS = [{"query": f"the cat sat on {i}", "choices": ["a mat", "one"], "gold": i % 2} for i in range(3)]
CONFIG = """
from gptjax.config import get_default

def get_config(arg=""):
    config = get_default()
    config.tokenizer = "byte"
    config.data.source = "text:{corpus}/*.txt"
    config.model.update(num_layers=1, num_heads=2, embed_dim=16, context_length=128, attention=arg, remat="full")
    config.train.update(num_steps=2, batch_size=8)
    config.evaluation.update(every=1, tasks="perplexity", max_tokens=300)
    config.logging.update(samples=1, sample_tokens=4, tensorboard=False)
    return config
"""


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    path.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    return path


def checkpoint(workdir, **options):
    """A work directory with a model that was never trained."""
    tokenizer, config = build_tokenizer("byte"), config_lib.get_default()
    config.model.update(num_layers=1, num_heads=2, embed_dim=16, context_length=128, vocab_size=tokenizer.vocab_size)
    config.model.update(options)
    params = gpt.initialise(Architecture.from_config(config.model, 0), jax.random.key(0))
    checkpoints = Checkpoints(workdir)
    state = create_state(params, optax.identity(), ema=False)
    checkpoints.save(1, state, config=config, tokenizer=tokenizer, metrics={})
    checkpoints.wait()
    checkpoints.close()
    return workdir


def scores(workdir, questions, corpus):
    """The results of perplexity and multiple choice."""
    options = [f"--tasks=perplexity,multiple_choice:{questions}", f"--data=text:{corpus}/00*.txt"]
    assert cli.run(evaluate.main, ["evaluate", f"--workdir={workdir}", *options, f"--output={workdir}/out.json"]) == 0
    found = json.loads((workdir / "out.json").read_text())["results"]
    return {task: {name: metric["value"] for name, metric in metrics.items()} for task, metrics in found.items()}


def completion(workdir, capsys):
    capsys.readouterr()
    options = ["--prompt=the cat", "--max_new_tokens=8", "--temperature=0", "--ignore_eos"]
    assert cli.run(generate.main, ["generate", f"--workdir={workdir}", *options]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("attention", ["reference", "xla", "splash", "cudnn"])
def test_a_checkpoint_of_any_kernel_is_evaluated_and_writes(attention, questions, tiny_corpus, tmp_path, capsys):
    dtype = {"compute_dtype": "bfloat16"} if attention == "cudnn" else {}
    named = checkpoint(tmp_path / "named", attention=attention, remat="dots", **dtype)
    auto = checkpoint(tmp_path / "auto", **dtype)
    assert scores(named, questions, tiny_corpus) == scores(auto, questions, tiny_corpus)
    assert completion(named, capsys) == completion(auto, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["xla", "splash"])
def test_a_run_with_any_kernel_evaluates_and_samples(attention, questions, tiny_corpus, tmp_path, capsys):
    (tmp_path / "config.py").write_text(CONFIG.format(corpus=tiny_corpus))
    workdir = tmp_path / "run"
    options = [f"--config={tmp_path}/config.py:{attention}", f"--workdir={workdir}"]
    assert cli.run(train.main, ["train", *options]) == 0
    assert len((workdir / "samples.jsonl").read_text().splitlines()) == 2
    assert scores(workdir, questions, tiny_corpus)["perplexity"]["perplexity"] > 1
    assert completion(workdir, capsys)
