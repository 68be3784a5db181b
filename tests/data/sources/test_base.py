import json
import os
import pickle
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.data import documents as documents_module
from gptjax.data.documents import in_parts, split_text
from gptjax.data.sources import tfds as catalogue
from gptjax.data.sources.opening import open_source
from gptjax.data.sources.utf8 import Utf8Decoder, decode_all
from gptjax.data.tokenization.tokenizer import build_tokenizer
from gptjax.errors import UserError


@pytest.fixture
def short_parts(monkeypatch):
    monkeypatch.setattr(documents_module, "PART_CHARACTERS", 10)


def texts(source) -> list[str]:
    return [document["text"] for document in source.documents()]


# Parts


@given(st.lists(st.text(alphabet="ab \n\r。你", max_size=30), max_size=6), st.integers(1, 12))
def test_parts_join_to_the_pieces_and_keep_the_limit(pieces, size):
    parts = list(split_text(iter(pieces), size))
    assert "".join(parts) == "".join(pieces)
    assert all(0 < len(part) <= size for part in parts) or parts == [""]


@pytest.fixture(scope="module")
def small_bpe():
    return build_tokenizer("bpe:300", ["abc abc a'b cab 12 122. ab\n\nabc, bca\n" * 20])


@given(
    st.lists(st.text(alphabet="abc'12.,", min_size=1, max_size=9), max_size=40),
    st.lists(st.sampled_from([" ", "\n", "  ", "\n\n", " \n"]), min_size=40, max_size=40),
)
def test_cuts_do_not_change_bpe_ids(small_bpe, words, spaces):
    text = "".join(word + space for word, space in zip(words, spaces, strict=False))
    parts = small_bpe.encode_batch(list(split_text([text], 40)))
    assert np.concatenate(parts).tolist() == small_bpe.encode(text).tolist()


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("one two three", "one two"),
        ("one  two  x", "one  two"),  # before both spaces, for want of a single one
        ("line\nbreaks", "line\n"),
        ("abcdefghijkl", "abcdefghij"),
    ],
)
def test_where_a_text_is_cut(text, first):
    assert next(split_text([text], 10)) == first


def test_a_document_has_parts_only_where_it_is_long(short_parts):
    assert list(in_parts({"text": "short", "id": "a", "source": "s"})) == [{"text": "short", "id": "a", "source": "s"}]
    parts = list(in_parts({"text": "one two three four five", "id": "a", "source": "s", "split": "test"}))
    assert [part["text"] for part in parts] == ["one two", " three", " four five"]
    assert [part["part"] for part in parts] == [0, 1, 2]
    assert {(part["id"], part["split"]) for part in parts} == {("a", "test")}


# Decoding


@given(st.binary(max_size=60), st.lists(st.integers(1, 9), max_size=20))
def test_decoding_in_pieces_equals_decoding_at_once(data, sizes):
    decoder = Utf8Decoder("replace", "here")
    pieces, rest = [], data
    for size in sizes:
        pieces.append(decoder.decode(rest[:size]))
        rest = rest[size:]
    pieces.append(decoder.decode(rest, final=True))
    assert "".join(pieces) == data.decode("utf-8", "replace").removeprefix("\ufeff")


def test_replacements_are_counted_but_not_genuine_replacement_characters():
    data = "a\ufffdb".encode() + b"\xff\xfe" + "ü".encode()
    assert decode_all(data, "replace", "here") == ("a\ufffdb\ufffd\ufffdü", 2)
    decoder = Utf8Decoder("replace", "here")
    for byte in data:
        decoder.decode(bytes([byte]))
    assert decoder.replaced == 2


@pytest.mark.parametrize("cut", [0, 1, 3, 5])
def test_the_offset_of_a_bad_byte_is_that_in_the_file(cut):
    data = "aü".encode() + b"b\xe4c"
    decoder = Utf8Decoder("reject", "file.txt")
    with pytest.raises(UserError, match=r"file\.txt: byte 0xe4 at offset 4 .*data\.decode_errors=replace"):
        for piece in (data[:cut], data[cut:]):
            decoder.decode(piece)
        decoder.decode(b"", final=True)


# text:


def test_text_files_are_documents_in_the_order_of_their_paths(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "z.txt").write_bytes("\ufeffzwei\r\n".encode())
    (tmp_path / "b" / "y.txt").write_text("eins")
    (tmp_path / "a.txt").write_text("你好", "utf-8")
    (tmp_path / "a.md").write_text("no")
    source = open_source(f"text:{tmp_path}/**/*.txt")
    found = [(document["id"], document["text"]) for document in source.documents()]
    assert found == [("a.txt", "你好"), ("b/y.txt", "eins"), ("b/z.txt", "zwei\r\n")]
    assert texts(source) == [text for _, text in found]
    assert [document["id"] for document in open_source(f"text:{tmp_path}/a.txt").documents()] == ["a.txt"]


