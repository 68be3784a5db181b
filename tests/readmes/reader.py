"""Someone who follows a README: types its commands one after another, in one process.

As a program, `python reader.py TYPED RESULTS`: TYPED is a JSON list of things to do in the current directory, each with
`kind`, `text` (as the README has it) and `words` (what is run). To RESULTS goes a JSON line for each, with the exit
status and what was printed.

    gptjax   words of `gptjax VERB ...`, called in this process, so that JAX is imported and each program compiled once
    serve    the same, in front of `clients`, which are run while it serves; then it gets SIGTERM
    shell    words of another program
    python   code, with the names of the lines before it
"""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SAID = "Good morning!\n"  # on standard input
ADDRESS = "http://127.0.0.1:8000"  # of a server, in READMEs


def main() -> None:
    from gptjax import config as config_lib
    from gptjax.model import presets

    typed = json.loads(Path(sys.argv[1]).read_text())
    names: dict[str, Any] = {"config": config_lib.get_default(), "presets": presets}
    with Path(sys.argv[2]).open("w") as results:
        for item in typed:
            began = sum(os.times()[:4])  # of this process and of those that it waited for
            with printed() as output:
                status = run(item, names, output)
            clients = item.pop("clients", [])
            for each in [*clients, {**item, "status": status, "output": output.read_text(errors="replace")}]:
                results.write(json.dumps({**each, "seconds": sum(os.times()[:4]) - began}) + "\n")
            results.flush()


def run(item: dict[str, Any], names: dict[str, Any], output: Path) -> int:
    try:
        if item["kind"] == "gptjax":
            with variables(item["environment"]):
                return command(item["words"])
        if item["kind"] == "serve":
            return serve(item, names, output)
        if item["kind"] == "shell":
            return subprocess.run(item["words"], stdin=subprocess.DEVNULL).returncode
        exec(compile(item["text"], "README", "exec"), names)
        return 0
    except SystemExit as end:
        return int(end.code or 0)
    except Exception:
        traceback.print_exc()
        return 1


@contextlib.contextmanager
def variables(of_item: dict[str, str]) -> Iterator[None]:
    """Variables of the environment, for one command."""
    os.environ.update(of_item)
    yield
    for name in of_item:
        del os.environ[name]


def command(words: list[str]) -> int:
    """The exit status of `gptjax VERB ...`."""
    from gptjax import cli

    verb, *options = words
    return cli.run(importlib.import_module(f"gptjax.{verb}").main, [f"gptjax {verb}", *options])


def serve(item: dict[str, Any], names: dict[str, Any], output: Path) -> int:
    """Serves until the clients are done; each gets `status` and `output`. The status of the worst, or the server's."""
    worst, ended = [1], threading.Event()

    def use() -> None:
        while "serving " not in (text := output.read_text()):
            if ended.wait(0.05):
                return
        port = text.partition("/v1")[0].rpartition(":")[2]
        try:
            look(f"http://127.0.0.1:{port}")
            worst[0] = 0
            for client in item["clients"]:
                text = output.read_text()
                words = [word.replace(ADDRESS, f"http://127.0.0.1:{port}") for word in client.get("words", ())]
                client["text"], shown = client["text"].replace(ADDRESS, f"http://127.0.0.1:{port}"), client["text"]
                client["status"] = run({**client, "words": words}, names, output)
                client["text"], client["output"] = shown, output.read_text()[len(text) :]
        except Exception:
            traceback.print_exc()
            worst[0] = 1
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    client = threading.Thread(target=use)
    client.start()
    try:
        return command(item["words"]) or worst[0]
    finally:
        ended.set()
        client.join()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def look(address: str) -> None:
    """Opens the page and makes every model write a few tokens."""
    key = Path("keys.txt").read_text().split()[0]

    def get(path: str, body: dict[str, Any] | None = None) -> bytes:
        request = urllib.request.Request(f"{address}{path}", body and json.dumps(body).encode())
        request.add_header("authorization", f"Bearer {key}")
        return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=300).read()

    assert b"<html" in get("/")
    for model in json.loads(get("/v1/models"))["data"]:
        answer = json.loads(get("/v1/completions", {"model": model["id"], "prompt": "The", "max_tokens": 3}))
        assert answer["choices"][0]["finish_reason"] in ("stop", "length"), answer


@contextlib.contextmanager
def printed() -> Iterator[Path]:
    """A file with everything that this process and its children print inside the context."""
    handle, name = tempfile.mkstemp(prefix="printed-")
    question = tempfile.TemporaryFile()  # noqa: SIM115
    question.write(SAID.encode())
    question.seek(0)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(number) for number in range(3)]
    for number, source in enumerate((question.fileno(), handle, handle)):
        os.dup2(source, number)
    try:
        yield Path(name)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, source in enumerate(kept):
            os.dup2(source, number)
            os.close(source)
        question.close()
        os.close(handle)


if __name__ == "__main__":
    main()
