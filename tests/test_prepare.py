"""The verb prepare: its files, its output and its errors."""

import json
import signal
import subprocess
import sys

import pytest

from gptjax import cli, prepare
from gptjax.config import OPTIONS
from gptjax.data.building.build import work_directory
from gptjax.data.store.store import open_store


def run(*arguments: str) -> int:
    return cli.run(prepare.main, ["gptjax prepare", *arguments])


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    directory = tmp_path_factory.mktemp("chat")
    pairs = [{"instruction": f"question {i}", "input": "", "output": f"answer {i} of many"} for i in range(120)]
    pairs.append(pairs[3])
    (directory / "chat.json").write_text(json.dumps(pairs))
    return directory


def test_a_store_is_made_and_shown(chat, capsys):
    output = chat / "store"
    arguments = (
        "--tokenizer=byte",
        "--deduplicate=exact",
        "--cleaning=dialogue",
        "--show=1",
        "--show_tokens=120",
    )
    assert run(f"--source=alpaca:{chat}/chat.json", f"--output={output}", *arguments) == 0
    printed = capsys.readouterr().out
    store = open_store(output)
    assert (store.manifest["cleaning"], store.manifest["duplicates"]) == ("dialogue", 1)
    assert f"train: {store.split('train').num_documents} documents" in printed
    assert "left out: 1 duplicates" in printed
    assert f"{output}/card.md" in printed
    assert "--config.data.source=store:" in printed
    assert "── document 0 ──" in printed
    assert "<|im_start|>assistant\nanswer 0 of many<|im_end|>" in printed


def test_what_the_cleaning_leaves_out_is_counted_by_step(tmp_path, capsys):
    for number in range(8):
        (tmp_path / f"{number}.txt").write_text(
            "short" if number < 2 else f"the document with the number {number} " * 9
        )
    options = (f"--output={tmp_path}/store", "--tokenizer=byte", "--cleaning=spaces,length")
    assert run(f"--source=text:{tmp_path}/*.txt", *options, "--cleaning_options=min_characters=50") == 0
    assert "left out: 2 documents removed by cleaning (length 2); the data card has examples" in capsys.readouterr().out


def test_a_prepared_store_is_shown_with_the_mask_in_colour(chat, capsys):
    from rich.console import Console

    from gptjax.data.store.view import rows_as_text

    assert run(f"--source=alpaca:{chat}/chat.json", f"--output={chat}/again", "--tokenizer=byte") == 0
    assert run(f"--output={chat}/again", "--show=2", "--show_tokens=60") == 0
    assert capsys.readouterr().out.count(" row ") == 2
    rows = list(rows_as_text(open_store(chat / "again"), "train", 3, 100))
    styles = {text: style for row in rows for text, style in _spans(row)}
    assert styles["answer 0 of many"] == "green"
    assert styles["question 0"] == "dim"
    assert rows[1].plain.splitlines()[1].endswith("continued ──")
    colours = Console(force_terminal=True, color_system="standard", width=200)
    with colours.capture() as capture:
        colours.print(rows[0])
    assert "\x1b[32manswer 0 of many\x1b[0m" in capture.get()


def _spans(row):
    for span in row.spans:
        for line in row.plain[span.start : span.end].splitlines():
            yield line, str(span.style)


def test_options_reach_the_store(tmp_path):
    lines = [json.dumps({"body": f"some words {i} " * (i % 20 + 1)}) for i in range(120)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "{broken"]))
    status = run(
        f"--source=jsonl:{tmp_path}/a.jsonl#body",
        f"--output={tmp_path}/s",
        "--tokenizer=bpe:300",
        "--cleaning=plain",
        "--cleaning_options=min_characters=100",
        "--on_error=skip",
        "--split_by=position",
        "--test_fraction=0",
        "--validation_fraction=0.2",
        "--dtype=uint32",
        "--shard_tokens=500",
        "--workers=1",
    )
    assert status == 0
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    assert (manifest["split_by"], manifest["dtype"], manifest["skipped"]) == ("position", "uint32", 1)
    assert list(manifest["splits"]) == ["train", "validation"]
    step = next(s for s in json.loads((tmp_path / "s" / "card.json").read_text())["cleaning"]["steps"] if s["removed"])
    assert step["step"] == "length"
    assert len(manifest["splits"]["train"]["shards"]) > 1


