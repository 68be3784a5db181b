"""Sinks beside metrics.jsonl never stop, delay or fail a run."""

import errno
import importlib.util
import os
import subprocess
import sys
import threading
import time
from functools import partial
from types import ModuleType

import pytest

from gptjax.errors import UserError
from gptjax.training import sinks

LINE = {"step": 3, "split": "train", "loss": 0.5, "mfu_convention": "PaLM", "gradient_norm": None}


class Fake:
    """A sink that stores what it is given."""

    def __init__(self):
        self.lines, self.closed = [], False

    def write(self, step, values):
        self.lines.append((step, values))

    def close(self):
        self.closed = True


class Raises(Fake):
    def write(self, step, values):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/runs/a/tensorboard")

    def close(self):
        raise RuntimeError("cannot close")


class Blocks(Fake):
    def write(self, step, values):
        threading.Event().wait()


@pytest.fixture
def no_end(monkeypatch):
    """A stuck sink ends the process at its exit; here it must not end the tests."""
    monkeypatch.setattr(sinks.atexit, "register", lambda function: None)


def test_the_numbers_of_a_line_arrive_in_order():
    fake = Fake()
    several = sinks.Sinks({"fake": lambda: fake})
    for step in range(500):
        several.write(LINE | {"step": step})
    several.close()
    assert fake.lines == [(step, {"train/loss": 0.5}) for step in range(500)]
    assert fake.closed


def test_a_sink_that_raises_is_turned_off_with_one_warning_and_the_others_go_on(capsys):
    fake = Fake()
    several = sinks.Sinks({"bad": Raises, "good": lambda: fake})
    for _ in range(10):
        several.write(LINE)
    several.close()
    warnings = capsys.readouterr().err
    assert warnings.count("warning: bad: ") == 1
    assert "/runs/a/tensorboard: the disk is full" in warnings and "off for the rest of this run" in warnings
    assert len(fake.lines) == 10


def test_a_sink_that_cannot_be_made_is_turned_off(capsys):
    def make():
        raise SystemExit("no account")  # as a library that asks for a login may do

    several = sinks.Sinks({"bad": make})
    several.write(LINE)
    several.close()
    assert "warning: bad: no account; it is off" in capsys.readouterr().err


def test_a_sink_that_blocks_for_ever_loses_lines_and_keeps_nobody(capsys, no_end):
    several = sinks.Sinks({"stuck": Blocks}, capacity=5)
    for step in range(100):
        several.write(LINE | {"step": step})
    several.close(timeout=0.1)
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2
    assert "stuck; from step" in warnings[0] and "has not ended within 0.1 s" in warnings[1]


