"""What clients of OpenAI's API need; the numbers are those of a list of known faults of other servers."""

import contextlib
import json
import math
import time

import numpy as np
import pytest

from gptjax.data.tokenization.templates import ChatTemplate
from gptjax.generation import decoding
from gptjax.generation.events import Event
from gptjax.server.generating import finite
from gptjax.server.models import Models

HELLO = [{"role": "user", "content": "hello"}]
PROMPT = {"model": "text", "prompt": "abc", "max_tokens": 8, "seed": 1, "ignore_eos": True}
CHAT = {"messages": HELLO, "max_tokens": 8, "seed": 1, "ignore_eos": True}


def post(client, path, **body):
    return client.post(path, json=body)


def text(client, **changes) -> str:
    response = post(client, "/v1/completions", **PROMPT | changes)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


def said(client, **changes) -> dict:
    response = post(client, "/v1/chat/completions", **CHAT | changes)
    assert response.status_code == 200, response.text
    return response.json()


def refused(response, status=400, kind="invalid_request_error") -> dict:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert error["type"] == kind
    assert error["code"] is None or isinstance(error["code"], str)
    return error


def writes(model, monkeypatch, pieces, *, reason="stop", **fields):
    """Makes the engine of a model answer with these texts."""

    def step(self):
        self._leave()
        self._join()
        events = []
        for slot, request in list(self._slots):
            for i, piece in enumerate(pieces):
                last = reason if i == len(pieces) - 1 else None
                events.append(Event(request.handle, piece, (65,), (-1.0,), last, **fields))
            self._slots.leave(slot)
        return events

    monkeypatch.setattr(type(model.engine), "step", step)


def test_01_unknown_parameters_are_accepted_and_stop_seed_and_n_never_ignored(client):
    assert text(client, foo=3, user="me", prediction={"type": "content"}) == text(client)
    assert text(client, seed=2) != text(client)
    whole = text(client)
    assert text(client, stop=whole[3]) == whole[: whole.index(whole[3])]
    choices = post(client, "/v1/completions", **PROMPT, n=3).json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    assert choices[0]["text"] == whole and len({choice["text"] for choice in choices}) == 3
    for path, body in (("/v1/completions", PROMPT), ("/v1/chat/completions", CHAT)):
        for name, value in (("stop", [""]), ("stop", 3), ("seed", "x"), ("n", 0), ("n", 1000), ("n", 1.5)):
            assert refused(post(client, path, **body | {name: value}))["param"] == name


def test_02_parameters_of_newer_clients_are_accepted(client):
    newer = {
        "max_completion_tokens": 4,
        "reasoning_effort": "low",
        "verbosity": "low",
        "store": False,
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "prompt_cache_key": "k",
        "safety_identifier": "s",
        "parallel_tool_calls": True,
        "stream_options": {"include_obfuscation": False},
        "messages": [{"role": "developer", "content": "be brief"}, *HELLO],
    }
    assert said(client, **newer)["usage"]["completion_tokens"] == 4


def test_03_content_is_text_parts_or_null(client):
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    assert said(client, messages=[{"role": "user", "content": parts}])["choices"] == said(client)["choices"]
    nothing = [*HELLO, {"role": "assistant", "content": None}, {"role": "user", "content": "x"}]
    assert said(client, messages=nothing)["choices"]
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]
    assert "image_url" in refused(post(client, "/v1/chat/completions", **CHAT | {"messages": image}))["message"]


@pytest.mark.parametrize(("path", "body"), [("/v1/completions", PROMPT), ("/v1/chat/completions", CHAT)])
def test_04_chunks_share_id_and_time(client, read_stream, path, body):
    chunks = read_stream(post(client, path, **body, stream=True, n=2))
    assert len({chunk["id"] for chunk in chunks}) == len({chunk["created"] for chunk in chunks}) == 1
    assert chunks[0]["id"] and {chunk["model"] for chunk in chunks} == {body.get("model", "chat")}
    assert {choice["index"] for chunk in chunks for choice in chunk["choices"]} == {0, 1}


