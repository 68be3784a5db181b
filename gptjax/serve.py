"""Serve trained models by OpenAI's API.

  python -m gptjax.serve --model=mine=runs/chat
  python -m gptjax.serve --model=small=runs/small --model=large=runs/large --port=8080 --slots=16
  python -m gptjax.serve --model=gpt2=hf:models/gpt2 --model=mine=runs/chat --preferences=choices.jsonl
  python -m gptjax.serve --model=base=runs/base --model=mine=runs/lora --memory_limit=4
  python -m gptjax.serve --model=gs://BUCKET/runs/going_on --reload=60
  python -m gptjax.serve --model=runs/chat --host=0.0.0.0 --allowed_hosts=gpt.example.org --api_keys=keys.txt

In a browser, the address shows a page to talk to one model, or to two side by side; each choice of the better answer is
written to --preferences. `OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")` works as it is, and so
does lm-eval: `lm_eval --model=local-completions --model_args=base_url=http://127.0.0.1:8000/v1/completions,model=mine`.
The same seed gives the same answer, whatever other requests run. Arrays that are equal in several models (LoRA runs
and their base) are in memory once. With --reload, a new best checkpoint of a run replaces the one before; running
requests end with the parameters that they began with. SIGTERM finishes running requests, then ends the server.
"""

import asyncio
import contextlib
import errno
import gc
import importlib.util
import logging
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from gptjax import cli, interrupts
from gptjax.config.values import shown
from gptjax.errors import UserError
from gptjax.generation.flags import define_number

if TYPE_CHECKING:
    from gptjax.server.models import Models

NEEDED = ("starlette", "uvicorn", "prometheus_client")


def main(argv: Sequence[str]) -> None:
    flag_values = flags.FlagValues()
    define = {"flag_values": flag_values}
    flags.DEFINE_multi_string(
        "model", None, "NAME=DIR or NAME=hf:DIR, may be repeated, e.g. --model=mine=runs/chat", **define
    )
    flags.DEFINE_string("host", "127.0.0.1", "the address to listen at, e.g. --host=0.0.0.0", **define)
    define_number(flag_values, "port", 8000, "the port; 0 takes a free one, e.g. --port=8080", (0, 65535))
    flags.DEFINE_string("api_keys", None, "a file with a key on each line, e.g. --api_keys=keys.txt", **define)
    flags.DEFINE_list(
        "allowed_hosts", [], "names by which clients call this server, e.g. --allowed_hosts=gpt.example.org", **define
    )
    flags.DEFINE_list(
        "allowed_origins", [], "pages that may call it from a browser, e.g. --allowed_origins=https://a.org", **define
    )
    define_number(flag_values, "slots", 8, "requests answered at a time, e.g. --slots=16", (1, 4096))
    define_number(
        flag_values, "max_waiting", 256, "requests that may wait; more get 429, e.g. --max_waiting=9", (1, 9999)
    )
    define_number(
        flag_values,
        "context_length",
        0,
        "tokens of prompt and answer together; 0 = the model's own, e.g. --context_length=512",
        (0, 2**24),
    )
    define_number(
        flag_values,
        "chunk",
        256,
        "tokens of a prompt processed at once, while other answers wait; a power of 2, e.g. --chunk=64",
        (16, 65536),
    )
    define_number(
        flag_values, "memory_limit", 0, "GiB for all models; 0 = any, e.g. --memory_limit=4", (0, 10**6), whole=False
    )
    define_number(
        flag_values,
        "reload",
        0,
        "seconds between checks for a better checkpoint of a run that still trains; 0 = never, e.g. --reload=60",
        (0, 86400),
        whole=False,
    )
    define_number(
        flag_values, "max_body", 8, "largest body of a request in MiB, e.g. --max_body=1", (0.001, 1024), whole=False
    )
    define_number(
        flag_values,
        "time_limit",
        600,
        "seconds that an answer may take, e.g. --time_limit=60",
        (0.1, 86400),
        whole=False,
    )
    define_number(
        flag_values,
        "shutdown_seconds",
        30,
        "seconds for running requests to finish after SIGTERM, e.g. --shutdown_seconds=5",
        (0, 3600),
        whole=False,
    )
    flags.DEFINE_string(
        "preferences", None, "file for choices between two answers, e.g. --preferences=choices.jsonl", **define
    )
    flags.DEFINE_bool("warm_up", True, "compile all programs before the first request, e.g. --nowarm_up", **define)
    flags.DEFINE_bool("log_prompts", False, "write prompts to the log, e.g. --log_prompts", **define)
    cli.parse(flag_values, argv, __doc__)
    _check(flag_values)

    with contextlib.ExitStack() as starting:
        # Imports and tracing make no garbage; the collector would take a tenth of the start-up time.
        gc.disable()
        starting.callback(gc.enable)
        from gptjax.server import app, limits, preferences, reloading

        keys = limits.read_keys(flag_values.api_keys) if flag_values.api_keys else ()
        choices = preferences.check(flag_values.preferences) if flag_values.preferences else None
        door = limits.Limits(
            body_bytes=int(flag_values.max_body * 2**20),
            seconds=flag_values.time_limit,
            shutdown_seconds=flag_values.shutdown_seconds,
            log_prompts=flag_values.log_prompts,
        )
        # The port is taken before models are loaded, which takes longest.
        listening = starting.enter_context(_listen(flag_values.host, flag_values.port))
        models = _load(flag_values)
        form = "%(asctime)s %(levelname)s %(message)s"
        logging.basicConfig(level=logging.INFO, format=form, stream=sys.stderr, force=True)  # replaces absl's handler
        for loud in ("jax", "orbax", "absl", "uvicorn.access"):
            logging.getLogger(loud).setLevel(logging.WARNING)
        hosts = (*limits.LOOPBACK, socket.gethostname().lower(), flag_values.host.lower(), *flag_values.allowed_hosts)
        origins = flag_values.allowed_origins
        application = app.make(models, door, keys=keys, hosts=hosts, origins=origins, preferences=choices)
        for model in models:
            model.start(warm_up=flag_values.warm_up)
        if flag_values.reload:
            patience = door.seconds + 1  # longer than any request may take
            reloading.Reloader(models, every=flag_values.reload, patience=patience).start()
        host, port = listening.getsockname()[:2]
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        names = ", ".join(model.name for model in models)
        print(f"serving {names} at http://{address}/v1", f"page: http://{address}", sep="\n", flush=True)
        print(*models.taken, sep="\n", flush=True)
        if not keys and flag_values.host not in ("127.0.0.1", "localhost", "::1"):
            print("warning: anybody who reaches this address may use it; give --api_keys=FILE", file=sys.stderr)
        gc.enable()
        run(application, listening, models, door.shutdown_seconds)


