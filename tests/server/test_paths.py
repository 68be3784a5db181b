"""Endpoints without generation, answers in a given format, limits and keys."""

import base64
import json
import re
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from gptjax.data.tokenization.tokenizer import Tokenizer
from gptjax.errors import UserError
from gptjax.generation.engine import Busy
from gptjax.generation.params import SamplingParams
from gptjax.model import gpt
from gptjax.server import app as app_lib
from gptjax.server import limits as limits_lib
from gptjax.server import models as models_lib
from gptjax.server.limits import Limits
from gptjax.server.models import Models
from gptjax.server.served import EngineOptions

HELLO = [{"role": "user", "content": "hello"}]


def test_an_embedding_is_the_mean_of_the_final_states(client, models):
    model = models.find("text")
    ids = [1, 2, 3, 200]
    answer = client.post("/v1/embeddings", json={"model": "text", "input": [ids, [5, 6, 7, 8]]}).json()
    architecture = model.model.architecture
    params = {**model.model.params, "blocks": jax.tree.map(lambda *x: jnp.stack(x), *model.model.params["blocks"])}
    hidden, _ = gpt.bind(architecture, params).hidden(jnp.array([ids]), positions=jnp.arange(4)[None])
    expected = np.asarray(hidden)[0].mean(0)
    np.testing.assert_allclose(answer["data"][0]["embedding"], expected / np.linalg.norm(expected), atol=1e-5)
    assert [one["index"] for one in answer["data"]] == [0, 1] and answer["usage"]["total_tokens"] == 8
    coded = client.post("/v1/embeddings", json={"model": "text", "input": ids, "encoding_format": "base64"}).json()
    floats = np.frombuffer(base64.b64decode(coded["data"][0]["embedding"]), "<f4")
    np.testing.assert_array_equal(floats, np.float32(answer["data"][0]["embedding"]))
    for body in ({"input": [300]}, {"input": "a", "dimensions": 3}, {"input": []}, {"input": [65] * 129}):
        assert client.post("/v1/embeddings", json={"model": "text", **body}).status_code == 400


def test_tokens_there_and_back(client, models):
    text = "naïve 你好"
    tokens = client.post("/tokenize", json={"model": "text", "prompt": text, "add_special_tokens": False}).json()[
        "tokens"
    ]
    assert bytes(tokens).decode() == text
    assert client.post("/detokenize", json={"model": "text", "tokens": tokens}).json() == {"prompt": text}
    with_begin = client.post("/tokenize", json={"model": "text", "prompt": text}).json()
    assert with_begin["tokens"] == [256, *tokens] and with_begin["max_model_len"] == 128
    info = client.get("/tokenizer_info").json()
    assert info["eos_token"] == info["bos_token"] == "<|endoftext|>" and "im_start" in info["chat_template"]
    end = client.post("/tokenize", json={"prompt": info["eos_token"], "add_special_tokens": False}).json()
    assert end["tokens"] == [256]
    assert client.post("/detokenize", json={"tokens": [5000]}).status_code == 400
    rendered = client.post("/apply-template", json={"messages": HELLO}).json()["prompt"]
    assert rendered == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


def test_an_answer_goes_on_where_the_last_message_is_the_assistants(client, models):
    begun = [*HELLO, {"role": "assistant", "content": "Well,"}]
    tokens = client.post("/tokenize", json={"messages": begun}).json()["tokens"]
    assert models.find("chat").tokenizer.decode(tokens).endswith("hello\nassistant\nWell,")


def test_a_model_of_text_has_no_dialogues(client):
    answer = client.post("/v1/chat/completions", json={"model": "text", "messages": HELLO})
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "no_template"


@pytest.mark.parametrize(
    "form",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["a", "b"]}}}},
        {"guided_json": {"enum": ["a", "b"]}},
        {"guided_regex": '"[ab]"'},
    ],
)
def test_an_answer_in_a_given_form(client, form):
    answer = client.post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 9, **form}).json()
    assert json.loads(answer["choices"][0]["message"]["content"]) in ("a", "b")
    assert answer["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    "form",
    [
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "nonsense"}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 3}}}},
        {"guided_regex": "(a"},
    ],
)
def test_a_form_that_is_none(client, form):
    answer = client.post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 9, **form})
    assert answer.status_code == 400 and answer.json()["error"]["message"]


def test_the_prefix_of_a_dialogue_is_counted_as_cached(client):
    long = [{"role": "user", "content": "cached? " * 6}]
    first = client.post("/v1/chat/completions", json={"messages": long, "max_tokens": 3, "seed": 1}).json()
    turns = [*long, first["choices"][0]["message"] | {"content": "ok"}, {"role": "user", "content": "more"}]
    second = client.post("/v1/chat/completions", json={"messages": turns, "max_tokens": 3}).json()
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= 64


