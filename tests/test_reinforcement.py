"""Reinforcement learning as a run: its files, its errors, and that a kill changes nothing."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from gptjax import config as config_lib
from gptjax.artifacts import checkpoints
from gptjax.errors import RunError, UserError
from gptjax.generation import decoding
from gptjax.parallel import mesh as mesh_lib
from gptjax.train import train
from gptjax.training import rollouts
from gptjax.training.program import Program

REPOSITORY = Path(__file__).parent.parent
# Rewards answers with few different characters. The call of the number KILL_CALL ends the run that asks.
REWARD = """
import os, signal
calls = 0

def calm(prompt, completion, reference):
    global calls
    calls += 1
    if calls == int(os.environ.get("KILL_CALL", 0)):
        os.kill(os.getppid(), signal.SIGKILL)
    if "raise" in os.environ.get("REWARD_DOES", "") and calls % 16 == 1:
        raise ValueError("not today")
    return -len(set(completion))
"""
CONFIG = """
from gptjax.config import get_default

def get_config():
    config = get_default()
    config.tokenizer = "byte"
    config.data.update(source="toy:copy#length=2,size=90", validation_fraction=0.2, test_fraction=0.0)
    config.data.split_by = "document"
    config.model.update(num_layers=1, num_heads=2, embed_dim=16, context_length=48)
    config.objective.update(name="reinforcement", reward="{reward}:calm", reward_workers=1, group_size=4)
    config.objective.update(max_new_tokens=4, num_iterations={num_iterations}, kl_weight=0.01)
    config.optimizer.learning_rate = 1e-2
    config.schedule.update(name="constant", warmup=0)
    config.train.update(num_steps={num_steps}, batch_size=16, checkpoint_every=4, keep_checkpoints=1)
    config.evaluation.update(every=6, max_prompts=6)
    config.logging.update(every=1, samples=2, tensorboard=False)
    config.mesh.data = {devices}
    return config
