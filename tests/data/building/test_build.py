"""Building a store: the same bytes with any number of workers, on any runner, and after a kill."""

import contextlib
import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from gptjax.data.building.build import build_store, work_directory
from gptjax.data.sources import text_files
from gptjax.data.sources.opening import open_source
from gptjax.data.store.store import open_store
from gptjax.errors import RunError, UserError

OPTIONS = dict(tokenizer="bpe:400", cleaning="plain", deduplicate="near", test_fraction=0.1, shard_tokens=5000)


def sha256_of(directory: Path) -> dict[str, str]:
    """sha256 of each file below a directory."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(f.relative_to(directory)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def sentence(seed: int, words: int = 40) -> str:
    random = np.random.default_rng(seed)
    return " ".join("".join(random.choice(list("abcdefgh"), 4)) for _ in range(words))


def decoded(store, split: str) -> list[str]:
    tokens = store.split(split)
    starts = tokens.document_starts
    lengths = np.diff(starts, append=tokens.num_tokens)
    tokenizer = store.tokenizer()
    return [tokenizer.decode(tokens.read(s, n)) for s, n in zip(starts.tolist(), lengths.tolist(), strict=True)]


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(text_files, "PIECE_BYTES", 5000)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """200 texts in JSONL and one long text; several pieces, some documents twice or nearly."""
    directory = tmp_path_factory.mktemp("corpus")
    documents = [sentence(i % 180) + ("  \n\nend" if i % 3 else "") for i in range(200)]
    documents[150] = documents[7].replace("a", "a", 1) + " one more"
    lines = [json.dumps({"text": text}) for text in documents]
    (directory / "a.jsonl").write_text("\n".join(lines))
    return directory / "a.jsonl"


# The same bytes


def test_runners_and_workers_make_no_difference(tmp_path, corpus, small_pieces):
    source = open_source(f"jsonl:{corpus}")
    assert len(source.pieces()) > 5
    builds = {"one": {"workers": 1}, "two": {"workers": 2}, "eight": {"workers": 8}}
    found = {}
    for name, how in builds.items():
        found[name] = sha256_of(build_store(source, tmp_path / name, **OPTIONS, **how).directory)
    assert found["one"] == found["two"] == found["eight"]
    assert {"manifest.json", "card.json", "card.md", "duplicates.jsonl"} <= set(found["one"])
    assert sum(name.startswith("train/tokens") for name in found["one"]) > 1
    open_store(tmp_path / "one").verify()


@pytest.mark.slow
def test_beam_makes_no_difference(tmp_path, corpus, small_pieces):
    pytest.importorskip("apache_beam")
    source = open_source(f"jsonl:{corpus}")
    alone = build_store(source, tmp_path / "alone", **OPTIONS, workers=1)
    beam = build_store(source, tmp_path / "beam", **OPTIONS, runner="beam")
    assert sha256_of(beam.directory) == sha256_of(alone.directory)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "beam"]
    corpus_with_error = tmp_path / "bad.jsonl"
    corpus_with_error.write_text('{"text": "fine"}\n{broken\n')
    with pytest.raises(UserError, match=r"^\S*bad\.jsonl, line 2: not JSON"):
        build_store(open_source(f"jsonl:{corpus_with_error}"), tmp_path / "c", **OPTIONS, runner="beam")


def test_where_the_corpus_is_cut_makes_no_difference(tmp_path, corpus, monkeypatch):
    whole = build_store(open_source(f"jsonl:{corpus}"), tmp_path / "whole", **OPTIONS)
    monkeypatch.setattr(text_files, "PIECE_BYTES", 3000)
    cut = build_store(open_source(f"jsonl:{corpus}"), tmp_path / "cut", **OPTIONS)
    differing = {"manifest.json", "card.json", "card.md"}  # the fingerprint, and the sample of the card
    for name, digest in sha256_of(whole.directory).items():
        if name not in differing:
            assert sha256_of(cut.directory)[name] == digest, name


def test_a_long_document_in_several_pieces_stays_one(tmp_path, monkeypatch):
    text = "".join(f"{sentence(i, 8)}\n" for i in range(400))
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text("short " * 30)
    options = {
        "tokenizer": "bpe:400",
        "validation_fraction": 0.1,
        "test_fraction": 0.0,
        "split_by": "position",
    }
    whole = build_store(open_source(f"text:{tmp_path}/*.txt"), tmp_path / "whole", **options)
    monkeypatch.setattr(text_files, "PIECE_BYTES", 2000)
    source = open_source(f"text:{tmp_path}/*.txt")
    assert len(source.pieces()) > 5
    cut = build_store(source, tmp_path / "cut", **options, workers=2)
    for name in whole.splits:
        np.testing.assert_array_equal(whole.split(name).document_starts, cut.split(name).document_starts)
        np.testing.assert_array_equal(whole.split(name).document_bytes, cut.split(name).document_bytes)
        assert decoded(whole, name) == decoded(cut, name)


# Continuing

PROGRAM = """
import multiprocessing, os, signal, sys
from gptjax.data.sources import text_files
from gptjax.data.building import build
text_files.PIECE_BYTES = 5000

