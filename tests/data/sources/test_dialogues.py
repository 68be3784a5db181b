import bz2
import gzip
import json
import lzma

import pytest

from gptjax.data.sources.base import Faults
from gptjax.data.sources.dialogues import FORMATS, read_dialogues
from gptjax.errors import UserError

USER, ASSISTANT = {"role": "user", "content": "Hi 你"}, {"role": "assistant", "content": "Hello 好"}
DIALOGUE = [USER, ASSISTANT]


def read(path, format, **options):
    return list(read_dialogues(path, format, source="spec", **options))


def turns(document) -> list[str]:
    return [f"{message['role'][0]}:{message['content']}" for message in document["messages"]]


def write_lines(path, entries):
    path.write_text("".join(f"{json.dumps(entry, ensure_ascii=False)}\n" for entry in entries), "utf-8")
    return path


WRITTEN = {  # one dialogue of two turns in each format: file name and contents
    "messages": ("a.jsonl", json.dumps({"messages": DIALOGUE})),
    "sharegpt": (
        "a.json",
        json.dumps([{"conversations": [{"from": "human", "value": "Hi 你"}, {"from": "gpt", "value": "Hello 好"}]}]),
    ),
    "alpaca": ("a.json", json.dumps([{"instruction": "Hi 你", "input": "", "output": "Hello 好"}], indent=2)),
    "pairs": ("a.csv", "\ufeffprompt,response\r\nHi 你,Hello 好\r\n"),
    "chatterbot": ("a.yml", "categories:\n- x\nconversations:\n- - Hi 你\n  - Hello 好\n"),
    "kdconv": (
        "a.json",
        json.dumps([{"messages": [{"message": "Hi 你"}, {"message": "Hello 好"}], "name": "x"}]),
    ),
}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2"])
def test_every_format_says_the_same(tmp_path, format, suffix):
    name, text = WRITTEN[format]
    path = tmp_path / (name + suffix)
    path.write_bytes({"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress}[suffix](text.encode()))
    (document,) = read(path, format, name="sub/a")
    assert document["messages"] == DIALOGUE
    assert (document["id"], document["source"], document["split_key"]) == ("sub/a:1", "spec", "Hi 你")


def test_messages_with_system_parts_and_a_last_question(tmp_path):
    content = [{"type": "text", "text": "Hello "}, {"type": "text", "text": "好"}]
    entry = [
        {"role": "developer", "content": "Be kind"},
        USER,
        {"role": "assistant", "content": content},
        USER,
    ]
    (document,) = read(write_lines(tmp_path / "a.jsonl", [{"messages": entry}]), "messages")
    assert turns(document) == ["s:Be kind", "u:Hi 你", "a:Hello 好", "u:Hi 你"]
    assert document["split_key"] == "Be kind\nHi 你"


def test_alpaca_with_history_system_and_input(tmp_path):
    entry = {
        "instruction": "Translate",
        "input": "chat",
        "output": "cat",
        "system": "s",
        "history": [["1", "2"], ["3", "4"]],
    }
    (document,) = read(write_lines(tmp_path / "a.jsonl", [entry]), "alpaca")
    assert turns(document) == ["s:s", "u:1", "a:2", "u:3", "a:4", "u:Translate\nchat", "a:cat"]


def test_pairs_have_prompt_and_references_and_any_two_fields(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"question": "q", "answer": "a"}, {"prompt": "p", "response": "r"}])
    first, second = read(path, "pairs")
    assert (first["prompt"], first["references"], turns(second)) == ("q", ["a"], ["u:p", "a:r"])
    (tmp_path / "b.csv").write_text('mr,ref\n"name[x], area[y]","line 1\nline 2"\nm,r\n')
    first, second = read(tmp_path / "b.csv", "pairs", fields=("mr", "ref"))
    assert (first["prompt"], first["references"]) == ("name[x], area[y]", ["line 1\nline 2"])
    assert second["id"] == "b.csv:2"


