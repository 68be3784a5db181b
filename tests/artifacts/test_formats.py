"""Checkpoints of earlier formats: they are opened, evaluated and continued.

`format_1` is the work directory of a run of 4 steps on the 40 lines of `corpus`, with Muon, AdamW and an average.
"""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from gptjax import config as config_lib
from gptjax.artifacts import loading
from gptjax.artifacts.checkpoints import FORMAT, Checkpoints
from gptjax.errors import UserError
from gptjax.parallel.mesh import make_mesh
from gptjax.train import train
from gptjax.training.program import Program

FORMAT_1 = Path(__file__).parent / "format_1"


@pytest.fixture
def corpus(tmp_path) -> Path:
    """The text that the run was trained on."""
    directory = tmp_path / "corpus"
    directory.mkdir()
    for i in range(1, 41):
        (directory / f"{i}.txt").write_text(f"the cat number {i} sat on the mat and saw bird {i * 7 % 13}\n")
    return directory


@pytest.fixture
def run(tmp_path) -> Path:
    return Path(shutil.copytree(FORMAT_1, tmp_path / "run"))


def program_of(config: config_lib.Config) -> Program:
    config = config.copy_and_resolve_references().unlock()
    config.objective.name = "language_modeling"
    return Program.of(config, make_mesh(config.mesh, jax.devices()[:1]))


def test_a_checkpoint_of_format_1_opens():
    trained = loading.load(FORMAT_1)
    assert trained.step == 4
    assert trained.tokenizer.decode(trained.tokenizer.encode("the cat")) == "the cat"
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(trained.params))


def test_the_state_of_format_1_is_whole(run):
    program = program_of(loading.read_config(run / "checkpoints" / "4"))
    state = Checkpoints(run).restore(4, program.target)
    assert int(state.step) == 4
    moments = [np.abs(leaf).max() for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert min(moments) > 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    norm = np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(state.params)))
    before = next(line["parameter_norm"] for line in lines if line["split"] == "train")
    assert norm == pytest.approx(before, rel=0.05)  # of the state before the last step


def test_a_run_of_format_1_is_continued(run, corpus):
    """The run is finished: the same command has nothing to train and rewrites its files."""
    config = config_lib.from_json((run / "config.json").read_text()).unlock()
    config.data.source = f"text:{corpus}/*.txt"
    config.mesh.data = 1
    before = (run / "metrics.jsonl").read_text()
    train(config.lock(), run)
    assert (run / "metrics.jsonl").read_text() == before


def test_a_state_without_a_part_for_clipping(tmp_path):
    """As format 1 wrote it with optimizer.clip_norm=0."""
    config = loading.read_config(FORMAT_1 / "checkpoints" / "4").unlock()
    config.optimizer.clip_norm = 0.0
    program = program_of(config)
    state = program.initial_state()
    checkpoints = Checkpoints(tmp_path)
    tokenizer = loading.load(FORMAT_1).tokenizer
    parts = {
        "step": state.step,
        "params": state.params,
        "opt_state": state.opt_state[1],
        "ema_params": state.ema_params,
    }
    checkpoints.save(1, parts, config=program.config, tokenizer=tokenizer, metrics={})
    checkpoints.wait()
    path = tmp_path / "checkpoints" / "1" / "metadata" / "metadata"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 1}))
    restored = checkpoints.restore(1, program.target)
    jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_a_newer_format_is_refused_by_name(run):
    path = run / "checkpoints" / "4" / "metadata" / "metadata"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": FORMAT + 1}))
    with pytest.raises(UserError, match=rf"is of checkpoint format {FORMAT + 1}, and this gptjax reads up to {FORMAT}"):
        loading.load(run)