def progress(stage, done, total):
    print(stage, done, total, flush=True)
    if stage == sys.argv[3] and 0 < done < total:
        print("pids", *[child.pid for child in multiprocessing.active_children()], flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    from gptjax.data.sources.opening import open_source
    build.build_store(open_source(sys.argv[1]), sys.argv[2], tokenizer="bpe:400", cleaning="plain",
                      deduplicate="near", test_fraction=0.1, shard_tokens=5000, workers=2, progress=progress)
"""


@pytest.mark.parametrize("stage", ["clean", pytest.param("tokenize", marks=pytest.mark.slow)])
def test_a_killed_build_goes_on_where_it_stopped(tmp_path, corpus, small_pieces, stage):
    (tmp_path / "program.py").write_text(PROGRAM)
    killed = subprocess.run(
        [sys.executable, tmp_path / "program.py", f"jsonl:{corpus}", tmp_path / "store", stage],
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "store").exists()
    assert wait_for_workers(killed.stdout) == 2
    folder = work_directory(tmp_path / "store") / {"clean": "cleaned", "tokenize": "tokens"}[stage]
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.suffix != ".partial"}
    assert times
    kept = {}

    def progress(name, done, total):
        if name == "assemble" and not kept:
            kept.update({path: path.stat().st_mtime_ns for path in times})

    store = build_store(open_source(f"jsonl:{corpus}"), tmp_path / "store", **OPTIONS, progress=progress)
    assert kept == times, "what was done is not done again"
    alone = build_store(open_source(f"jsonl:{corpus}"), tmp_path / "alone", **OPTIONS, workers=1)
    assert sha256_of(store.directory) == sha256_of(alone.directory)
    assert not work_directory(tmp_path / "store").exists()


def test_workers_end_with_a_killed_parent(tmp_path, corpus):
    (tmp_path / "program.py").write_text(PROGRAM)
    killed = subprocess.run(
        [sys.executable, tmp_path / "program.py", f"jsonl:{corpus}", tmp_path / "store", "clean"],
        capture_output=True,
        text=True,
    )
    assert wait_for_workers(killed.stdout) == 2


def wait_for_workers(printed: str) -> int:
    """Waits until the workers of a killed build have ended; returns their number."""
    pids = [int(pid) for pid in printed.rpartition("pids")[2].split()]
    deadline = time.monotonic() + 120
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:  # nobody may be there to bury it
                assert time.monotonic() < deadline
                time.sleep(0.05)
    return len(pids)


def test_an_interrupted_build_ends_its_workers_and_no_other_process(tmp_path, corpus, small_pieces):
    def interrupt(stage, done, total):
        if stage == "clean" and done:
            workers.update(set(multiprocessing.active_children()) - {other})
            raise KeyboardInterrupt

    workers = set()
    other = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
    other.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            build_store(open_source(f"jsonl:{corpus}"), tmp_path / "s", **OPTIONS, workers=2, progress=interrupt)
        assert len(workers) == 2
        for worker in workers:
            worker.join()
        assert other.is_alive()
    finally:
        other.kill()


def test_an_interrupted_build_is_continued(tmp_path, corpus, small_pieces):
    def interrupt(stage, done, total):
        if stage == "clean" and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_store(open_source(f"jsonl:{corpus}"), tmp_path / "s", **OPTIONS, workers=1, progress=interrupt)
    assert len(list((work_directory(tmp_path / "s") / "cleaned").iterdir())) == 1
    build_store(open_source(f"jsonl:{corpus}"), tmp_path / "s", **OPTIONS, workers=1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["s"]


def test_a_corrected_file_is_read_again_and_the_others_are_not(tmp_path, small_pieces):
    for i in range(6):
        lines = [json.dumps({"text": sentence(100 * i + j)}) for j in range(30)]
        (tmp_path / f"{i}.jsonl").write_text("\n".join(lines))
    good = (tmp_path / "4.jsonl").read_text()
    (tmp_path / "4.jsonl").write_text(good + "\n{broken")
    with pytest.raises(UserError, match=r"4\.jsonl, line 31: not JSON"):
        build_store(open_source(f"jsonl:{tmp_path}/*.jsonl"), tmp_path / "s", **OPTIONS, workers=1)
    done = {path: path.stat().st_mtime_ns for path in (work_directory(tmp_path / "s") / "cleaned").iterdir()}
    assert len(done) >= 4
    (tmp_path / "4.jsonl").write_text(good)
    kept = []

    def progress(stage, done_bytes, total):
        if stage == "assemble":
            kept.append(all(path.stat().st_mtime_ns == at for path, at in done.items()))

    build_store(open_source(f"jsonl:{tmp_path}/*.jsonl"), tmp_path / "s", **OPTIONS, workers=1, progress=progress)
    assert all(kept)


def test_two_builds_of_one_store_at_once_are_refused(tmp_path, corpus, small_pieces):
    source = open_source(f"jsonl:{corpus}")

    def second(stage, done, total):
        if stage == "select" and not done:
            with pytest.raises(UserError, match="is being built by another process"):
                build_store(source, tmp_path / "s", **OPTIONS)

    build_store(source, tmp_path / "s", **OPTIONS, workers=1, progress=second)


# What is removed


def test_near_duplicates_across_the_splits_are_found(tmp_path):
    items = [{"text": sentence(i)} for i in range(300)]
    planted = sentence(5) + " and a few other words"
    items.append({"text": planted})
    path = tmp_path / "a.jsonl"
    for seed in range(50):  # a wording that falls into another split than what it repeats
        items[-1] = {"text": f"{planted} {seed}"}
        path.write_text("\n".join(map(json.dumps, items)))
        store = build_store(
            open_source(f"jsonl:{path}"),
            tmp_path / f"s{seed}",
            tokenizer="byte",
            deduplicate="near",
            test_fraction=0.3,
        )
        card = json.loads((store.directory / "card.json").read_text())
        (pair,) = card["duplicates"]["pairs"]
        assert (pair["id"], pair["kept_id"], pair["kind"]) == ("a.jsonl:301", "a.jsonl:6", "near")
        assert sum(planted in text for name in store.splits for text in decoded(store, name)) == 0
        if pair["split"] != pair["kept_split"]:
            break
    assert card["duplicates"]["across_splits"] == 1
    assert "1 across splits" in (store.directory / "card.md").read_text("utf-8")


def test_exact_duplicates_are_left_out_and_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    texts = [sentence(i % 120) for i in range(150)]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    kept = build_store(open_source(f"jsonl:{path}"), tmp_path / "a", tokenizer="byte", deduplicate="exact")
    every = build_store(open_source(f"jsonl:{path}"), tmp_path / "b", tokenizer="byte")
    assert sorted(text for name in kept.splits for text in decoded(kept, name)) == sorted(set(texts))
    assert sum(every.split(name).num_documents for name in every.splits) == 150
    assert (kept.manifest["duplicates"], every.manifest["duplicates"]) == (30, 0)
    lines = (kept.directory / "duplicates.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    assert len(lines) == 30
    assert (first["id"], first["kept_id"], first["kind"]) == ("a.jsonl:121", "a.jsonl:1", "exact")
    assert first["split"] == first["kept_split"]  # the same text has the same hash


def test_long_documents_are_compared_as_a_whole(tmp_path, monkeypatch):
    from gptjax.data import documents as documents_module

    monkeypatch.setattr(documents_module, "PART_CHARACTERS", 300)
    for name, seed in (("a", 1), ("b", 2), ("c", 1)):
        (tmp_path / f"{name}.txt").write_text(sentence(seed, 400))
    store = build_store(
        open_source(f"text:{tmp_path}/*.txt"),
        tmp_path / "s",
        tokenizer="byte",
        deduplicate="near",
        test_fraction=0.0,
    )
    (pair,) = json.loads((store.directory / "card.json").read_text())["duplicates"]["pairs"]
    assert (pair["id"], pair["kept_id"], pair["kind"]) == ("c.txt", "a.txt", "exact")
    assert "".join(decoded(store, "train") + decoded(store, "validation")) == sentence(1, 400) + sentence(2, 400)


def test_contaminated_documents_are_removed_and_listed(tmp_path):
    question = "Natalia sold clips to forty eight of her friends in April and then half as many in May"
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": question, "answer": "seventy two"}) + "\n")
    texts = [sentence(i) for i in range(150)]
    texts[70] = f"{sentence(900)}. {question.upper()}! {sentence(901)}"
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    store = build_store(
        open_source(f"jsonl:{path}"),
        tmp_path / "s",
        tokenizer="byte",
        decontaminate=(f"{tmp_path}/test*.jsonl",),
    )
    assert sorted(t for name in store.splits for t in decoded(store, name)) == sorted(texts[:70] + texts[71:])
    contamination = json.loads((store.directory / "card.json").read_text())["contamination"]
    assert contamination["removed"] == store.manifest["contaminated"] == 1
    assert contamination["documents"][0]["id"] == "corpus.jsonl:71"
    assert contamination["documents"][0]["file"].endswith("test.jsonl")
    assert "natalia sold clips" in (store.directory / "card.md").read_text("utf-8")


def test_bad_documents_are_skipped_and_counted(tmp_path):
    lines = [json.dumps({"text": sentence(i)}) for i in range(120)]
    lines[10] = "{broken"
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    store = build_store(open_source(f"jsonl:{path}", on_error="skip"), tmp_path / "s", tokenizer="byte")
    card = json.loads((store.directory / "card.json").read_text())
    assert store.manifest["skipped"] == card["skipped"]["count"] == 1
    assert f"{path}, line 11: not JSON" in card["skipped"]["messages"][0]
    assert card["read"]["documents"] == sum(split["documents"] for split in card["splits"].values()) == 119


def test_a_cleaning_that_leaves_nothing_is_said(tmp_path):
    (tmp_path / "a.txt").write_text("a few words")
    with pytest.raises(UserError, match="nothing is left of the 1 documents"):
        build_store(
            open_source(f"text:{tmp_path}/a.txt"),
            tmp_path / "s",
            tokenizer="byte",
            cleaning="plain",
            cleaning_options={"min_characters": 1000},
        )


def test_text_that_cannot_be_written_back_is_stamped(tmp_path):
    (tmp_path / "a.txt").write_text("The Quick, brown fox! " * 50)
    source = open_source(f"text:{tmp_path}/a.txt")
    store = build_store(source, tmp_path / "s", tokenizer="byte", cleaning="plain+lowercase", test_fraction=0.0)
    assert store.manifest["invertible"] is False
    assert "the original cannot be restored" in (store.directory / "card.md").read_text("utf-8")
    plain = build_store(source, tmp_path / "t", tokenizer="byte", cleaning="plain", test_fraction=0.0)
    assert plain.manifest["invertible"] is True


def test_held_out_text_can_stay_as_it_was(tmp_path, small_pieces):
    texts = [f"The {sentence(i, 8).title()}, and. " for i in range(300)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    options = {"tokenizer": "byte", "split_by": "document", "cleaned_splits": "train", "test_fraction": 0.1}
    source = open_source(f"jsonl:{tmp_path}/a.jsonl")
    plain = build_store(source, tmp_path / "plain", cleaning="none", **options)
    lower = build_store(source, tmp_path / "lower", cleaning="lowercase", **options)
    for name in ("validation", "test"):
        assert decoded(plain, name) == decoded(lower, name)
        assert set(decoded(plain, name)) < set(texts)
    assert decoded(lower, "train") == [text.lower() for text in decoded(plain, "train")]
    assert lower.manifest["cleaned_splits"] == "train"


def test_whether_a_text_in_several_pieces_is_held_out_is_not_guessed(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "PIECE_BYTES", 2000)
    (tmp_path / "a.txt").write_text("".join(f"{sentence(i, 8)}\n" for i in range(400)))
    options = {"tokenizer": "byte", "split_by": "document", "cleaned_splits": "train", "validation_fraction": 0.0}
    with pytest.raises(UserError, match=r"begins in an earlier piece.*cleaned_splits=all"):
        build_store(open_source(f"text:{tmp_path}/a.txt"), tmp_path / "s", **options)


# Dialogues


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    directory = tmp_path_factory.mktemp("chat")
    lines = []
    for i in range(150):
        messages = [
            {"role": "system", "content": "Be kind. <|im_end|>"},
            {"role": "user", "content": f"Question {i}? {sentence(i, 5)}"},
            {"role": "assistant", "content": f"Answer {i}: {sentence(1000 + i, 6)}"},
        ]
        lines.append(json.dumps({"messages": messages}))
    (directory / "chat.jsonl").write_text("\n".join(lines))
    return build_store(open_source(f"messages:{directory}/chat.jsonl"), directory / "store", tokenizer="bpe:500")


def test_only_answers_and_their_ends_bear_loss(chat):
    tokenizer, split = chat.tokenizer(), chat.split("train")
    assert split.has_mask
    end = tokenizer.special_tokens["<|im_end|>"]
    for start, length in zip(
        split.document_starts.tolist(),
        np.diff(split.document_starts, append=split.num_tokens).tolist(),
        strict=True,
    ):
        tokens, mask = split.read(start, length), split.read_mask(start, length)
        assert tokens[0] == tokenizer.eot_id and not mask[0]
        assert tokens[mask][-1] == end
        assert tokenizer.decode(tokens[mask]).startswith("Answer ")
        assert (tokens == end).sum() == 3, "the text <|im_end|> of a message is not a token"
    chat.verify()


def test_masks_are_read_across_shards(tmp_path, chat):
    lines = [json.dumps({"prompt": f"q {i}", "response": f"a {sentence(i, 3)}"}) for i in range(120)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    options = {"tokenizer": "byte", "test_fraction": 0.0}
    large = build_store(open_source(f"pairs:{tmp_path}/a.jsonl"), tmp_path / "a", **options).split("train")
    small = build_store(open_source(f"pairs:{tmp_path}/a.jsonl"), tmp_path / "b", **options, shard_tokens=37)
    small = small.split("train")
    starts = np.array([0, 30, 36, 37, 400, large.num_tokens - 5])
    lengths = np.array([100, 10, 1, 37, 0, 5])
    for read in ("read_ranges", "read_mask_ranges"):
        expected = getattr(large, read)(starts, lengths)
        np.testing.assert_array_equal(getattr(small, read)(starts, lengths), expected)
    np.testing.assert_array_equal(
        small.read_ranges(starts, lengths),
        np.concatenate([large.read(s, n) for s, n in zip(starts.tolist(), lengths.tolist(), strict=True)]),
    )
    with pytest.raises(IndexError):
        small.read_mask(large.num_tokens - 1, 2)


def test_a_damaged_mask_is_named(tmp_path):
    lines = [json.dumps({"prompt": f"q {i}", "response": f"a {i}"}) for i in range(120)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    store = build_store(open_source(f"pairs:{tmp_path}/a.jsonl"), tmp_path / "s", tokenizer="byte")
    mask = store.directory / "train" / "mask-00000.bin"
    data = bytearray(mask.read_bytes())
    data[3] ^= 1
    mask.write_bytes(data)
    with pytest.raises(UserError, match=r"train/mask-00000\.bin: its sha256"):
        store.verify()
    mask.write_bytes(data[:-1])
    with pytest.raises(UserError, match=r"train/mask-00000\.bin: it has"):
        open_store(store.directory)


def test_text_alone_has_no_mask(tmp_path, corpus):
    split = build_store(open_source(f"jsonl:{corpus}"), tmp_path / "s", tokenizer="byte").split("train")
    assert not split.has_mask
    assert split.read_mask(5, 10).all()


# Wrong requests


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runner": "slurm"}, "runner='slurm': expected one of local, beam"),
        ({"workers": -1}, "workers=-1"),
        ({"dtype": "int8"}, "dtype is 'int8'; choose from auto"),
        ({"deduplicate": "fuzzy"}, "'fuzzy'"),
        ({"cleaned_splits": "train", "split_by": "auto"}, "cleaned_splits=train needs data.split_by=document"),
        ({"cleaning": "plian"}, "plian.*did you mean plain"),
        ({"cleaning_options": {"min_character": 3}}, "min_character"),
        ({"decontaminate": ("/nowhere/*.jsonl",)}, "no file matches"),
    ],
)
def test_wrong_options(tmp_path, corpus, options, message):
    with pytest.raises(UserError, match=message):
        build_store(open_source(f"jsonl:{corpus}"), tmp_path / "s", **{**OPTIONS, **options})
    assert not list(tmp_path.iterdir())


def test_a_vocabulary_that_does_not_fit_is_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes("".join(map(chr, [*range(0x20, 0xD800), *range(0xE000, 0x13000)])).encode())
    with pytest.raises(UserError, match=r"dtype=uint16 has no room for the tokenizer's \d+ ids"):
        build_store(open_source(f"text:{tmp_path}/a.txt"), tmp_path / "s", tokenizer="char", dtype="uint16")


def test_a_worker_that_dies_is_no_bug_of_the_user(tmp_path):
    from gptjax.data.building.runners import LocalRunner

    with pytest.raises(RunError, match=r"a worker process died.*Run again to continue"):
        LocalRunner(2).run(os._exit, [3, 3], lambda item: None)
