"""A run that is killed, stopped or repeated gives the same results as an undisturbed one."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from gptjax import config as config_lib
from gptjax.artifacts import checkpoints, loading
from gptjax.parallel import mesh as mesh_lib
from gptjax.training.program import Program

REPOSITORY = Path(__file__).parent.parent
NUM_STEPS = 60
CONFIG = """
from gptjax.config import get_default

def get_config():
    config = get_default()
    config.tokenizer = "byte"
    config.data.update(source="text:{corpus}/*.txt", split_by="position", validation_fraction=0.1)
    config.model.update(num_layers=2, num_heads=2, embed_dim=16, context_length=16, dropout=0.1)
    config.schedule.update(name="wsd", warmup=4, decay=20)
    config.train.update(num_steps={num_steps}, batch_size=4, ema_decay=0.9, early_stopping_patience=50)
    config.train.update(checkpoint_every=15, keep_checkpoints=1)
    config.evaluation.update(every=10, max_tokens=500)
    config.logging.update(every=1, samples=0, tensorboard=False)
    config.mesh.data = 2
    return config
"""

# Put into the training process as sitecustomize: kills it at the first file operation whose name contains the
# operation and whose path contains the place.
KILLER = """
import os, signal, sys

operation, place = os.environ["KILL_AT"].split()

def kill(event, arguments):
    if event.endswith(operation) and place in str(arguments):
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(kill)
"""


@pytest.fixture(scope="module")
def config_file(tiny_corpus, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(CONFIG.format(corpus=tiny_corpus, num_steps=NUM_STEPS))
    return path


@pytest.fixture(scope="module")
def undisturbed(config_file, tmp_path_factory) -> Path:
    """The work directory of a run that nobody stopped."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    finish(start(config_file, workdir))
    return workdir


def start(config_file: Path, workdir: Path, *options: str, **environment: str) -> subprocess.Popen:
    inherited = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    inherited["XLA_FLAGS"] = " ".join(re.findall(r"--xla_cpu_max_isa=\S+", os.environ["XLA_FLAGS"]))
    command = [
        sys.executable,
        "-m",
        "gptjax.train",
        f"--config={config_file}",
        f"--workdir={workdir}",
        *options,
    ]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=REPOSITORY, env=inherited | environment, **pipes)


def finish(process: subprocess.Popen, *, status: int = 0) -> str:
    """Waits for the end of a run; returns what it wrote to stderr."""
    _, errors = process.communicate(timeout=300)
    assert process.returncode == status, errors
    return errors


def wait_for_step(process: subprocess.Popen, workdir: Path, step: int) -> None:
    """Returns as soon as metrics.jsonl has a line of `step`."""
    while process.poll() is None:
        if any(line["step"] >= step for line in lines(workdir)):
            return
        time.sleep(0.001)
    raise AssertionError(f"the run ended before step {step}: {process.communicate()[1]}")


def lines(workdir: Path) -> list[dict]:
    path = workdir / "metrics.jsonl"
    whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
    return [json.loads(line) for line in whole.splitlines()]


def losses(workdir: Path) -> list[tuple[str, int, float]]:
    return [(line["split"], line["step"], line["loss"]) for line in lines(workdir)]


