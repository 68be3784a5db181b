"""A server with two tiny models of random parameters: `chat` has a template, `text` has none."""

import asyncio
import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("httpx2")

from starlette.testclient import TestClient

from gptjax import config as config_lib
from gptjax.artifacts.checkpoints import Checkpoints
from gptjax.artifacts.loading import Trained
from gptjax.data.tokenization.templates import ChatTemplate
from gptjax.data.tokenization.tokenizer import build_tokenizer
from gptjax.model import gpt
from gptjax.model.architecture import Architecture
from gptjax.server import app as app_lib
from gptjax.server.limits import Limits
from gptjax.server.models import Models
from gptjax.server.served import EngineOptions, Served
from gptjax.training.state import create_state

CONTEXT = 128
OPTIONS = EngineOptions(slots=4, chunk=16, rounds=2, max_waiting=16)


def trained(*, template: ChatTemplate | None = None, seed: int = 0, **options) -> Trained:
    tokenizer = build_tokenizer("byte")
    if template is not None:
        tokenizer = ChatTemplate().prepare_tokenizer(tokenizer)
    config = config_lib.get_default()
    config.model.update(num_layers=1, num_heads=2, embed_dim=16, context_length=CONTEXT, scan_unroll=1)
    config.model.update(vocab_size=tokenizer.vocab_size, **options)
    architecture = Architecture.from_config(config.model, 0)
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(leaf.dtype), gpt.abstract_params(architecture)
    )
    return Trained(Path("runs/tiny"), 1, config, tokenizer, architecture, jax.device_put(params), template)


@pytest.fixture(scope="session")
def make_trained() -> Callable[..., Trained]:
    return trained


@pytest.fixture(scope="session")
def save_run() -> Callable[..., None]:
    """Writes a model as the checkpoint of a step of a run."""
    import optax

    def save(workdir: Path, step: int, trained: Trained, loss: float = 1.0) -> None:
        checkpoints = Checkpoints(workdir)
        state = create_state(trained.params, optax.identity(), ema=False)
        known = {"config": trained.config, "tokenizer": trained.tokenizer, "template": trained.template}
        checkpoints.save(step, state, **known, metrics={"validation_loss": loss})
        checkpoints.wait()
        checkpoints.close()

    return save


@pytest.fixture(scope="session")
def make_served() -> Callable[..., Served]:
    """Makes a model that is not started."""

    def make(name: str = "chat", template: ChatTemplate | None = None, options: EngineOptions = OPTIONS) -> Served:
        template = ChatTemplate() if name == "chat" and template is None else template
        return Served(name, trained(template=template), options)

    return make


@pytest.fixture(scope="session")
def models(make_served) -> Iterator[Models]:
    models = Models([make_served("chat"), make_served("text")])
    for model in models:
        model.start(warm_up=False)
    yield models
    for model in models:
        model.close(0)


@pytest.fixture(scope="session")
def make_client() -> Callable[..., TestClient]:
    """A client of the application, in this process."""

    def make(models: Models, limits: Limits = Limits(), **options) -> TestClient:  # noqa: B008 (frozen)
        application = app_lib.make(models, limits, **options)
        return TestClient(application, base_url="http://localhost", raise_server_exceptions=False)

    return make


@pytest.fixture
def client(models, make_client) -> TestClient:
    return make_client(models)


@pytest.fixture(scope="session")
def read_stream() -> Callable[..., list]:
    """The data of the frames of an SSE response; asserts that it is well formed and ends with [DONE]."""

    def read(response) -> list:
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        frames = response.text.split("\n\n")
        assert frames.pop() == "" and frames.pop() == "data: [DONE]"
        lines = [frame.split("\n")[-1] for frame in frames]
        assert all(line.startswith("data: ") for line in lines)
        return [json.loads(line.removeprefix("data: ")) for line in lines]

    return read


@pytest.fixture
def live(tmp_path) -> Callable:
    """Serves models at a free port of this machine, in a thread; returns the address."""
    import threading

    import uvicorn

    with contextlib.ExitStack() as stack:

        def start(models: Models, limits: Limits = Limits(), **options) -> str:  # noqa: B008 (frozen)
            config = uvicorn.Config(
                app_lib.make(models, limits, **options), port=0, log_config=None, lifespan="off", access_log=False
            )
            server = uvicorn.Server(config)
            thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
            thread.start()

            def stop():
                server.should_exit = True
                thread.join(timeout=30)

            stack.callback(stop)
            while not server.started:
                assert thread.is_alive()
                thread.join(timeout=0.01)
            return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"

        yield start