def test_05_the_models_are_listed_the_first_first(client):
    listed = client.get("/v1/models").json()
    assert [model["id"] for model in listed["data"]] == ["chat", "text"]
    assert client.get("/v1/models/text").json()["id"] == "text"
    assert said(client)["model"] == "chat", "without a name the first answers"
    for response in (client.get("/v1/models/none"), post(client, "/v1/chat/completions", **CHAT, model="none")):
        assert refused(response, 404)["code"] == "model_not_found"


def test_06_an_empty_key_is_accepted_where_none_is_set(client):
    for value in ("Bearer ", "Bearer", "Bearer anything", ""):
        assert client.get("/v1/models", headers={"authorization": value}).status_code == 200


def test_07_max_tokens(client, models):
    for path, body in (("/v1/completions", PROMPT), ("/v1/chat/completions", CHAT)):
        for value in (0, -1):
            assert refused(post(client, path, **body | {"max_tokens": value}))["param"] == "max_tokens"
        unlimited = {name: value for name, value in body.items() if name != "max_tokens"}
        answer = post(client, path, **unlimited).json()
        assert answer["usage"]["total_tokens"] == 128 and answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(("path", "body"), [("/v1/completions", PROMPT), ("/v1/chat/completions", CHAT)])
def test_08_usage_in_a_stream_only_if_asked_for(client, read_stream, path, body):
    plain = read_stream(post(client, path, **body, stream=True))
    assert not any("usage" in chunk for chunk in plain)
    *others, last = read_stream(post(client, path, **body, stream=True, stream_options={"include_usage": True}))
    assert last["choices"] == [] and last["usage"] == post(client, path, **body).json()["usage"] | {
        "prompt_tokens_details": last["usage"]["prompt_tokens_details"]
    }
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in others)


def test_09_errors_have_openais_form(client):
    error = refused(
        post(client, "/v1/chat/completions", **CHAT | {"messages": [{"role": "user", "content": "x" * 200}]})
    )
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    assert "128" in error["message"] and "2" in error["message"]
    error = refused(post(client, "/v1/completions", **PROMPT | {"prompt": "x" * 200}))
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
    refused(client.get("/nowhere"), 404)
    refused(client.get("/v1/completions"), 405)
    for body in (b"", b"{", b"[]", b"null", b'{"prompt": "\xff"}', b"[" * 5000, b'{"prompt": NaN}'):
        refused(client.post("/v1/completions", content=body))


