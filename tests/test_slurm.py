"""A real Slurm cluster of two nodes: one run over two processes. Skips where there is none."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

REPOSITORY = Path(__file__).parent.parent
CONFIG = """
from gptjax.config import get_default

def get_config():
    config = get_default()
    config.tokenizer = "byte"
    config.data.update(source="text:{corpus}/*.txt", split_by="position", validation_fraction=0.1)
    config.model.update(num_layers=1, num_heads=2, embed_dim=16, context_length=16, dropout=0.1)
    config.train.update(num_steps=40, batch_size=4, checkpoint_every=5, keep_checkpoints=1)
    config.evaluation.update(every=20, max_tokens=300, batch_size=4)
    config.logging.update(every=1, samples=0, tensorboard=False)
    return config
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster() -> None:
    """Two idle nodes, or skip. Slurm must answer at once."""
    if not shutil.which("sinfo"):
        pytest.skip("Slurm is not installed")
    try:
        nodes = subprocess.run(
            ["sinfo", "--noheader", "--Node", "--states=idle", "--format=%N"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except subprocess.TimeoutExpired:
        pytest.skip("Slurm does not answer")
    if nodes.returncode or len(set(nodes.stdout.split())) < 2:
        pytest.skip("Slurm has no two idle nodes")


@pytest.fixture(scope="module")
def config_file(tiny_corpus, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(CONFIG.format(corpus=tiny_corpus))
    return path


def train(config_file: Path, workdir: Path, *options: str, nodes: int = 2, devices: int = 1) -> subprocess.Popen:
    """`srun` with one process per node, or a run without Slurm."""
    flags = f"--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={devices}"
    # A step within an allocation would share its nodes; a test is a job of its own.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_J")}
    command = [sys.executable, "-m", "gptjax.train", f"--config={config_file}", f"--workdir={workdir}", *options]
    srun = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--label", "--wait=600"] if nodes > 1 else []
    return subprocess.Popen(
        [*srun, *command],
        env=environment | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen, status: int = 0) -> str:
    _, errors = process.communicate(timeout=240)
    assert process.returncode == status, errors
    return errors


def losses(workdir: Path) -> dict[tuple[str, int], float]:
    with (workdir / "metrics.jsonl").open() as file:
        return {(line["split"], line["step"]): line["loss"] for line in map(json.loads, file)}


def assert_same_losses(workdir: Path, expected: Path) -> None:
    ours, theirs = losses(workdir), losses(expected)
    assert list(ours) == list(theirs)
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-5)


@pytest.fixture(scope="module")
def alone(config_file, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("alone")
    finish(train(config_file, workdir, nodes=1, devices=2))
    return workdir


def test_two_nodes_are_one_run(cluster, config_file, alone, tmp_path):
    finish(train(config_file, tmp_path))
    assert_same_losses(tmp_path, alone)
    assert json.loads((tmp_path / "manifest.json").read_text())["devices"]["processes"] == 2


def test_a_killed_process_ends_the_job_and_one_process_goes_on(cluster, config_file, alone, tmp_path):
    job = train(config_file, tmp_path)
    while job.poll() is None:
        with contextlib.suppress(OSError, ValueError):
            if ("train", 12) in losses(tmp_path):
                break
        time.sleep(0.05)
    os.kill(process_of_node(1, tmp_path), signal.SIGKILL)
    _, errors = job.communicate(timeout=300)  # srun itself would wait for 600 s
    assert job.returncode != 0
    saved = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit())
    (line,) = [line for line in errors.splitlines() if "failed:" in line and line.startswith("0:")]
    assert "process 1 (host " in line and "was killed or crashed" in line
    assert f"the same command continues from step {saved} " in line
    finish(train(config_file, tmp_path, nodes=1, devices=2))
    assert_same_losses(tmp_path, alone)


def process_of_node(number: int, workdir: Path) -> int:
    """The process id of the training task of a node; all nodes are this machine."""
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (directory / "cmdline").read_text().split("\0")
            environment = (directory / "environ").read_text().split("\0")
            if (
                f"--workdir={workdir}" in command
                and "srun" not in command[0]
                and f"SLURM_PROCID={number}" in environment
            ):
                return int(directory.name)
    pytest.skip("the nodes of this cluster are other machines")


def test_a_process_that_never_shows_up_is_named(cluster, config_file, tmp_path):
    train_line = f"exec {sys.executable} -m gptjax.train --config={config_file} --workdir={tmp_path} --join_timeout=5"
    result = subprocess.run(
        ["srun", "-N2", "-n2", "bash", "-c", f"if [ $SLURM_PROCID = 1 ]; then exit 0; fi; {train_line}"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=REPOSITORY,
    )
    assert result.returncode == 1
    assert "failed: 1 of 2 processes did not show up within 5 s: process 1 (host " in result.stderr


def test_a_batch_job_of_the_launcher(cluster, config_file, alone, tmp_path):
    log = tmp_path / "job.log"
    workdir = tmp_path / "run"
    launch = [sys.executable, "-m", "gptjax.launch", "slurm", "--nodes=2", f"--config={config_file}", f"--log={log}"]
    flags = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=1"
    subprocess.run(
        [*launch, f"--workdir={workdir}", "--time=10"],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
    )
    deadline = time.monotonic() + 180
    while "generate: " not in (text := log.read_text() if log.exists() else ""):
        assert time.monotonic() < deadline and "failed:" not in text, text
        time.sleep(0.5)
    assert_same_losses(workdir, alone)


def test_a_job_goes_on_after_its_time(cluster, config_file, tmp_path):
    """Sends by hand the signal that Slurm sends before the time limit of a job, which is a minute at least."""
    log, workdir = tmp_path / "job.log", tmp_path / "run"
    launch = [sys.executable, "-m", "gptjax.launch", "slurm", "--nodes=2", "--requeue", "--time=10", f"--log={log}"]
    flags = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=1"
    longer = ["--config.train.num_steps=600", "--config.train.checkpoint_every=300", "--config.evaluation.every=600"]
    name = f"requeue-{os.getpid()}"
    subprocess.run(
        [*launch, f"--name={name}", f"--config={config_file}", f"--workdir={workdir}", "--", *longer],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
    )
    listed = ["squeue", "--noheader", f"--name={name}", "--format=%i"]
    job = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.strip()
    signalled = moved = False
    deadline = time.monotonic() + 240
    while "generate: " not in (text := log.read_text() if log.exists() else ""):
        assert time.monotonic() < deadline, text
        with contextlib.suppress(OSError, ValueError):
            if not signalled and ("train", 20) in losses(workdir):
                signalled = True
                subprocess.run(["scancel", "--batch", "--signal=USR1", job], check=True)
        if "stopped by SIGUSR1" in text and not moved:  # Slurm itself would let it wait for two minutes
            update = ["scontrol", "update", f"JobId={job}", "StartTime=now+20"]
            moved = subprocess.run(update, capture_output=True).returncode == 0
        time.sleep(0.5)
    assert text.count("continuing at step ") == 1
    with (workdir / "metrics.jsonl").open() as file:
        lines = [line["step"] for line in map(json.loads, file) if line["split"] == "train"]
    assert lines == list(range(1, 601))


def test_a_job_that_begins_again_too_often_ends(cluster, tmp_path, monkeypatch):
    """Requeued by hand, as Slurm does after a node failure, and as the job itself does after its time limit."""
    from gptjax import launch
    from gptjax.launchers import slurm

    monkeypatch.setattr(slurm, "MOST_RESTARTS", 1)
    texts: list[str] = []
    monkeypatch.setattr(slurm, "call", lambda command, text: texts.append(text))
    log, python = tmp_path / "job.log", tmp_path / "python"
    python.write_text("#!/bin/sh\necho life $SLURM_RESTART_COUNT\nexec sleep 300\n")
    python.chmod(0o755)
    words = ["--requeue", "--time=10", f"--log={log}", f"--python={python}", "--config=c.py", f"--workdir={tmp_path}"]
    launch.main(["launch", "slurm", *words])
    submitted = subprocess.run(["sbatch", "--parsable"], input=texts[0], capture_output=True, text=True, check=True)
    job, lives, last = submitted.stdout.strip(), 0, "failed: the job has begun again 2 times, and may 1"
    try:
        deadline = time.monotonic() + 240
        while last not in (text := log.read_text() if log.exists() else ""):
            assert time.monotonic() < deadline, text
            if text.count("life") > lives:
                lives += 1
                subprocess.run(["scontrol", "requeue", job], check=True)
            update = ["scontrol", "update", f"JobId={job}", "StartTime=now"]  # it would wait for two minutes
            subprocess.run(update, capture_output=True)
            time.sleep(0.5)
    finally:
        subprocess.run(["scancel", job], capture_output=True)
    assert lives == 2
