"""Unusual corpora: endless, vanishing or multiplying files, encodings, tool calls, slow parsers."""

import gzip
import json
import os

import pytest

from gptjax.data.sources.files import find_files
from gptjax.data.sources.opening import open_source
from gptjax.data.sources.records import read_records
from gptjax.errors import UserError

USER = {"role": "user", "content": "u"}
ANSWER = {"role": "assistant", "content": "a"}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}],
}
RESULT = {"role": "tool", "content": "42", "tool_call_id": "1"}
GBK = "今天天气很好，我们去公园玩。"


def read(tmp_path, name, data, scheme, **options):
    """The texts or messages of one file, and the source."""
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    source = open_source(f"{scheme}:{path}", **options)
    return [document.get("text", document.get("messages")) for document in source.documents()], source


def dialogue(*messages, **keys):
    return json.dumps({"messages": messages, **keys})


# What never ends


def test_each_file_is_read_once_whatever_links_lead_to_it(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "z.txt").write_text("z")
    (tmp_path / "sub" / "y.txt").write_text("y")
    for name, target in (("self", "."), ("again", "."), ("sub/up", ".."), ("link.txt", "z.txt")):
        (tmp_path / name).symlink_to(target)
    assert [file.name for file in find_files("s", f"{tmp_path}/**/*.txt")] == ["sub/y.txt", "z.txt"]
    assert [file.name for file in find_files("s", f"{tmp_path}/**")] == ["sub/y.txt", "z.txt"]
    assert [file.name for file in find_files("s", f"{tmp_path}/*.txt")] == ["z.txt"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("/dev/zero", "is a device"),
        ("/proc/self/*", "is a virtual file of the kernel"),
        ("{}/pipe", "is a named pipe"),
        ("{}/p*", "is a named pipe"),
        ("~no-such-user-here/x", "there is no user"),
        ("a\0b", "not a path: it has a character NUL"),
        ("x" * 300, "is too long"),
    ],
)
def test_what_is_no_file_is_refused(tmp_path, pattern, message):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=message):
        find_files("s", pattern.format(tmp_path))


# What vanishes or multiplies


def test_a_list_in_the_first_line_hides_nothing(tmp_path):
    lines = '["a"]\n{"text": "b"}\n'
    with pytest.raises(UserError, match=r"line 1 holds a JSON list"):
        read(tmp_path, "a.jsonl", lines, "jsonl")
    texts, source = read(tmp_path, "a.jsonl", lines, "jsonl", on_error="skip")
    assert texts == ["b"] and source.faults.skipped == 1
    with pytest.raises(UserError, match=r"ends with \] in line 2; the text after it"):
        read(tmp_path, "a.json", '[{"text": "a"},\n{"text": "b"}]\n{"text": "c"}\n', "jsonl")
    with pytest.raises(UserError, match="the key 'text' occurs twice"):
        read(tmp_path, "a.jsonl", '{"text": "a", "text": "b"}', "jsonl")


@pytest.mark.parametrize(
    ("rows", "line", "left"),
    [
        ('1,"one\n2,two\n3,three\n', 2, ["two", "three"]),
        ('1,"one\n2,"two"\n3,three\n', 2, ["two", "three"]),
        ('1,one\n2,two\n3,"three', 4, ["one", "two"]),
    ],
)
def test_a_quote_that_is_not_closed_takes_one_row(tmp_path, rows, line, left):
    with pytest.raises(UserError, match=rf"a\.csv, line {line}: the quote that opens in line {line}"):
        read(tmp_path, "a.csv", "id,text\n" + rows, "csv")
    texts, source = read(tmp_path, "a.csv", "id,text\n" + rows, "csv", on_error="skip")
    assert texts == left and source.faults.skipped == 1


def test_columns(tmp_path):
    assert read(tmp_path, "a.csv", 'id,text\n1,"one\ntwo"\n3,x\n', "csv")[0] == ["one\ntwo", "x"]
    for delimiter in ";\t|":
        assert read(tmp_path, "a.csv", f"id{delimiter}text\n1{delimiter}x,y\n", "csv")[0] == ["x,y"]
    assert read(tmp_path, "a.csv", 'text;"a,b"\nx,y;1\n', "csv")[0] == ["x,y"]
    assert read(tmp_path, "a.csv", "text;a,b\nx,y;1\n", "csv", delimiter="semicolon")[0] == ["x,y"]
    with pytest.raises(UserError, match="column 'text' occurs 2 times"):
        read(tmp_path, "a.csv", "text,text\nx,y\n", "csv")


