"""Token stores in an object store: fsspec's memory, which only this process sees."""

import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest

from gptjax.buckets import Bucket
from gptjax.data.building.build import build_store
from gptjax.data.sources.opening import open_source
from gptjax.data.store.store import open_store
from gptjax.errors import UserError


@pytest.fixture
def place(monkeypatch, tmp_path) -> str:
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path / "cache"))
    yield "memory://stores/corpus"
    bucket = Bucket("memory://stores")
    bucket.remove(list(bucket.list()))


def build(corpus: Path, directory: str | Path, **options):
    return build_store(open_source(f"text:{corpus}/*.txt"), directory, tokenizer="byte", workers=1, **options)


def copies() -> list[str]:
    cache = Path(os.environ["GPTJAX_CACHE"]) / "buckets"
    return sorted(path.name for path in cache.glob("store-*/train/*.bin"))


def test_a_store_in_a_bucket_is_that_of_a_disk_and_shards_are_copied_when_they_are_read(
    place, tiny_corpus, tmp_path, monkeypatch
):
    here = build(tiny_corpus, tmp_path / "disk", shard_tokens=2000)
    there = build(tiny_corpus, place, shard_tokens=2000)
    assert there.manifest == here.manifest
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path / "another machine"))
    store = open_store(f"store:{place}")
    assert store.manifest == here.manifest
    assert store.tokenizer().sha256 == here.tokenizer().sha256
    split, same = store.split("train"), here.split("train")
    assert copies() == []
    np.testing.assert_array_equal(split.document_starts, same.document_starts)
    np.testing.assert_array_equal(split.read(2500, 100), same.read(2500, 100))
    assert copies() == ["tokens-00001.bin"]
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(split)).read(1950, 100), same.read(1950, 100))
    assert copies() == ["tokens-00000.bin", "tokens-00001.bin"]
    np.testing.assert_array_equal(split.read(0, split.num_tokens), same.read(0, same.num_tokens))
    store.verify()


def test_the_same_build_is_found_and_another_is_refused(place, tiny_corpus):
    build(tiny_corpus, place)
    generation = Bucket(place).modified("manifest.json")
    build(tiny_corpus, place)
    assert Bucket(place).modified("manifest.json") == generation
    with pytest.raises(UserError, match=rf"cannot build a token store at {re.escape(place)}: what is there was"):
        build(tiny_corpus, place, validation_fraction=0.3)


def test_an_upload_that_was_ended_is_continued(place, tiny_corpus):
    build(tiny_corpus, place)
    Bucket(place).remove(["manifest.json", "train/documents.npy"])
    with pytest.raises(UserError, match=r"is not a token store: it has no manifest\.json"):
        open_store(place)
    assert build(tiny_corpus, place).split("train").num_documents > 0


def test_what_is_damaged_in_a_bucket_is_named(place, tiny_corpus, tmp_path, monkeypatch):
    build(tiny_corpus, place)
    bucket = Bucket(place)
    content = bucket.read("train/tokens-00000.bin")
    bucket.write("train/tokens-00000.bin", bytes([content[0] ^ 1]) + content[1:])
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path / "another machine"))
    with pytest.raises(UserError, match=rf"damaged at {re.escape(place)}/train/tokens-00000.bin: its sha256 is"):
        open_store(place).split("train").read(0, 10)
    bucket.write("train/tokens-00000.bin", content[1:])
    with pytest.raises(UserError, match=r"tokens-00000\.bin: it has \d+ bytes, the manifest says"):
        open_store(place)
