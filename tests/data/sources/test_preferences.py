"""Preferences in every supported format, and the errors for bad records."""

import gzip
import json

import pytest

from gptjax.data.sources.base import Faults, Reading
from gptjax.data.sources.opening import open_source
from gptjax.data.sources.preferences import read_preferences
from gptjax.errors import UserError

Q, GOOD, BAD = "Is it?", "It is.", "No idea."
TURNS = [{"role": "user", "content": Q}]
SHAREGPT = [{"from": "human", "value": Q}]
EARLIER = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]


def answer(text):
    return {"role": "assistant", "content": text}


PAIRS = {
    "trl text": {"prompt": Q, "chosen": GOOD, "rejected": BAD},
    "trl messages": {"prompt": TURNS, "chosen": [answer(GOOD)], "rejected": [answer(BAD)]},
    "trl implicit": {"chosen": [*TURNS, answer(GOOD)], "rejected": [*TURNS, answer(BAD)]},
    "prompt twice": {"prompt": Q, "chosen": [*TURNS, answer(GOOD)], "rejected": [*TURNS, answer(BAD)]},
    "question": {"question": Q, "chosen": GOOD, "rejected": BAD, "chosen_score": 4.0},
    "hh": {"chosen": f"\n\nHuman: {Q}\n\nAssistant: {GOOD}", "rejected": f"\n\nHuman: {Q}\n\nAssistant: {BAD}"},
    "hh prompt": {"prompt": f"\n\nHuman: {Q}\n\nAssistant:", "chosen": GOOD, "rejected": BAD},
    "alpaca": {"instruction": "Is", "input": "it?", "chosen": GOOD, "rejected": BAD},
    "sharegpt": {
        "conversations": SHAREGPT,
        "chosen": {"from": "gpt", "value": GOOD},
        "rejected": {"from": "gpt", "value": BAD},
    },
    "ranking": {"instruction": Q, "input": "", "output": [GOOD, BAD], "history": []},
}
JUDGED = {
    "trl": {"prompt": Q, "completion": GOOD, "label": True},
    "trl messages": {"prompt": TURNS, "completion": [answer(GOOD)], "label": True},
    "alpaca": {"instruction": Q, "input": "", "output": GOOD, "kto_tag": True},
    "sharegpt": {"conversations": [*SHAREGPT, {"from": "gpt", "value": GOOD}], "kto_tag": True},
    "csv": {"prompt": Q, "completion": GOOD, "label": "True"},
}


def read(tmp_path, *records, on_error="raise", **reading):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    faults = Faults(on_error)
    return list(read_preferences(path, source="preference:p", faults=faults, reading=Reading(**reading))), faults


@pytest.mark.parametrize("format", PAIRS)
def test_a_pair_is_one_document_with_both_sides(tmp_path, format):
    (document,), faults = read(tmp_path, PAIRS[format])
    asked = "Is\nit?" if format == "alpaca" else Q
    prompt = {"role": "user", "content": asked}
    assert document["messages"] == [prompt, answer(GOOD)]
    assert document["rejected"] == [prompt, answer(BAD)]
    assert (document["id"], document["split_key"]) == ("p.jsonl:1", asked)
    assert not faults.notes


@pytest.mark.parametrize("format", JUDGED)
def test_a_judged_answer_has_a_label(tmp_path, format):
    (document,), _ = read(tmp_path, JUDGED[format])
    assert document["messages"] == [*TURNS, answer(GOOD)]
    assert document["label"] is True and "rejected" not in document
    tag = "kto_tag" if "kto_tag" in JUDGED[format] else "label"
    (document,), _ = read(tmp_path, JUDGED[format] | {tag: False})
    assert document["label"] is False


def test_turns_of_the_prompt_bear_no_loss(tmp_path):
    sides = {side: [*EARLIER, *TURNS, answer(text)] for side, text in (("chosen", GOOD), ("rejected", BAD))}
    hh = {
        side: f"\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: {Q}\n\nAssistant: {text}"
        for side, text in (("chosen", GOOD), ("rejected", BAD))
    }
    alpaca = {"instruction": Q, "history": [["Hi.", "Hello."]], "chosen": GOOD, "rejected": BAD}
    documents, _ = read(tmp_path, sides, hh, alpaca)
    for document in documents:
        assert [message.get("train", True) for message in document["messages"]] == [True, False, True, True]
        assert document["messages"][:3] == document["rejected"][:3]


def test_a_ranking_gives_every_pair_with_the_better_answer_first(tmp_path):
    documents, _ = read(tmp_path, {"instruction": Q, "output": ["a", "b", "c"]})
    said = [(d["messages"][-1]["content"], d["rejected"][-1]["content"]) for d in documents]
    assert said == [("a", "b"), ("a", "c"), ("b", "c")]
    assert [d["id"] for d in documents] == ["p.jsonl:1/1-2", "p.jsonl:1/1-3", "p.jsonl:1/2-3"]
    assert len({d["split_key"] for d in documents}) == 1


