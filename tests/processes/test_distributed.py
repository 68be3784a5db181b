"""Processes of a run: how they meet, agree and end, without JAX; and training on two of them."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest

from gptjax.config import MESH_AXES
from gptjax.errors import RunError
from gptjax.parallel import partition
from gptjax.processes import distributed
from gptjax.processes.cluster import Cluster
from gptjax.processes.rollcall import roll_call

# A process of a group that runs the code of its first argument, with `group` and `index`.
MEMBER = """
import os, signal, sys, time
from gptjax.errors import RunError, UserError
from gptjax.processes import distributed
from gptjax.processes.cluster import Cluster
from gptjax.processes.rollcall import roll_call

code, address, size, index, timeout = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6])
cluster = Cluster(address, index, tuple(f"machine-{i}" for i in range(size)))
describe = lambda error: (2 if isinstance(error, UserError) else 1, f"{type(error).__name__}: {error}")
try:
    group = distributed._Members(cluster, roll_call(cluster, timeout))
except (RunError, UserError) as error:
    print(error, file=sys.stderr)
    raise SystemExit(1)
group.advice = lambda: "continue from step 7"
try:
    exec(code)
    group.gather()
    group._finished = True
    time.sleep(0.2)
except BaseException as error:
    group.fail(error, describe)
"""


def free_port() -> int:
    """A port P such that P + 1 is free as well."""
    while True:
        with contextlib.suppress(OSError), socket.socket() as first, socket.socket() as second:
            first.bind(("", 0))
            port = first.getsockname()[1]
            second.bind(("", port + 1))
            return port


def start(code: str, size: int, indices, *, timeout: int = 120) -> list[subprocess.Popen]:
    address = f"localhost:{free_port()}"
    return [
        subprocess.Popen(
            [sys.executable, "-c", MEMBER, code, address, str(size), str(index), str(timeout)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in indices
    ]


def finish(processes, *, timeout: int = 300) -> list[tuple[int, str, str]]:
    """(status, output, last line of the errors) of each."""
    results = []
    for process in processes:
        output, errors = process.communicate(timeout=timeout)
        results.append((process.returncode, output, (errors.strip().splitlines() or [""])[-1]))
    return results


def test_one_process_agrees_with_itself():
    group = distributed.Group()
    assert group.gather(5) == [5]
    assert group.first(lambda: "x") == "x"
    with group.first_goes_first():
        group.same("config", {"a": 1})
    assert (group.stops_at(3, ""), group.stops_at(4, "SIGTERM")) == ("", "SIGTERM")


def test_all_know_what_each_gave_and_the_first_goes_first():
    code = """
for round in range(50):
    assert group.gather([index, round]) == [[i, round] for i in range(3)]
assert group.first(lambda: f"of {index}") == "of 0"
time.sleep(0.3 * (index == 0))
with group.first_goes_first():
    print(time.monotonic())