# Encodings and fields


def test_encodings(tmp_path):
    for scheme, name, text in (
        ("text", "a.txt", GBK),
        ("jsonl", "a.jsonl", json.dumps({"text": GBK}, ensure_ascii=False)),
        ("csv", "a.csv", f"id,text\n1,{GBK}\n"),
    ):
        for mark in ("utf-16", "utf-32", "utf-8-sig"):
            assert read(tmp_path, name, text.encode(mark), scheme)[0] == [GBK]
        assert read(tmp_path, name, text.encode("gbk"), scheme, encoding="GBK")[0] == [GBK]
        with pytest.raises(UserError, match=r"GB18030: --config\.data\.encoding=gb18030"):
            read(tmp_path, name, text.encode("gbk"), scheme)
    with pytest.raises(UserError, match="name its encoding"):
        read(tmp_path, "a.txt", "café naïveté".encode("latin-1"), "text")
    with pytest.raises(UserError, match="not gb18030"):
        read(tmp_path, "a.txt", GBK.encode("gbk")[:-1], "text", encoding="gb18030")
    texts, source = read(tmp_path, "a.txt", b"ab\xff", "text", encoding="gb18030", decode_errors="replace")
    assert texts == ["ab\ufffd"] and source.faults.replaced == 1
    for name in ("nonsense", "zip", "rot13", "", "idna", "a\0b"):
        with pytest.raises(UserError, match="not a known text encoding"):
            open_source("python_docs", encoding=name)


def test_fields_that_are_no_text(tmp_path):
    with pytest.raises(UserError, match=r"field 'text' is null, but must be text.*null_fields=empty"):
        read(tmp_path, "a.jsonl", '{"text": null}', "jsonl")
    assert read(tmp_path, "a.jsonl", '{"text": null}\n{"text": "x"}', "jsonl", null_fields="empty")[0] == ["", "x"]
    with pytest.raises(UserError, match=r"field 'text' is 1\.5, but must be text"):
        read(tmp_path, "a.jsonl", '{"text": 1.5}', "jsonl")


def test_lines_of_text_are_records(tmp_path):
    (tmp_path / "a.txt").write_bytes("one\n\ntwo\n".encode("utf-16"))
    records = list(read_records(tmp_path / "a.txt", lines=True))
    assert [(record.number, record.value) for record in records] == [(1, {"text": "one"}), (3, {"text": "two"})]


# Dialogues


def test_what_bears_loss(tmp_path):
    (messages,), _ = read(tmp_path, "a.jsonl", dialogue(USER, {**ANSWER, "weight": 0}, USER, ANSWER), "messages")
    assert [message.get("train", True) for message in messages] == [True, False, True, True]
    for bad, message in (
        ([USER, {**ANSWER, "weight": 0}], "all turns of the assistant are left out of the loss"),
        ([USER, {**ANSWER, "weight": 0.5}], "weight is 0.5"),
        ([USER, {**ANSWER, "train": "no"}], r'messages\[1\]\.train is "no", but must be true or false'),
        ([{**USER, "train": True}, ANSWER], "only turns of the assistant are trained on"),
        ([USER, {**ANSWER, "reasoning_content": "x"}], "reasoning_content"),
    ):
        with pytest.raises(UserError, match=message):
            read(tmp_path, "a.jsonl", dialogue(*bad), "messages")


