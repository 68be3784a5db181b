"""tools/torture: a short run, and that it detects planted faults."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
sys.path.insert(0, str(REPOSITORY))

from tools.torture import compare, judge  # noqa: E402
from tools.torture.hook.sitecustomize import RECORD  # noqa: E402

WRITES = """
import os
with open("first", "w") as file:
    file.write("1")
os.rename("first", "second")
os.mkdir("folder")
open("/dev/null", "w").close()
with open("folder/third", "w") as file:
    file.write("3")
    os.fsync(file.fileno())
os.remove("folder/third")
"""


def torture(tmp_path: Path, *options: str) -> dict:
    """Runs the tool and returns its results. Fails with its output if a case did not end as required."""
    output = tmp_path / "torture.json"
    command = [sys.executable, "-m", "tools.torture", f"--scratch={tmp_path}", f"--output={output}", *options]
    if programs := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        command.append(f"--programs={programs}")
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=3600)
    assert result.returncode == 0, result.stderr + result.stdout
    return json.loads(output.read_text())


@pytest.mark.slow
def test_disturbed_stages_end_like_undisturbed_ones(tmp_path):
    cases = {
        "train": "kill:1 disk:1",
    }
    names = [f"{stage}:{case}" for stage, which in cases.items() for case in which.split()]
    found = torture(tmp_path, f"--only={','.join(names)}")
    tried = {f"{case['stage']}:{case['kind']}:{case['seed']}" for case in found["cases"]}
    assert {name for name in names if ":disk:" not in name or not found["notes"]} == tried


def run_hooked(directory: Path, **environment: str) -> tuple[int, list[str]]:
    """The status of a process that writes, and the operations that were counted."""
    env = os.environ | {"PYTHONPATH": str(REPOSITORY / "tools/torture/hook"), "TORTURE_ROOT": f"{directory}/"}
    env |= {"TORTURE_TALLY": str(directory.with_suffix(".tally"))} | environment
    result = subprocess.run([sys.executable, "-c", WRITES], cwd=directory, env=env, start_new_session=True, timeout=60)
    text = directory.with_suffix(".tally").read_text()
    return result.returncode, [text[i : i + RECORD].strip() for i in range(0, len(text), RECORD)]


def test_operations_are_counted_and_killed_before(tmp_path):
    directory = (tmp_path / "whole").resolve()
    directory.mkdir()
    operations = ["open first", "os.rename second", "os.mkdir folder", "open folder/third", "os.fsync folder/third"]
    operations.append("os.remove folder/third")
    assert run_hooked(directory) == (0, operations)

    for number, there in ((1, []), (2, ["first"]), (4, ["folder", "second"])):
        directory = (tmp_path / str(number)).resolve()
        directory.mkdir()
        assert run_hooked(directory, TORTURE_AT=str(number)) == (-signal.SIGKILL, operations[:number])
        assert sorted(path.name for path in directory.iterdir()) == there


class Said:
    """A command that has printed something."""

    argv = ("train",)

    def __init__(self, *lines: str):
        self.lines = lines

    def errors(self) -> str:
        return "".join(f"{line}\n" for line in self.lines)

    def last_line(self) -> str:
        return self.lines[-1] if self.lines else ""


@pytest.mark.parametrize(
    ("status", "lines", "wrong"),
    [
        (0, [], None),
        (1, ["failed: /x/y: the disk is full"], None),
        (-9, [], "status -9"),
        (1, [], "not a sentence"),
        (1, ["failed: 'NoneType' object is not iterable"], "not a sentence"),
        (1, ["failed: KeyError: this is a bug in gptjax; please report the lines above"], "this is a bug"),
        (0, ["report.html could not be written: [Errno 28] No space left on device"], "Errno"),
        (1, ["failed: " + "x" * 10_000], "10008 characters"),
        (
            1,
            ["Traceback (most recent call last):", f'  File "{REPOSITORY}/gptjax/train.py", line 1', "failed: oh"],
            "traceback",
        ),
    ],
)
def test_ends_that_are_wrong(status, lines, wrong):
    if wrong is None:
        judge.ended(Said(*lines), status, {0, 1})
    else:
        with pytest.raises(judge.Wrong, match=wrong):
            judge.ended(Said(*lines), status, {0, 1})


def test_a_full_disk_is_told_with_path_space_and_what_to_do():
    told = "failed: /disk/run/state: the disk is full (0.0 of 1 MiB free). Make room; the same command then goes on"
    judge.tells_of_the_disk(Said(told), "/disk")
    for lacking in ("/disk", "MiB", "Make room; the same command then goes on"):
        with pytest.raises(judge.Wrong):
            judge.tells_of_the_disk(Said(told.replace(lacking, "")), "/disk")


def test_a_difference_of_one_bit_or_one_line_shows(tmp_path):
    run, other = tmp_path / "a" / "run", tmp_path / "b" / "run"
    for directory, wall_time in ((run, 1.5), (other, 9.25)):
        directory.mkdir(parents=True)
        (directory / "config.json").write_text(json.dumps({"source": f"{directory.parent}/x"}))
        lines = [{"step": 1, "split": "train", "loss": 2.0, "wall_time_s": wall_time, "seconds/step": wall_time}]
        (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    expected = compare.run(run, run.parent)
    assert compare.difference(expected, compare.run(other, other.parent)) == ""
    text = (other / "metrics.jsonl").read_text()
    (other / "metrics.jsonl").write_text(text.replace("2.0", "2.0000000000000004"))
    assert compare.difference(expected, compare.run(other, other.parent)).startswith("metrics.jsonl is")
    (other / "metrics.jsonl").write_text(text + text)
    assert compare.difference(expected, compare.run(other, other.parent)).startswith("metrics.jsonl is")


def test_what_is_left_behind(tmp_path):
    for name in (
        "out/whole.json",
        "out/.whole.json.1f.77@here.partial",
        "out/run/5.orbax-checkpoint-tmp",
        "cache/store-0123abcd.lock",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    left = compare.left_behind(tmp_path, {"cache/store-N.lock"})
    assert left == ["out/.whole.json.1f.77@here.partial", "out/run/5.orbax-checkpoint-tmp"]
