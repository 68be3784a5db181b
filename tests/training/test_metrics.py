import errno
import json
import math
import os

import pytest

from gptjax.training.metrics import MetricsLog, history, read


def write(workdir, steps, *, step=0, **values):
    log = MetricsLog(workdir, step=step)
    for number in steps:
        log.write({"step": number, "split": "train", "loss": number / 10} | values)


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
    return history(log.path)


def test_of_several_processes_only_one_writes(tmp_path):
    write(tmp_path, [1, 2])
    other = MetricsLog(tmp_path, enabled=False)
    other.write({"step": 3, "split": "train", "loss": 0.5})
    assert steps_in(tmp_path) == [1, 2]


def test_what_is_damaged_is_left_out_with_a_word(tmp_path, capsys):
    write(tmp_path, [10, 20])
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\x93NUMPY\x00\xff\n[]\nnull\n" + path.read_bytes() + b'{"step": "x"}\n{"split": "train"}\n{"ste')
    assert steps_in(tmp_path) == [10, 20]
    assert history(path)["lowest"] == 1.0
    write(tmp_path, [30], step=20)
    assert steps_in(tmp_path) == [10, 20, 30]
    assert "metrics.jsonl: 5 damaged lines are dropped" in capsys.readouterr().err


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_a_line_that_a_disk_takes_in_part_is_taken_back(tmp_path, monkeypatch, code):
    log = MetricsLog(tmp_path)
    log.write({"step": 1, "split": "train", "loss": 1.5})
    opened = type(log.path).open

    def full(self, *arguments, **options):
        file = opened(self, *arguments, **options)
        return Full(file, code) if self == log.path else file

    with monkeypatch.context() as patch:
        patch.setattr(type(log.path), "open", full)
        with pytest.raises(OSError, match=r"metrics\.jsonl"):
            log.write({"step": 2, "split": "train", "loss": 1.25})
    assert log.path.read_text() == '{"step": 1, "split": "train", "loss": 1.5}\n'
    log.write({"step": 2, "split": "train", "loss": 1.25})
    assert steps_in(tmp_path) == [1, 2]


class Full:
    """A file of a disk that takes five bytes more."""

    def __init__(self, file, code):
        self.file, self.code, self.room = file, code, 5

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, data):
        if not self.room:
            raise OSError(self.code, os.strerror(self.code))
        written, self.room = self.file.write(data[: self.room]), 0
        return written

    def __getattr__(self, name):
        return getattr(self.file, name)
