"""Many clients at once, most of them abusive: good requests get right answers, bad ones get errors."""

import concurrent.futures
import json
import random

import pytest

from gptjax.server.openapi import BODIES

GOOD = [
    ("/v1/completions", {"model": "text", "prompt": f"number {i}", "max_tokens": 3 + i, "seed": i, "logprobs": 1})
    for i in range(6)
]
GOOD += [
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * (5 * i)}], "max_tokens": 4, "seed": i})
    for i in range(5)
]
GOOD += [
    (
        "/v1/completions",
        {"model": "text", "prompt": [[1, 2, 3]], "echo": True, "logprobs": 2, "max_tokens": 1, "seed": 0},
    ),
    ("/v1/embeddings", {"model": "text", "input": "abc"}),
    ("/tokenize", {"prompt": "abc"}),
]
ABSURD = [
    None,
    True,
    -1,
    0,
    1e308,
    -1e308,
    2**63,
    "x",
    "",
    [],
    {},
    [[]],
    [None],
    {"a": 1},
    "\x00",
    "\ud800",
    "9" * 5000,
]
NAMES = (
    *("model", "prompt", "max_tokens", "temperature", "top_p", "top_k", "min_p", "n", "seed", "stop", "logprobs"),
    *("echo", "stream", "logit_bias", "presence_penalty", "frequency_penalty", "repetition_penalty", "stream_options"),
    *(
        "response_format",
        "guided_regex",
        "guided_json",
        "best_of",
        "suffix",
        "messages",
        "tools",
        "tool_choice",
        "input",
    ),
    *("dimensions", "encoding_format", "max_output_tokens", "instructions", "text", "tokens", "top_logprobs"),
)
PATHS = (
    *("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/embeddings"),
    *("/tokenize", "/detokenize", "/apply-template"),
)
BASES = {
    "/v1/completions": {"model": "text", "prompt": "a", "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2},
    "/v1/responses": {"input": "a", "max_output_tokens": 2},
    "/v1/embeddings": {"input": "a"},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [65]},
    "/apply-template": {"messages": [{"role": "user", "content": "a"}]},
}
BROKEN = [
    b"",
    b"{",
    b"[1",
    b'{"prompt": "\xff\xfe"}',
    b"\x00" * 50,
    b'{"a":' * 2000,
    b'{"prompt": Infinity}',
    b"nul",
    b'"x"',
]


@pytest.fixture
def http(models, live):
    import httpx2

    with httpx2.Client(
        base_url=live(models), timeout=120, limits=httpx2.Limits(max_connections=64), trust_env=False
    ) as http:
        yield http


def core(answer: dict) -> dict:
    """The part of an answer that depends only on the request."""
    kept = {name: answer[name] for name in ("choices", "data", "tokens") if name in answer}
    assert kept, answer
    return kept


def retried(http, path, body):
    """The answer, with further tries if the queue is full."""
    while (answer := http.post(path, json=body)).status_code == 429:
        assert answer.json()["error"]["code"] == "queue_full"
    assert answer.status_code == 200, answer.text
    return core(answer.json())


@pytest.mark.parametrize(("clients", "requests"), [(8, 12), pytest.param(64, 12, marks=pytest.mark.slow)])
def test_clients_with_nonsense_among_them(http, models, clients, requests):
    expected = [retried(http, path, body) for path, body in GOOD]

    def client(number: int) -> int:
        rng = random.Random(number)
        count = 0
        for _ in range(requests):
            kind = rng.random()
            if kind < 0.4:
                place = rng.randrange(len(GOOD))
                assert retried(http, *GOOD[place]) == expected[place]
                count += 1
                continue
            path = rng.choice(PATHS)
            if kind < 0.6:
                answer = http.post(path, content=rng.choice(BROKEN))
                assert 400 <= answer.status_code < 500, answer.text
            else:
                body = BASES[path] | {name: rng.choice(ABSURD) for name in rng.sample(NAMES, rng.randint(1, 3))}
                answer = http.post(path, content=json.dumps(body).encode(), headers={"x-request-id": "a b"})
            assert answer.status_code < 500, (path, body, answer.text)
            if answer.status_code != 200:
                error = answer.json()["error"]
                assert error["message"] and set(error) == {"message", "type", "param", "code"}
        return count

    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        assert sum(pool.map(client, range(clients))) > clients * requests / 4
    assert [retried(http, path, body) for path, body in GOOD] == expected
    assert all(model.load[:2] == (0, 0) and model.pump.alive for model in models)


@pytest.mark.parametrize("path", PATHS)
def test_every_absurd_value_of_every_parameter(client, path):
    for name in NAMES:  # of those that a path does not know, a few values do for all
        for value in ABSURD if name in BODIES[path].model_fields else ABSURD[::6]:
            body = json.dumps(BASES[path] | {name: value}).encode()
            answer = client.post(path, content=body)
            assert answer.status_code < 500, (name, value, answer.text)
            if answer.status_code != 200:
                assert answer.json()["error"]["message"], (name, value)
