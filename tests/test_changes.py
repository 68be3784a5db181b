"""A run that continues under changed conditions: only on request, recorded with its step, and exact."""

import contextlib
import io
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from gptjax import cli, train
from gptjax import config as config_lib
from gptjax.artifacts import loading
from gptjax.parameters import path_string

CONFIG = """
from gptjax.config import get_default

def get_config():
    config = get_default()
    config.tokenizer = "byte"
    config.data.update(source="text:{corpus}/*.txt", split_by="position", validation_fraction=0.1)
    config.model.update(num_layers=1, num_heads=2, embed_dim=16, context_length=16, dropout=0.1)
    config.schedule.update(name="constant", warmup=2, decay=1)
    config.train.update(num_steps=6, batch_size=4, ema_decay=0.9, checkpoint_every=6)
    config.evaluation.update(every=3, max_tokens=200)
    config.logging.update(every=1, samples=0, tensorboard=False)
    config.mesh.data = 2
    return config
"""


@pytest.fixture(scope="module")
def config_file(tiny_corpus, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(CONFIG.format(corpus=tiny_corpus))
    return path


@pytest.fixture
def run(config_file):
    def command(workdir: Path, *options: str, status: int = 0) -> str:
        """Trains in this process; returns what stderr shows."""
        told = io.StringIO()
        argv = ["train", f"--config={config_file}", f"--workdir={workdir}", *options]
        with contextlib.redirect_stderr(told):
            assert cli.run(train.main, argv) == status, told.getvalue()
        return told.getvalue()

    return command


def story(workdir: Path) -> list[tuple]:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [(line["split"], line["step"], line["loss"], line.get("learning_rate")) for line in lines]


def parameters(workdir: Path) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(loading.load(loading.find(workdir, "last")).params)
    return {path_string(path): np.asarray(leaf) for path, leaf in leaves}


def changes(workdir: Path) -> list[dict]:
    return json.loads((workdir / "manifest.json").read_text())["changes"]


def test_a_longer_run_is_the_one_that_was_long_from_the_start(run, tmp_path):
    longer, extended = ["--config.train.num_steps=12"], tmp_path / "extended"
    run(tmp_path / "straight", *longer)
    run(extended)
    refused = run(extended, *longer, status=2)
    assert refused.count("\n") == 1
    assert "train.num_steps was 6 and is 12 now. With --allow_changes it goes on from step 6" in refused
    told = run(extended, *longer, "--allow_changes")
    assert "changed from here on: train.num_steps is 12, it was 6" in told
    assert "new learning rate" not in told, "a constant rate is the same"
    assert story(extended) == story(tmp_path / "straight")
    ours, theirs = parameters(extended), parameters(tmp_path / "straight")
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    assert changes(extended) == [{"step": 6, "options": {"train.num_steps": [6, 12]}}]
    run(extended, *longer)  # done: the same command needs no flag, and what was changed is still known
    assert len(changes(extended)) == 1


def test_the_rest_is_trained_with_the_new_values(run, tmp_path):
    run(tmp_path)
    before = story(tmp_path)
    options = ["--config.train.num_steps=10", "--config.schedule.name=linear", "--config.optimizer.learning_rate=0.002"]
    told = run(tmp_path, *options, "--config.evaluation.every=5", "--allow_changes")
    now = config_lib.from_json((tmp_path / "config.json").read_text())
    assert (now.train.num_steps, now.schedule.name, now.evaluation.every) == (10, "linear", 5)
    assert story(tmp_path)[: len(before)] == before
    rates = {step: rate for split, step, _, rate in story(tmp_path) if split == "train"}
    expected = [2e-3 * (1 - 0.9 * (step - 2) / 8) for step in range(6, 10)]  # linear from step 2 to 10, to a tenth
    np.testing.assert_allclose([rates[step] for step in range(7, 11)], expected, rtol=1e-5)
    assert "new learning rate: step 7: 0.0011" in told
    assert changes(tmp_path)[0]["options"]["schedule.name"] == ["constant", "linear"]
    assert "evaluation.every" in changes(tmp_path)[0]["options"], "what needs no flag is recorded, too"


def test_a_run_does_not_end_before_it_is(run, tmp_path):
    run(tmp_path)
    refused = run(tmp_path, "--config.train.num_steps=4", "--allow_changes", status=2)
    assert "train.num_steps is 4, and the run in" in refused
    assert json.loads((tmp_path / "config.json").read_text())["train"]["num_steps"] == 6


def test_without_a_checkpoint_anything_may_change(run, tmp_path):
    run(tmp_path, "--config.optimizer.learning_rate=1e10", status=1)  # diverges before there is one
    run(tmp_path, status=2)
    run(tmp_path, "--config.model.num_layers=2", "--allow_changes")
    assert changes(tmp_path) == []
