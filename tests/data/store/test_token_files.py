"""`tokens:GLOB`: token files of nanoGPT and llm.c, read without conversion."""

import numpy as np
import pytest

from gptjax.config import get_default
from gptjax.data import opening
from gptjax.data.pipeline.batches import Batches
from gptjax.data.store import token_files
from gptjax.data.store.token_files import open_token_files
from gptjax.data.tokenization.tokenizer import build_tokenizer
from gptjax.errors import UserError

TEXTS = [f"text {i} größer " * (1 + i % 5) for i in range(30)]
TOKENIZER = build_tokenizer("byte")
EOT = TOKENIZER.eot_id


def nanogpt(path, texts) -> np.ndarray:
    """Raw uint16, each document followed by the end-of-text token, as openwebtext/prepare.py writes it."""
    tokens = np.concatenate([[*TOKENIZER.encode(text), EOT] for text in texts]).astype("<u2")
    tokens.tofile(path)
    return tokens


def llm_c(path, texts) -> np.ndarray:
    """A header of 256 int32, each document after the end-of-text token, as dev/data/data_common.py writes it."""
    tokens = np.concatenate([[EOT, *TOKENIZER.encode(text)] for text in texts]).astype("<u2")
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    path.write_bytes(header.tobytes() + tokens.tobytes())
    return tokens


def opened(directory, pattern="*.bin"):
    return open_token_files(f"tokens:{directory}/{pattern}", TOKENIZER, directory / "cache")


def documents(split) -> list[str]:
    lengths = np.diff(split.document_starts, append=split.num_tokens).tolist()
    return [TOKENIZER.decode(split.read(s, n)) for s, n in zip(split.document_starts.tolist(), lengths, strict=True)]


@pytest.mark.parametrize("chunk", [7, 1 << 22])
def test_llm_c_shards(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(token_files, "_CHUNK_TOKENS", chunk)
    expected = [llm_c(tmp_path / f"fineweb_train_{i:06}.bin", TEXTS[10 * i : 10 * i + 10]) for i in range(2)]
    llm_c(tmp_path / "fineweb_val_000000.bin", TEXTS[20:])
    store = opened(tmp_path)
    split = store.split("train")
    assert store.splits == ("train", "validation")
    assert split.num_tokens == sum(map(len, expected))
    np.testing.assert_array_equal(split.read(0, split.num_tokens), np.concatenate(expected))
    assert documents(split) == TEXTS[:20]
    assert split.document_bytes.tolist() == [len(text.encode()) for text in TEXTS[:20]]
    assert (split.num_documents, split.num_bytes) == (20, sum(len(text.encode()) for text in TEXTS[:20]))
    assert documents(store.split("validation")) == TEXTS[20:]
    assert not split.has_mask
    store.verify()


def test_nanogpt_files(tmp_path):
    expected = nanogpt(tmp_path / "train.bin", TEXTS[:20])
    nanogpt(tmp_path / "val.bin", TEXTS[20:])
    split = opened(tmp_path).split("train")
    np.testing.assert_array_equal(split.read(0, split.num_tokens), expected)
    assert documents(split) == [*TEXTS[:20], ""]  # the last end-of-text token begins one more
    assert split.document_bytes.sum() == sum(len(text.encode()) for text in TEXTS[:20])
    batch = Batches(split, context_length=16, batch_size=4, seed=0)[0]
    starts = batch["positions"] == 0
    assert (starts[:, 1:] <= (batch["tokens"][:, 1:] == EOT)).all()


def test_the_table_of_documents_is_kept(tmp_path, monkeypatch):
    llm_c(tmp_path / "train.bin", TEXTS)
    first = opened(tmp_path).split("train").document_starts
    monkeypatch.setattr(token_files.ForeignSplit, "find_documents", lambda self: pytest.fail("read again"))
    np.testing.assert_array_equal(opened(tmp_path).split("train").document_starts, first)


def test_a_config_names_them(tmp_path):
    llm_c(tmp_path / "a_train.bin", TEXTS)
    llm_c(tmp_path / "a_val.bin", TEXTS)
    config = get_default()
    config.tokenizer = "byte"
    config.data.update(source=f"tokens:{tmp_path}/*.bin", cache_dir=str(tmp_path / "cache"))
    store = opening.open_store_of(config)
    assert store.split("validation").num_documents == len(TEXTS)
    assert store.tokenizer().vocab_size == 257
    with pytest.raises(UserError, match="no split 'test'; it has train, validation"):
        store.split("test")
    config.tokenizer = "bpe:300"
    with pytest.raises(UserError, match="holds tokens, and tokenizer='bpe:300' is trained on text"):
        opening.open_store_of(config)


def test_gpt2(tmp_path, shared_data):
    gpt2 = build_tokenizer(f"hf:{shared_data}/gpt2_bpe")
    ids = [np.array([gpt2.eot_id, *gpt2.encode(text)], "<u2") for text in TEXTS]
    np.concatenate(ids).tofile(tmp_path / "train.bin")
    split = open_token_files(f"tokens:{tmp_path}/train.bin", gpt2, tmp_path / "cache").split("train")
    assert split.document_bytes.tolist() == [len(text.encode()) for text in TEXTS]


def damaged(directory, kind: str):
    path = directory / "train.bin"
    if kind == "odd":
        path.write_bytes(b"abc")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "short":
        llm_c(path, TEXTS)
        path.write_bytes(path.read_bytes()[:-4])
    elif kind == "version":
        path.write_bytes(np.array([20240520, 7, 0], "<i4").tobytes() + bytes(1024))
    elif kind == "unnamed":
        llm_c(directory / "shard.bin", TEXTS)
    elif kind == "validation only":
        llm_c(directory / "val.bin", TEXTS)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("odd", r"train\.bin has 3 bytes: not whole tokens"),
        ("empty", r"train\.bin has 0 bytes"),
        ("short", r"train\.bin has \d+ bytes, and its header says \d+ tokens"),
        ("version", r"of version 7; expected version 1"),
        ("unnamed", r"'shard\.bin' has neither train nor val"),
        ("validation only", r"no file has train in its name; there are val\.bin"),
        ("missing", r"no file matches"),
    ],
)
def test_what_cannot_be_read(tmp_path, kind, message):
    damaged(tmp_path, kind)
    with pytest.raises(UserError, match=message):
        opened(tmp_path)


