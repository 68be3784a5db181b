"""A random model, constrained by a grammar token by token, writes text of the grammar."""

import json
import re

import numpy as np
import pytest

from gptjax.data.tokenization.tokenizer import build_tokenizer
from gptjax.errors import UserError
from gptjax.generation.engine import Engine, Model
from gptjax.generation.params import SamplingParams

pytest.importorskip("llguidance")

from gptjax.generation.constraints import Grammar

BYTES = build_tokenizer("byte")
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["ann", "bob"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_json_beside_free_text(random_model):
    engine = Engine(Model.prepare(*random_model()), BYTES, slots=3, end_ids=[BYTES.eot_id])
    grammars = [Grammar.of_schema(BYTES, SCHEMA), Grammar.of_regex(BYTES, "[a-c]{3}-[0-9]{2}"), None]
    prompt, params = np.arange(5, dtype=np.int32), SamplingParams(max_new_tokens=50)
    for grammar in grammars:
        engine.submit(prompt, params, index=7, constraint=grammar and grammar.start())
    events = {handle: [] for handle in range(3)}
    while engine.busy:
        for event in engine.step():
            events[event.handle].append(event)
    texts = ["".join(event.text for event in own) for own in events.values()]
    person = json.loads(texts[0])
    assert person["name"] in ("ann", "bob") and 0 <= person["age"] <= 99
    assert re.fullmatch("[a-c]{3}-[0-9]{2}", texts[1])
    assert [own[-1].finish_reason for own in events.values()][:2] == ["stop", "stop"]
    free = Engine(Model.prepare(*random_model()), BYTES, slots=1, end_ids=[BYTES.eot_id])
    free.submit(prompt, params, index=7)
    expected = []
    while free.busy:
        expected += [token for event in free.step() for token in event.tokens]
    assert [token for event in events[2] for token in event.tokens] == expected, "the others do not change it"


@pytest.mark.parametrize("spec", ["char", "bpe:300"])
def test_every_kind_of_vocabulary(spec):
    tokenizer = build_tokenizer(spec, ["hello world 0123 " * 20])
    follower = Grammar.of_regex(tokenizer, "[0-9]+").start()
    first = np.flatnonzero(follower.allowed(512))
    assert {tokenizer.decode([token]) for token in first} >= set("0123") and tokenizer.eot_id not in first
    follower.advance(int(tokenizer.encode("1")[0]))
    assert follower.allowed(512)[tokenizer.eot_id]


@pytest.mark.parametrize("schema", [{"type": "nonsense"}, {"type": "object", "properties": 3}, {"$ref": "#/nowhere"}])
def test_a_schema_that_is_none(schema):
    with pytest.raises(UserError, match="the grammar of the answer is refused"):
        Grammar.of_schema(BYTES, schema)


def test_a_regex_that_is_none():
    with pytest.raises(UserError, match=r"the grammar of the answer is refused.*unclosed group"):
        Grammar.of_regex(BYTES, "(a")
