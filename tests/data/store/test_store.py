import concurrent.futures
import filecmp
import json
import pickle
from dataclasses import dataclass, field

import numpy as np
import pytest

from gptjax.config import get_default
from gptjax.data.building.build import build_store, cached_store
from gptjax.data.documents import in_parts
from gptjax.data.opening import open_store_of
from gptjax.data.sources.base import Faults, Piece, Source
from gptjax.data.sources.opening import open_source
from gptjax.data.store.store import open_store
from gptjax.data.tokenization.tokenizer import build_tokenizer
from gptjax.errors import UserError


@dataclass
class Corpus(Source):
    """A source of documents in memory: one piece."""

    items: list[dict]
    spec: str = "memory"
    faults: Faults = field(default_factory=Faults)
    readings: list[int] = field(default_factory=list)

    def pieces(self):
        return [Piece("memory", 1, self.items)]

    def read(self, piece):
        self.readings.append(1)
        for index, item in enumerate(self.items):
            yield from in_parts({"id": str(index), "source": "memory", **item})

    def key(self):
        return json.dumps(self.items)


def corpus(*texts: str) -> Corpus:
    return Corpus([{"text": text} for text in texts])


def document_texts(store, name: str) -> list[str]:
    """The documents of a split, decoded one by one from its tokens."""
    split, tokenizer = store.split(name), store.tokenizer()
    starts = split.document_starts.tolist()
    ends = [*starts[1:], split.num_tokens]
    found = []
    for start, end in zip(starts, ends, strict=True):
        tokens = split.read(start, end - start)
        assert tokens[0] == tokenizer.eot_id
        assert tokenizer.eot_id not in tokens[1:]
        found.append(tokenizer.decode(tokens))
    return found


WORDS = [f"word {i} größer\n" * (i % 7 + 1) for i in range(300)]


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe:300"])
@pytest.mark.parametrize("shard_tokens", [100_000_000, 97])
def test_documents_come_back(tmp_path, tokenizer, shard_tokens):
    store = build_store(corpus(*WORDS), tmp_path / "s", tokenizer=tokenizer, shard_tokens=shard_tokens)
    assert store.manifest["split_by"] == "document"
    found = {name: document_texts(store, name) for name in store.splits}
    assert sorted(text for texts in found.values() for text in texts) == sorted(WORDS)
    for name, texts in found.items():
        split = store.split(name)
        assert texts == [text for text in WORDS if text in set(texts)]  # the order of the source
        assert split.document_bytes.tolist() == [len(text.encode()) for text in texts]
        assert (split.num_documents, split.num_bytes) == (len(texts), sum(split.document_bytes))
        assert split.num_characters == sum(map(len, texts))
        files = store.manifest["splits"][name]["shards"]
        assert sum(shard["tokens"] for shard in files) == split.num_tokens
        assert max(shard["tokens"] for shard in files) <= shard_tokens
    store.verify()


def test_windows_across_shards(tmp_path):
    source = corpus(*WORDS)
    small = build_store(source, tmp_path / "a", tokenizer="byte", shard_tokens=13).split("train")
    large = build_store(source, tmp_path / "b", tokenizer="byte").split("train")
    everything = large.read(0, large.num_tokens)
    assert everything.dtype == np.int32
    np.testing.assert_array_equal(small.read(0, small.num_tokens), everything)
    starts = np.random.default_rng(0).integers(0, large.num_tokens - 40, 50)
    windows = small.read_windows(starts, 40)
    np.testing.assert_array_equal(windows, np.stack([everything[start : start + 40] for start in starts]))
    again = pickle.loads(pickle.dumps(small))
    np.testing.assert_array_equal(again.read_windows(starts, 40), windows)
    for start, length in ((-1, 2), (large.num_tokens - 1, 2)):
        with pytest.raises(IndexError):
            large.read(start, length)


def test_the_form_on_disk(tmp_path):
    build_store(corpus("ab", "c", "d"), tmp_path, tokenizer="byte", validation_fraction=0.34, test_fraction=0.0)
    tokens = np.fromfile(tmp_path / "train" / "tokens-00000.bin", dtype="<u2")
    assert tokens.tolist() == [256, 97, 98]
    assert np.load(tmp_path / "train" / "documents.npy").tolist() == [[0, 2]]
    tokens = np.fromfile(tmp_path / "validation" / "tokens-00000.bin", dtype="<u2")
    assert tokens.tolist() == [256, 99, 256, 100]
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["dtype"] == "uint16"
    assert manifest["source"] == "memory"
    assert manifest["cleaning"] == "none"
    assert manifest["tokenizer"]["vocab_size"] == 257


def test_a_large_vocabulary_is_stored_in_32_bits(tmp_path):
    text = "".join(map(chr, [*range(0x20, 0xD800), *range(0xE000, 0x13000)]))
    store = build_store(corpus(text), tmp_path / "s", tokenizer="char", validation_fraction=0.1, test_fraction=0.0)
    assert store.manifest["dtype"] == "uint32"
    assert "".join(document_texts(store, "train") + document_texts(store, "validation")) == text


