"""Abusive clients of an OpenAI-compatible server, all at once: does it leak, and do polite clients get right answers?

  python tools/abuse_serve.py --url=http://127.0.0.1:8000 --clients=64 --seconds=120

First, polite requests are sent one after another; later, the same requests must get the same answers while other
clients read slowly, disconnect, send invalid JSON or UTF-8, bodies of 10 MB, and absurd values. Prints outcomes by
kind, the time to the first token, the server's memory and open files before and after, and the slots that are still
in use at the end. The exit status is 1 if an answer was wrong or 5xx, or a slot was lost.
"""

import argparse
import collections
import concurrent.futures
import json
import random
import re
import threading
import time
import urllib.parse

import httpx2
import psutil

SHARES = {  # of requests, by kind
    "polite": 0.35,
    "slow reader": 0.1,
    "slow writer": 0.05,
    "disconnects": 0.2,
    "broken JSON": 0.08,
    "invalid UTF-8": 0.07,
    "10 MB": 0.03,
    "absurd": 0.12,
}
ABSURD = [None, True, -1, 0, 1e308, 2**63, "x", [], {}, [[]], {"a": 1}, "\ud800", "9" * 5000]
NAMES = ("prompt", "max_tokens", "temperature", "top_p", "top_k", "n", "seed", "stop", "logprobs", "echo", "stream")
BROKEN = [b"", b"{", b"[1", b'{"a":' * 2000, b'{"prompt": Infinity}', b"nul"]
BIG = json.dumps({"prompt": "x" * (10 << 20)}).encode()


class Abuse:
    """The clients and their outcomes."""

    def __init__(self, url: str, kinds: int):
        limits = httpx2.Limits(max_connections=1024)
        self.http = httpx2.Client(base_url=url, timeout=300, limits=limits, trust_env=False)
        self.models = self.http.get("/v1/models").raise_for_status().json()["data"]
        self.requests = [self._request(number) for number in range(kinds)]
        self.process = _listener(urllib.parse.urlsplit(url).port)
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.first: list[float] = []  # seconds to the first token, for clients that read at once
        self.faults: list[str] = []
        self._lock = threading.Lock()
        self.expected = [self._answer(place) for place in range(kinds)]

    def _request(self, number: int) -> tuple[str, dict]:
        card = self.models[number % len(self.models)]
        body = {"model": card["id"], "max_tokens": 8 + number % 40, "seed": number, "temperature": number % 3 / 2}
        text = f"request {number} " * (1 + number % 7)
        if card["chat"] and number % 2:
            return "/v1/chat/completions", body | {"messages": [{"role": "user", "content": text}]}
        return "/v1/completions", body | {"prompt": text, "ignore_eos": True}

    def ask(self, kind: str, rng: random.Random) -> None:
        """Sends one request of a kind and counts its outcome."""
        if kind in ("polite", "slow reader", "slow writer"):
            place = rng.randrange(len(self.requests))
            answer = self._answer(place, kind)
            if answer == self.expected[place]:
                self._count(f"{kind}: the expected answer")
            else:
                self._fault(f"{kind}: {answer} to request {place}, before {self.expected[place]}")
        elif kind == "disconnects":
            path, body = rng.choice(self.requests)
            with self.http.stream("POST", path, json=body | {"max_tokens": 200, "stream": True}) as answer:
                lines = answer.iter_lines()
                for _ in range(rng.randrange(6)):
                    next(lines, None)
            self._count(f"{kind}: {answer.status_code}")
        else:
            answer = self.http.post(self.requests[0][0], content=self._nonsense(kind, rng))
            allowed = {"absurd": range(200, 500), "10 MB": (413,)}.get(kind, (400,))
            if answer.status_code not in allowed:
                self._fault(f"{kind}: {answer.status_code} {answer.text[:200]}")
            self._count(f"{kind}: {answer.status_code}")

    def _nonsense(self, kind: str, rng: random.Random) -> bytes:
        if kind == "10 MB":
            return BIG
        if kind == "broken JSON":
            return rng.choice(BROKEN)
        if kind == "invalid UTF-8":
            return b'{"prompt": "' + rng.randbytes(rng.randrange(1, 30)) + b'\xff"}'
        body = {"prompt": "a", "max_tokens": 4} | {name: rng.choice(ABSURD) for name in rng.sample(NAMES, 2)}
        return json.dumps(body).encode()

    def _answer(self, place: int, kind: str = "polite") -> tuple[str, str]:
        """(text, finish_reason) of a stream. Tries again if the queue is full."""
        path, body = self.requests[place]
        content = json.dumps(body | {"stream": True}).encode()
        pieces, reason, began, first = [], None, time.perf_counter(), None
        sent = _slowly(content) if kind == "slow writer" else content
        with self.http.stream("POST", path, content=sent) as answer:
            if answer.status_code == 429:
                self._count(f"{kind}: 429")
                time.sleep(float(answer.headers["retry-after"]))
                return self._answer(place, kind)
            if answer.status_code != 200:
                return str(answer.status_code), answer.read().decode()
            for line in answer.iter_lines():
                if not line.startswith("data: {"):
                    continue
                data = json.loads(line.removeprefix("data: "))
                if "error" in data:
                    return "error", data["error"]["message"]
                (choice,) = data["choices"]
                text = choice.get("text") or choice.get("delta", {}).get("content") or ""
                if text and first is None:
                    first = time.perf_counter() - began
                pieces.append(text)
                reason = choice["finish_reason"] or reason
                if kind == "slow reader":
                    time.sleep(0.05)
        if kind == "polite" and first is not None:
            with self._lock:
                self.first.append(first)
        return "".join(pieces), reason

    def size(self) -> str:
        """Memory, files and threads of the server's process, if it is on this machine."""
        if self.process is None:
            return "unknown: the server is on another machine"
        resident = self.process.memory_info().rss / 2**20
        return f"{resident:.0f} MiB, {self.process.num_fds()} files, {self.process.num_threads()} threads"

    def busy(self) -> int:
        """Slots in use, and waiting requests."""
        text = self.http.get("/metrics").text
        found = re.findall(r"^gptjax_(?:used_slots|waiting_requests)\{.*\} ([\d.]+)$", text, re.MULTILINE)
        return int(sum(map(float, found)))

    def _count(self, outcome: str) -> None:
        with self._lock:
            self.outcomes[outcome] += 1

    def _fault(self, fault: str) -> None:
        with self._lock:
            self.faults.append(fault)


