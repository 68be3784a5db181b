"""Sources that are files: the same documents whole, compressed, in ranges and from a remote store."""

import bz2
import csv
import gzip
import json
import lzma
import pickle

import numpy as np
import pytest

from gptjax.data.sources import cuts as ranges
from gptjax.data.sources import text_files
from gptjax.data.sources.opening import open_source
from gptjax.data.tokenization.tokenizer import build_tokenizer
from gptjax.errors import UserError

TEXTS = [f"document {i} ünï 漢字\n" + "word " * (i % 9) for i in range(40)]


def texts(source) -> list[str]:
    return [document["text"] for document in source.documents()]


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(text_files, "PIECE_BYTES", 400)


def write_jsonl(path, records) -> None:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")


def compress(path, suffix: str):
    data, target = path.read_bytes(), path.with_name(path.name + suffix)
    if suffix != ".zst":
        target.write_bytes({".gz": gzip, ".bz2": bz2, ".xz": lzma}[suffix].compress(data))
    else:
        import pyarrow

        with target.open("wb") as file, pyarrow.CompressedOutputStream(file, "zstd") as stream:
            stream.write(data)
    path.unlink()
    return target


def write(directory, scheme: str):
    """A file of `TEXTS`; returns its path and the field of the spec."""
    path = directory / f"a.{scheme}"
    if scheme == "jsonl":
        write_jsonl(path, [{"body": text} for text in TEXTS])
    elif scheme == "json":
        path.write_text(json.dumps([{"body": text} for text in TEXTS], indent=1), encoding="utf-8")
    elif scheme == "csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            rows = csv.DictWriter(file, ["id", "body"])
            rows.writeheader()
            rows.writerows({"id": i, "body": text} for i, text in enumerate(TEXTS))
    return path


# Formats


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst", ".bz2", ".xz"])
@pytest.mark.parametrize("form", ["jsonl", "json", "csv"])
def test_records(tmp_path, form, suffix):
    path = write(tmp_path, form)
    if suffix:
        path = compress(path, suffix)
    scheme = "csv" if form == "csv" else "jsonl"
    found = list(open_source(f"{scheme}:{tmp_path}/a.*#body").documents())
    assert [document["text"] for document in found] == TEXTS
    assert [document["id"] for document in found] == [f"{path.name}:{i + 1}" for i in range(len(TEXTS))]


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".bz2", ".xz"])
def test_compressed_text(tmp_path, suffix):
    for number, text in enumerate(TEXTS):
        path = tmp_path / f"{number:02}.txt"
        path.write_text(text, encoding="utf-8")
        compress(path, suffix)
    assert texts(open_source(f"text:{tmp_path}/*{suffix}")) == TEXTS


def test_parquet(tmp_path, monkeypatch):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    table = pyarrow.table({"body": TEXTS, "title": [f"title {i}" for i in range(len(TEXTS))]})
    pyarrow.parquet.write_table(table, path, row_group_size=7)
    whole = list(open_source(f"parquet:{path}#body").documents())
    assert [document["text"] for document in whole] == TEXTS
    monkeypatch.setattr(text_files, "PIECE_BYTES", 300)
    source = open_source(f"parquet:{path}#body")
    assert len(source.pieces()) > 2
    assert list(source.documents()) == whole
    assert texts(open_source(f"parquet:{path}#title+body"))[3] == f"title 3\n{TEXTS[3]}"
    with pytest.raises(UserError, match=r"a\.parquet: no column 'text'; columns: body, title"):
        texts(open_source(f"parquet:{path}"))
    assert texts(open_source(f"parquet:{compress(path, '.zst')}#body")) == TEXTS
    path.write_bytes(b"no such thing")
    with pytest.raises(UserError, match=r"a\.parquet is not a Parquet file"):
        texts(open_source(f"parquet:{path}#body"))


def test_pages_are_delivered_as_they_are(tmp_path):
    page = "<html><body><p>Tom &amp; Jerry</p></body></html>"
    (tmp_path / "a.html").write_text(page)
    (tmp_path / "b.html").write_text("")
    assert texts(open_source(f"html:{tmp_path}/*.html")) == [page, ""]


def test_fields_are_joined_and_lists_are_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [{"title": "月", "paragraphs": ["床前明月光", "疑是地上霜"], "a+b": "plus"}])
    assert texts(open_source(f"jsonl:{path}#title+paragraphs")) == ["月\n床前明月光\n疑是地上霜"]
    assert texts(open_source(f"jsonl:{path}#a+b")) == ["plus"]