def test_what_nothing_reads_of_a_yaml_file_is_counted(tmp_path):
    path, faults = tmp_path / "a.yml", Faults()
    path.write_text("categories: [greetings]\nsystem: Be brief.\nempty:\nconversations:\n- [hi, hello]\n- [a, b]\n")
    assert len(list(read_dialogues(path, "chatterbot", source="x", faults=faults))) == 2
    assert faults.notes == {"key 'system' of files, which nothing reads": 1}


def test_yaml_scalars_are_words(tmp_path):
    (tmp_path / "a.yml").write_text("conversations:\n- - Is it so?\n  - Yes\n  - 1_0\n  - null\n")
    (document,) = read(tmp_path / "a.yml", "chatterbot")
    assert turns(document) == ["u:Is it so?", "a:Yes", "u:1_0", "a:null"]


BAD = [
    ([USER], "no assistant turn"),
    ([], "no assistant turn"),
    ([USER, USER, ASSISTANT], "turns 1 and 2 are both of the user"),
    ([USER, ASSISTANT, ASSISTANT], "turns 2 and 3 are both of the assistant"),
    (
        [USER, {"role": "tool", "content": "x"}],
        r"turn 2 \(tool\) is a tool call or result: --config\.data\.tool_turns=template",
    ),
    ([USER, {"role": "assistant", "content": " \n"}], r"turn 2 \(assistant\) is empty"),
    ([USER, {"role": "assistant", "content": None}], r"turn 2 \(assistant\): content is null, but must be text"),
    ([USER, {"role": "assistant", "content": [{"type": "image_url"}]}], "part of the type 'image_url'"),
    ([USER, {"role": "assistant", "content": "\ud800"}], "half a surrogate pair"),
    ([USER, {"content": "x"}], "no field 'role' or 'from'"),
    ([USER, "x"], r"messages\[1\] is \"x\", but must be an object"),
    ("x", "no list 'messages' or 'conversations'"),
]


@pytest.mark.parametrize(("messages", "message"), BAD)
def test_a_bad_dialogue_is_named_or_skipped_and_counted(tmp_path, messages, message):
    path = tmp_path / "a.jsonl"
    lines = [{"messages": DIALOGUE}, {"messages": messages}, {"messages": DIALOGUE}]
    path.write_text("".join(json.dumps(line) + "\n\n" for line in lines))
    with pytest.raises(UserError, match=rf"a\.jsonl, line 3: .*{message}"):
        read(path, "messages")
    skipped = Faults("skip")
    assert [document["id"] for document in read(path, "messages", faults=skipped)] == [
        "a.jsonl:1",
        "a.jsonl:5",
    ]
    assert skipped.skipped == 1
    (found,) = skipped.messages
    assert "a.jsonl, line 3" in found and "on_error" not in found


