"""Unmodified client packages with a live server."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import config as config_lib
from gptjax.parallel.mesh import make_mesh
from gptjax.server.models import Models

SCRIPT = """
import json, sys
from openai import OpenAI, BadRequestError, NotFoundError
client = OpenAI(base_url=sys.argv[1] + "/v1", api_key="key", max_retries=0)
hello = [{"role": "user", "content": "hello"}]
ask = dict(model="chat", messages=hello, max_tokens=8, seed=1)
whole = client.chat.completions.create(**ask, logprobs=True, top_logprobs=2)
assert whole.choices[0].message.role == "assistant"
assert len(whole.choices[0].logprobs.content) == whole.usage.completion_tokens
pieces = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == whole.choices[0].message.content
assert pieces[-1].usage.total_tokens == whole.usage.total_tokens
completion = client.completions.create(model="text", prompt=["a", "b"], max_tokens=3, echo=True, logprobs=1, seed=1)
assert [c.text[0] for c in completion.choices] == ["a", "b"]
assert completion.choices[0].logprobs.token_logprobs[0] is None
response = client.responses.create(model="chat", input="hello", max_output_tokens=8)
with client.responses.stream(model="chat", input="hello", max_output_tokens=8) as stream:
    kinds = [event.type for event in stream]
    final = stream.get_final_response()
assert kinds[0] == "response.created" and final.output_text is not None and response.output_text is not None
schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
formed = client.chat.completions.create(**ask | {"max_tokens": 30}, response_format=form)
assert json.loads(formed.choices[0].message.content)["a"] in (1, 2)
embedding = client.embeddings.create(model="text", input=["abc", "d"])
assert abs(sum(x * x for x in embedding.data[0].embedding) - 1) < 1e-4
assert [m.id for m in client.models.list()] == ["chat", "text"] and client.models.retrieve("text").id == "text"
for error, change in ((BadRequestError, {"max_tokens": 0}), (NotFoundError, {"model": "none"})):
    try:
        client.chat.completions.create(**ask | change)
    except error as refused:
        assert refused.body["message"] and refused.request_id
    else:
        raise AssertionError(error)
print("fine")
"""


LITELLM = """
import sys, litellm
litellm.suppress_debug_info = True
hello = [{"role": "user", "content": "hello"}]
server = dict(api_base=sys.argv[1] + "/v1", api_key="key", max_retries=0, num_retries=0)
ask = dict(model="openai/chat", messages=hello, max_tokens=8, seed=1, **server)
whole = litellm.completion(**ask, logprobs=True, top_logprobs=2)
text = whole.choices[0].message.content
assert len(whole.choices[0].logprobs.content) == whole.usage.completion_tokens
pieces = list(litellm.completion(**ask, stream=True, stream_options={"include_usage": True}))
assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == text
reasons = {piece.choices[0].finish_reason for piece in pieces if piece.choices} - {None}
assert reasons == {whole.choices[0].finish_reason}
assert litellm.stream_chunk_builder(pieces).usage.total_tokens == whole.usage.total_tokens
completion = litellm.text_completion(model="text-completion-openai/text", prompt="a", max_tokens=3, seed=1, **server)
assert completion.choices[0].text and completion.usage.completion_tokens == 3
embedding = litellm.embedding(model="openai/text", input=["abc"], encoding_format="float", **server)
assert abs(sum(x * x for x in embedding.data[0]["embedding"]) - 1) < 1e-4
response = litellm.responses(model="openai/chat", input="hello", max_output_tokens=8, **server)
assert response.output[0].content[0].text
long = [{"role": "user", "content": "x" * 500}]
for error, change in (
    (litellm.BadRequestError, {"temperature": -1}),
    (litellm.NotFoundError, {"model": "openai/none"}),
    (litellm.ContextWindowExceededError, {"messages": long}),
):
    try:
        litellm.completion(**ask | change)
    except error as refused:
        assert refused.message
    else:
        raise AssertionError(error)