def test_text_files_that_are_not_utf8(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("café".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.txt: byte 0xe9 at offset 3"):
        texts(open_source(f"text:{path}"))
    source = open_source(f"text:{path}", decode_errors="replace")
    for _ in range(2):
        assert texts(source) == ["caf\ufffd"]
        assert source.faults.replaced == 1


@pytest.mark.parametrize("unit", ["lorem ipsum\n", "x", "漢字"])
def test_memory_stays_flat_for_a_large_file(tmp_path, unit):
    path = tmp_path / "large.txt"
    size = 40_000_000
    path.write_text(unit * (size // len(unit.encode())), encoding="utf-8")
    tracemalloc.start()
    length = sum(len(text) for text in (part["text"] for part in open_source(f"text:{path}").documents()))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert length == size // len(unit.encode()) * len(unit)
    assert peak < size / 2


def test_the_key_changes_with_the_files(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    key = open_source(f"text:{path}").key()
    assert open_source(f"text:{path}").key() == key
    assert open_source(f"text:{path}", decode_errors="replace").key() != key
    path.write_text("other")
    assert open_source(f"text:{path}").key() != key


# jsonl:


def test_json_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one", "body": "eins"}\n\n{"text": "", "body": "zw\\u00f6lf"}\r\n', encoding="utf-8")
    assert texts(open_source(f"jsonl:{tmp_path}/*.jsonl")) == ["one", ""]
    found = list(open_source(f"jsonl:{path}#body").documents())
    assert [(document["id"], document["text"]) for document in found] == [
        ("a.jsonl:1", "eins"),
        ("a.jsonl:3", "zwölf"),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', r"line 2: not JSON"),
        ('["text"]', r"line 2 holds a JSON list"),
        ('{"body": "x", "id": 1}', r"line 2: no field 'text'; fields: 'body', 'id'"),
        ('{"text": 3}', r"line 2: field 'text' is 3, but must be text"),
        ('{"text": "\\ud800"}', r"line 2: .*surrogate.*data\.decode_errors=replace"),
    ],
)
def test_a_bad_json_line_is_named(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(UserError, match=r"a\.jsonl, " + message):
        texts(open_source(f"jsonl:{path}"))


# tfds:


@pytest.fixture(scope="module")
def tfds_directory(tmp_path_factory):
    tfds = pytest.importorskip("tensorflow_datasets")

    class TinyTexts(tfds.core.GeneratorBasedBuilder):
        __module__ = "__main__"  # in a package, TFDS would look for checksums beside it
        VERSION = tfds.core.Version("1.2.0")
        BUILDER_CONFIGS = (tfds.core.BuilderConfig(name="plain"),)

        def _info(self):
            features = {"text": tfds.features.Text(), "title": tfds.features.Text(), "label": np.int64}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, _):
            return {"train": self._examples("train", 5), "test": self._examples("test", 2)}

        def _generate_examples(self):
            raise NotImplementedError

        def _examples(self, split, count):
            for i in range(count):
                yield i, {"text": f"{split} text {i} ü", "title": f"{split} title {i}", "label": i}

    directory = tmp_path_factory.mktemp("tfds")
    TinyTexts(config="plain", data_dir=directory, file_format="array_record").download_and_prepare()
    return str(directory)


def test_a_tfds_dataset_without_a_split_brings_its_own(tfds_directory):
    found = list(open_source("tfds:tiny_texts/plain", data_dir=tfds_directory).documents())
    assert sorted(document["text"] for document in found) == sorted(
        [f"train text {i} ü" for i in range(5)] + [f"test text {i} ü" for i in range(2)]
    )
    assert all(document["text"].startswith(document["split"]) for document in found)
    assert len({document["id"] for document in found}) == 7


def test_one_split_and_one_field_of_a_tfds_dataset(tfds_directory):
    found = list(open_source("tfds:tiny_texts/plain:test#title", data_dir=tfds_directory).documents())
    assert sorted(document["text"] for document in found) == ["test title 0", "test title 1"]
    assert not any("split" in document for document in found)
    assert len(texts(open_source("tfds:tiny_texts/plain:train[:2]", data_dir=tfds_directory))) == 2


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tfds:tiny_text", r"no dataset 'tiny_text' in .*holds: .*tiny_texts"),
        ("tfds:tiny_texts", r"holds no version; it holds: plain"),
        ("tfds:tiny_texts/fancy", r"holds: plain"),
        ("tfds:tiny_texts/plain:dev", r"no split 'dev'; splits: test, train"),
        ("tfds:tiny_texts/plain#body", r"no text feature 'body'; text features: text, title"),
        ("tfds:tiny_texts/plain#label", r"no text feature 'label'"),
    ],
)
def test_what_a_tfds_spec_can_get_wrong(tfds_directory, spec, message):
    with pytest.raises(UserError, match=message):
        open_source(spec, data_dir=tfds_directory)


@pytest.mark.parametrize("status", [0, 1])
def test_a_dataset_that_is_not_prepared_is_prepared_elsewhere(tfds_directory, tmp_path, monkeypatch, status):
    calls = []

    def build(command, **_):
        calls.append(command)
        if status == 0:
            shutil.copytree(f"{tfds_directory}/tiny_texts", tmp_path / "tiny_texts")
        return subprocess.CompletedProcess(command, status, "", "Traceback\nDatasetNotFoundError: no tiny_texts")

    monkeypatch.setattr(catalogue.importlib.util, "find_spec", lambda name: name == "tensorflow" or None)
    monkeypatch.setattr(catalogue.subprocess, "run", build)
    if status == 0:
        source = open_source("tfds:tiny_texts/plain:test", data_dir=str(tmp_path))
        assert len(texts(source)) == 2
    else:
        with pytest.raises(
            UserError, match=r"could not prepare 'tiny_texts/plain' .*DatasetNotFoundError: no tiny_texts"
        ):
            open_source("tfds:tiny_texts/plain:test", data_dir=str(tmp_path))
    assert calls[0][3:] == ["build", "tiny_texts/plain", f"--data_dir={tmp_path}", "--file_format=array_record"]


def test_a_dataset_prepared_again_in_its_place_is_another(tfds_directory, tmp_path):
    shutil.copytree(f"{tfds_directory}/tiny_texts", tmp_path / "tiny_texts")

    def identity():
        source = open_source("tfds:tiny_texts/plain:test", data_dir=str(tmp_path))
        return source.key(), source.pieces()[0].sha256

    before = identity()
    assert identity() == before
    (directory,) = (tmp_path / "tiny_texts/plain").iterdir()
    (file,) = directory.glob("*test*")
    stat = file.stat()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000_000))
    rewritten = identity()
    assert all(new != old for new, old in zip(rewritten, before, strict=True))
    info = directory / "dataset_info.json"
    info.write_text(info.read_text() + "\n")
    assert all(new != old for new, old in zip(identity(), rewritten, strict=True))


