"""Training on dialogues, from a file of questions and answers to a model that answers."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from gptjax.artifacts import loading
from gptjax.config import get_default
from gptjax.data import opening
from gptjax.data.store.store import open_store
from gptjax.evaluation.likelihood import Scorer
from gptjax.model import gpt
from gptjax.model.architecture import Architecture
from gptjax.parallel import partition
from gptjax.parallel.mesh import make_mesh

REPOSITORY = Path(__file__).parent.parent
ANIMALS = ["cat", "dog", "owl", "fox", "cow", "hen", "elk", "ant", "bee", "bat", "pig", "rat", "ape", "eel", "jay"]
CONFIG = """
from gptjax.config import apply_arg, get_default

def get_config(arg=""):
    config = get_default()
    config.tokenizer = "byte"
    config.data.update(source="{source}", word_swap=0.1, test_fraction=0.0)
    config.model.update(num_layers=2, num_heads=2, embed_dim=32, context_length=96)
    config.optimizer.learning_rate = 1e-2
    config.train.update(num_steps=150, batch_size=8)
    config.evaluation.update(every=75, tasks="perplexity")
    config.logging.update(every=50, samples=1, sample_tokens=24, sample_prompt="What are you?")
    return apply_arg(config, arg)
"""


def gptjax(verb: str, *options: str) -> str:
    command = [sys.executable, "-m", f"gptjax.{verb}", *options]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("dialogues")
    rows = [{"prompt": f"Who is the {animal}?", "response": f"The {animal} is you."} for animal in ANIMALS * 4]
    rows += [{"prompt": "What are you?", "response": "A small model."}] * 20
    (directory / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "notes").mkdir()
    for i in range(40):
        (directory / "notes" / f"{i}.txt").write_text(f"note {i % 5}: all is well. " * 6)
    (directory / "config.py").write_text(
        CONFIG.format(source=f"pairs:{directory}/talk.jsonl@3 + text:{directory}/notes/*.txt@1")
    )
    return directory


@pytest.fixture(scope="module")
def workdir(folder) -> Path:
    """Of a run on a mixture of dialogues and text."""
    assert "done; best" in gptjax("train", f"--config={folder}/config.py", f"--workdir={folder}/run")
    return folder / "run"


@pytest.fixture(scope="module")
def store(folder):
    gptjax("prepare", f"--source=pairs:{folder}/talk.jsonl", f"--output={folder}/talk", "--tokenizer=byte")
    return open_store(folder / "talk")


def test_loss_is_on_the_words_of_the_assistant_and_the_end_of_its_turn(store):
    config = get_default()
    config.data.source = f"store:{store.directory}"
    config.model.context_length = 96
    config.train.batch_size = 8
    batches = opening.RunData.open(config).batches(config, dialogues=True)
    tokenizer = store.tokenizer()
    end = tokenizer.special_tokens["<|im_end|>"]
    for step in range(3):
        batch = batches[step]
        assert (batch["weights"].sum(axis=1) > 0).all()
        trained = batch["targets"][batch["weights"] == 1]
        answers = [tokenizer.decode(part) for part in np.split(trained, np.flatnonzero(trained == end) + 1)[:-1]]
        assert trained[-1] == end
        assert all(answer == "A small model." or answer.endswith("is you.") for answer in answers)


def test_validation_scores_what_training_trains(store):
    config = get_default()
    config.model.update(num_layers=1, num_heads=2, embed_dim=16, context_length=32, vocab_size=259)
    architecture = Architecture.from_config(config.model, 0)
    mesh = make_mesh(config.mesh)
    params = jax.device_put(gpt.initialise(architecture, jax.random.key(0)), partition.replicated(mesh))
    split = store.split("train")
    scorer = Scorer(architecture, mesh, batch_size=8)
    likelihood = scorer.score(params, split, eot_id=256, stride=16)
    assert likelihood.tokens.sum() == split.read_mask(0, split.num_tokens).sum()
    assert "scored:assistant" in likelihood.signature


@pytest.mark.slow
def test_the_model_answers_and_stops(workdir):
    prompts = [("What are you?", "A small model.\n"), ("Who is the owl?", "The owl is you.\n")]
    for prompt, answer in prompts:
        assert gptjax("generate", f"--workdir={workdir}", f"--prompt={prompt}", "--temperature=0") == answer


def test_samples_are_answers(workdir):
    *_, last = map(json.loads, (workdir / "samples.jsonl").read_text("utf-8").splitlines())
    assert last["prompt"] == "What are you?" and "small" in last["text"]


def test_the_checkpoint_knows_its_template(workdir):
    trained = loading.load(workdir)
    assert trained.template.end_of_turn == "<|im_end|>"


def test_losses_and_epochs_are_told_by_source(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["split"] == "train"]
    assert train[-1]["epoch/talk"] > train[0]["epoch/talk"] > 0 and train[-1]["epoch/notes"] > 0
    for line in (line for line in lines if line["split"] == "validation"):
        low, high = sorted([line["loss/talk"], line["loss/notes"]])
        assert low < line["loss"] < high
    assert line["loss/notes"] < 1.0


def test_tokens_are_counted_without_padding(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    config = json.loads((workdir / "config.json").read_text())
    cells = config["train"]["batch_size"] * config["model"]["context_length"]
    for line in lines:
        assert 0.5 * cells * line["step"] < line["tokens_seen"] < cells * line["step"]
    assert [line["tokens_seen"] for line in lines] == sorted(line["tokens_seen"] for line in lines)


def test_evaluate_tells_the_sources_apart(workdir, tmp_path):
    gptjax("evaluate", f"--workdir={workdir}", "--checkpoint=last", f"--output={tmp_path}/results.json")
    scores = json.loads((tmp_path / "results.json").read_text())["results"]["perplexity"]
    last = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()][-1]
    for name in ("nll", "nll/talk", "nll/notes"):
        assert scores[name]["value"] == pytest.approx(last[name.replace("nll", "loss")], rel=1e-6)
    parts = [scores["nll/talk"], scores["nll/notes"]]
    tokens = [part["n"] for part in parts]
    assert scores["nll"]["n"] == sum(tokens)
    mean = np.average([part["value"] for part in parts], weights=tokens)
    assert scores["nll"]["value"] == pytest.approx(mean, rel=1e-6)