def final_state(workdir: Path) -> list[np.ndarray]:
    """Every array of the last checkpoint: parameters, their average, optimizer state."""
    config = config_lib.from_json((workdir / "config.json").read_text())
    program = Program.of(config, mesh_lib.make_mesh(config.mesh))
    store = checkpoints.Checkpoints(workdir)
    state = store.restore(store.steps()[-1], program.target)
    store.close()
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def assert_same_story(workdir: Path, undisturbed: Path) -> None:
    """Bitwise equal losses, each step logged once, and a bitwise equal final state."""
    assert losses(workdir) == losses(undisturbed)
    for ours, theirs in zip(final_state(workdir), final_state(undisturbed), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_run_tells_every_step_and_evaluation_once(undisturbed):
    steps = {split: [s for name, s, _ in losses(undisturbed) if name == split] for split in ("train", "validation")}
    assert steps == {"train": list(range(1, NUM_STEPS + 1)), "validation": list(range(10, NUM_STEPS + 1, 10))}


def test_repeated_run_has_the_same_losses(config_file, undisturbed, tmp_path):
    finish(start(config_file, tmp_path))
    assert_same_story(tmp_path, undisturbed)


def test_killed_at_any_moment_it_continues_as_if_nothing_happened(config_file, undisturbed, tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(KILLER)
    workdir = tmp_path / "run"

    def saved() -> list[int]:
        return checkpoints.finished_steps(workdir / "checkpoints")

    def killed_while(operation: str, place: str) -> None:
        killed = start(config_file, workdir, PYTHONPATH=str(site), KILL_AT=f"{operation} {place}")
        finish(killed, status=-signal.SIGKILL)

    # Between two steps, before there is a checkpoint.
    process = start(config_file, workdir)
    wait_for_step(process, workdir, 3)
    process.kill()
    finish(process, status=-signal.SIGKILL)

    # In the middle of a save: its directory was just made; everything is written but not yet in its place.
    killed_while("mkdir", "/checkpoints/10.")
    assert saved() == []
    killed_while("rename", "/checkpoints/20'")
    assert saved()[-1] in (10, 15)  # 15 where the best at 10 had been replaced by it

    # While an old checkpoint is removed, of which half is left.
    killed_while("rmdir", "'state'")
    newest = saved()[-1]
    assert newest >= 15

    # Just after a save.
    process = start(config_file, workdir)
    while not (newer := [step for step in saved() if step > newest]) and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    finish(process, status=-signal.SIGKILL)
    assert newer[-1] < NUM_STEPS

    finish(start(config_file, workdir))
    assert_same_story(workdir, undisturbed)


@pytest.mark.slow
def test_stopped_by_a_signal_it_says_where_it_saved_and_continues(config_file, undisturbed, tmp_path):
    for number, step in ((signal.SIGTERM, 5), (signal.SIGINT, 25)):
        process = start(config_file, tmp_path)
        wait_for_step(process, tmp_path, step)
        process.send_signal(number)
        message = finish(process, status=1).strip().splitlines()[-1]
        saved = loading.find(tmp_path, "last")
        assert int(saved.name) >= step
        assert message == (
            f"failed: stopped by {number.name} at step {saved.name}; saved in {saved}. The same command continues"
        )
    finish(start(config_file, tmp_path))
    assert_same_story(tmp_path, undisturbed)


@pytest.mark.slow
def test_continued_on_another_number_of_devices(config_file, undisturbed, tmp_path):
    process = start(config_file, tmp_path)
    wait_for_step(process, tmp_path, 25)
    process.terminate()
    finish(process, status=1)
    finish(start(config_file, tmp_path, "--config.mesh.data=1"))
    ours, theirs = losses(tmp_path), losses(undisturbed)
    assert [key for *key, _ in ours] == [key for *key, _ in theirs]
    np.testing.assert_allclose([x[-1] for x in ours], [x[-1] for x in theirs], rtol=1e-5)


@pytest.mark.slow
def test_early_stopping_keeps_the_best_and_stays_stopped(config_file, tmp_path):
    # A learning rate of zero: the first evaluation stays the best.
    options = ["--config.optimizer.learning_rate=0.0", "--config.train.early_stopping_patience=2"]
    process = start(config_file, tmp_path, *options)
    wait_for_step(process, tmp_path, 12)
    process.terminate()  # the counter and the best checkpoint outlive a stop
    finish(process, status=1)
    for _ in range(2):
        finish(start(config_file, tmp_path, *options))
        validated = [step for split, step, _ in losses(tmp_path) if split == "validation"]
        assert validated == [10, 20, 30]
        assert checkpoints.finished_steps(tmp_path / "checkpoints") == [10, 30]
        assert loading.find(tmp_path, "best").name == "10"


@pytest.mark.parametrize("logging_every", [pytest.param(1, marks=pytest.mark.slow), 100])
def test_diverged_run_ends_with_advice_and_saves_nothing_that_is_not_finite(config_file, tmp_path, logging_every):
    options = ["--config.optimizer.learning_rate=1e9", "--config.train.checkpoint_every=1"]
    process = start(config_file, tmp_path, *options, f"--config.logging.every={logging_every}")
    errors = finish(process, status=1)
    assert "Traceback" not in errors
    message = errors.strip().splitlines()[-1]
    saved = checkpoints.finished_steps(tmp_path / "checkpoints")
    assert message.startswith("failed: the ")
    assert f"Try a lower --config.optimizer.learning_rate. Checkpoints: {saved} in" in message
    assert all(np.isfinite(leaf).all() for leaf in final_state(tmp_path))