def run(application: Any, listening: socket.socket, models: "Models", shutdown_seconds: float) -> None:
    """Serves until Ctrl-C or a signal that ends jobs, then finishes what runs within `shutdown_seconds`."""
    import uvicorn

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            loop = asyncio.get_running_loop()
            for number in (signal.SIGINT, *interrupts.STOPPING):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    loop.add_signal_handler(number, self.end)
            yield

        def end(self) -> None:
            """New requests are refused, running ones are finished; the second signal does not wait for them."""
            self.force_exit = self.should_exit
            self.should_exit = True
            seconds = 0.0 if self.force_exit else shutdown_seconds
            self.closing = [asyncio.ensure_future(model.stop(seconds)) for model in models]

    config = uvicorn.Config(
        application,
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_keep_alive=65,  # longer than clients keep a connection, so that none is closed during a request
        timeout_graceful_shutdown=int(shutdown_seconds) + 5,
    )
    try:
        asyncio.run(Server(config).serve(sockets=[listening]))
    finally:
        for model in models:
            model.close(0)


def _check(options: flags.FlagValues) -> None:
    if not options.model:
        raise UserError("--model is missing; e.g. --model=mine=runs/quickstart")
    if options.chunk & (options.chunk - 1):
        raise UserError(f"--chunk={options.chunk} is not a power of 2; e.g. --chunk=256")
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise UserError(f"serve needs {', '.join(missing)}: pip install 'gptjax[serve]'")


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises UserError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        reason = "the port is in use; choose another, or --port=0" if taken else error.strerror or str(error)
        raise UserError(f"--host={shown(host)} --port={port}: {reason}") from None
    except ValueError:  # not a host name: too long, or with other characters
        raise UserError(f"--host={shown(host)}: expected an address or a name, such as 127.0.0.1") from None


def _load(options: flags.FlagValues) -> "Models":
    from gptjax.config import cache_directory, get_default
    from gptjax.processes import runtime
    from gptjax.server import models, served

    # rows=1 makes a CPU one device. Its matrix products use all cores; two devices would both read every parameter.
    runtime.start(get_default().mesh, rows=1, cache_dir=cache_directory(get_default()))
    engine = served.EngineOptions(
        slots=options.slots,
        context_length=options.context_length,
        chunk=options.chunk,
        max_waiting=options.max_waiting,
    )
    return models.load(options.model, engine, options.memory_limit, reload=options.reload > 0)


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
