"""/v1/responses: what the openai package and Codex read."""

import json

import pytest

ASK = {"model": "chat", "input": "hello", "max_output_tokens": 6, "seed": 3}
REQUIRED = {"id", "created_at", "model", "object", "output", "parallel_tool_calls", "tool_choice", "tools", "usage"}


def events_of(response) -> list[dict]:
    frames = response.text.split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""]
    events = []
    for frame in frames[:-2]:
        name, data = frame.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def test_the_order_of_events(client):
    events = events_of(client.post("/v1/responses", json=ASK | {"stream": True}))
    kinds = [event["type"].removeprefix("response.") for event in events]
    deltas = [kind for kind in kinds if kind == "output_text.delta"]
    assert kinds == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *deltas,
        *("output_text.done", "content_part.done", "output_item.done", "completed"),
    ]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    for event in events:
        if event["type"].startswith(("response.output_text", "response.content_part")):
            assert (event["output_index"], event["content_index"]) == (0, 0)
    text = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    whole = client.post("/v1/responses", json=ASK).json()
    last = events[-1]["response"]
    assert whole["output"][0]["content"][0]["text"] == text == last["output"][0]["content"][0]["text"]
    for response in (whole, last, events[0]["response"], events[1]["response"]):
        assert response.keys() >= REQUIRED and response["object"] == "response"
    assert whole["usage"]["output_tokens"] == 6 and whole["usage"].keys() == {
        *("input_tokens", "input_tokens_details", "output_tokens", "output_tokens_details", "total_tokens")
    }
    assert whole["status"] == "incomplete" and whole["incomplete_details"] == {"reason": "max_output_tokens"}


def test_a_schema_ends_by_itself(client):
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    text = {"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}}
    answer = client.post("/v1/responses", json=ASK | {"text": text, "max_output_tokens": 40}).json()
    assert answer["status"] == "completed" and json.loads(answer["output"][0]["content"][0]["text"])["a"] in (1, 2)
    *_, last = events_of(
        client.post("/v1/responses", json=ASK | {"text": text, "max_output_tokens": 40, "stream": True})
    )
    assert last["type"] == "response.completed"


def test_items_are_messages(client):
    parts = [{"type": "input_text", "text": "hello"}]
    items = [{"type": "message", "role": "user", "content": parts}]
    assert (
        client.post("/v1/responses", json=ASK | {"input": items}).json()["output"][0]["content"]
        == (client.post("/v1/responses", json=ASK).json()["output"][0]["content"])
    )
    merged = [{"role": "developer", "content": "b"}, *items, {"type": "reasoning", "summary": []}]
    tools = [{"type": "web_search"}, {"type": "custom", "name": "x"}]
    answer = client.post("/v1/responses", json=ASK | {"input": merged, "instructions": "a", "tools": tools})
    assert answer.status_code == 200 and answer.json()["tools"] == []


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"type": "image_generation_call"}]}, "input"),
        ({"input": [{"role": 3, "content": "x"}]}, "input"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"input": "x" * 500}, "input"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format"),
    ],
)
def test_what_is_not_done_is_refused(client, change, param):
    response = client.post("/v1/responses", json=ASK | change)
    assert response.status_code == 400 and response.json()["error"]["param"] == param
