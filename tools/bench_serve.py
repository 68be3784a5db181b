"""A load test of an OpenAI-compatible server.

  python tools/bench_serve.py --url=http://127.0.0.1:8000 --clients=16 --seconds=30
  python tools/bench_serve.py --url=http://127.0.0.1:8000 --mix=chat,completion,long,broken

Each client sends one request after another until the time is over; kinds of requests have their shares of the mix.
Prints the time to the first token, tokens per second, and errors by kind; then the speed-up of parallel streams over
one after another. The prompts are random letters, so that no two requests share a prefix.
"""

import argparse
import collections
import concurrent.futures
import json
import random
import statistics
import threading
import time

import httpx2

LETTERS = "aeinorst    "


class Load:
    """The requests and their outcomes."""

    def __init__(self, url: str, model: str, max_tokens: int, key: str):
        self.http = httpx2.Client(
            base_url=url,
            timeout=300,
            limits=httpx2.Limits(max_connections=1024),
            headers={"authorization": f"Bearer {key}"},
            trust_env=False,
        )
        cards = {card["id"]: card for card in self.http.get("/v1/models").raise_for_status().json()["data"]}
        self.card = cards[model or next(iter(cards))]
        self.max_tokens = max_tokens
        self.lock = threading.Lock()
        self.first: list[float] = []  # seconds to the first token
        self.rates: list[float] = []  # tokens per second of each stream, from its first token on
        self.tokens = 0
        self.outcomes: collections.Counter[str] = collections.Counter()

    def ask(self, kind: str, seed: int) -> None:
        """Sends one request and counts its outcome."""
        if kind == "broken":
            answer = self.http.post("/v1/completions", content=b'{"prompt": "\xff')
            self._count(f"broken: {answer.status_code}")
            return
        path, body = self._body(kind, seed)
        began, first, count = time.perf_counter(), None, 0
        with self.http.stream("POST", path, json=body) as answer:
            if answer.status_code != 200:
                answer.read()
                self._count(f"{kind}: {answer.status_code} {answer.json()['error']['code']}")
                return
            for line in answer.iter_lines():
                if not line.startswith("data: {"):
                    continue
                data = json.loads(line.removeprefix("data: "))
                if "error" in data:
                    self._count(f"{kind}: in the stream: {data['error']['code']}")
                    return
                if data.get("usage"):
                    count = data["usage"]["completion_tokens"]
                elif first is None and any(_text(choice) for choice in data["choices"]):
                    first = time.perf_counter() - began
        seconds = time.perf_counter() - began
        with self.lock:
            self.outcomes[f"{kind}: answered"] += 1
            self.tokens += count
            if first is not None:
                self.first.append(first)
            if first is not None and count > 1 and seconds > first:
                self.rates.append((count - 1) / (seconds - first))

    def _body(self, kind: str, seed: int) -> tuple[str, dict]:
        rng = random.Random(seed)
        length = self.card["max_model_len"] // 2 if kind == "long" else 60  # characters; a token has one or more
        text = "".join(rng.choice(LETTERS) for _ in range(length))
        body = {"model": self.card["id"], "max_tokens": self.max_tokens, "seed": seed, "ignore_eos": True}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        if kind == "chat":
            return "/v1/chat/completions", body | {"messages": [{"role": "user", "content": text}]}
        return "/v1/completions", body | {"prompt": text}

    def _count(self, outcome: str) -> None:
        with self.lock:
            self.outcomes[outcome] += 1


def _text(choice: dict) -> str:
    return choice.get("text") or choice.get("delta", {}).get("content") or ""


def percentile(values: list[float], share: float) -> float:
    """The value below which `share` of the values are."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)] if values else float("nan")


def run(load: Load, clients: int, seconds: float, mix: list[str]) -> None:
    """Sends requests for `seconds`, and prints the outcomes."""
    end = time.perf_counter() + seconds

    def client(number: int) -> None:
        rng, asked = random.Random(number), 0
        while time.perf_counter() < end:
            load.ask(rng.choice(mix), number + clients * asked)
            asked += 1

    began = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(clients)))
    taken = time.perf_counter() - began
    milliseconds = [1000 * value for value in load.first]
    print(f"{clients} clients, {taken:.1f} s, {len(milliseconds)} streams of {load.max_tokens} tokens at most")
    print(f"first token    p50 {percentile(milliseconds, 0.5):8.1f} ms   p99 {percentile(milliseconds, 0.99):8.1f} ms")
    print(f"tokens/s       all {load.tokens / taken:8.1f}      per stream {statistics.median(load.rates or [0]):8.1f}")
    for outcome, count in sorted(load.outcomes.items()):
        print(f"  {count:6} {outcome}")


def compare(load: Load, streams: int, kind: str) -> None:
    """The same requests one after another, then all at once."""
    times = []
    for clients in (1, streams):
        before, began = load.tokens, time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(clients) as pool:
            list(pool.map(lambda number: load.ask(kind, 10**6 + number), range(streams)))
        times.append(time.perf_counter() - began)
        rate = (load.tokens - before) / times[-1]
        print(f"{streams} streams, {clients:2} at a time: {times[-1]:6.2f} s, {rate:8.1f} tokens/s")
    print(f"in parallel {times[0] / times[1]:.2f} times as fast")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="", help="default: the server's first model")
    parser.add_argument("--key", default="none")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--max_tokens", type=int, default=64)
    parser.add_argument("--mix", default="", help="of chat, completion, long, broken; default: what the model can do")
    parser.add_argument("--streams", type=int, default=16, help="parallel streams, compared with sequential; 0: none")
    options = parser.parse_args()
    load = Load(options.url.removesuffix("/v1"), options.model, options.max_tokens, options.key)
    kind = "chat" if load.card["chat"] else "completion"
    mix = options.mix.split(",") if options.mix else [kind, kind, kind, "completion", "long"]
    load.ask(kind, 0)
    load.first.clear()
    load.rates.clear()
    load.outcomes.clear()
    load.tokens = 0
    run(load, options.clients, options.seconds, mix)
    if options.streams:
        compare(load, options.streams, kind)


if __name__ == "__main__":
    main()
