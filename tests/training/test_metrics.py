import json
import math
import os
import subprocess
import sys

import pytest

from gptjax.training.metrics import MetricsLog, history, read


def write(workdir, steps, *, step=0, **values):
    log = MetricsLog(workdir, step=step)
    for number in steps:
        log.write({"step": number, "split": "train", "loss": number / 10} | values)
    log.close()


def steps_in(workdir) -> list[int]:
    return [line["step"] for line in read(workdir / "metrics.jsonl")]


def test_what_is_written_is_read(tmp_path):
    write(tmp_path, [1, 2], note="Übung", tokens_seen=2**40)
    assert read(tmp_path / "metrics.jsonl") == [
        {"step": n, "split": "train", "loss": n / 10, "note": "Übung", "tokens_seen": 2**40} for n in (1, 2)
    ]


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
    log = MetricsLog(tmp_path)
    log.write({"step": 1, "split": "train", "loss": 1.5})
    assert steps_in(tmp_path) == [1]
    log.close()


@pytest.mark.parametrize(("start", "expected"), [(20, [10, 20, 25]), (15, [10, 20]), (0, [5])])
def test_a_run_that_continues_drops_what_it_will_tell_again(tmp_path, start, expected):
    write(tmp_path, [10, 20, 30])
    write(tmp_path, [start + 5], step=start)
    assert steps_in(tmp_path) == expected


def test_a_line_cut_short_by_a_kill_is_left_out_and_not_continued(tmp_path):
    write(tmp_path, [10, 20])
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 30, "spl')
    assert steps_in(tmp_path) == [10, 20]
    write(tmp_path, [30], step=20)
    assert steps_in(tmp_path) == [10, 20, 30]
    assert len(path.read_text().splitlines()) == 3


def test_numbers_that_json_does_not_know_become_null(tmp_path):
    log = MetricsLog(tmp_path)
    log.write({"step": 1, "split": "train", "loss": math.nan, "gradient_norm": math.inf, "accuracy": 0.5})
    log.close()
    (text,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    line = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert line == {"step": 1, "split": "train", "loss": None, "gradient_norm": None, "accuracy": 0.5}


def test_the_past_of_a_run_in_short(tmp_path):
    assert history_of(tmp_path, []) == {"lowest": None, "monitored": [], "seconds": {}}
    lines = [
        {"step": 1, "split": "train", "loss": 3.0, "seconds/step": 1.0},
        {"step": 2, "split": "train", "loss": math.nan, "seconds/step": 2.0},
        {"step": 2, "split": "validation", "loss": 4.0, "seconds/step": 2.5, "accuracy": 0.5},
    ]
    assert history_of(tmp_path, lines) == {
        "lowest": 3.0,
        "monitored": [4.0],
        "seconds": {"step": 2.5},
    }


def history_of(workdir, lines) -> dict:
    log = MetricsLog(workdir)
    for line in lines:
        log.write(line)
    log.close()
    return history(log.path)


def test_of_several_processes_only_one_writes(tmp_path):
    write(tmp_path, [1, 2])
    other = MetricsLog(tmp_path, enabled=False)
    other.write({"step": 3, "split": "train", "loss": 0.5})
    other.close()
    assert steps_in(tmp_path) == [1, 2]


def test_tensorboard_does_not_bring_torch(tmp_path):
    """Which takes a second to import, where it is installed."""
    pytest.importorskip("tensorboardX")
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    program = (
        "import sys; from pathlib import Path; from gptjax.training.metrics import MetricsLog\n"
        f"log = MetricsLog(Path({str(tmp_path)!r}), step=0, tensorboard=True)\n"
        "log.write({'step': 1, 'split': 'train', 'loss': 1.0}); log.close()\n"
        "assert 'torch' not in sys.modules"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "tensorboard").iterdir())