def test_a_process_with_a_stuck_sink_ends_with_its_status():
    """Also if the sink's library never returns at the exit of the process."""
    program = (
        "import atexit, threading; from gptjax import interrupts; from gptjax.training import sinks\n"
        "sinks._EXIT_SECONDS = 0.1\n"
        "class Stuck:\n"
        "    def __init__(self): atexit.register(threading.Event().wait)\n"
        "    def write(self, step, values): threading.Event().wait()\n"
        f"several = sinks.Sinks({{'stuck': Stuck}}); several.write({LINE!r}); several.close(timeout=1.0)\n"
        "interrupts.ending(7)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 7, done.stderr


def test_trackers_are_asked_for_by_name():
    assert sinks.check("") == []
    with pytest.raises(UserError, match=r"logging\.trackers=comet: comet is not one of wandb, trackio, mlflow"):
        sinks.check("comet")


def test_a_library_that_is_not_installed_is_a_mistake_at_the_start(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="wandb is not installed; pip install wandb"):
        sinks.check("wandb,trackio")


class FakeRun:
    def __init__(self, options):
        self.options, self.logged, self.finished = options, [], False

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


def begin(runs, **options):
    runs.append(FakeRun(options))
    return runs[-1]


@pytest.fixture
def libraries(monkeypatch):
    """Stand-ins for wandb and trackio; yields the runs that were started with each."""
    begun = {"wandb": [], "trackio": []}
    for name in begun:
        module = ModuleType(name)
        module.__spec__ = importlib.util.spec_from_loader(name, loader=None)
        module.init = partial(begin, begun[name])
        module.Settings = dict
        monkeypatch.setitem(sys.modules, name, module)
    for variable in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_RUN_ID", "WANDB_DIR", "TRACKIO_PROJECT"):
        monkeypatch.delenv(variable, raising=False)
    return begun


def track(workdir, step=0):
    made = sinks.makers(workdir, {"seed": 1}, step=step, tensorboard=False, trackers="wandb, trackio")
    several = sinks.Sinks(made)
    several.write(LINE)
    several.close()


def test_trackers_get_the_numbers_and_a_run_that_continues_stays_one(libraries, tmp_path, capsys):
    track(tmp_path)
    track(tmp_path, step=2)
    assert capsys.readouterr().err == ""
    for runs in libraries.values():
        assert [run.logged for run in runs] == [[(3, {"train/loss": 0.5})]] * 2
        assert all(run.finished and run.options["config"] == {"seed": 1} for run in runs)
        assert all(run.options["project"] == "gptjax" and run.options["resume"] == "allow" for run in runs)
    first, second = libraries["wandb"]
    assert first.options["id"] == second.options["id"]
    first, second = libraries["trackio"]
    assert first.options["name"] == second.options["name"]


def test_the_environment_of_the_libraries_counts(libraries, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("WANDB_NAME", "named")
    monkeypatch.setenv("TRACKIO_PROJECT", "ours")
    track(tmp_path)
    assert libraries["wandb"][0].options["project"] == "mine"
    assert "name" not in libraries["wandb"][0].options  # wandb reads it
    assert libraries["trackio"][0].options["project"] == "ours"


def test_mlflow_keeps_one_run_of_a_work_directory_in_its_own_file(tmp_path, monkeypatch, capsys):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    address = (tmp_path / "mlruns").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    for step in (0, 2):
        options = {"step": step, "tensorboard": False, "trackers": "mlflow"}
        made = sinks.makers(tmp_path, {"seed": 1, "model": {"norm": "rms"}}, **options)
        several = sinks.Sinks(made)
        several.write(LINE | {"step": step + 3})
        several.close()
    assert capsys.readouterr().err == ""
    client = mlflow.MlflowClient(address)
    (run,) = client.search_runs([client.get_experiment_by_name("gptjax").experiment_id])
    assert (run.info.status, run.info.run_name) == ("FINISHED", tmp_path.name)
    assert run.data.params == {"seed": "1", "model.norm": "rms"}
    assert [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, "train/loss")] == [
        (3, 0.5),
        (5, 0.5),
    ]


def wandb_records(path) -> list[bytes]:
    """The content of a .wandb file: after 7 bytes, 32 KiB blocks of parts (checksum 4, length 2, kind 1)."""
    data, at, records, parts = path.read_bytes(), 7, [], []
    while at + 7 < len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts.append(data[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):  # the whole, or its last part
            records.append(b"".join(parts))
            parts = []
    return records


def test_weights_and_biases_offline(tmp_path, monkeypatch, capfd):
    """Its own files, as `wandb sync` would send them: the numbers at their steps, one run per work directory."""
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "tracked"))
    (tmp_path / "tracked").mkdir()
    for step in (0, 2):
        made = sinks.makers(tmp_path, {"seed": 1}, step=step, tensorboard=False, trackers="wandb")
        several = sinks.Sinks(made)
        several.write(LINE | {"step": step + 3})
        several.close(timeout=60)
        time.sleep(1.1)  # wandb names a directory by the second
    assert "off for the rest" not in capfd.readouterr().err
    found = [
        wandb_internal_pb2.Record.FromString(record)
        for path in sorted(tmp_path.glob("tracked/wandb/offline-run-*/*.wandb"))
        for record in wandb_records(path)
    ]
    assert {(record.run.run_id, record.run.project) for record in found if record.HasField("run")} == {
        (sinks.run_id(tmp_path), "gptjax")
    }
    told = [(record.history.step.num, item) for record in found for item in record.history.item]
    numbers = [(step, float(item.value_json)) for step, item in told if "train/loss" in (item.key, *item.nested_key)]
    assert numbers == [(3, 0.5), (5, 0.5)]


def test_tensorboard_reads_what_is_written(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    for start in (0, 3):
        sink = sinks.TensorBoard(tmp_path / str(start), start)
        sink.write(start + 1, {"train/loss": 0.5, "train/accuracy": 0.25})
        sink.close()
        (path,) = (tmp_path / str(start)).iterdir()
        data, events = path.read_bytes(), []
        while data:  # a record: length in 8 bytes, a checksum in 4, the data, a checksum in 4
            size = int.from_bytes(data[:8], "little")
            events.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
        assert events[0].file_version == "brain.Event:2"
        assert {value.tag: value.simple_value for value in events[-1].summary.value} == {
            "train/loss": 0.5,
            "train/accuracy": 0.25,
        }
        assert events[-1].step == start + 1
        assert [e.step for e in events if e.HasField("session_log")] == ([start + 1] if start else [])


def test_tensorboard_does_not_bring_torch(tmp_path):
    """torch takes a second to import where it is installed."""
    pytest.importorskip("tensorboardX")
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    program = (
        "import sys; from pathlib import Path; from gptjax.training import sinks\n"
        f"made = sinks.makers(Path({str(tmp_path)!r}), {{}}, step=0, tensorboard=True, trackers='')\n"
        f"several = sinks.Sinks(made); several.write({LINE!r}); several.close()\n"
        "assert 'torch' not in sys.modules"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "tensorboard").iterdir())