def test_the_description_has_all_paths_that_take_a_body(client):
    described = client.get("/openapi.json").json()
    taken = {path: methods for path, methods in described["paths"].items() if "post" in methods}
    routes = [route for route in client.app._app.routes if "POST" in route.methods]
    assert {route.path for route in routes} == set(taken)
    known = described["components"]["schemas"]
    for path, methods in taken.items():
        name = methods["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        wrong = client.post(path, json={key: {"no": "such value"} for key in known[name]["properties"]})
        assert known[name]["properties"] and wrong.status_code == 400, path
        assert known["Error"]["properties"]["error"]["required"] == list(wrong.json()["error"])
    assert all(client.get(path).status_code == 200 for path in set(described["paths"]) - set(taken))


def test_metrics(client):
    client.post("/v1/completions", json={"model": "text", "prompt": "a", "max_tokens": 3})
    client.post("/v1/completions", content=b"{")
    text = client.get("/metrics").text
    for line in (
        'gptjax_requests_total{model="text"} 1.0',
        'gptjax_slots{model="text"} 4.0',
        'gptjax_used_slots{model="text"} 0.0',
        'gptjax_waiting_requests{model="chat"} 0.0',
        'gptjax_time_to_first_token_seconds_count{model="text"} 1.0',
        'gptjax_errors_total{code="",status="400",type="invalid_request_error"} 1.0',
    ):
        assert line in text
    assert re.search(r'gptjax_generated_tokens_total{model="text"} [1-3]\.0', text)


def test_every_answer_has_an_id(client):
    assert client.get("/health").headers["x-request-id"].startswith("req_")
    assert client.get("/nowhere", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert client.get("/health", headers={"x-request-id": "a b\tc"}).headers["x-request-id"].startswith("req_")


def test_keys(models, make_client, tmp_path):
    path = tmp_path / "keys.txt"
    path.write_text("# ours\nfirst\n\nsecond\n")
    path.chmod(0o644)
    with pytest.raises(UserError, match="can be read by others; chmod 600"):
        limits_lib.read_keys(path)
    path.chmod(0o600)
    client = make_client(models, keys=limits_lib.read_keys(path))
    for key, status in (("first", 200), ("second", 200), ("", 401), ("third", 401), ("# ours", 401), ("é", 401)):
        answer = client.get("/v1/models", headers={"authorization": f"Bearer {key}".encode()})
        assert answer.status_code == status, key
    error = client.get("/metrics").json()["error"]
    assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
    assert client.get("/health").status_code == 200 == client.get("/ready").status_code
    path.write_text("# none\n")
    with pytest.raises(UserError, match="has no key"):
        limits_lib.read_keys(path)


def test_a_body_that_is_too_large(models, make_client):
    client = make_client(models, Limits(body_bytes=1000))
    for content in (b"x" * 1001, iter([b"x" * 600] * 2)):
        answer = client.post("/v1/completions", content=content)
        assert answer.status_code == 413 and answer.json()["error"]["code"] == "request_too_large"


def test_more_answers_than_the_limit(models, make_client):
    client = make_client(models, Limits(prompts=4))
    answer = client.post("/v1/completions", json={"model": "text", "prompt": ["a", "b"], "n": 3, "max_tokens": 1})
    assert answer.status_code == 400 and "at most 4" in answer.json()["error"]["message"]


def test_an_answer_that_takes_too_long(models, make_client, read_stream):
    client = make_client(models, Limits(seconds=0.0))
    ask = {"model": "text", "prompt": "a", "ignore_eos": True}
    answer = client.post("/v1/completions", json=ask)
    assert answer.status_code == 408 and answer.json()["error"]["code"] == "request_timeout"
    assert (
        read_stream(client.post("/v1/completions", json=ask | {"stream": True}))[-1]["error"]["code"]
        == "request_timeout"
    )


def test_a_full_queue_is_429_and_leaves_nothing_behind(make_served, make_client):
    model = make_served("text", options=EngineOptions(slots=1, chunk=16, max_waiting=3))
    model.start(warm_up=False)
    client = make_client(Models([model]))
    several = client.post("/v1/completions", json={"prompt": "a", "n": 9, "ignore_eos": True})
    assert several.status_code == 400, "more than the queue could ever hold"
    others = []
    with pytest.raises(Busy):
        while True:
            others.append(model.pump.submit([1], SamplingParams(max_new_tokens=100, ignore_eos=True)))
    answer = client.post("/v1/completions", json={"prompt": "a", "n": 3, "ignore_eos": True})
    for stream in others:
        stream.cancel()
        list(stream)
    assert answer.status_code == 429 and answer.json()["error"]["code"] == "queue_full"
    assert 0 < int(answer.headers["retry-after"]) <= 120
    assert client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200
    model.close(0)
    closed = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})
    assert closed.status_code == 503 and closed.json()["error"]["code"] == "shutting_down"
    assert client.get("/ready").status_code == 503 and client.get("/health").status_code == 200