# Splits


@pytest.mark.parametrize("size", [1000, 997, 10])
@pytest.mark.parametrize("fractions", [(0.1, 0.0), (0.1, 0.1), (0.3, 0.2)])
def test_the_position_split_is_exact_to_the_character(tmp_path, size, fractions):
    text = "".join(chr(97 + i % 26) for i in range(size))
    pieces = [text[: size // 3], text[size // 3 : size // 2], text[size // 2 :]]
    validation, test = fractions
    store = build_store(
        corpus(*pieces),
        tmp_path / "s",
        tokenizer="char",
        split_by="position",
        validation_fraction=validation,
        test_fraction=test,
    )
    joined = {name: "".join(document_texts(store, name)) for name in store.splits}
    assert joined["train"] == text[: int((1 - (validation + test)) * size)]
    assert joined["train"] + joined["validation"] + joined.get("test", "") == text
    if test:
        assert joined["test"] == text[int((1 - test) * size) :]


def test_nanogpt_split(tmp_path):
    text = "All the world's a stage.\n" * 401
    store = build_store(corpus(text), tmp_path / "s", tokenizer="char", validation_fraction=0.1, test_fraction=0.0)
    assert store.manifest["split_by"] == "position"
    assert document_texts(store, "train") == [text[: int(len(text) * 0.9)]]
    assert document_texts(store, "validation") == [text[int(len(text) * 0.9) :]]


def test_the_document_split_depends_on_the_key_alone(tmp_path):
    items = [{"text": f"{side} {i}", "split_key": str(i)} for side in ("left", "right") for i in range(200)]
    store = build_store(Corpus(items), tmp_path / "a", tokenizer="byte", validation_fraction=0.2)
    fewer = build_store(Corpus(items[100:]), tmp_path / "b", tokenizer="byte", validation_fraction=0.2)
    for name in store.splits:
        texts = set(document_texts(store, name))
        assert {f"right {text.split()[1]}" for text in texts} <= texts
        assert set(document_texts(fewer, name)) <= texts
    assert 0.1 < store.split("validation").num_documents / 400 < 0.3


def test_splits_of_the_source_are_kept(tmp_path):
    items = [{"text": f"{name} {i}", "split": name} for name in ("train", "validation") for i in range(3)]
    store = build_store(Corpus(items), tmp_path / "s", tokenizer="byte")
    assert store.manifest["split_by"] == "source"
    assert store.splits == ("train", "validation")
    assert document_texts(store, "validation") == ["validation 0", "validation 1", "validation 2"]


def test_a_missing_validation_split_is_taken_from_train(tmp_path):
    items = [{"text": f"{name} {i}", "split": name} for name in ("train", "test") for i in range(200)]
    store = build_store(Corpus(items), tmp_path / "s", tokenizer="byte", validation_fraction=0.2)
    assert store.split("test").num_documents == 200
    assert all(text.startswith("train") for text in document_texts(store, "validation"))
    assert store.split("train").num_documents + store.split("validation").num_documents == 200


def test_a_long_document_stays_one(tmp_path):
    path = tmp_path / "long.txt"
    text = "some words in a line\n" * 60_000
    path.write_text(text)
    store = build_store(
        open_source(f"text:{path}"),
        tmp_path / "s",
        tokenizer="bpe:300",
        validation_fraction=0.1,
        test_fraction=0.0,
    )
    assert store.split("train").num_documents == store.split("validation").num_documents == 1
    tokenizer = build_tokenizer("bpe:300", [text])
    np.testing.assert_array_equal(
        store.split("train").read(1, store.split("train").num_tokens - 1),
        tokenizer.encode(text[: int(0.9 * len(text))]),
    )


# Identity


def test_built_twice_it_has_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        build_store(corpus(*WORDS), tmp_path / name, tokenizer="bpe:300")
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) == 11
    assert filecmp.cmpfiles(tmp_path / "a", tmp_path / "b", files, shallow=False)[0] == files


def test_the_fingerprint_is_that_of_the_documents(tmp_path):
    stores = {
        name: build_store(source, tmp_path / name, tokenizer=tokenizer, split_by="position")
        for name, source, tokenizer in [
            ("a", corpus("abc" * 20, "def"), "byte"),
            ("b", corpus("abc" * 20, "def"), "char"),
            ("c", corpus("abc" * 20 + "d", "ef"), "byte"),
        ]
    }
    assert stores["a"].fingerprint == stores["b"].fingerprint != stores["c"].fingerprint


def test_the_cache_builds_once_for_each_set_of_options(tmp_path):
    source = corpus(*WORDS)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        stores = list(pool.map(lambda _: cached_store(source, tmp_path, tokenizer="byte"), range(4)))
    assert len({store.directory for store in stores}) == 1
    assert len(source.readings) == 1
    other = cached_store(source, tmp_path, tokenizer="byte", validation_fraction=0.2)
    assert other.directory != stores[0].directory
    assert cached_store(corpus(*WORDS[:-1]), tmp_path, tokenizer="byte").directory != stores[0].directory


# Failures


def test_a_failed_build_leaves_nothing(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"good" * 100 + b"\xff")
    with pytest.raises(UserError, match="offset 400"):
        build_store(open_source(f"text:{path}"), tmp_path / "s", tokenizer="byte")

    def interrupt(stage, done, total):
        if stage == "tokenize":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_store(corpus(*WORDS), tmp_path / "s", tokenizer="byte", progress=interrupt)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (corpus(), {}, "has no text"),
        (corpus("", ""), {}, "has no text"),
        (corpus("a"), {}, "train split is empty: 1 documents .* by position .*"),
        (corpus("a", "b"), {"split_by": "document"}, "split is empty"),
        (corpus("a"), {"split_by": "sentence"}, "split_by is 'sentence'; choose from"),
        (corpus("a"), {"validation_fraction": 0.5, "test_fraction": 0.5}, "sum is below 1"),
        (corpus("a"), {"shard_tokens": 0}, "shard_tokens is 0"),
        (Corpus([{"text": "a", "split": "dev"}]), {}, "split 'dev'"),
    ],
)
def test_what_cannot_be_built(tmp_path, source, options, message):
    with pytest.raises(UserError, match=message):
        build_store(source, tmp_path / "s", tokenizer="byte", **options)
    assert not list(tmp_path.iterdir())