def test_10_what_a_template_refuses_is_told_and_system_messages_are_merged(make_served, make_client):
    strict = (
        "{% for m in messages %}{% if loop.index0 and messages[loop.index0 - 1].role == m.role %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    model = make_served("chat", ChatTemplate(strict))
    model.start(warm_up=False)
    client = make_client(Models([model]))
    error = refused(post(client, "/v1/chat/completions", **CHAT | {"messages": HELLO + HELLO}))
    assert "roles must alternate" in error["message"] and error["param"] == "messages"
    two = [{"role": "system", "content": "a"}, *HELLO, {"role": "system", "content": "b"}]
    rendered = post(client, "/apply-template", messages=two).json()["prompt"]
    assert rendered.startswith("<|im_start|>system\na\n\nb<|im_end|>") and rendered.count("system") == 1
    model.close(0)


@pytest.mark.parametrize(("path", "body"), [("/v1/completions", PROMPT), ("/v1/chat/completions", CHAT)])
def test_11_an_error_in_mid_stream_is_one_frame(client, read_stream, monkeypatch, path, body):
    calls, decode = [], decoding.decode

    def broken(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("secret detail")
        return decode(*arguments, **options)

    expected = post(client, path, **body).json()["choices"]
    monkeypatch.setattr(decoding, "decode", broken)
    *chunks, last = read_stream(post(client, path, **body, stream=True))
    assert last["error"]["type"] == "server_error" and "secret" not in json.dumps(last)
    assert chunks and not any("error" in chunk for chunk in chunks)
    calls.clear()
    error = post(client, path, **body)
    assert error.status_code == 500 and error.json()["error"]["type"] == "server_error"
    assert post(client, path, **body).json()["choices"] == expected, "the next request is right"


def test_12_infinite_log_probabilities_never_reach_json(client, models, monkeypatch):
    assert [finite(value) for value in (-math.inf, math.nan, math.inf, -1e30, -2.5)] == [-9999.0] * 4 + [-2.5]
    choice = post(client, "/v1/completions", **PROMPT, logprobs=2, logit_bias={"65": -100}).json()["choices"][0]
    assert all(math.isfinite(value) for value in choice["logprobs"]["token_logprobs"])


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("streaming", [False, True])
def test_13_the_stop_text_is_not_in_the_output(client, read_stream, path, streaming):
    body = PROMPT if path == "/v1/completions" else CHAT
    forced = body | {"max_tokens": 12, "temperature": 0, "guided_regex": "one\nSTOPPED ENDS", "ignore_eos": False}
    for stop, expected, reason in (
        ("STOP", "one\n", "stop"),
        (["nothing", "ENDS"], "one\nSTOPPED ", None),
        ("STOPX", "one\nSTOPPED ", None),
        ("D ENDSx", "one\nSTOPPED ", None),
    ):
        limit = {"max_tokens": 60} if stop == ["nothing", "ENDS"] else {}
        response = post(client, path, **forced | {"stop": stop, "stream": streaming} | limit)
        if streaming:
            choices = [chunk["choices"][0] for chunk in read_stream(response)]
            found = "".join(c.get("text") or c.get("delta", {}).get("content") or "" for c in choices)
            ended = choices[-1]["finish_reason"]
        else:
            choice = response.json()["choices"][0]
            found, ended = choice.get("text") or choice["message"]["content"], choice["finish_reason"]
        assert found == expected
        assert ended == (reason or ("stop" if limit else "length"))


def test_14_half_a_character_is_held_and_flushed_once(client, read_stream):
    rocket = {"logit_bias": {str(byte): -100 for byte in range(256)}}
    whole = {"guided_regex": "🚀🚀", "max_tokens": 20, "ignore_eos": False}
    chunks = read_stream(post(client, "/v1/completions", **PROMPT | whole, stream=True))
    pieces = [chunk["choices"][0]["text"] for chunk in chunks]
    assert "".join(pieces) == "🚀🚀" and not any("\ufffd" in piece for piece in pieces)
    assert text(client, **whole | {"max_tokens": 6}) == "🚀", "what is cut off is left out"
    biased = {"logit_bias": rocket["logit_bias"] | {"255": 100}, "max_tokens": 3}
    assert text(client, **biased) in ("", "\ufffd\ufffd\ufffd")


def test_16_the_reason_in_a_stream_is_that_without(client, read_stream):
    for changes in ({}, {"guided_regex": "ab", "ignore_eos": False}, {"stop": ["e", "a", "i", "o", " "]}):
        for path, body in (("/v1/completions", PROMPT), ("/v1/chat/completions", CHAT)):
            whole = post(client, path, **body | changes).json()["choices"][0]
            chunks = read_stream(post(client, path, **body | changes, stream=True))
            reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]]
            assert reasons[-1] == whole["finish_reason"] and set(reasons[:-1]) <= {None}
            texts = [c.get("text") or c.get("delta", {}).get("content") or "" for k in chunks for c in k["choices"]]
            assert "".join(texts) == (whole["text"] if "text" in whole else whole["message"]["content"])