def test_no_key_of_a_record_is_lost_in_silence(tmp_path):
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    (messages,), _ = read(tmp_path, "a.jsonl", json.dumps({"system": "S", "conversations": turns}), "sharegpt")
    assert messages[0] == {"role": "system", "content": "S"}
    (messages,), _ = read(tmp_path, "a.jsonl", '{"prompt":"p","response":"r","system_prompt":"S"}', "pairs")
    assert [message["content"] for message in messages] == ["S", "p", "r"]
    _, source = read(tmp_path, "a.jsonl", dialogue(USER, ANSWER, id=1, other=[1]), "messages")
    assert dict(source.faults.notes) == {"key 'other' of records, which is not used": 1}
    with pytest.raises(UserError, match=r"images is .* only text is read"):
        read(tmp_path, "a.jsonl", dialogue(USER, ANSWER, images=["x"]), "messages")
    with pytest.raises(UserError, match=r"history is 5, but must be a list"):
        read(tmp_path, "a.json", '[{"instruction": "i", "output": "o", "history": 5}]', "alpaca")
    with pytest.raises(UserError, match="names 1 field"):
        read(tmp_path, "a.jsonl#prompt", "", "pairs")
    with pytest.raises(UserError, match=r"margin is 2, which is not supported"):
        read(tmp_path, "a.jsonl", '{"prompt": "p", "chosen": "c", "rejected": "r", "margin": 2.0}', "preference")
    with pytest.raises(UserError, match=r"turn 1: weight is 0, which is not read"):
        read(tmp_path, "a.json", '[{"messages": [{"message": "a", "weight": 0}, {"message": "b"}]}]', "kdconv")
    (messages,), _ = read(
        tmp_path, "a.json", '[{"system": "S", "messages": [{"message": "a"}, {"message": "b"}]}]', "kdconv"
    )
    assert [message["content"] for message in messages] == ["S", "a", "b"]


def test_fields_beside_those_that_were_named_are_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"q": "p", "a": "r", "system": "S", "id": 1}')
    source = open_source(f"pairs:{tmp_path}/a.jsonl#q,a")
    assert len(list(source.documents())) == 1
    assert dict(source.faults.notes) == {"field 'system' of records, which was not asked for": 1}


def test_what_follows_a_compressed_file_is_told_in_words(tmp_path):
    data = gzip.compress(b'{"text": "a"}\n') + b"more"
    with pytest.raises(UserError, match=r"the checksum differs, or uncompressed data follows") as error:
        read(tmp_path, "a.jsonl.gz", data, "jsonl")
    assert "b'" not in str(error.value)


def test_tools_and_turns_of_one_speaker(tmp_path):
    record = dialogue(USER, CALL, RESULT, ANSWER, tools=[{"type": "function", "function": {"name": "f"}}])
    with pytest.raises(UserError, match=r"turn 2 .*tool_turns=template .*tool_turns=leave_out"):
        read(tmp_path, "a.jsonl", record, "messages")
    (messages,), source = read(tmp_path, "a.jsonl", record, "messages", tool_turns="leave_out")
    assert messages == [USER, ANSWER] and sum(source.faults.notes.values()) == 3
    (messages,), _ = read(tmp_path, "a.jsonl", record, "messages", tool_turns="template")
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "assistant"]
    assert messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}
    with pytest.raises(UserError, match="same_speaker=join"):
        read(tmp_path, "a.jsonl", dialogue(USER, USER, ANSWER), "messages")
    (messages,), _ = read(tmp_path, "a.jsonl", dialogue(USER, USER, ANSWER), "messages", same_speaker="join")
    assert messages == [{"role": "user", "content": "u\n\nu"}, ANSWER]


# Hard on parsers


def test_yaml_that_expands(tmp_path, monkeypatch):
    monkeypatch.setattr("gptjax.data.sources.yaml_files.MAX_VALUES", 10_000)
    with pytest.raises(UserError, match="more than 100 deep"):
        read(tmp_path, "a.yml", "conversations: &a\n- *a\n", "chatterbot")
    with pytest.raises(UserError, match="more than 100 deep"):
        read(tmp_path, "a.yml", "conversations: " + "[" * 3000, "chatterbot")
    bomb = "x0: &x0 [a, b]\n" + "".join(f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9)}]\n" for i in range(1, 11))
    texts, source = read(tmp_path, "a.yml", bomb + "conversations:\n- *x10\n- [q, a]\n", "chatterbot", on_error="skip")
    assert len(texts) == 1 and "more than 10,000 values" in source.faults.messages[0]