def test_empty_documents_are_skipped_and_counted(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf")
    (tmp_path / "b.txt").write_text("words " * 30)
    store = build_store(open_source(f"text:{tmp_path}/*.txt"), tmp_path / "s", tokenizer="byte")
    assert store.manifest["empty_documents"] == 1
    assert store.split("train").num_documents == 1


def test_replacements_are_counted_once(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"caf\xe9 " * 100)
    source = open_source(f"text:{path}", decode_errors="replace")
    store = build_store(source, tmp_path / "s", tokenizer="byte")
    assert store.manifest["decode_replacements"] == 100


def test_damage_is_named(tmp_path):
    directory = build_store(corpus(*WORDS), tmp_path / "s", tokenizer="byte", shard_tokens=500).directory
    shard = directory / "train" / "tokens-00001.bin"
    data = bytearray(shard.read_bytes())
    data[10] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match=r"train/tokens-00001\.bin: its sha256"):
        open_store(f"store:{directory}").verify()
    shard.write_bytes(data[:-2])
    with pytest.raises(UserError, match=r"train/tokens-00001\.bin: it has 998 bytes, the manifest says 1000"):
        open_store(directory)
    shard.unlink()
    with pytest.raises(UserError, match=r"train/tokens-00001\.bin: it is missing"):
        open_store(directory)


def test_a_run_does_not_read_a_store_with_a_byte_flipped(tmp_path):
    config = get_default()
    (tmp_path / "a.txt").write_text("some words of a text\n" * 100, "utf-8")
    config.data.update(source=f"text:{tmp_path}/a.txt", cache_dir=str(tmp_path / "cache"), split_by="position")
    config.tokenizer = "byte"
    shard = open_store_of(config).directory / "train" / "tokens-00000.bin"
    shard.write_bytes(b"z" + shard.read_bytes()[1:])
    with pytest.raises(UserError, match=r"train/tokens-00000\.bin: its sha256 .* remove the store"):
        open_store_of(config)


def test_what_is_held_out_shows_and_names_do_not(tmp_path):
    whole = [
        build_store(corpus(*WORDS), tmp_path / name, tokenizer="byte", shard_tokens=n)
        for name, n in (("a", 500), ("b", 700))
    ]
    other = build_store(corpus(*WORDS), tmp_path / "c", tokenizer="byte", validation_fraction=0.2)
    renamed = Corpus([{"text": text, "id": f"x{i}"} for i, text in enumerate(WORDS)])
    renamed = build_store(renamed, tmp_path / "d", tokenizer="byte", shard_tokens=500)
    assert whole[0].layout == whole[1].layout == renamed.layout != other.layout
    assert whole[0].fingerprint == other.fingerprint != renamed.fingerprint
    assert whole[0].content == renamed.content != other.content


@pytest.mark.parametrize("name", ["manifest.json", "tokenizer.json"])
def test_a_cut_file_of_a_store_is_named_in_plain_words(name, tmp_path):
    directory = build_store(corpus(*WORDS), tmp_path / "s", tokenizer="byte").directory
    path = directory / name
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=rf"{name} is not JSON: line \d+, column \d+: [a-z ]+"):
        open_store(directory).tokenizer()


def test_what_cannot_be_opened(tmp_path):
    with pytest.raises(UserError, match="is not a token store"):
        open_store(tmp_path)
    store = build_store(corpus("a" * 100), tmp_path / "s", tokenizer="byte", test_fraction=0.0)
    with pytest.raises(UserError, match="no split 'test'; it has train, validation"):
        store.split("test")
    with pytest.raises(UserError, match="it exists"):
        build_store(corpus("a" * 100), tmp_path / "s", tokenizer="byte")
    manifest = store.directory / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 99'))
    with pytest.raises(UserError, match="format version 99, expected 1"):
        open_store(store.directory)