"""


@pytest.fixture
def config_file(tmp_path) -> Path:
    return write(tmp_path)


def write(directory: Path, *, num_iterations: int = 1, num_steps: int = 4, devices: int = 1) -> Path:
    (directory / "reward.py").write_text(REWARD)
    path = directory / "tiny.py"
    values = {"num_iterations": num_iterations, "num_steps": num_steps, "devices": devices}
    path.write_text(CONFIG.format(reward=directory / "reward.py", **values))
    return path


def load(path: Path, **options) -> config_lib.Config:
    spec = importlib.util.spec_from_file_location("tiny", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    for name, value in options.items():
        section, _, option = name.partition("__")
        config[section][option] = value
    config_lib.validate(config)
    return config.lock()


def lines(workdir: Path) -> list[dict]:
    path = workdir / "metrics.jsonl"
    whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
    return [json.loads(line) for line in whole.splitlines()]


TOLD = ("reward", "kl", "entropy", "length", "clip_fraction", "groups_without_signal", "sampler_difference", "loss")


def story(workdir: Path) -> list[list]:
    """All results that do not depend on time."""
    return [[line["split"], line["step"], *(line.get(name) for name in TOLD)] for line in lines(workdir)]


def test_a_run_tells_its_rewards_and_shows_answers(config_file, tmp_path, capsys):
    workdir = tmp_path / "run"
    train(load(config_file), workdir)
    told = lines(workdir)
    trained = [line for line in told if line["split"] == "train"]
    assert [line["step"] for line in trained] == [1, 2, 3, 4]
    for line in trained:
        assert all(isinstance(line[name], float) for name in (*TOLD, "truncated", "reward_failures"))
        assert line["sampler_difference"] < 1e-5 and line["clip_fraction"] == 0
        assert 1 <= line["length"] <= 4 and -4 <= line["reward"] <= 0
        assert abs(line["loss"]) < 1 and line["gradient_norm"] > 0
    assert trained[0]["kl"] == pytest.approx(0, abs=1e-6) and trained[-1]["kl"] > 0
    (validated,) = [line for line in told if line["split"] == "validation"]
    assert -4 <= validated["reward"] <= 0 and 0 < validated["distinct1"] <= 1
    assert "loss" not in validated and "perplexity" not in validated
    samples = [json.loads(line) for line in (workdir / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 2
    assert re.fullmatch(r"<\|im_start\|>user\ncopy \d\d<\|im_end\|>\n<\|im_start\|>assistant\n", samples[0]["prompt"])
    assert samples[0]["reward"] == -len(set(samples[0]["text"])) and len(samples[0]["reference"]) == 2
    shown = capsys.readouterr()
    assert "validation reward " in shown.err and "best validation reward" in shown.out
    assert "Reward" in (workdir / "report.html").read_text()
    assert checkpoints.finished_steps(workdir / "checkpoints") == [4]


def test_nothing_is_compiled_after_the_first_answers(config_file, tmp_path):
    programs = decoding.insert, decoding.decode, decoding.new_state
    train(load(config_file, train__num_steps=1), tmp_path / "one")
    sizes = [program._cache_size() for program in programs]
    train(load(config_file, train__num_steps=5, evaluation__every=2), tmp_path / "five")
    assert [program._cache_size() for program in programs] == sizes


def test_several_processes_are_refused(config_file, tmp_path, monkeypatch):
    monkeypatch.setattr(rollouts, "distributed", SimpleNamespace(current=lambda: SimpleNamespace(size=2)))
    with pytest.raises(UserError, match="runs in one process, and this run has 2; use the devices of one machine"):
        train(load(config_file), tmp_path / "run")


def test_the_best_checkpoint_has_the_highest_reward(config_file, tmp_path):
    workdir = tmp_path / "run"
    train(load(config_file, train__num_steps=6, evaluation__every=2), workdir)
    rewards = {line["step"]: line["reward"] for line in lines(workdir) if line["split"] == "validation"}
    best = max(rewards, key=lambda step: (rewards[step], -step))
    assert best in checkpoints.finished_steps(workdir / "checkpoints")


def test_failed_rewards_are_skipped_and_counted_or_end_the_run(config_file, tmp_path, monkeypatch):
    monkeypatch.setenv("REWARD_DOES", "raise")
    with pytest.raises(RunError, match=r"calm raised ValueError: not today for the question copy:\d+; .*=skip"):
        train(load(config_file), tmp_path / "fatal")
    workdir = tmp_path / "skipped"
    train(load(config_file, objective__reward_errors="skip"), workdir)
    first = lines(workdir)[0]
    assert first["reward_failures"] == 1
    assert first["groups_without_signal"] >= 0.25
    assert np.isfinite(first["loss"]) and -4 <= first["reward"] <= 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train__batch_size": 18}, r"batch_size 18 is not divisible by objective\.group_size 4"),
        (
            {"objective__max_new_tokens": 48},
            r"max_new_tokens 48 leaves no room for a question in model\.context_length",
        ),
        ({"model__dropout": 0.1}, r"model\.dropout is 0\.1 with objective\.name=reinforcement"),
        ({"objective__label_smoothing": 0.1}, r"label_smoothing is 0\.1 with objective\.name=reinforcement"),
        ({"data__word_swap": 0.1}, r"data\.word_swap is 0\.1 with"),
        ({"objective__max_new_tokens": 40}, r"no question of \w+ has at most 8 tokens.*raise model\.context_length"),
        ({"data__source": "toy:quicksort"}, "unknown toy task 'toy:quicksort'"),
        ({"objective__reward": "exact"}, "'exact' is not a reward; choose from"),
        ({"objective__reward": "none.py:f"}, "none.py is not a file"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_before_the_first_step(config_file, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        train(load(config_file, **options), tmp_path / "run")


def test_texts_without_answers_are_refused(config_file, tiny_corpus, tmp_path):
    config = load(config_file, data__source=f"text:{tiny_corpus}/*.txt")
    with pytest.raises(UserError, match="texts without answers; reinforcement needs dialogues"):
        train(config, tmp_path / "run")


def test_without_held_out_questions_nothing_is_validated(config_file, tmp_path, capsys):
    workdir = tmp_path / "run"
    train(load(config_file, data__validation_fraction=0.0, train__num_steps=1), workdir)
    assert [line["split"] for line in lines(workdir)] == ["train"]
    assert "nothing was validated" in capsys.readouterr().out


def test_steps_are_rounded_up_to_whole_rollouts(config_file):
    config = load(config_file, objective__num_iterations=3, train__num_steps=10)
    resolved = config_lib.resolve(config, 259, 100.0)
    assert (resolved.train.num_steps, resolved.train.checkpoint_every, resolved.evaluation.every) == (12, 6, 6)


# ---- Kills ------------------------------------------------------------------------------------------------------


KILLER = """
import os, signal, sys