"""
    results = finish(start(code, 3, range(3)))
    assert [status for status, *_ in results] == [0, 0, 0], results
    first, *others = (float(output) for _, output, _ in results)
    assert first <= min(others)


def test_a_process_that_never_shows_up_is_named():
    for error in failed_roll_call(4, [0, 2]):
        assert isinstance(error, RunError)
        assert "2 of 4 processes did not show up within 2 s: process 1 (host machine-1), process 3" in str(error)


def test_a_first_process_that_never_shows_up_is_named():
    ((status, _, line),) = finish(start("", 2, [1], timeout=1))
    assert status == 1 and line.startswith("process 0 did not answer at localhost:")


@pytest.mark.parametrize(
    ("indices", "said"), [([0, 1, 1], "joined as number 1 of 3"), ([0, 0], "cannot listen on port")]
)
def test_two_processes_with_one_number(indices, said):
    assert any(said in str(error) for error in failed_roll_call(3, indices))


def failed_roll_call(size: int, indices: Sequence[int], timeout: float = 2.0) -> list[BaseException]:
    """The error of each process of a roll call that cannot succeed. Threads, since they start at the same moment."""
    address = f"localhost:{free_port()}"
    clusters = [Cluster(address, index, tuple(f"machine-{i}" for i in range(size))) for index in indices]
    with ThreadPoolExecutor(len(indices)) as threads:
        calls = [threads.submit(roll_call, cluster, timeout) for cluster in clusters]
        errors = [call.exception() for call in calls]
    assert None not in errors
    return errors


def test_strangers_do_not_disturb_the_roll_call():
    address = f"localhost:{free_port()}"
    command = [sys.executable, "-c", MEMBER, "print(group.gather(index))", address, "2"]
    first = subprocess.Popen([*command, "0", "120"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    port = int(address.rpartition(":")[2])
    while first.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("localhost", port), timeout=5) as stranger:
            stranger.sendall(b"GET / HTTP/1.0\r\n\r\n")
            break
        time.sleep(0.02)
    second = subprocess.Popen([*command, "1", "120"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert [output for _, output, _ in finish([first, second])] == ["[0, 1]\n"] * 2


def test_strangers_who_say_nothing_keep_nobody_waiting():
    address, timeout = f"localhost:{free_port()}", 12.0
    port = int(address.rpartition(":")[2])
    with ThreadPoolExecutor() as threads, contextlib.ExitStack() as strangers:
        calls = [threads.submit(roll_call, Cluster(address, 0, ("", "")), timeout)]
        for said in (b"", b"", b'{"process": 1', b"{}\n", b'{"process": 1}\n', b"x" * 2000, b""):
            stranger = strangers.enter_context(connect(port))
            stranger.sendall(said)
        calls.append(threads.submit(roll_call, Cluster(address, 1, ("", "")), timeout))
        (first,), (second,) = (call.result().values() for call in calls)
        first.send({"kind": "greeting"})
        assert second.receive() == {"kind": "greeting"}
        first.socket.close()
        second.socket.close()


def connect(port: int) -> socket.socket:
    """A connection to a process that may not listen yet."""
    while True:
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection(("localhost", port))
        time.sleep(0.01)


def test_a_message_of_unknown_kind_is_passed_over():
    code = """
if index == 1:
    for message in ({"kind": "tell"}, {"kind": None}, {"kind": []}, {"kind": "collect"}, {}):
        group._connections[0].send(message)
print(group.gather(index))
"""
    results = finish(start(code, 2, range(2)))
    assert [(status, output) for status, output, _ in results] == [(0, "[0, 1]\n")] * 2
    assert results[0][2] == "warning: process 1 (host machine-1) sent a message of unknown kind None"


def test_last_words_before_an_abort_need_no_lock():
    """JAX may abort in any thread, while other threads hold locks."""
    code = """
import ctypes, threading
distributed.LEADER_GRACE = 60
group.gather()
os.kill(os.getpid(), signal.SIGKILL) if index == 0 else None
while not group._ended: time.sleep(0.01)
holds = threading.Event()
threading.Thread(target=lambda: (group._changed.acquire(), holds.set(), time.sleep(60)), daemon=True).start()
holds.wait()
ctypes.CDLL(None).abort()
"""
    _, (status, _, line) = finish(start(code, 2, range(2)))
    assert status == 1
    assert line.startswith("failed: process 0 (host machine-0) of 2 was killed or crashed")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others_and_is_named(victim):
    code = f"group.gather(); os.kill(os.getpid(), signal.SIGKILL) if index == {victim} else time.sleep(600)"
    distributed_grace = "distributed.GRACE = 0.5; "
    results = finish(start(distributed_grace + code, 3, range(3)))
    for index, (status, _, line) in enumerate(results):
        if index == victim:
            assert status == -signal.SIGKILL
        else:
            assert status == 1
            assert line == (
                f"failed: process {victim} (host machine-{victim}) of 3 was killed or crashed, and the run cannot "
                "go on without it; continue from step 7"
            )


@pytest.mark.parametrize("others", ["time.sleep(600)", "group.gather()"])
@pytest.mark.parametrize("unlucky", [0, 2])
def test_an_error_of_one_process_is_told_by_all(unlucky, others):
    code = f"""