def test_closing_finishes_a_running_answer(make_served, make_client):
    model = make_served("text")
    model.start(warm_up=False)
    client = make_client(Models([model]))
    ask = {"prompt": "a", "seed": 1, "ignore_eos": True}
    expected = client.post("/v1/completions", json=ask).json()["choices"]
    answers = []
    thread = threading.Thread(target=lambda: answers.append(client.post("/v1/completions", json=ask)))
    thread.start()
    while not model.engine.busy and not answers:
        time.sleep(0.001)
    model.close(60)
    thread.join()
    assert answers[0].json()["choices"] == expected


def test_prompts_are_in_no_log_unless_asked_for(models, make_client, caplog):
    ask = {"model": "text", "prompt": "my secret", "max_tokens": 1}
    with caplog.at_level("DEBUG"):
        make_client(models).post("/v1/completions", json=ask)
        assert "my secret" not in caplog.text
        make_client(models, Limits(log_prompts=True)).post("/v1/completions", json=ask)
    assert "my secret" in caplog.text


def test_what_a_vocabulary_lacks_is_told_in_the_log(models, make_client, caplog, monkeypatch):
    words = {"<|endoftext|>": 0, "[UNK]": 1, "moon": 2}
    vocabulary = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    vocabulary.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    vocabulary.add_special_tokens(["<|endoftext|>", "[UNK]"])
    tokenizer = Tokenizer.from_str(vocabulary.to_str(), eot_token="<|endoftext|>")
    monkeypatch.setattr(models.find("text"), "tokenizer", tokenizer)
    for prompt, limits, told in (
        ("moon", Limits(), []),
        ("moon 月 月", Limits(), ["text: the vocabulary lacks 2 pieces of a prompt, which --log_prompts names: "]),
        ("moon 月 月", Limits(log_prompts=True), ["text: the vocabulary lacks 月: the model reads [UNK] there"]),
    ):
        caplog.clear()
        ask = {"model": "text", "prompt": prompt, "max_tokens": 1}
        assert make_client(models, limits).post("/v1/completions", json=ask).status_code == 200
        warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert len(warnings) == len(told)
        assert all(warning.startswith(beginning) for warning, beginning in zip(warnings, told, strict=True))


def test_the_page_may_load_nothing_from_elsewhere(client, models, make_client, monkeypatch, tmp_path):
    monkeypatch.setattr(app_lib, "PAGE", tmp_path / "page")
    assert client.get("/").status_code == 404
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "index.html").write_text("<p>hi")
    (tmp_path / "page" / "chat.js").write_text("1")
    (tmp_path / "secret").write_text("no")
    client = make_client(models, keys=["k"])
    answer = client.get("/")
    assert answer.text == "<p>hi" and answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert client.get("/chat.js").headers["content-type"].startswith("text/javascript")
    for path in ("/../secret", "/..%2fsecret", "/%2e%2e/secret", "/page"):
        assert client.get(path).status_code in (401, 404)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a=runs/x", ("a", "runs/x")),
        ("runs/x", ("x", "runs/x")),
        ("hf:models/gpt2", ("gpt2", "hf:models/gpt2")),
        ("a=hf:b=c", ("a", "hf:b=c")),
    ],
)
def test_a_model_has_a_name(text, expected):
    assert models_lib.parse(text) == expected


@pytest.mark.parametrize("text", ["=runs/x", "a=", ""])
def test_a_model_without_a_name_or_a_directory(text):
    with pytest.raises(UserError, match="expected NAME=DIR"):
        models_lib.parse(text)


def test_the_memory_of_a_model_is_that_of_its_arrays(models):
    model = models.find("text")
    bytes_of = sum(leaf.nbytes for leaf in jax.tree.leaves(model.model.params))
    while model.engine._state is None:
        time.sleep(0.01)
    state = sum(leaf.nbytes for leaf in jax.tree.leaves(model.engine._state))
    taken = {one.name: one for one in models.taken}["text"]
    assert (taken.parameters, taken.shared) == (bytes_of, 0)
    assert taken.state == pytest.approx(state, rel=0.01)