print("fine")
"""


def check(python: str, address: str, script: str = SCRIPT) -> None:
    local = {"LITELLM_LOCAL_MODEL_COST_MAP": "true"}  # nothing is asked of anybody else
    environment = {**os.environ, "PYTHONPATH": "", "NO_PROXY": "*", **local}
    answer = subprocess.run(
        [python, "-c", script, address], capture_output=True, text=True, timeout=120, env=environment, check=False
    )
    assert answer.stdout == "fine\n", answer.stderr


def test_the_openai_package_unmodified(models, live):
    """The version in this environment, and those of GPTJAX_OPENAI_PYTHONS (interpreters separated by ":")."""
    others = [path for path in os.environ.get("GPTJAX_OPENAI_PYTHONS", "").split(":") if path]
    if not others:
        pytest.importorskip("openai")
        others = [sys.executable]
    address = live(models)
    for python in others:
        check(python, address)


@pytest.mark.slow
def test_litellm_as_a_client(models, live):
    """It converts OpenAI's errors, such as that of a prompt that is too long, to its own."""
    if importlib.util.find_spec("litellm") is None:  # to import it takes seconds, and asks its maker for prices
        pytest.skip("there is no litellm")
    check(sys.executable, live(models), LITELLM)


@pytest.mark.slow
def test_schemathesis_finds_no_answer_5xx(make_served, live, tmp_path):
    """Requests that the schemas of /openapi.json allow, and others."""
    if importlib.util.find_spec("schemathesis") is None:
        pytest.skip("there is no schemathesis")
    models = Models([make_served("chat"), make_served("text")])
    for model in models:
        model.start(warm_up=False)
    address = live(models, preferences=tmp_path / "choices.jsonl")
    command = [sys.executable, "-m", "schemathesis.cli", "run", address + "/openapi.json", "--no-color"]
    command += ["--checks=not_a_server_error", "--phases=examples,coverage,fuzzing", "--max-examples=10"]
    command += ["--seed=1", "--generation-deterministic", "--request-timeout=60"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert int(re.search(r"(\d+) generated, \1 passed", answer.stdout)[1]) > 500, answer.stdout
    assert all(model.load[:2] == (0, 0) and model.pump.alive for model in models)
    for model in models:
        model.close(0)


TASK = """
task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: {target}
metric_list: [{metrics}]
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "target", "metrics"),
    [
        ("multiple_choice", "label", "{metric: acc}, {metric: acc_norm}"),
        (
            "loglikelihood_rolling",
            '"{{question}} {{choices[0]}}"',
            "{metric: bits_per_byte}, {metric: byte_perplexity}",
        ),
    ],
)
def test_lm_eval_scores_through_the_server_as_evaluate_does(models, live, tmp_path, kind, target, metrics):
    """local-completions without its own tokenizer uses the server's. Equal to the digits that lm-eval prints."""
    lm_eval = pytest.importorskip("lm_eval")
    pytest.importorskip("tenacity")
    from lm_eval.tasks import TaskManager

    from gptjax.evaluation.continuations import ContinuationScorer
    from gptjax.evaluation.harness import CheckpointLM, _task_of_file, run

    rng = np.random.default_rng(0)
    words = ["alpha", "be", "gamma ray", "d"]
    rows = [
        {"question": f"{' '.join(rng.choice(words, 3))}?", "choices": [f"{w} {i % 7}" for w in words], "label": i % 4}
        for i in range(30)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = tmp_path / "tiny.yaml"
    task.write_text(TASK.format(file=tmp_path / "rows.jsonl", kind=kind, target=target, metrics=metrics))
    model = models.find("text")
    stacked = {**model.model.params, "blocks": jax.tree.map(lambda *x: jnp.stack(x), *model.model.params["blocks"])}
    mesh = make_mesh(config_lib.get_default().mesh, devices=jax.devices()[:1])
    scorer = ContinuationScorer(model.model.architecture, stacked, mesh, batch_size=4)
    ours = run(str(task), CheckpointLM(scorer, model.tokenizer, lambda *_, **__: []))
    theirs = lm_eval.simple_evaluate(
        "local-completions",
        model_args=f"base_url={live(models)}/v1/completions,model=text,max_length=128,num_concurrent=2,max_retries=1",
        tasks=[_task_of_file(task)],
        task_manager=TaskManager(include_path=str(tmp_path)),
        bootstrap_iters=0,
    )
    found = theirs["results"]["tiny"]
    assert len(ours.metrics) >= 2
    for name, metric in ours.metrics.items():
        assert f"{found[f'{name},none']:.4f}" == f"{metric.value:.4f}", name