def test_pieces_join_to_the_dataset(tfds_directory, monkeypatch):
    whole = list(open_source("tfds:tiny_texts/plain", data_dir=tfds_directory).documents())
    monkeypatch.setattr(catalogue, "PIECE_BYTES", 100)
    source = open_source("tfds:tiny_texts/plain", data_dir=tfds_directory)
    worker = pickle.loads(pickle.dumps(source))
    assert len(source.pieces()) > 3
    assert [document for piece in source.pieces() for document in worker.read(piece)] == whole


def test_the_catalogue_dataset_is_the_shakespeare_file():
    shared = os.environ.get("GPTJAX_SHARED_DATA")
    if not shared:
        pytest.skip("GPTJAX_SHARED_DATA is not set")
    source = open_source("tfds:tiny_shakespeare", data_dir=f"{shared}/tfds")
    documents = list(source.documents())
    assert [document["split"] for document in documents if not document.get("part")] == [
        "train",
        "validation",
        "test",
    ]
    assert "".join(texts(source)) == Path(shared, "tinyshakespeare", "input.txt").read_text(encoding="utf-8")


def test_reading_any_source_imports_neither_tensorflow_nor_torch_nor_jax(tfds_directory, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x"}))
    program = f"""
import sys
from gptjax.data.sources.opening import open_source
from gptjax.data.tokenization import tokenizer as tokenizers
from gptjax.data.store import store
from gptjax.data.pipeline import batches as pipeline
assert not {{"grain", "jax", "tensorflow_datasets", "tokenizers"}} & set(sys.modules)
for spec in ("tfds:tiny_texts/plain", "jsonl:{tmp_path}/a.jsonl", "python_docs:questions"):
    assert list(open_source(spec, data_dir={tfds_directory!r}).documents())
assert not {{"jax", "tensorflow", "torch"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


# Specs


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("python_doc", r"unknown data source 'python_doc'.*Did you mean 'python_docs'\?"),
        ("txt:*.md", r"Did you mean 'text:\*\.md'\?"),
        ("text:", r"unknown data source 'text:'.*text:GLOB"),
        ("text:/nowhere/*.txt", r"no file matches 'text:/nowhere/\*\.txt'"),
        ("jsonl:/nowhere.jsonl", r"no file matches .* glob$"),
        ("text:/nowhere@2.txt", r"no file matches .* glob$"),
        *((f"text:/nowhere{end}", r"'SPEC@WEIGHT \+ SPEC@WEIGHT'") for end in ("@1", " +text:b", ".txt +", ",text:b")),
        ("store:/somewhere", r"token store"),
    ],
)
def test_unknown_specs_say_what_was_expected(spec, message):
    with pytest.raises(UserError, match=message):
        open_source(spec)


def test_a_path_without_a_scheme_is_recognised(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("x")
    with pytest.raises(UserError, match=f"Did you mean 'text:{path}'"):
        open_source(str(path))
    with pytest.raises(UserError, match="is a directory"):
        open_source(f"text:{tmp_path}")
    with pytest.raises(UserError, match=r"data\.decode_errors='ignore'"):
        open_source(f"text:{path}", decode_errors="ignore")