distributed.GRACE = 0.5
group.gather()
if index == {unlucky}: raise UserError("the disk of this machine is not there")
{others}
"""
    results = finish(start(code, 3, range(3)))
    for index, (status, _, line) in enumerate(results):
        said = "" if index == unlucky else f" (reported by process {unlucky} (host machine-{unlucky}))"
        assert (status, line) == (2, f"UserError: the disk of this machine is not there{said}")


def test_what_fails_because_another_process_is_gone_is_not_the_reason():
    """A collective fails as soon as a peer is dead; its message is about the peer, not about the reason."""
    code = """
group.gather()
os.kill(os.getpid(), signal.SIGKILL) if index == 1 else None
raise ValueError("Gloo all-reduce failed: connection reset by peer")
"""
    (status, _, line), _ = finish(start(code, 2, range(2)))
    assert status == 1 and "process 1 (host machine-1) of 2 was killed" in line


def test_an_error_that_all_have_is_told_as_it_is():
    results = finish(start("group.gather(); raise RunError('the loss is nan')", 3, range(3)))
    assert [(status, line) for status, _, line in results] == [(1, "RunError: the loss is nan")] * 3


@pytest.mark.parametrize("receivers", [[0], [1], [0, 2]])
def test_a_signal_to_one_process_stops_all_before_the_same_step(receivers):
    """The processes are at different steps; each runs at most two more steps while another one is behind."""
    code = f"""
import random
random.seed(index)
for step in range(10**6):
    signal_name = "SIGTERM" if index in {receivers} and step >= 20 else ""
    if stopped := group.stops_at(step, signal_name):
        break
    time.sleep(random.random() * 0.004)
    if step == 10: time.sleep(0.1 * index)
print(step, stopped)
"""
    results = finish(start(code, 3, range(3)))
    assert len({output for _, output, _ in results}) == 1, results
    step, name = results[0][1].split()
    assert int(step) >= 20 and name == "SIGTERM"


def test_different_values_are_a_mistake():
    results = finish(start("group.same('config', {'seed': index, 'rate': 0.5})", 2, range(2)))
    assert all("process 1 has another config than process 0: seed is 1, not 0" in line for *_, line in results)
    assert all(status == 2 for status, *_ in results)


# ---- Training on two processes ---------------------------------------------------------------------------------------

CONFIG = """
from gptjax.config import get_default

def get_config():
    config = get_default()
    config.tokenizer = "byte"
    config.data.update(source="text:{corpus}/*.txt", split_by="position", validation_fraction=0.1)
    config.model.update(num_layers=1, num_heads=2, embed_dim=16, context_length=16, dropout=0.1)
    config.train.update(num_steps=30, batch_size=4, checkpoint_every=5, keep_checkpoints=1)
    config.schedule.update(name="constant", warmup=1)
    config.evaluation.update(every=10, max_tokens=300, batch_size=4)
    config.logging.update(every=1, samples=2, sample_tokens=4, tensorboard=False)
    return config
