"""A work directory on a really full disk: a small file system in memory, if this test may mount one."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent


def mount(place: Path, *options: str) -> bool:
    place.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(place)]
    try:
        return subprocess.run(command, capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


@pytest.fixture
def disk(tmp_path):
    """Mounts a file system of a given size at a place, or skips the test."""
    mounted = []

    def make(place: Path, size: str) -> Path:
        if not mount(place, f"size={size}"):
            pytest.skip("this process may not mount a file system")
        mounted.append(place)
        return place

    yield make
    for place in reversed(mounted):
        subprocess.run(["umount", "-l", str(place)], timeout=60)


def train(workdir: Path, corpus: Path) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["XLA_FLAGS"] = " ".join(re.findall(r"--xla_cpu_max_isa=\S+", os.environ["XLA_FLAGS"]))
    options = (
        f"--workdir={workdir}",
        "--config=configs/quickstart.py:runlocal",
        f"--config.data.source=text:{corpus}/*.txt",
        "--config.logging.every=1",
        "--config.train.checkpoint_every=5",
    )
    command = [sys.executable, "-m", "gptjax.train", *options]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)


def losses(workdir: Path) -> list[tuple[int, str, float]]:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["split"], line["loss"]) for line in lines]


@pytest.fixture(scope="module")
def undisturbed(tiny_corpus, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    done = train(workdir, tiny_corpus)
    assert done.returncode == 0, done.stderr
    return workdir


SIZES = [
    "600k",
    *(pytest.param(size, marks=pytest.mark.slow) for size in ("12k", "200k", "1000k")),
]  # from the set-up to a second save


@pytest.mark.parametrize("size", SIZES)
def test_a_run_ends_with_the_reason_and_goes_on_when_there_is_room(size, tiny_corpus, disk, undisturbed, tmp_path):
    place = disk(tmp_path / "disk", size)
    failed = train(place / "run", tiny_corpus)
    last = failed.stderr.splitlines()[-1]
    assert failed.returncode == 1, failed.stderr
    assert re.match(rf"failed: {place}/run.*: the disk is full \(\d.* MiB free\)\. Make room; the same command", last)
    assert "Traceback" not in failed.stderr and len(last) < 600
    assert mount(place, "remount", "size=64m")
    done = train(place / "run", tiny_corpus)
    assert done.returncode == 0, done.stderr
    assert losses(place / "run") == losses(undisturbed)


def test_a_full_tensorboard_is_warned_of_and_nothing_else(tiny_corpus, disk, undisturbed, tmp_path):
    pytest.importorskip("tensorboardX")
    disk(tmp_path / "run" / "tensorboard", "8k")
    done = train(tmp_path / "run", tiny_corpus)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("warning: TensorBoard: ") == 1
    assert f"{tmp_path}/run/tensorboard: the disk is full" in done.stderr
    assert losses(tmp_path / "run") == losses(undisturbed)