operation, place = os.environ["KILL_AT"].split()

def kill(event, arguments):
    if event.endswith(operation) and place in str(arguments):
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(kill)
"""


def start(path: Path, workdir: Path, **environment: str) -> subprocess.Popen:
    inherited = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    inherited["XLA_FLAGS"] = " ".join(re.findall(r"--xla_cpu_max_isa=\S+", os.environ["XLA_FLAGS"]))
    command = [sys.executable, "-m", "gptjax.train", f"--config={path}", f"--workdir={workdir}"]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=REPOSITORY, env=inherited | environment, **pipes)


def finish(process: subprocess.Popen, *, status: int = 0) -> str:
    _, errors = process.communicate(timeout=600)
    assert process.returncode == status, errors
    return errors


def final_params(workdir: Path) -> list[np.ndarray]:
    import jax

    config = config_lib.from_json((workdir / "config.json").read_text())
    program = Program.of(config, mesh_lib.make_mesh(config.mesh))
    store = checkpoints.Checkpoints(workdir)
    state = store.restore(store.steps()[-1], program.target)
    store.close()
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


@pytest.mark.slow
@pytest.mark.parametrize("num_iterations", [1, 2])
def test_killed_in_any_phase_it_continues_bitwise(tmp_path, num_iterations):
    path = write(tmp_path, num_iterations=num_iterations, num_steps=48, devices=2)
    undisturbed, workdir = tmp_path / "undisturbed", tmp_path / "killed"
    finish(start(path, undisturbed))
    expected = story(undisturbed)
    assert len(expected) == 48 + 8

    def saved() -> int:
        return max(checkpoints.finished_steps(workdir / "checkpoints"), default=0)

    def started_until_saved() -> subprocess.Popen:
        before, process = saved(), start(path, workdir)
        while process.poll() is None and saved() == before:
            time.sleep(0.001)
        return process

    # While answers are rewarded: the first ones, and the second.
    for call in (5, 30):
        finish(start(path, workdir, KILL_CALL=str(call)), status=-signal.SIGKILL)
    # In the middle of a save.
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(KILLER)
    at = {"PYTHONPATH": os.pathsep.join([str(site), str(REPOSITORY)]), "KILL_AT": "mkdir /checkpoints/4."}
    finish(start(path, workdir, **at), status=-signal.SIGKILL)
    assert saved() == 0
    # Wherever it is when a checkpoint appears.
    process = started_until_saved()
    process.kill()
    finish(process, status=-signal.SIGKILL)
    # By a signal, which saves between two sets of answers.
    process = started_until_saved()
    process.terminate()
    assert "stopped by SIGTERM" in finish(process, status=1)
    assert saved() % num_iterations == 0

    finish(start(path, workdir))
    assert story(workdir) == expected
    for ours, theirs in zip(final_params(workdir), final_params(undisturbed), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    if num_iterations == 2:
        assert any(line[1] % 2 == 0 and line[0] == "train" and line[6] >= 0 for line in expected)