def test_a_tree_of_openassistant_gives_the_pairs_of_each_of_its_turns(tmp_path):
    def reply(text, role, rank=None, replies=(), **more):
        return {"text": text, "role": role, "rank": rank, "replies": list(replies), **more}

    second = reply("why?", "prompter", None, [reply("x", "assistant", 1), reply("y", "assistant", 0)])
    replies = [
        reply("b", "assistant", 1, [second]),
        reply("a", "assistant", 0),
        reply("z", "assistant", 2, deleted=True),
    ]
    documents, _ = read(tmp_path, {"message_tree_id": "1", "prompt": reply(Q, "prompter", None, replies)})
    said = [[m["content"] for m in d["messages"]] + [d["rejected"][-1]["content"]] for d in documents]
    assert said == [[Q, "a", "b"], [Q, "b", "why?", "y", "x"]]
    assert len({d["id"] for d in documents}) == 2


def test_a_system_text_and_speakers_are_read_as_in_dialogues(tmp_path):
    (document,), _ = read(tmp_path, {"system": "Be kind.", "question": Q, "chosen": GOOD, "rejected": BAD})
    assert document["messages"][0] == {"role": "system", "content": "Be kind."}
    twice = [{"from": "human", "value": "So."}, *SHAREGPT]
    record = {
        "conversations": twice,
        "chosen": {"from": "gpt", "value": GOOD},
        "rejected": {"from": "gpt", "value": BAD},
    }
    with pytest.raises(UserError, match="same_speaker=join"):
        read(tmp_path, record)
    (document,), _ = read(tmp_path, record, same_speaker="join")
    assert document["messages"][0]["content"] == f"So.\n\n{Q}"


BROKEN = {
    "are equal": {"prompt": Q, "chosen": GOOD, "rejected": GOOD},
    "chosen and rejected are equal": {"chosen": [*TURNS, answer(GOOD)], "rejected": [*TURNS, answer(GOOD)]},
    "one side is the beginning": {"chosen": [*TURNS, answer(GOOD), *TURNS], "rejected": [*TURNS, answer(GOOD)]},
    "a ranking needs two or more answers and has 1": {"instruction": Q, "output": [GOOD]},
    "answers 1 and 3 are equal": {"instruction": Q, "output": [GOOD, BAD, GOOD]},
    "rejected is missing or empty": {"prompt": Q, "chosen": GOOD, "rejected": ""},
    "answer 2 is empty": {"prompt": Q, "chosen": GOOD, "rejected": " "},
    "no prompt": {"chosen": GOOD, "rejected": BAD},
    'the label is "maybe"': {"prompt": Q, "completion": GOOD, "label": "maybe"},
    "the label is 2": {"prompt": Q, "completion": GOOD, "label": 2},
    "no answer to which the label belongs": {"prompt": Q, "label": True},
    "chosen is missing or empty; fields: 'prompt', 'response'": {"prompt": Q, "response": GOOD},
    "must begin and end with a turn of the assistant": {"prompt": TURNS, "chosen": TURNS, "rejected": [answer(BAD)]},
    "the prompt differs": {"prompt": "Other?", "chosen": [*TURNS, answer(GOOD)], "rejected": [*TURNS, answer(BAD)]},
    "images is": {"prompt": Q, "chosen": GOOD, "rejected": BAD, "images": ["a.png"]},
    "chosen is 3, but must be": {"prompt": Q, "chosen": 3, "rejected": BAD},
    "has half a surrogate": {"prompt": Q, "chosen": "\ud800", "rejected": BAD},
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_bad_record_is_named_and_can_be_skipped(tmp_path, message):
    with pytest.raises(UserError, match=r"p.jsonl, line 2.*on_error=skip") as caught:
        read(tmp_path, PAIRS["question"], BROKEN[message])
    assert message in str(caught.value)
    documents, faults = read(tmp_path, PAIRS["question"], BROKEN[message], PAIRS["hh"], on_error="skip")
    assert [document["id"] for document in documents] == ["p.jsonl:1", "p.jsonl:3"]
    assert faults.skipped == 1 and message in faults.messages[0]


def test_files_may_be_lists_tables_and_compressed(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([PAIRS["ranking"]]))
    (tmp_path / "b.csv").write_text(f"question,chosen,rejected\n{Q},{GOOD},{BAD}\n")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(json.dumps(PAIRS["hh"]).encode()))
    documents = list(open_source(f"preference:{tmp_path}/*").documents())
    assert [d["id"] for d in documents] == ["a.json:1", "b.csv:1", "c.jsonl.gz:1"]
    assert {d["rejected"][-1]["content"] for d in documents} == {BAD}


def test_parquet_keeps_lists_of_messages(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist([PAIRS["trl implicit"]]), tmp_path / "a.parquet")
    (document,) = open_source(f"preference:{tmp_path}/a.parquet").documents()
    assert document["rejected"] == [*TURNS, answer(BAD)]


def test_of_dialogues_the_last_turn_alone_can_bear_loss(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"messages": [*EARLIER, *TURNS, answer(GOOD)]}))
    for turns, learnt in (("all", [True, True]), ("last", [False, True])):
        (document,) = open_source(f"messages:{path}", assistant_turns=turns).documents()
        assert [m.get("train", True) for m in document["messages"] if m["role"] == "assistant"] == learnt