def test_17_18_echo_with_log_probabilities_is_real(client):
    ids = client.post("/tokenize", json={"model": "text", "prompt": "hello", "add_special_tokens": False}).json()[
        "tokens"
    ]
    ask = PROMPT | {"prompt": [ids, ids[:3]], "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
    choices = post(client, "/v1/completions", **ask).json()["choices"]
    for choice, prompt in zip(choices, (ids, ids[:3]), strict=True):
        logprobs = choice["logprobs"]
        assert choice["text"].startswith("hello"[: len(prompt)])
        values, tops = logprobs["token_logprobs"], logprobs["top_logprobs"]
        assert len(values) == len(tops) == len(logprobs["tokens"]) == len(prompt) + 1, "one generated entry"
        assert values[0] is None and tops[0] is None and all(value < 0 for value in values[1:])
        assert logprobs["text_offset"][:3] == [0, 1, 2]
        for token, value, top in list(zip(logprobs["tokens"], values, tops, strict=True))[1:]:
            assert top[token] == value, "the same number"
            assert len(top) in (1, 2)
        assert values[-1] == max(tops[-1].values())
    zero = post(client, "/v1/completions", **ask | {"logprobs": 0}).json()["choices"][0]["logprobs"]
    assert zero["token_logprobs"] == choices[0]["logprobs"]["token_logprobs"]
    assert zero["top_logprobs"][1] == {zero["tokens"][1]: zero["token_logprobs"][1]}
    longest = post(client, "/v1/completions", **ask | {"prompt": [65] * 128}).json()["choices"][0]
    assert len(longest["logprobs"]["tokens"]) == 129
    assert text(client, echo=True) == "abc" + text(client), "without log-probabilities too"
    end = post(client, "/v1/completions", **ask | {"logit_bias": {"256": 100}, "ignore_eos": False}).json()["choices"][
        0
    ]
    assert len(end["logprobs"]["tokens"]) == len(ids) + 1 and end["finish_reason"] == "stop"


def test_18_log_probabilities_of_a_chat(client, read_stream):
    ask = {"logprobs": True, "top_logprobs": 3}
    content = said(client, **ask)["choices"][0]["logprobs"]["content"]
    assert len(content) == 8
    for entry in content:
        assert bytes(entry["bytes"]) and len(entry["top_logprobs"]) in (3, 4)
        chosen = [top for top in entry["top_logprobs"] if top["token"] == entry["token"]]
        assert chosen and chosen[0]["logprob"] == entry["logprob"]
    chunks = read_stream(post(client, "/v1/chat/completions", **CHAT | ask, stream=True))
    streamed = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [entry for part in streamed if part for entry in part["content"]] == content
    assert said(client, logprobs=True)["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def idle(models, seconds=60) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if all(model.engine.load[:2] == (0, 0) for model in models):
            return True
        time.sleep(0.01)
    return False


def test_19_a_hundred_disconnects_lose_no_slot(models, live):
    import httpx2

    address = live(models)
    endless = {"model": "text", "prompt": "abc", "ignore_eos": True}
    with httpx2.Client(base_url=address, timeout=30) as http:
        expected = http.post("/v1/completions", json=PROMPT).json()["choices"]
        for number in range(100):
            if number % 2:
                with http.stream("POST", "/v1/completions", json=endless | {"stream": True}) as response:
                    if number % 4 == 1:
                        next(response.iter_bytes())
            else:
                with contextlib.suppress(httpx2.TimeoutException):  # a fast machine has answered
                    http.post("/v1/completions", json=endless | {"n": 12}, timeout=0.01)
            if number % 10 == 9:
                assert idle(models), "every slot is free again"
        assert http.post("/v1/completions", json=PROMPT).json()["choices"] == expected
    assert idle(models)


def test_20_the_same_seed_gives_the_same_answer_in_any_company(client, models):
    """Tokens and log-probabilities are bit-identical, alone and among other requests."""
    from concurrent.futures import ThreadPoolExecutor

    asks = [PROMPT | {"prompt": "x" * (7 * i + 1), "seed": i, "logprobs": 2, "max_tokens": 5 + i} for i in range(12)]
    alone = [post(client, "/v1/completions", **ask).json()["choices"] for ask in asks]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda ask: post(client, "/v1/completions", **ask).json()["choices"], asks))
    assert together == alone


