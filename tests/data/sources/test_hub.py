"""Hugging Face datasets from directories: what `save_to_disk` wrote, and Parquet files."""

import pickle

import pytest

from gptjax.data.sources import hub
from gptjax.data.sources.opening import open_source
from gptjax.errors import UserError

datasets = pytest.importorskip("datasets")

TEXTS = {"train": [f"train text {i} ü" for i in range(20)], "test": [f"test text {i}" for i in range(3)]}


@pytest.fixture(scope="module", params=["saved", "parquet"])
def directory(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("hub")
    splits = {
        name: datasets.Dataset.from_dict({"text": texts, "title": [text.upper() for text in texts]})
        for name, texts in TEXTS.items()
    }
    if request.param == "saved":
        datasets.DatasetDict(splits).save_to_disk(path)
    else:
        for name, rows in splits.items():
            rows.to_parquet(path / f"{name}-00000-of-00001.parquet")
    return path


def test_without_a_split_a_dataset_brings_its_own(directory):
    found = list(open_source(f"hf:{directory}").documents())
    assert [(d["split"], d["text"]) for d in found] == [(name, text) for name, texts in TEXTS.items() for text in texts]
    assert len({document["id"] for document in found}) == 23


def test_one_split_and_one_field(directory):
    found = list(open_source(f"hf:{directory}:test#title").documents())
    assert [document["text"] for document in found] == [text.upper() for text in TEXTS["test"]]
    assert not any("split" in document for document in found)
    found = list(open_source(f"hf:{directory}:train[25%:40%]#title+text").documents())
    assert [d["text"] for d in found] == [f"{text.upper()}\n{text}" for text in TEXTS["train"][5:8]]


def test_pieces_join_to_the_dataset(directory, monkeypatch):
    whole = list(open_source(f"hf:{directory}").documents())
    monkeypatch.setattr(hub, "PIECE_BYTES", 100)
    source = open_source(f"hf:{directory}")
    pieces = source.pieces()
    worker = pickle.loads(pickle.dumps(source))
    assert len(pieces) > 4
    assert [document for piece in pieces for document in worker.read(piece)] == whole
    assert open_source(f"hf:{directory}").key() == source.key()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hf:{}#body", "no column 'body'; columns: text, title"),
        ("hf:{}:dev", "no split 'dev' .*splits: test, train"),
        ("hf:", "unknown data source"),
    ],
)
def test_what_a_spec_can_get_wrong(directory, spec, message):
    with pytest.raises(UserError, match=message):
        open_source(spec.format(directory))


def test_a_dataset_that_cannot_be_had_is_named(tmp_path, monkeypatch):
    def no_network(*_, **__):
        raise ConnectionError("no network\nmore")

    monkeypatch.setattr(datasets, "load_dataset", no_network)
    with pytest.raises(UserError, match=r"'hf:nobody/nothing:train' cannot be opened: no network$"):
        open_source("hf:nobody/nothing:train")


def test_the_name_and_the_configuration_are_told_apart(monkeypatch):
    asked = []

    def load(*names):
        asked.append(names)
        return {"train": datasets.Dataset.from_dict({"text": ["x"]})}

    monkeypatch.setattr(datasets, "load_dataset", load)
    for spec in ("hf:wikitext", "hf:owner/name:train", "hf:owner/name/config:train#text"):
        assert [document["text"] for document in open_source(spec).documents()] == ["x"]
    assert asked == [("wikitext",), ("owner/name",), ("owner/name", "config")]
