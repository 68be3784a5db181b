"""One writer per work directory: who is refused, and when a lock is stale."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gptjax.artifacts import lock as lock_lib
from gptjax.artifacts.lock import Lock, Owner
from gptjax.errors import RunError, UserError

STARTER = """
import sys, time
from pathlib import Path
from gptjax.artifacts.lock import Lock
from gptjax.errors import UserError
sys.stdin.readline()
try:
    lock = Lock.take(Path(sys.argv[1]))
except UserError as error:
    print("refused", error)
else:
    print("holds", flush=True)
    sys.stdin.readline()
    if sys.argv[2:] != ["leave"]:
        lock.release()
"""


def start(workdir, *arguments) -> subprocess.Popen:
    command = [sys.executable, "-c", STARTER, str(workdir), *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def go(process: subprocess.Popen) -> None:
    process.stdin.write("\n")
    process.stdin.flush()


def leave(workdir, **changes) -> None:
    """Writes the lock of another owner."""
    workdir.mkdir(exist_ok=True)
    owner = dataclasses.replace(Owner.new(), token="0123", **changes)
    (workdir / lock_lib.NAME).write_text(json.dumps(dataclasses.asdict(owner)))


def age(workdir, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(workdir / lock_lib.NAME, (then, then))


def test_the_second_is_refused_and_told_who_writes(tmp_path):
    lock = Lock.take(tmp_path / "below" / "run")
    with pytest.raises(
        UserError, match=rf"process {os.getpid()} on \S+ has been writing there since \d{{4}}-\d\d-\d\d \d\d:\d\d"
    ):
        Lock.take(tmp_path / "below" / "run")
    lock.check()
    lock.release()
    assert list(tmp_path.iterdir()) == []  # what was made for nothing is gone, too
    Lock.take(tmp_path / "below" / "run").release()


def test_what_is_in_the_directory_stays(tmp_path):
    lock = Lock.take(tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    lock.release()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("left", [None, "dead", "many"])
def test_of_many_starters_one_wins(left, tmp_path):
    if left:
        leave(tmp_path, pid=2**22 + 1)  # above the largest number of a process
    if left == "many":  # starters that were killed while they took a lock over
        claims = [("0123", "4567"), ("4567", "89ab")]
        for before, token in claims:
            owner = dataclasses.replace(Owner.new(), token=token, pid=2**22 + 1)
            (tmp_path / f".lock.{before}.claim").write_text(json.dumps(dataclasses.asdict(owner)))
    starters = [start(tmp_path) for _ in range(8)]
    try:
        for starter in starters:
            go(starter)
        said = [starter.stdout.readline() for starter in starters]
        assert sorted(line.split()[0] for line in said) == ["holds"] + ["refused"] * 7, said
        winner = starters[said.index("holds\n")]
        assert all(f"process {winner.pid} on" in line for line in said if line != "holds\n")
        assert [path.name for path in tmp_path.iterdir()] == [lock_lib.NAME]
        go(winner)
        assert all(starter.wait(timeout=60) == 0 for starter in starters)
        assert list(tmp_path.iterdir()) == []
    finally:
        for starter in starters:
            starter.kill()
            starter.communicate(timeout=60)


def test_a_killed_owner_is_followed_at_once(tmp_path):
    owner = start(tmp_path, "leave")
    try:
        go(owner)
        assert owner.stdout.readline() == "holds\n"
    finally:
        owner.kill()
        owner.communicate(timeout=60)
    assert (tmp_path / lock_lib.NAME).exists()
    Lock.take(tmp_path).release()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the system does not say when a process started")
def test_a_process_that_has_the_number_of_the_owner_is_not_the_owner(tmp_path):
    leave(tmp_path, started="1")
    Lock.take(tmp_path).release()


@pytest.mark.parametrize("other", [{"machine": "another boot"}, {"machine": "another boot", "host": "n7"}])
def test_of_an_owner_elsewhere_the_last_sign_of_life_decides(other, tmp_path):
    leave(tmp_path, pid=2**22 + 1, **other)
    age(tmp_path, lock_lib.STALE / 2)
    host = other.get("host", Owner.new().host)
    with pytest.raises(UserError, match=rf"on {re.escape(host)} has been writing there .* 120 s after its last sign"):
        Lock.take(tmp_path)
    age(tmp_path, lock_lib.STALE * 2)
    Lock.take(tmp_path).release()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"host": 1}', "\x00\xff"])
def test_a_lock_that_cannot_be_read_is_left_after_a_while(text, tmp_path):
    (tmp_path / lock_lib.NAME).write_text(text)
    with pytest.raises(UserError, match="cannot be read"):
        Lock.take(tmp_path)
    age(tmp_path, lock_lib.STALE * 2)
    Lock.take(tmp_path).release()


def test_an_owner_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_lib, "BEAT", 0.01)
    lock = Lock.take(tmp_path)
    age(tmp_path, 1000)
    deadline = time.monotonic() + 60
    while time.time() - (tmp_path / lock_lib.NAME).stat().st_mtime > 500:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    lock.release()


def test_an_owner_that_slept_too_long_stops_and_leaves_the_lock_of_the_next(tmp_path):
    lock = Lock.take(tmp_path)
    leave(tmp_path, host="n7", machine="another boot")
    with pytest.raises(RunError, match=r"was taken over by process .* on n7"):
        lock.check()
    lock.release()
    assert "n7" in (tmp_path / lock_lib.NAME).read_text()


def test_a_disk_without_links(tmp_path, monkeypatch):
    def link(*names):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    lock = Lock.take(tmp_path)
    with pytest.raises(UserError, match="has been writing there"):
        Lock.take(tmp_path)
    lock.release()


def test_a_path_that_cannot_be_a_directory(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("file", "file/run", "x" * 300, "a\x00b"):
        with pytest.raises(UserError, match="cannot be made"):
            Lock.take(tmp_path / name)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux says that a process has ended")
def test_the_lock_of_a_killed_process_is_free_before_anybody_has_waited_for_it(tmp_path):
    process = start(tmp_path, "leave")
    go(process)
    assert process.stdout.readline() == "holds\n"
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and stays in the table of processes
    Lock.take(tmp_path).release()
    process.communicate()