def test_dialogues(tmp_path):
    pairs = [{"prompt": f"question {i}", "response": f"answer {i}"} for i in range(5)]
    write_jsonl(tmp_path / "a.jsonl", pairs)
    found = list(open_source(f"pairs:{tmp_path}/a.jsonl").documents())
    assert [document["messages"][1]["content"] for document in found] == [pair["response"] for pair in pairs]
    assert [document["id"] for document in found] == [f"a.jsonl:{i + 1}" for i in range(5)]
    turns = [{"role": "user", "content": "hello"}, {"role": "user", "content": "again"}]
    write_jsonl(tmp_path / "b.jsonl", [{"messages": turns}])
    with pytest.raises(UserError, match=r"b\.jsonl, line 1.*two user turns|turns 1 and 2 are both of the user"):
        list(open_source(f"messages:{tmp_path}/b.jsonl").documents())
    source = open_source(f"messages:{tmp_path}/b.jsonl", on_error="skip")
    assert list(source.documents()) == []
    assert source.faults.skipped == 1


# Pieces


@pytest.mark.parametrize("ending", ["\n", "\r\n", ""])
def test_ranges_of_lines_have_the_documents_and_numbers_of_the_whole(tmp_path, small_pieces, monkeypatch, ending):
    monkeypatch.setattr(ranges, "_READ_BYTES", 90)
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in TEXTS]
    lines.insert(3, "")
    path.write_bytes(((ending or "\n").join(lines) + ending).encode())
    source = open_source(f"jsonl:{path}")
    pieces = source.pieces()
    assert len(pieces) > 5
    assert texts(source) == TEXTS
    numbers = [int(document["id"].rpartition(":")[2]) for document in source.documents()]
    assert numbers == [1, 2, 3, *range(5, len(TEXTS) + 2)]
    other_order = [list(source.read(piece)) for piece in reversed(pieces)]
    assert [d for documents in reversed(other_order) for d in documents] == list(source.documents())


@pytest.mark.parametrize("text", ["word  two\n\nüber 漢字 " * 400, "漢字" * 3000, "x" * 9000, "a\u3000\u3000b\n" * 900])
def test_ranges_of_a_text_join_to_the_text(tmp_path, monkeypatch, text):
    monkeypatch.setattr(text_files, "PIECE_BYTES", 1000)
    monkeypatch.setattr(ranges, "_WINDOW_BYTES", 100)
    path = tmp_path / "a.txt"
    path.write_text(text, encoding="utf-8")
    source = open_source(f"text:{path}")
    assert len(source.pieces()) > 4
    documents = list(source.documents())
    assert "".join(document["text"] for document in documents) == text
    assert [document["part"] == 0 for document in documents] == [True] + [False] * (len(documents) - 1)


def test_ranges_keep_the_token_ids_of_the_whole(tmp_path, monkeypatch):
    text = "".join(f"It's item {i},\nand  more;\n\n\tword " for i in range(300))
    tokenizer = build_tokenizer("bpe:400", [text])
    monkeypatch.setattr(text_files, "PIECE_BYTES", 500)
    (tmp_path / "a.txt").write_text(text)
    parts = texts(open_source(f"text:{tmp_path}/a.txt"))
    assert len(parts) > 10
    np.testing.assert_array_equal(np.concatenate(tokenizer.encode_batch(parts)), tokenizer.encode(text))


def test_a_cut_text_with_bytes_that_are_not_utf8(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "PIECE_BYTES", 1000)
    data = ("größer " * 400).encode("latin-1")
    (tmp_path / "a.txt").write_bytes(data)
    source = open_source(f"text:{tmp_path}/a.txt", decode_errors="replace")
    assert "".join(texts(source)) == data.decode("utf-8", "replace")
    assert source.faults.replaced == 800
    with pytest.raises(UserError, match=r"byte 0xf6 at offset 2 "):
        texts(open_source(f"text:{tmp_path}/a.txt"))


def test_small_files_share_a_piece_and_the_order_stays(tmp_path, small_pieces):
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number:02}.txt").write_text(text, encoding="utf-8")
    source = open_source(f"text:{tmp_path}/*.txt")
    assert 2 < len(source.pieces()) < 20
    assert texts(source) == TEXTS


