"""Every verb with what it reads and writes in a bucket; the oracle is the same on a disk."""

import gzip
import importlib
import io
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from bucket_runs import CONFIG

from gptjax import buckets, cli, outputs
from gptjax import config as config_lib
from gptjax.artifacts import checkpoints, mirror, models
from gptjax.artifacts.lock import Lock
from gptjax.buckets import Bucket
from gptjax.data.tokenization.tokenizer import build_tokenizer
from gptjax.errors import RunError, UserError
from gptjax.evaluation import benchmarks, prompts
from gptjax.model import gpt
from gptjax.model.architecture import Architecture

pytest.importorskip("gcsfs")
URL = "gs://gptjax-test"
LINES = '{"prompt": "a cat", "reference": "sat"}\n{"prompt": "the sun", "reference": "sang"}\n'
STUDY = """
from pathlib import Path
from gptjax.studies.study import Study

def get_study(arg=""):
    names = {{}}
    exec(Path({config!r}).read_text(), names)
    arms = {{"none": {{"model.dropout": 0.0}}, "some": {{"model.dropout": 0.1}}}}
    return Study(question="Does it hurt?", base=names["get_config"](), arms=arms, claims=("none < some",), seeds=2)
"""


def command(verb: str, *words: str) -> int:
    """The exit status of a command."""
    return cli.run(importlib.import_module(f"gptjax.{verb}").main, [f"gptjax {verb}", *words])


@pytest.fixture(scope="module")
def model_files(tmp_path_factory) -> Path:
    """A work directory with an untrained model, in a layout that can be exported to Hugging Face."""
    workdir = tmp_path_factory.mktemp("model") / "run"
    tokenizer = build_tokenizer("byte")
    config = config_lib.get_default()
    config.tokenizer = "byte"
    config.model.update(num_layers=1, num_heads=2, embed_dim=16, context_length=32, vocab_multiple=1)
    config.model.update(
        vocab_multiple=1, norm="layernorm", positions="learned", activation="gelu", qk_norm=False, use_bias=True
    )
    config = config_lib.resolve(config, tokenizer.vocab_size, 1)
    shapes, rng = gpt.abstract_params(Architecture.from_config(config.model, 0)), np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(leaf.dtype), shapes)
    checkpoints.write_parameters(workdir, params, config=config, tokenizer=tokenizer)
    (workdir / "config.json").write_text(config_lib.to_json(config))
    return workdir


@pytest.fixture
def model(store, model_files) -> str:
    """The same model in a bucket."""
    bucket = Bucket(f"{URL}/model")
    paths = [path for path in model_files.rglob("*") if path.is_file()]
    bucket.put([path.relative_to(model_files).as_posix() for path in paths], model_files)
    return bucket.url