def test_flags_have_the_defaults_of_a_config_and_an_example_each():
    values = prepare._flags()
    for name, option in {"tokenizer": OPTIONS["tokenizer"], **OPTIONS["data"]}.items():
        if name != "source" and name in values:
            assert values[name].default == option.default and option.help in values[name].help, name
    assert all(f"e.g. --{name}=" in values[name].help for name in values if name not in ("source",))
    assert {"tokenizer", "near_threshold", "decode_errors", "workers"} <= set(values)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--source is missing"),
        (("--source=python_docs",), "--output is missing"),
        (("--source=text:/nowhere/*.txt", "--output=store"), "no file matches"),
        (("--source=python_docs", "--output=store", "--cleaning=wep"), "'wep' is neither a profile"),
        (
            ("--source=python_docs", "--output=store", "--cleaning_options=min"),
            "expected NAME=VALUE, found 'min'",
        ),
        (
            ("--source=python_docs", "--output=store", "--runer=beam"),
            "unknown option --runer; did you mean --runner?",
        ),
        (("--source=python_docs", "--output=store", "--near_threshold=2"), "--near_threshold is 2.0; it must be at"),
        (("--source=python_docs", "--output=store", "--split_by=positon"), "choose from auto, document, position; did"),
        (("--source=python_docs", "--output=store", "--shard_tokens=0"), "--shard_tokens is 0; it must be at least 1"),
        (("--source=python_docs", "--output=store", "--workers=-1"), "--workers is -1; it must be at least 0"),
        (("--show=1", "--output=/nowhere"), "is not a token store"),
    ],
)
def test_wrong_requests_end_with_status_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", ["SIGINT", pytest.param("SIGTERM", marks=pytest.mark.slow)])
def test_an_interrupt_says_how_to_continue(name, tmp_path):
    for i in range(40):
        (tmp_path / f"{i:02}.txt").write_text(f"text {i} of a corpus\n" * 40_000)
    command = [
        sys.executable,
        "-m",
        "gptjax.prepare",
        f"--source=text:{tmp_path}/*.txt",
        f"--output={tmp_path}/store",
    ]
    process = subprocess.Popen([*command, "--tokenizer=byte"], stderr=subprocess.PIPE, text=True)
    cleaned = work_directory(tmp_path / "store") / "cleaned"
    while process.poll() is None and not (cleaned.is_dir() and any(p.suffix != ".partial" for p in cleaned.iterdir())):
        pass
    process.send_signal(getattr(signal, name))
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "interrupted; what is done is kept in" in errors.splitlines()[-1]
    assert "the same command continues" in errors.splitlines()[-1]
    assert work_directory(tmp_path / "store").is_dir()
    assert run(*command[3:], "--tokenizer=byte") == 0
    assert not work_directory(tmp_path / "store").exists()


NASTY = ["", " ", "nan", "1e99", "-1", "0x10", "[[[", "~no-such-user/x", "a\0b", "x" * 5000, "A + B", "é\udcff", "null"]
PYTHON = ("Traceback", "NoneType", "invalid literal", "Errno", "this is a bug", "argument of type")


@pytest.mark.parametrize(
    "flag", ["source", "tokenizer", "cleaning", "cleaning_options", "workers", "encoding", "output"]
)
def test_nasty_values_are_refused_in_words(flag, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = {"source": "text:absent.txt", "output": "store", "tokenizer": "byte"}
    for value in NASTY:
        assert run(*(f"--{name}={given}" for name, given in {**flags, flag: value}.items())) == 2, value
        last = capsys.readouterr().err.splitlines()[-1]
        assert len(last) < 3000 and not any(word in last for word in PYTHON), (value, last)


def test_numbers_and_options_are_those_of_this_verb(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_bytes("今天天气很好".encode("gbk"))
    assert run("--source=text:a.txt", "--output=s", "--tokenizer=byte", "--workers=1.0") == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "GB18030: --encoding=gb18030" in message and "--decode_errors=replace" in message
    assert run("--source=text:a@1 + text:b@2", "--output=s") == 2
    assert "is a mixture, which is made while training" in capsys.readouterr().err
