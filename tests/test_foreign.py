"""Foreign files are read within limits and refused in plain words."""

import os
from pathlib import Path
from typing import ClassVar, Literal

import pydantic
import pytest

from gptjax import files, foreign, json_text
from gptjax.errors import UserError


class Rope(foreign.Schema):
    kind: Literal["linear", "llama3"]
    factor: float = pydantic.Field(gt=0)


class Config(foreign.Schema):
    IGNORED: ClassVar[frozenset[str]] = frozenset({"use_cache"})
    n_layer: int = pydantic.Field(ge=1, le=10_000)
    name: str | None = None
    rope: Rope | None = None
    eos: int | list[int] = 0


RIGHT = {"n_layer": 2}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "c.json: n_layer is missing"),
        ({"n_layer": "two"}, 'c.json: n_layer is "two", but must be a whole number'),
        ({"n_layer": True}, "c.json: n_layer is true, but must be a whole number"),
        ({"n_layer": 10**12}, "c.json: n_layer is 1000000000000, but must be at most 10000"),
        (RIGHT | {"rope": {"kind": "x", "factor": 1}}, "rope.kind is \"x\", but must be 'linear' or 'llama3'"),
        (
            RIGHT | {"rope": {"kind": "linear", "factor": float("nan")}},
            "rope.factor is NaN, but must be a finite number",
        ),
        (RIGHT | {"rope": {"kind": "linear"}}, "c.json: rope.factor is missing"),
        (RIGHT | {"eos": "</s>"}, 'eos is "</s>", but must be a whole number or a list'),
        (RIGHT | {"eos": [1, None]}, "eos[1] is null, but must be a whole number"),
        ([1], "c.json holds [1], but must be an object: {...}"),
        (None, "c.json holds null, but must be an object"),
    ],
)
def test_file_field_what_it_holds_and_what_it_must_be(value, message):
    with pytest.raises(UserError) as error:
        foreign.check(Config, value, "c.json")
    assert message in str(error.value)


def test_keys_that_nobody_knows_are_told_and_ignored_ones_are_not():
    config = foreign.check(Config, RIGHT | {"use_cache": True, "window": 5, "nothing": None}, "c.json")
    assert (config.n_layer, config.unknown()) == (2, ["window"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is empty"),
        (b'{"a": 1', "the text ends before the value does"),
        (b'{"a": \n xy}', "line 2, column 2: a value is expected where 'xy}' is"),
        (b"{} {}", "the value has ended where '{}' is, and more follows"),
        (b'{"a": "\xff"}', "line 1: byte 0xff is not UTF-8"),
        (b"[" * 100_000, "more than 100 deep"),
        (b"[" * 101 + b"1" + b"]" * 101, "more than 100 deep"),
        (b'{"a":' * 5000 + b"1" + b"}" * 5000, "more than 100 deep"),
        (b"1" * 10_000, "a whole number with thousands of digits"),
    ],
)
def test_what_is_no_json_is_named_with_its_place(tmp_path, text, message):
    path = tmp_path / "c.json"
    path.write_bytes(text)
    with pytest.raises(UserError) as error:
        json_text.read_json(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_a_hundred_levels_and_many_entries_are_read():
    assert json_text.parse_json("[" * 100 + "1" + "]" * 100, "x")
    assert len(json_text.parse_json(str([[1]] * 5000), "x")) == 5000


@pytest.mark.parametrize(
    "path", ["/dev/zero", "/dev/null", "/proc/kmsg", "/sys/kernel/notes", "pipe", "folder", "nothing", "a\0b"]
)
def test_what_does_not_end_is_not_opened(tmp_path, path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"regular file|no such file|not a path"):
        files.regular(tmp_path / path)


def test_what_a_shell_hands_over_is_read():
    read, write = os.pipe()
    os.write(write, b'{"a": 1}')
    os.close(write)
    assert json_text.read_json(Path(f"/dev/fd/{read}")) == {"a": 1}
    os.close(read)