def test_the_tokenizer_must_fit(tmp_path):
    np.array([5, 300, 2], "<u2").tofile(tmp_path / "train.bin")
    with pytest.raises(UserError, match=r"train\.bin has the token id 300 at token 1, and the tokenizer has only 257"):
        opened(tmp_path).split("train").document_starts  # noqa: B018
    large = build_tokenizer("char", ["".join(map(chr, [*range(0x20, 0xD800), *range(0xE000, 0x13000)]))])
    with pytest.raises(UserError, match=r"uint16 cannot hold the \d+ ids"):
        open_token_files(f"tokens:{tmp_path}/train.bin", large, tmp_path, dtype="uint16")


def test_ids_of_four_bytes_are_read_where_they_are_named_and_never_by_guess(tmp_path):
    ids = np.arange(200, dtype="<u4")
    path = tmp_path / "train.bin"
    spec = f"tokens:{path}"
    ids.tofile(path)
    with pytest.raises(UserError, match=r"every second uint16 is 0.*token_dtype=uint32"):
        open_token_files(spec, TOKENIZER, tmp_path)
    split = open_token_files(spec, TOKENIZER, tmp_path, dtype="uint32").split("train")
    assert split.read(0, 200).tolist() == ids.tolist() and split.num_documents == 1
    header = np.zeros(256, "<i4")
    header[:3] = 20240801, 7, 200
    path.write_bytes(header.tobytes() + ids.tobytes())
    assert open_token_files(spec, TOKENIZER, tmp_path).split("train").read(0, 200).tolist() == ids.tolist()
    header[0] = 20240522
    path.write_bytes(header.tobytes() + ids.tobytes())
    with pytest.raises(UserError, match="magic number 20240522"):
        open_token_files(spec, TOKENIZER, tmp_path)
    np.save(tmp_path / "a.npy", ids)
    path.write_bytes((tmp_path / "a.npy").read_bytes())
    with pytest.raises(UserError, match="array of NumPy's"):
        open_token_files(spec, TOKENIZER, tmp_path)