def test_pieces_are_json_and_a_pickled_source_reads_them(tmp_path, small_pieces):
    path = write(tmp_path, "jsonl")
    source = open_source(f"jsonl:{path}#body")
    worker = pickle.loads(pickle.dumps(source))
    for piece in source.pieces():
        name, num_bytes, content = json.loads(json.dumps(piece))
        again = type(piece)(name, num_bytes, content)
        assert again.sha256 == piece.sha256
        assert list(worker.read(again)) == list(source.read(piece))


def test_a_piece_changes_with_its_file(tmp_path):
    path = write(tmp_path, "jsonl")
    source = open_source(f"jsonl:{path}#body")
    piece = source.pieces()[0]
    path.write_text('{"body": "another"}\n')
    assert open_source(f"jsonl:{path}#body").pieces()[0].sha256 != piece.sha256
    with pytest.raises(UserError, match=r"a\.jsonl was changed or removed"):
        list(source.read(piece))


# Remote stores


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_remote_store_goes_through_the_same_code(small_pieces, name):
    fsspec = pytest.importorskip("fsspec")
    data = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    memory = fsspec.filesystem("memory")
    memory.pipe(f"/bucket/deep/{name}", gzip.compress(data) if name.endswith(".gz") else data)
    try:
        source = open_source(f"jsonl:memory://bucket/**/{name}")
        assert texts(source) == TEXTS
        assert next(iter(source.documents()))["id"] == f"deep/{name}:1"
        assert (len(source.pieces()) == 1) == name.endswith(".gz")
        with pytest.raises(UserError, match=r"no file matches 'text:memory://bucket/\*\.txt'"):
            open_source("text:memory://bucket/*.txt")
    finally:
        memory.rm("/bucket", recursive=True)


def test_an_unknown_protocol_says_what_to_install():
    with pytest.raises(UserError, match=r"nowhere://.*cannot be opened.*pip install"):
        open_source("text:nowhere://bucket/*.txt")


# What cannot be read


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("scheme", ["text", "jsonl"])
def test_a_truncated_file_is_named(tmp_path, scheme, suffix):
    path = tmp_path / "a.jsonl"
    write_jsonl(
        path,
        [{"text": text, "noise": np.random.default_rng(i).bytes(40).hex()} for i, text in enumerate(TEXTS)],
    )
    path = compress(path, suffix)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(UserError, match=rf"a\.jsonl\{suffix}.*(cannot be read|end|Truncated|truncated)"):
        texts(open_source(f"{scheme}:{path}"))
    source = open_source(f"{scheme}:{path}", on_error="skip")
    texts(source)
    assert source.faults.skipped == 1
    assert "a.jsonl" in source.faults.messages[0]


def test_bad_lines_are_skipped_and_named(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [
        b'{"text": "one"}',
        b"{broken",
        b'{"body": "x"}',
        b'{"text": "caf\xe9"}',
        b'{"text": 3}',
        b'{"text": "two"}',
    ]
    path.write_bytes(b"\n".join(lines))
    source = open_source(f"jsonl:{path}", on_error="skip")
    assert texts(source) == ["one", "two"]
    assert source.faults.skipped == 4
    assert [int(message.partition("line ")[2].partition(":")[0]) for message in source.faults.messages] == [
        2,
        3,
        4,
        5,
    ]
    assert texts(open_source(f"jsonl:{path}", on_error="skip", decode_errors="replace")) == [
        "one",
        "caf\ufffd",
        "two",
    ]


def test_a_line_too_long_is_skipped_without_being_held(tmp_path, monkeypatch):
    from gptjax.data.sources import records

    monkeypatch.setattr(records, "MAX_LINE_BYTES", 1000)
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [{"text": "one"}, {"text": "x" * 5000}, {"text": "two"}])
    with pytest.raises(UserError, match=r"a\.jsonl, line 2"):
        texts(open_source(f"jsonl:{path}"))
    source = open_source(f"jsonl:{path}", on_error="skip")
    assert texts(source) == ["one", "two"]
    assert source.faults.skipped == 1


def test_a_page_that_is_too_large_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "MAX_PAGE_BYTES", 100)
    (tmp_path / "a.html").write_text("<p>" * 200)
    (tmp_path / "b.html").write_text("<p>fine")
    source = open_source(f"html:{tmp_path}/*.html", on_error="skip")
    assert texts(source) == ["<p>fine"]
    assert "a.html" in source.faults.messages[0]


def test_a_text_that_is_not_utf8_is_skipped(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.txt").write_bytes(b"fine")
    source = open_source(f"text:{tmp_path}/*.txt", on_error="skip")
    assert texts(source) == ["fine"]
    assert "a.txt: byte 0xe9 at offset 3" in source.faults.messages[0]