@pytest.mark.parametrize(
    ("name", "data", "read_before", "message"),
    [
        ("a.jsonl", b'{"prompt": "p", "response": "r"}\n{"prompt"\n', 1, "line 2: not JSON"),
        (
            "a.jsonl",
            b'{"prompt": "p", "response": "r"}\n"\xff"\n',
            1,
            "line 2: byte 0xff at 1 of the line is not UTF-8",
        ),
        ("a.jsonl", b"[" * 100_000, 0, "not JSON"),
        ("a.json", b'[\n{"prompt": "p", "response": "r"},\n{"prompt"]', 1, r"entry 2 \(line 3\): not JSON"),
        ("a.json", b'[{"prompt": "p", "response": "r"}', 1, "does not end with ]"),
        ("a.csv", b"prompt,response\np,r\nonly one\n", 1, "line 3: expected 2 columns: prompt, response"),
        ("a.csv", b"prompt,response\np,\xff\n", 0, "not UTF-8"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"prompt": "p", "response": "r"}\n' * 2000)[:-20],
            None,
            "cannot be read further",
        ),
        ("a.jsonl.gz", b"no gzip", 0, "cannot be read further"),
        ("a.jsonl.bz2", b"no bzip2", 0, "cannot be read further"),
        ("a.jsonl.xz", b"no xz", 0, "cannot be read further"),
        ("a.jsonl.xz", lzma.compress(b'{"prompt": "p"}\n' * 2000)[:-40], None, "cannot be read further"),
        ("a.jsonl.zst", b"no zstd", 0, "cannot be read further"),
    ],
)
def test_a_damaged_file_is_read_up_to_the_damage(tmp_path, name, data, read_before, message):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"{name}.*{message}"):
        read(path, "pairs")
    skipped = Faults("skip")
    documents = read(path, "pairs", faults=skipped)
    assert read_before is None or len(documents) == read_before
    assert skipped.skipped == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("conversations:\n- [a, b]\n- just text\n", r"line 3: a conversation must be a list"),
        ("conversations:\n- [a, {b: c}]\n", "line 2: turn 2: a mapping"),
        ("other: 1\n", "no list 'conversations'"),
        ("a: [b\n", "not YAML"),
        ("", "no list 'conversations'"),
    ],
)
def test_bad_yaml_is_named(tmp_path, text, message):
    (tmp_path / "a.yml").write_text(text)
    with pytest.raises(UserError, match=rf"a\.yml.*{message}"):
        read(tmp_path / "a.yml", "chatterbot")


def test_a_line_without_end_is_not_held_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("gptjax.data.sources.records.MAX_LINE_BYTES", 1 << 20)
    good = json.dumps({"prompt": "p", "response": "r"})
    (tmp_path / "a.jsonl").write_text(f"{good}\n{'x' * (5 << 20)}\n{good}\n")
    with pytest.raises(UserError, match="line 2: a line of more than 1 MiB"):
        read(tmp_path / "a.jsonl", "pairs")
    documents = read(tmp_path / "a.jsonl", "pairs", faults=Faults("skip"))
    assert [document["id"] for document in documents] == ["a.jsonl:1", "a.jsonl:3"]


def test_wrong_requests_are_named(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"mr": "p", "ref": "r"}])
    with pytest.raises(UserError, match="expected one of messages, sharegpt"):
        read(path, "vicuna")
    with pytest.raises(UserError, match=r"cannot open .*missing"):
        read(tmp_path / "missing.jsonl", "pairs")
    with pytest.raises(UserError, match=r"fields 'mr', 'ref'; name them: pairs:GLOB#A,B"):
        read(path, "pairs")
    with pytest.raises(UserError, match="no field 'src'; there is 'mr', 'ref'"):
        read(path, "pairs", fields=("src", "ref"))


REAL = [
    ("alpaca", "chat/oaast_sft_zh.json", None, 766),
    ("pairs", "chat/dolly_hhrlhf_train_small.jsonl", None, 1000),
    ("kdconv", "chat/kdconv/film_dev.json", None, 150),
    ("chatterbot", "chat/chatterbot/*/*.yml", None, 2492),
    ("pairs", "eval/gsm8k_train.jsonl.gz", None, 7473),
    ("pairs", "e2e/trainset.csv.gz", ("mr", "ref"), 42061),
    ("pairs", "e2e/testset_w_refs.csv", ("mr", "ref"), 4693),
]


@pytest.mark.parametrize(("format", "pattern", "fields", "count"), REAL)
def test_published_dialogues_are_read(shared_data, format, pattern, fields, count):
    skipped = Faults("skip")
    documents = [
        document
        for path in sorted(shared_data.glob(pattern))
        for document in read(path, format, name=str(path), fields=fields, faults=skipped)
    ]
    assert len(documents) == len({document["id"] for document in documents}) == count
    # A statement of ChatterBot's trivia.yml lost its line break, so a conversation is one text.
    assert skipped.skipped == (format == "chatterbot")
