"""Files that builds leave behind, and running the same command again."""

import errno
import json

import numpy as np
import pytest

from gptjax.data.building import remains
from gptjax.data.building.build import build_store, work_directory
from gptjax.data.sources.opening import open_source
from gptjax.errors import UserError
from gptjax.files import save_array


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(200)))
    return f"jsonl:{path}"


def test_a_finished_store_of_the_same_inputs_is_a_success(tmp_path, corpus):
    first = build_store(open_source(corpus), tmp_path / "s", tokenizer="byte")
    work = work_directory(tmp_path / "s")
    work.mkdir()  # as of a build that was killed after its store was in place
    changed = first.directory.stat().st_mtime_ns
    again = build_store(open_source(corpus), tmp_path / "s", tokenizer="byte")
    assert again.fingerprint == first.fingerprint and first.directory.stat().st_mtime_ns == changed
    assert not work.exists()
    with pytest.raises(UserError, match="it exists, and was not built from this source with these options"):
        build_store(open_source(corpus), tmp_path / "s", tokenizer="char")


def test_what_killed_builds_left_is_swept_and_what_is_at_work_or_kept_stays(tmp_path, corpus):
    names = {name: tmp_path / f".{name}.building" for name in ("killed", "kept", "working", "foreign")}
    for path in names.values():
        (path / "cleaned").mkdir(parents=True)
    for name in ("killed", "kept"):
        (names[name] / remains.LOCK).touch()
    (names["kept"] / remains.KEPT).touch()
    with remains.claimed(names["working"], tmp_path / "working"):
        build_store(open_source(corpus), tmp_path / "s", tokenizer="byte")
        left = sorted(name for name, path in names.items() if path.exists())
    assert left == ["foreign", "kept", "working"]


def test_an_array_that_does_not_fit_names_the_reason():
    with pytest.raises(OSError, match="No space left") as caught:
        save_array("/dev/full", np.arange(100_000))
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == "/dev/full"


def test_the_card_and_the_message_say_why_a_split_has_its_size(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"prompt": "the same", "response": f"r{i}"}) + "\n" for i in range(200)))
    with pytest.raises(UserError, match=r"only 1 different ones \(200 documents share one\): use .*split_by=position"):
        build_store(open_source(f"pairs:{path}"), tmp_path / "s", tokenizer="byte")
    store = build_store(open_source(f"pairs:{path}"), tmp_path / "p", tokenizer="byte", split_by="position")
    assert "validation 5.0% asked" in (store.directory / "card.md").read_text()
