"""The verb: its process, its address, how it ends, and its messages on mistakes."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import jax
import numpy as np
import pytest

pytest.importorskip("uvicorn")

from gptjax import cli, serve
from gptjax import config as config_lib
from gptjax.artifacts.checkpoints import Checkpoints
from gptjax.data.tokenization.tokenizer import build_tokenizer
from gptjax.model import gpt
from gptjax.model.architecture import Architecture
from gptjax.training.state import create_state


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run whose model was never trained."""
    import optax

    workdir, tokenizer = tmp_path_factory.mktemp("run"), build_tokenizer("byte")
    config = config_lib.get_default()
    config.model.update(num_layers=1, num_heads=2, embed_dim=16, context_length=2048)
    config.model.vocab_size = tokenizer.vocab_size
    abstract = gpt.abstract_params(Architecture.from_config(config.model, 0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(leaf.dtype), abstract)
    checkpoints = Checkpoints(workdir)
    state = create_state(jax.device_put(params), optax.identity(), ema=False)
    checkpoints.save(1, state, config=config, tokenizer=tokenizer, metrics={"validation_loss": 1.0})
    checkpoints.wait()
    checkpoints.close()
    return workdir


@pytest.fixture
def start(workdir):
    """Starts the command; returns the process and the address that it prints."""
    processes = []

    def start(*arguments):
        command = [
            sys.executable,
            "-m",
            "gptjax.serve",
            f"--model=tiny={workdir}",
            "--port=0",
            "--nowarm_up",
            *arguments,
        ]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "NO_PROXY": "*"}
        )
        processes.append(process)
        line = process.stdout.readline()
        assert line.startswith("serving tiny at http://127.0.0.1:"), process.stderr.read()
        return process, line.split(" at ")[1].strip().removesuffix("/v1")

    yield start
    for process in processes:
        process.kill()
        process.wait()


def ask(address, **body):
    request = urllib.request.Request(f"{address}/v1/completions", json.dumps(body).encode())
    return json.load(urllib.request.urlopen(request, timeout=120))


def test_sigterm_finishes_what_runs_and_ends_with_0(start):
    process, address = start()
    assert ask(address, prompt="a", max_tokens=3, seed=1)["usage"]["completion_tokens"] <= 3
    answers = []
    body = {"prompt": "a", "max_tokens": 1500, "seed": 1, "ignore_eos": True}
    thread = threading.Thread(target=lambda: answers.append(ask(address, **body)))
    thread.start()
    while 'used_slots{model="tiny"} 1.0' not in urllib.request.urlopen(f"{address}/metrics").read().decode():
        assert thread.is_alive()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    thread.join()
    assert answers[0]["usage"]["completion_tokens"] == 1500
    assert process.wait(timeout=60) == 0, process.stderr.read()


def test_sigterm_does_not_wait_for_ever(start):
    process, address = start("--shutdown_seconds=0")
    ask(address, prompt="a", max_tokens=3)  # compiles: a program that is compiled takes its time before it looks up
    errors = []

    def endless():
        try:
            ask(address, prompt="a", ignore_eos=True, n=64)
        except urllib.error.HTTPError as error:
            errors.append((error.code, json.load(error)["error"]["code"]))

    thread = threading.Thread(target=endless)
    thread.start()
    while 'used_slots{model="tiny"} 8.0' not in urllib.request.urlopen(f"{address}/metrics").read().decode():
        assert thread.is_alive()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    thread.join()
    assert errors == [(503, "shutting_down")]
    assert process.wait(timeout=60) == 0


@pytest.fixture
def refused(workdir, capsys):
    """Runs the command with a wrong request in this process; returns its last line on stderr."""

    def run(*arguments):
        assert cli.run(serve.main, ["serve", *arguments]) == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    return run


def test_mistakes_are_told(refused, workdir, tmp_path):
    assert "--model is missing" in refused()
    assert "no checkpoint in" in refused(f"--model=a={tmp_path}", "--port=0")
    assert "expected NAME=DIR" in refused("--model=a=", "--port=0")
    assert "two models are called a" in refused(f"--model=a={workdir}", f"--model=a={workdir}", "--port=0")
    assert "--chunk=48 is not a power of 2" in refused(f"--model={workdir}", "--chunk=48")
    assert "need 0.0" in refused(f"--model={workdir}", "--port=0", "--memory_limit=0.001")
    step = next((workdir / "checkpoints").iterdir())
    assert "get no new checkpoints" in refused(f"--model={step}", "--port=0", "--reload=60")
    assert "keys.txt cannot be read" in refused(f"--model={workdir}", f"--api_keys={tmp_path}/keys.txt", "--port=0")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"--port={port}: the port is in use" in refused(f"--model={workdir}", f"--port={port}")
    assert "nowhere.invalid" in refused(f"--model={workdir}", "--host=nowhere.invalid", "--port=0")