@pytest.fixture(scope="module")
def config_file(tiny_corpus, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(CONFIG.format(folder=tiny_corpus, steps=12, save=4, evaluate=6))
    return path


@pytest.fixture(scope="module")
def study_file(config_file) -> Path:
    path = config_file.with_name("study.py")
    path.write_text(STUDY.format(config=str(config_file)))
    return path


def assert_same_parameters(one: str | Path, other: str | Path) -> None:
    ours, theirs = (models.find(str(place)).load() for place in (one, other))
    for a, b in zip(jax.tree.leaves(ours.params), jax.tree.leaves(theirs.params), strict=True):
        np.testing.assert_array_equal(a[tuple(map(slice, b.shape))], b)  # rows that pad the vocabulary apart


# ---- Files ---------------------------------------------------------------------------------------------------------


def test_an_object_is_a_file_that_is_read_piece_by_piece_from_any_place(store, monkeypatch):
    monkeypatch.setattr("gptjax.buckets._PIECE", 7)
    bucket, data = Bucket(f"{URL}/pieces"), bytes(range(256))
    bucket.write("object", data)
    with bucket.open("object") as file:
        assert file.read(3) == data[:3]
        assert file.seek(250) == 250
        assert file.read() == data[250:]
        assert file.read() == b""
    assert list(bucket.open("object")) == list(io.BytesIO(data))
    with pytest.raises(UserError, match=r"gs://gptjax-test/pieces: there is no such bucket or object"):
        bucket.open("other")


def test_prompts_and_questions_are_read_from_a_bucket(store):
    bucket = Bucket(f"{URL}/in")
    bucket.write("prompts.jsonl", LINES.encode())
    bucket.write("prompts.jsonl.gz", gzip.compress(LINES.encode()))
    bucket.write("copa.jsonl", b'{"query": "a", "choices": ["b", "c"], "gold": 1}\n')
    for name in ("prompts.jsonl", "prompts.jsonl.gz"):
        assert [one["prompt"] for one in prompts.read_prompts(f"{URL}/in/{name}")] == ["a cat", "the sun"]
    assert benchmarks.read_questions(f"{URL}/in/copa.jsonl")[0].gold == 1


def test_a_result_is_whole_in_a_bucket_and_stands_beside_its_items(store):
    url = f"{URL}/out/result.json"
    outputs.claim(url)
    assert store.buckets["gptjax-test"] == {}
    outputs.write(url, ["a\n", "b\n"])
    assert Bucket(f"{URL}/out").read("result.json") == b"a\nb\n"
    assert outputs.beside(url, ".items.jsonl") == f"{URL}/out/result.items.jsonl"
    assert outputs.beside("runs/a.b/result", ".x") == "runs/a.b/result.x"
    with pytest.raises(UserError, match=r"--output=gs://gptjax-test/ names no object"):
        outputs.claim(f"{URL}/")


def test_a_store_that_is_silent_is_told_of_before_it_answers(store, capsys, monkeypatch):
    monkeypatch.setattr("gptjax.buckets.SILENCE", 0.05)
    bucket = Bucket(f"{URL}/silent")
    said: list[str] = []

    def request() -> int:
        while not said or "waiting" not in said[-1]:
            said.append(capsys.readouterr().err)
        return 1

    assert bucket._ask(request) == 1
    assert said[-1].startswith("warning: gs://gptjax-test/silent does not answer: nothing for 0 s; waiting, 600 s")
    assert "gs://gptjax-test/silent answers again after" in capsys.readouterr().err


# ---- Mirrors -------------------------------------------------------------------------------------------------------


def test_a_cell_in_a_bucket_is_a_mirror_within_that_of_its_study(store):
    bucket = Bucket(f"{URL}/study")
    names = ["study.json", "cells/a/metrics.jsonl", "cells/a/log.txt", "cells/a/checkpoints/4/commit_success.txt"]
    for name in [*names, "cells/b/metrics.jsonl", "cells/a/checkpoints/4/state/d/data"]:
        bucket.write(name, name.encode())
    study = mirror.writable(bucket.url)
    one, other = (mirror.within(study, f"cells/{name}") for name in "ab")
    (other / "metrics.jsonl").write_text("of a run that is at work")
    (one / "log.txt").write_text("what the study has open")
    (one / "diverged.txt").write_text("no longer in the bucket")
    lock = Lock(other)
    lock._write(other / ".lock")
    mirror.pull(study)
    found = {path.relative_to(study).as_posix() for path in study.rglob("[!.]*") if path.is_file()}
    assert found == {"study.json", "cells/a/metrics.jsonl", "cells/a/log.txt", "cells/b/metrics.jsonl"}
    assert (other / "metrics.jsonl").read_text() == "of a run that is at work"
    assert (one / "log.txt").read_text() == "what the study has open"
    assert mirror.shown(one / "metrics.jsonl") == f"{URL}/study/cells/a/metrics.jsonl"
    (one / "metrics.jsonl").write_text("more")
    (study / "report.md").write_text("report")
    mirror.push(study)
    assert bucket.read("report.md") == b"report"
    assert bucket.read("cells/a/metrics.jsonl") == b"cells/a/metrics.jsonl"  # a cell pushes itself
    mirror.push(one, ["log.txt"])
    assert bucket.read("cells/a/log.txt") == b"what the study has open"
    assert mirror.in_words(f"no checkpoint in {one}/checkpoints") == f"no checkpoint in {URL}/study/cells/a/checkpoints"


def test_of_evaluations_in_a_bucket_the_newest_is_the_one_that_was_written_last(store):
    bucket = Bucket(f"{URL}/evaluated")
    for name in ("z.items.jsonl", "a.items.jsonl"):
        bucket.write(f"evaluation/{name}", b"")
        store.ahead += 100
    found = (mirror.opened(bucket.url) / "evaluation").iterdir()
    assert [path.name[0] for path in sorted(found, key=lambda path: path.stat().st_mtime)] == ["z", "a"]


def test_a_lock_in_a_bucket_does_not_depend_on_the_clock_of_this_machine(store, monkeypatch):
    url = f"{URL}/clock"
    store.ahead = 7200.0  # or this machine is behind by as much
    ours = Lock.take(mirror.place(url, part="ours"))
    name = "clock/.lock"
    content, *rest = store.buckets["gptjax-test"][name]
    elsewhere = json.dumps(json.loads(content) | {"machine": "elsewhere", "host": "n7"}).encode()
    store.buckets["gptjax-test"][name] = elsewhere, *rest
    for ahead in (7200.0, -7200.0):
        store.buckets["gptjax-test"][name] = elsewhere, rest[0], buckets.time.time() + ahead
        store.ahead = ahead
        with pytest.raises(
            UserError, match=r"--workdir=gs://gptjax-test/clock: process \d+ on n7 has been writing there"
        ):
            Lock.take(mirror.place(url, part="theirs"))
    ours.release()


# ---- What is refused -----------------------------------------------------------------------------------------------

READING = [
    ("chat", "--workdir={}", "--prompt=a"),
    ("generate", "--workdir={}", "--prompt=a"),
    ("generate", "--workdir=hf:{}", "--prompt=a"),
    ("evaluate", "--workdir={}"),
    ("evaluate", "--compare", "{}", "{}"),
    ("serve", "--model=a={}", "--port=0"),
    ("convert", "--from={}", "--to=hf:{tmp}/out"),
    ("convert", "--from=hf:{}", "--to={tmp}/out"),
    ("ablate", "--diff", "{}", "{}"),
    ("ablate", "--reproduce={}"),
    ("ablate", "--study={study}", "--workdir={}", "--plan"),
    ("train", "--config={config}", "--config.init_from={}", "--workdir={tmp}/run"),
    ("train", "--config={config}", "--config.data.source=store:{}", "--workdir={tmp}/run"),
]
WRITING = [
    ("generate", "--workdir={model}", "--prompt=a", "--output={}/out.jsonl"),
    ("evaluate", "--workdir={model}", "--output={}/out.json"),
    ("plan", "--config={config}", "--topology=local", "--output={}/out.json"),
    ("convert", "--from={model}", "--to=hf:{}"),
    ("ablate", "--study={study}", "--workdir={}"),
    ("train", "--config={config}", "--workdir={}"),
    ("prepare", "--source=text:{corpus}/*.txt", "--output={}"),
]


def refused(capsys, words, url, tmp_path, **places) -> str:
    """The last line of a command that is refused before anything is written on this machine."""
    status = command(*(word.replace("{}", url).format(tmp=tmp_path, **places) for word in words))
    said = capsys.readouterr().err.strip().splitlines()
    assert (status, list(tmp_path.iterdir())) == (2, []), said
    return said[-1]


@pytest.fixture
def places(config_file, study_file, model_files, tiny_corpus) -> dict[str, Path]:
    return {"config": config_file, "study": study_file, "model": model_files, "corpus": tiny_corpus}


@pytest.mark.parametrize("words", READING + WRITING, ids=" ".join)
def test_a_bucket_that_is_not_there_is_named(store, capsys, words, tmp_path, places):
    said = refused(capsys, words, "gs://nowhere/run", tmp_path, **places)
    assert said.startswith("error: gs://nowhere/run")
    assert "there is no such bucket or object" in said or "make the bucket gs://nowhere" in said


@pytest.mark.parametrize("words", READING + WRITING, ids=" ".join)
def test_a_store_that_wants_credentials_is_named(store, capsys, words, tmp_path, places):
    store.status = 401
    said = refused(capsys, words, f"{URL}/run", tmp_path, **places)
    assert said.startswith(f"error: {URL}/run: there are no credentials that it accepts")
    assert "gcloud auth application-default login" in said


@pytest.mark.parametrize("words", WRITING, ids=" ".join)
def test_a_bucket_that_may_only_be_read_is_named(store, capsys, words, tmp_path, places):
    store.read_only = True
    said = refused(capsys, words, f"{URL}/run", tmp_path, **places)
    assert said.startswith(f"error: {URL}/run: there is no permission")


@pytest.mark.parametrize("words", WRITING[3:6], ids=" ".join)
def test_the_second_of_two_that_write_in_one_place_is_refused(store, capsys, words, tmp_path, places):
    lock = Lock.take(mirror.place(f"{URL}/run", part="theirs"))
    said = refused(capsys, words, f"{URL}/run", tmp_path, **places)
    assert f"--workdir={URL}/run: process" in said
    assert "has been writing there" in said
    lock.check()
    lock.release()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("serve", "--model={model}", "--preferences={}/p.jsonl"), "lines cannot be appended to an object in a bucket"),
        (("serve", "--model={model}", "--api_keys={}/keys"), "is in an object store; a path on this machine is needed"),
        (("ablate", "--study={study}", "--workdir={}", "--launcher=slurm"), "--launcher=slurm needs a directory"),
        (("ablate", "--study={study}", "--workdir={}", "--pack=on"), "--pack=on needs a directory"),
        (("ablate", "--search", "--config={config}", "--workdir={}"), "--search needs a directory"),
        (("ablate", "--coordinates", "--config={config}", "--workdir={}"), "--coordinates needs a directory"),
        (("generate", "--workdir=gs://ab/run", "--prompt=a"), "'ab' is not the name of a bucket"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_what_cannot_be_in_a_bucket_is_refused_by_name(store, capsys, words, message, tmp_path, places):
    assert message in refused(capsys, words, f"{URL}/run", tmp_path, **places)
    assert store.buckets["gptjax-test"] == {}


# ---- What works ----------------------------------------------------------------------------------------------------


def test_a_model_is_converted_from_a_bucket_to_another_and_back(model, model_files, tmp_path, capsys):
    published, back = f"hf:{URL}/published", f"{URL}/back"
    assert command("convert", f"--from={model}", f"--to={published}") == 0
    assert command("convert", f"--from={model}", f"--to=hf:{tmp_path}/published") == 0
    bucket = Bucket(f"{URL}/published")
    names = {path.name for path in (tmp_path / "published").iterdir()}
    assert set(bucket.list()) == names
    for name in names - {"conversion.json"}:
        assert bucket.read(name) == (tmp_path / "published" / name).read_bytes()
    capsys.readouterr()
    assert command("convert", f"--from={model}", f"--to={published}") == 0
    assert f"{URL}/published already is the finished result of this conversion" in capsys.readouterr().out
    assert command("convert", f"--from={published}", f"--to={back}") == 0
    assert_same_parameters(back, model_files)
    assert command("convert", f"--from={published}", f"--to={model}") == 2
    assert f"error: --to={model} exists and is not a result of convert" in capsys.readouterr().err


def test_prepare_builds_in_a_bucket_what_it_builds_on_a_disk_and_reads_a_corpus_there(
    store, tiny_corpus, tmp_path, capsys
):
    bucket = Bucket(f"{URL}/corpus")
    bucket.put([path.name for path in tiny_corpus.iterdir()], tiny_corpus)
    words = ["--tokenizer=byte", "--validation_fraction=0.2", "--workers=1"]
    for source, place in (
        (tiny_corpus, tmp_path / "store"),
        (bucket.url, f"{URL}/store"),
        (bucket.url, f"{URL}/store"),
    ):
        assert command("prepare", f"--source=text:{source}/*.txt", f"--output={place}", *words) == 0
    assert f"{URL}/store already exists, built from the same source" in capsys.readouterr().out
    built = Bucket(f"{URL}/store")
    for path in (tmp_path / "store").glob("*.bin"):
        assert built.read(path.name) == path.read_bytes()
    assert command("prepare", f"--output={URL}/store", "--show=1") == 0


def test_a_conversion_whose_copy_was_ended_is_made_again(model, monkeypatch, capsys):
    bucket, put = Bucket(f"{URL}/ended"), Bucket.put

    def ended(self, names, directory):
        put(self, sorted(names)[:1], directory)
        raise RunError("the store has not answered")

    with monkeypatch.context() as patched:
        patched.setattr(Bucket, "put", ended)
        assert command("convert", f"--from={model}", f"--to=hf:{URL}/ended") == 1
    assert len([name for name in bucket.list() if not name.startswith(".")]) == 1
    assert command("convert", f"--from={model}", f"--to=hf:{URL}/ended") == 0
    assert not any(name.startswith(".") for name in bucket.list())
    assert_same_parameters(f"hf:{URL}/ended", model)


@pytest.mark.slow
def test_generate_chat_and_evaluate_give_what_they_give_on_a_disk(model, model_files, tmp_path, capsys):
    (tmp_path / "prompts.jsonl").write_text(LINES)
    Bucket(f"{URL}/in").write("prompts.jsonl", LINES.encode())
    for workdir, prompts_file, output in (
        (model, f"{URL}/in/prompts.jsonl", f"{URL}/out/completions.jsonl"),
        (str(model_files), f"{tmp_path}/prompts.jsonl", f"{tmp_path}/completions.jsonl"),
    ):
        words = [f"--workdir={workdir}", "--temperature=0", "--max_new_tokens=4"]
        assert command("generate", f"--prompts={prompts_file}", f"--output={output}", *words) == 0
        assert command("chat", "--prompt=a", *words) == 0
    said = capsys.readouterr().out
    assert f"wrote 2 completions to {URL}/out/completions.jsonl" in said
    assert Bucket(f"{URL}/out").read("completions.jsonl") == (tmp_path / "completions.jsonl").read_bytes()
    for number in (1, 2):
        place = f"{URL}/out/{number}.json"
        words = ["--tasks=f1", f"--prompts={URL}/in/prompts.jsonl", "--max_new_tokens=4", f"--output={place}"]
        assert command("evaluate", f"--workdir={model}", *words) == 0
    assert f"{model}/evaluation/f1-validation-0.json" in capsys.readouterr().out
    assert command("evaluate", "--compare", model, f"{URL}/out/2.json", f"--output={URL}/out/compared.json") == 0
    compared = json.loads(Bucket(f"{URL}/out").read("compared.json"))
    assert compared["a"] == model
    assert compared["differences"]["f1"]["f1"]["difference"] == 0


@pytest.mark.slow
def test_a_study_in_a_bucket_runs_only_what_is_missing_and_moves_by_copying(store, study_file, tmp_path, capsys):
    url, disk = f"{URL}/study", tmp_path / "study"
    bucket = Bucket(url)
    assert command("ablate", f"--study={study_file}", f"--workdir={url}") == 0
    assert f"report: {url}/report.md" in capsys.readouterr().out
    before = bucket.list()
    bucket.get(before, disk)
    assert command("ablate", f"--study={study_file}", f"--workdir={disk}", "--report") == 0
    for name in ("results.csv", "report.md"):
        assert bucket.read(name) == (disk / name).read_bytes()
    lost = [name for name in before if name.startswith("cells/some-seed1-")]
    bucket.remove(lost)
    shutil.rmtree(buckets.cache())  # another machine has no mirrors
    mirror._bucket_of.cache_clear()
    assert command("ablate", f"--study={study_file}", f"--workdir={url}", "--plan") == 0
    assert "4 cells (2 arms x 2 seeds) of 768 tokens; 1 to run" in capsys.readouterr().out
    assert command("ablate", f"--study={study_file}", f"--workdir={url}") == 0
    after = bucket.list()
    ran = {name.split("/")[1] for name in after if name.endswith("metrics.jsonl") and after[name] != before[name]}
    assert ran == {lost[0].split("/")[1]}
    assert bucket.read("results.csv") == (disk / "results.csv").read_bytes()
    cells = sorted({name.split("/")[1] for name in after if name.startswith("cells/")})
    one, other = (f"{url}/cells/{name}" for name in (cells[0], cells[-1]))
    capsys.readouterr()
    assert command("ablate", "--diff", one, other) == 0
    assert "model.dropout: 0.0 in the first, 0.1 in the second" in capsys.readouterr().out
    assert command("ablate", f"--reproduce={one}") == 0
    assert "bit-identical: all numbers" in capsys.readouterr().out
    assert bucket.read(f"cells/{cells[0]}-reproduced/metrics.jsonl") is not None