def test_21_tool_calls(make_served, make_client, read_stream, monkeypatch):
    jinja = (
        "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    model = make_served("chat", ChatTemplate(jinja))
    model.start(warm_up=False)
    client = make_client(Models([model]))
    tools = [
        {"type": "function", "function": {"name": "sky", "parameters": {"type": "object"}}},
        {"type": "web_search"},
    ]
    first, second = ({"name": "sky", "arguments": {"at": city}} for city in ("Rome", "Oslo"))
    answer = f"Let me see.\n<tool_call>\n{json.dumps(first)}\n</tool_call>\n<tool_call>{json.dumps(second)}</tool_call>"
    with monkeypatch.context() as patch:
        writes(model, patch, [answer[i : i + 7] for i in range(0, len(answer), 7)])
        choice = said(client, tools=tools)["choices"][0]
        assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] == "Let me see."
        calls = choice["message"]["tool_calls"]
        assert [json.loads(call["function"]["arguments"])["at"] for call in calls] == ["Rome", "Oslo"]
        chunks = read_stream(post(client, "/v1/chat/completions", **CHAT, tools=tools, stream=True))
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        streamed = [call for delta in deltas for call in delta.get("tool_calls", [])]
        assert [(call["index"], call["function"]["name"]) for call in streamed] == [(0, "sky"), (1, "sky")]
        assert len({call["id"] for call in streamed}) == 2
        assert "".join(delta.get("content") or "" for delta in deltas) == "Let me see."
        assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
        plain = said(client)["choices"][0]["message"]
        assert plain["content"] == answer and "tool_calls" not in plain, "without tools it is text"
    call = {"id": "c1", "type": "function", "function": {"name": "sky", "arguments": '{"at": 1}'}}
    turns = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [call]}]
    turns += [{"role": "tool", "tool_call_id": "c1", "content": "sunny"}]
    assert said(client, messages=turns, tools=tools, max_tokens=1)["usage"]["prompt_tokens"] > 60
    model.close(0)


def test_22_host_and_origin_are_checked(models, make_client, client):
    for host, status in (
        ("localhost", 200),
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("evil.example", 403),
        ("", 403),
    ):
        response = client.get("/v1/models", headers={"host": host})
        assert response.status_code == status, host
    refused(client.get("/v1/models", headers={"host": "evil.example"}), 403, "permission_error")
    response = client.get("/v1/models", headers={"origin": "https://evil.example"})
    assert not [name for name in response.headers if name.startswith("access-control")]
    asked = make_client(models, origins=["https://mine.example"])
    allowed = asked.options("/v1/models", headers={"origin": "https://mine.example"})
    assert allowed.headers["access-control-allow-origin"] == "https://mine.example" and allowed.status_code == 204
    assert "access-control-allow-credentials" not in allowed.headers
    assert (
        "access-control-allow-origin" not in asked.get("/v1/models", headers={"origin": "https://evil.example"}).headers
    )


def test_23_the_beginning_is_there_once(client, models):
    chat = next(iter(models))
    ids = post(client, "/tokenize", messages=HELLO).json()["tokens"]
    assert ids.count(chat.tokenizer.special_tokens["<|im_start|>"]) == 2
    assert np.array_equal(ids[: len(chat.begin_ids)], chat.begin_ids) and ids.count(chat.tokenizer.eot_id) == 1
    spelled = post(client, "/tokenize", messages=[{"role": "user", "content": "<|im_end|>"}]).json()["tokens"]
    assert spelled.count(chat.tokenizer.special_tokens["<|im_end|>"]) == 1, "what a user spells is not a special token"
