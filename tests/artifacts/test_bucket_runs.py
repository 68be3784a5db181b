"""Runs whose work directory is in a bucket; the oracle is the same run on a disk."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from bucket_runs import CONFIG, losses

from gptjax import config as config_lib
from gptjax import train
from gptjax.artifacts import loading, mirror
from gptjax.artifacts.lock import Lock
from gptjax.buckets import Bucket
from gptjax.errors import RunError, UserError
from gptjax.training.run import Run

pytest.importorskip("gcsfs")
REPOSITORY = Path(__file__).parents[2]

# Trains, and is killed before it takes the batch of a step.
KILLED = """
import os, signal, sys
from gptjax import cli
from gptjax.training.run import Run

batch = Run.batch

def killed(self, step, state):
    if step == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return batch(self, step, state)

Run.batch = killed
raise SystemExit(cli.main())
"""


@pytest.fixture(scope="module")
def config_file(tiny_corpus, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(CONFIG.format(folder=tiny_corpus, steps=12, save=4, evaluate=6))
    return path


def read_config(path: Path, **changes) -> config_lib.Config:
    names: dict = {}
    exec(path.read_text(), names)
    config = names["get_config"]()
    config.train.update(changes)
    return config


@pytest.fixture(scope="module")
def undisturbed(config_file, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    train.train(read_config(config_file), workdir)
    return workdir


def assert_equal_runs(url: str, disk: Path) -> None:
    """Bitwise equal losses, and equal parameters in the last checkpoint."""
    assert losses(Bucket(url).read("metrics.jsonl").decode()) == losses((disk / "metrics.jsonl").read_text())
    ours, theirs = (loading.load(place, "last") for place in (url, disk))
    assert ours.step == theirs.step
    for one, other in zip(jax.tree.leaves(ours.params), jax.tree.leaves(theirs.params), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("data", [b"", b"a\r", b"\n", b"\r\n", b"\n\nz", bytes(range(256)) + b"\r"])
def test_objects_hold_what_was_written(store, tmp_path, data):
    """Also for contents that end in line ends, since the multipart request adds its own."""
    bucket = Bucket("gs://gptjax-test/bytes")
    (tmp_path / "file").write_bytes(data)
    bucket.put(["file"], tmp_path)
    bucket.write("object", data)
    assert bucket.read("file") == bucket.read("object") == data
    bucket.get(["file"], tmp_path / "back")
    assert (tmp_path / "back" / "file").read_bytes() == data


@pytest.mark.slow
def test_a_run_that_is_killed_continues_from_the_bucket_on_another_machine(store, config_file, undisturbed):
    url = "gs://gptjax-test/killed"
    command = [sys.executable, "-c", KILLED, "train", f"--config={config_file}", f"--workdir={url}"]
    process = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    bucket = Bucket(url)
    assert bucket.read(".lock") is not None
    assert bucket.read("checkpoints/4/commit_success.txt") is not None
    shutil.rmtree(Path(os.environ["GPTJAX_CACHE"]) / "buckets")  # another machine has no mirror
    mirror._bucket_of.cache_clear()
    train.train(read_config(config_file), url)
    assert bucket.read(".lock") is None
    assert bucket.read("report.html") is not None
    assert_equal_runs(url, undisturbed)


@pytest.mark.slow
def test_a_run_moves_between_a_disk_and_a_bucket_by_copying(store, config_file, undisturbed, tmp_path):
    url, bucket = "gs://gptjax-test/moved", Bucket("gs://gptjax-test/moved")
    first = tmp_path / "first"
    train.train(read_config(config_file, num_steps=12), first)
    names = [path.relative_to(first).as_posix() for path in first.rglob("*") if path.is_file()]
    bucket.put(names, first)
    longer = read_config(config_file, num_steps=16)
    train.train(longer, url, allow_changes=True)  # from the disk to the bucket
    back = tmp_path / "back"
    bucket.get(bucket.list(), back)
    longest = read_config(config_file, num_steps=20)
    train.train(longest, back, allow_changes=True)  # and back
    train.train(longer, first, allow_changes=True)
    assert_equal_runs(url, first)
    train.train(longest, first, allow_changes=True)
    assert losses((back / "metrics.jsonl").read_text()) == losses((first / "metrics.jsonl").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["silent", "failing", "gone"])
def test_a_store_that_is_out_of_order_for_a_while_is_waited_for(store, config_file, undisturbed, kind, monkeypatch):
    out = {"silent": store.running.clear, "failing": lambda: setattr(store, "status", 503), "gone": store.stop}
    back = {"silent": store.running.set, "failing": lambda: setattr(store, "status", 0), "gone": store.start}
    save = Run.save

    def interrupted(self, step, state, line):
        if step == 6:
            out[kind]()
            threading.Timer(4.0, back[kind]).start()
        return save(self, step, state, line)

    monkeypatch.setattr("gptjax.training.run.Run.save", interrupted)
    url = f"gs://gptjax-test/{kind}"
    train.train(read_config(config_file), url)
    assert_equal_runs(url, undisturbed)


@pytest.mark.slow
def test_a_store_that_is_out_of_order_for_too_long_ends_a_run_that_then_continues(
    store, config_file, undisturbed, monkeypatch
):
    """The last step before the outage is saved, and the same command continues from it."""
    monkeypatch.setattr("gptjax.buckets.PATIENCE", 1.0)
    publish = Run.publish

    def interrupted(self):
        if self.checkpoints.steps()[-1:] == [6]:
            self.checkpoints.wait()
            store.stop()
        return publish(self)

    url = "gs://gptjax-test/long"
    with monkeypatch.context() as patched:
        patched.setattr("gptjax.training.run.Run.publish", interrupted)
        with pytest.raises(RunError, match=rf"{url} has not answered for 1 s.*the same command continues"):
            train.train(read_config(config_file), url)
    store.start()
    Bucket(url).remove([".lock"])  # its process is this one, which is there; of one that has ended it is taken over
    train.train(read_config(config_file), url)
    assert_equal_runs(url, undisturbed)


@pytest.mark.slow
def test_what_is_damaged_in_a_bucket_is_set_aside(store, config_file, undisturbed, capsys):
    url, bucket = "gs://gptjax-test/damaged", Bucket("gs://gptjax-test/damaged")
    train.train(read_config(config_file), url)
    name = next(name for name in bucket.list("checkpoints/12/state") if "/d/" in name)
    bucket.write(name, b"damage")
    with pytest.raises(UserError, match=r"gs://gptjax-test/damaged/checkpoints/12 is .*checksum differs"):
        loading.find(f"{url}/checkpoints/12")
    train.train(read_config(config_file), url)
    assert "gs://gptjax-test/damaged/checkpoints/12.damaged; it is ignored" in capsys.readouterr().err
    assert bucket.list("checkpoints/12.damaged/state")
    assert_equal_runs(url, undisturbed)


def test_one_of_two_runs_in_a_bucket_is_refused(store, config_file, tmp_path, monkeypatch):
    url = "gs://gptjax-test/shared"
    ours = Lock.take(mirror.place(url, part="ours"))
    theirs = mirror.place(url, part="theirs")
    with pytest.raises(UserError, match=r"--workdir=gs://gptjax-test/shared: process \d+ on .* has been writing there"):
        Lock.take(theirs)
    ours.check()
    ours.release()
    Lock.take(theirs).release()
    assert Bucket(url).list() == {}


def test_the_lock_of_a_machine_that_is_gone_is_taken_over_once_it_is_old(store, monkeypatch):
    url = "gs://gptjax-test/left"
    gone = Lock.take(mirror.place(url, part="gone"))
    bucket, lock = Bucket(url), store.buckets["gptjax-test"]["left/.lock"]
    elsewhere = json.loads(lock[0]) | {"machine": "elsewhere", "host": "n7"}
    bucket.write(".lock", json.dumps(elsewhere).encode())
    place = mirror.place(url, part="next")
    with pytest.raises(UserError, match=r"the directory is free 120 s after its last sign of life"):
        Lock.take(place)
    content, generation, changed = store.buckets["gptjax-test"]["left/.lock"]
    store.buckets["gptjax-test"]["left/.lock"] = content, generation, changed - 121
    ours = Lock.take(place)
    with pytest.raises(RunError, match=r"gs://gptjax-test/left was taken over by process"):
        gone.check()
    gone.release()
    ours.check()
    ours.release()


def test_of_many_that_create_an_object_at_once_one_does(store):
    bucket = Bucket("gs://gptjax-test/race")
    made = []

    def create(number: int) -> None:
        if bucket.create("one", str(number).encode()):
            made.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [str(number).encode() for number in made] == [bucket.read("one")]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("gs://nowhere/run", r"gs://nowhere/run: there is no such bucket or object.*make the bucket gs://nowhere"),
        ("gs://", r"'gs://' names no bucket"),
        ("s3://bucket/run", r"Orbax cannot write checkpoints to s3://; use gs://"),
        ("nothing://bucket/run", r"Orbax cannot write checkpoints to nothing://"),
        ("gs://gptjax-test/a/../b", r"is not a URL of objects"),
    ],
)
def test_what_is_no_place_for_a_run_is_refused_by_name(store, config_file, url, message):
    with pytest.raises(UserError, match=message):
        train.train(read_config(config_file), url)


def test_a_bucket_that_is_read_only_is_refused_before_anything_is_computed(store, config_file):
    store.read_only = True
    with pytest.raises(UserError, match=r"gs://gptjax-test/locked: there is no permission.*gcloud auth"):
        train.train(read_config(config_file), "gs://gptjax-test/locked")


def test_a_request_is_made_again_until_the_store_answers_and_that_is_told(store, capsys, monkeypatch):
    bucket, calls = Bucket("gs://gptjax-test/patient"), []
    monkeypatch.setattr("gptjax.buckets._PAUSES", (0.0,))

    def request() -> str:
        calls.append(1)
        if len(calls) < 3:
            raise ConnectionError("connection refused")
        return "answer"

    assert bucket._ask(request) == "answer"
    told = capsys.readouterr().err
    assert told.startswith("warning: gs://gptjax-test/patient does not answer: connection refused; waiting, 600 s")
    assert "gs://gptjax-test/patient answers again after 0 s" in told
    calls.clear()
    with pytest.raises(RunError, match=r"has not answered for 0 s: connection refused.*the same command continues"):
        Bucket(bucket.url, patience=0.0)._ask(request)


def test_a_mirror_is_like_its_bucket_and_logs_are_written_whole(store):
    bucket = Bucket("gs://gptjax-test/mirrored")
    contents = {"config.json": b"{}", "checkpoints/3/commit_success.txt": b"", "checkpoints/3/metadata/metadata": b"3"}
    contents |= {"checkpoints/3/state/d/data": b"arrays", "checkpoints/4/metadata/metadata": b"not whole"}
    for name, content in contents.items():
        bucket.write(name, content)
    workdir = mirror.opened(bucket.url)
    there = sorted(p.relative_to(workdir).as_posix() for p in workdir.rglob("[!.]*") if p.is_file())
    assert there == ["checkpoints/3/commit_success.txt", "checkpoints/3/metadata/metadata", "config.json"]
    assert mirror.shown(workdir / "checkpoints" / "3") == "gs://gptjax-test/mirrored/checkpoints/3"
    (workdir / "metrics.jsonl").write_text("{}\n")
    (workdir / "evaluation").mkdir()
    (workdir / "evaluation" / "one.json").write_text("1")
    (workdir / ".partial").write_text("half")
    mirror.push(workdir)
    generation = store.generation
    mirror.push(workdir)
    assert store.generation == generation  # nothing has changed
    assert bucket.read("metrics.jsonl") == b"{}\n"
    assert bucket.read("evaluation/one.json") == b"1"
    assert bucket.read(".partial") is None
    (workdir / "evaluation" / "local.json").write_text("only here")
    bucket.remove(["config.json"])
    mirror.pull(workdir)
    assert not (workdir / "config.json").exists()
    assert not (workdir / "evaluation" / "local.json").exists()
