import json
import math

import pytest

from gptjax.training.metrics import MetricsLog, read


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