def _slowly(content: bytes):
    for start in range(0, len(content), 40):
        yield content[start : start + 40]
        time.sleep(0.05)


def _listener(port: int | None) -> psutil.Process | None:
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
            return psutil.Process(connection.pid)
    return None


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(int(share * len(values)), len(values) - 1)] if values else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--requests", type=int, default=24, help="number of different polite requests, sent in advance")
    options = parser.parse_args()
    abuse = Abuse(options.url, options.requests)
    print(f"{len(abuse.first)} requests one after another: first token p50 {percentile(abuse.first, 0.5):.3f} s")
    abuse.first.clear()
    before, end = abuse.size(), time.perf_counter() + options.seconds

    def client(number: int) -> int:
        rng, asked = random.Random(number), 0
        while time.perf_counter() < end:
            (kind,) = rng.choices(list(SHARES), list(SHARES.values()))
            try:
                abuse.ask(kind, rng)
            except httpx2.HTTPError as error:
                abuse._fault(f"{kind}: {error!r}")
            asked += 1
        return asked

    with concurrent.futures.ThreadPoolExecutor(options.clients) as pool:
        asked = sum(pool.map(client, range(options.clients)))
    patience = time.perf_counter() + 30
    while abuse.busy() and time.perf_counter() < patience:
        time.sleep(0.1)
    lost = abuse.busy()
    abuse.http.close()
    time.sleep(1)  # time for the server to notice the closed connections
    print(f"{options.clients} clients, {options.seconds:.0f} s, {asked} requests")
    for outcome, count in sorted(abuse.outcomes.items()):
        print(f"  {count:6} {outcome}")
    first = [percentile(abuse.first, share) for share in (0.5, 0.99)]
    print(f"first token of polite requests: p50 {first[0]:.2f} s, p99 {first[1]:.2f} s")
    print(f"the server before: {before}\nthe server after:  {abuse.size()}\nslots lost: {lost}")
    print(f"wrong answers: {len(abuse.faults)}", *abuse.faults[:10], sep="\n  ")
    raise SystemExit(bool(abuse.faults or lost))


if __name__ == "__main__":
    main()