"""


@pytest.fixture(scope="module")
def config_file(tiny_corpus, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(CONFIG.format(corpus=tiny_corpus))
    return path


def train(config_file: Path, workdir: Path, *options: str, **numbers: int):
    return launch("train", [f"--config={config_file}", f"--workdir={workdir}", *options], **numbers)


def launch(verb: str, options: list[str], *, processes: int = 2, devices: int = 1) -> list[subprocess.Popen]:
    """Starts the processes of a command with this number of devices each."""
    flags = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count"
    environment = os.environ | {"XLA_FLAGS": f"{flags}={devices}"}
    command = [sys.executable, "-m", f"gptjax.{verb}", *options]
    port = free_port()

    def numbers(index: int) -> list[str]:
        if processes == 1:
            return []
        return [f"--coordinator=localhost:{port}", f"--num_processes={processes}", f"--process_id={index}"]

    return [
        subprocess.Popen(
            [*command, *numbers(index)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for index in range(processes)
    ]


def complete(processes, status: int = 0) -> list[str]:
    """The last line of each process; all must have ended with this status."""
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [status] * len(processes), "\n".join(errors)
    return [text.strip().splitlines()[-1] if text.strip() else "" for text in errors]


def losses(workdir: Path) -> dict[tuple[str, int], float]:
    with (workdir / "metrics.jsonl").open() as file:
        return {(line["split"], line["step"]): line["loss"] for line in map(json.loads, file)}


def wait_for_step(workdir: Path, step: int, processes) -> None:
    while all(process.poll() is None for process in processes):
        with contextlib.suppress(OSError, ValueError):
            if max(losses(workdir), default=("", 0), key=lambda key: key[1])[1] >= step:
                return
        time.sleep(0.05)
    raise AssertionError([process.communicate()[1][-2000:] for process in processes])


@pytest.fixture(scope="module")
def alone(config_file, tmp_path_factory) -> Path:
    """The work directory of a run in one process with two devices."""
    workdir = tmp_path_factory.mktemp("alone")
    complete(train(config_file, workdir, processes=1, devices=2))
    return workdir


def assert_same_losses(workdir: Path, expected: Path) -> None:
    ours, theirs = losses(workdir), losses(expected)
    assert list(ours) == list(theirs)
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-5)


@pytest.mark.slow
def test_two_processes_are_one_run(config_file, alone, tmp_path):
    complete(train(config_file, tmp_path))
    assert_same_losses(tmp_path, alone)
    assert (tmp_path / "samples.jsonl").read_text("utf-8") == (alone / "samples.jsonl").read_text("utf-8")
    assert json.loads((tmp_path / "manifest.json").read_text())["devices"]["processes"] == 2
    assert "goodput" in (tmp_path / "report.html").read_text("utf-8")
    verb = ["--checkpoint=last", "--tasks=perplexity", f"--workdir={tmp_path}"]
    complete(launch("evaluate", verb))
    (both,) = (tmp_path / "evaluation").glob("*-30.json")
    results = json.loads(both.read_text())["results"]["perplexity"]
    complete(launch("evaluate", verb, processes=1, devices=2))
    assert json.loads(both.read_text())["results"]["perplexity"] == results


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"context": 2}, {"fsdp": 2, "context": 2}, {"tensor": 2}])
def test_any_axis_may_span_the_processes(config_file, alone, tmp_path, mesh):
    devices = int(np.prod(list(mesh.values()))) // 2
    options = [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
    complete(train(config_file, tmp_path, *options, "--config.train.num_steps=10", devices=devices))
    theirs = {key: loss for key, loss in losses(alone).items() if key[1] <= 10}
    ours = losses(tmp_path)
    assert list(ours) == list(theirs)
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-5)


@pytest.mark.slow
def test_each_process_may_have_experts_of_its_own(config_file, tmp_path):
    options = ["--config.model.num_experts=4", "--config.train.num_steps=10"]
    complete(train(config_file, tmp_path / "alone", *options, processes=1, devices=2))
    complete(train(config_file, tmp_path / "both", *options, "--config.mesh.expert=2"))
    assert_same_losses(tmp_path / "both", tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_killed_in_one_process_it_ends_with_a_message_and_goes_on_in_one(config_file, alone, tmp_path, victim):
    processes = train(config_file, tmp_path, "--config.train.num_steps=30")
    wait_for_step(tmp_path, 12, processes)
    processes[victim].kill()
    (line,) = complete([processes[1 - victim]], status=1)
    saved = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit())
    assert f"process {victim}" in line and "was killed or crashed" in line
    assert f"the same command continues from step {saved} " in line
    complete(train(config_file, tmp_path, processes=1, devices=2))
    assert_same_losses(tmp_path, alone)


@pytest.mark.slow
def test_a_signal_to_one_process_saves_in_all(config_file, alone, tmp_path):
    processes = train(config_file, tmp_path)
    wait_for_step(tmp_path, 6, processes)
    processes[1].send_signal(signal.SIGTERM)
    lines = complete(processes, status=1)
    assert lines[0] == lines[1] and lines[0].startswith("failed: stopped by SIGTERM at step")
    complete(train(config_file, tmp_path))
    assert_same_losses(tmp_path, alone)


def test_the_rows_of_one_process_are_all_rows():
    mesh = jax.make_mesh((2, 1, 2, 2, 1), MESH_AXES)
    np.testing.assert_array_equal(partition.process_rows(8, mesh), np.arange(8))
