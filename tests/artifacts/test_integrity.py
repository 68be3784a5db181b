"""Damaged files of a work directory are reported, never used or deleted; the newest intact checkpoint is used."""

import json
import os
import shutil
from pathlib import Path

import pytest

from gptjax import cli, evaluate, generate, train
from gptjax.artifacts import integrity, loading
from gptjax.errors import UserError

CONFIG = """
from gptjax.config import get_default

def get_config():
    config = get_default()
    config.tokenizer = "byte"
    config.data.update(source="text:{corpus}/*.txt", split_by="position", validation_fraction=0.1)
    config.model.update(num_layers=1, num_heads=2, embed_dim=16, context_length=16)
    config.train.update(num_steps=9, batch_size=8, checkpoint_every=3)
    config.evaluation.update(every=3, max_tokens=512, tasks="perplexity")
    config.logging.update(every=1, samples=0, tensorboard=False)
    return config
"""


@pytest.fixture(scope="module")
def arguments(tiny_corpus, tmp_path_factory) -> list[str]:
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(CONFIG.format(corpus=tiny_corpus))
    return ["train", f"--config={path}"]


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory) -> Path:
    """The work directory of a finished run, with the steps 6 and 9."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    assert cli.run(train.main, [*arguments, f"--workdir={workdir}"]) == 0
    assert integrity.finished_steps(workdir / "checkpoints") == [6, 9]
    return workdir


@pytest.fixture
def workdir(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def losses(workdir: Path) -> list[tuple[int, str, float]]:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["split"], line["loss"]) for line in lines]


def largest(directory: Path) -> Path:
    return max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def empty(step: Path) -> None:
    for path in step.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def flip(step: Path) -> None:
    path = largest(step / "state")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def cut(step: Path) -> None:
    path = largest(step / "state")
    path.write_bytes(path.read_bytes()[:-10])


def put(name: str, text: str):
    return lambda step: (step / name).write_text(text)


DAMAGES = {
    "empty": (empty, "state is missing"),
    "no state": (lambda step: shutil.rmtree(step / "state"), "state is missing"),
    "no metadata": (lambda step: shutil.rmtree(step / "metadata"), "metadata is missing"),
    "a flipped byte": (flip, r"state/\S+ is not as it was written"),
    "a file cut": (cut, r"state/\S+ is not as it was written"),
    "a file gone": (lambda step: largest(step / "state").unlink(), r"state/\S+ is missing"),
    "metadata cut": (put("metadata/metadata", '{"step": 9, "con'), "metadata is not JSON"),
    "metadata of another type": (put("metadata/metadata", "[]"), r"metadata holds \[\], but must be an object"),
    "a field": (put("metadata/metadata", '{"step": "9"}'), 'step is "9", but must be a whole number'),
    "metrics": (put("metrics/metrics", "null"), "metrics holds null"),
    "checksums": (put("checksums.json", ""), "checksums.json is empty"),
}


@pytest.mark.parametrize(("damage", "said"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_named_and_not_used(damage, said, workdir, capsys):
    newest = workdir / "checkpoints" / "9"
    damage(newest)
    assert loading.find(workdir, "last").name == "6"
    assert loading.find(workdir, "best").name == "6"
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2 and all(str(newest) in line for line in warnings)
    with pytest.raises(UserError, match=f"{newest} is not a readable gptjax checkpoint: it is damaged: .*{said}"):
        loading.find(workdir, "9")
    with pytest.raises(UserError, match=said):
        loading.load(newest)


@pytest.mark.parametrize("damage", [empty, flip])
def test_a_run_continues_from_the_newest_whole_one_and_keeps_the_damaged_one(damage, arguments, whole, workdir, capsys):
    damage(workdir / "checkpoints" / "9")
    kept = {path.name for path in (workdir / "checkpoints" / "9").iterdir()}
    assert cli.run(train.main, [*arguments, f"--workdir={workdir}"]) == 0
    said = capsys.readouterr().err
    assert "checkpoints/9 is damaged" in said and "Step 6 is the newest that is whole" in said
    assert "continuing at step 6" in said
    assert {path.name for path in (workdir / "checkpoints" / "9.damaged").iterdir()} == kept
    assert losses(workdir) == losses(whole)
    assert integrity.fault(workdir / "checkpoints" / "9") is None


def test_without_a_whole_one_all_say_so(arguments, workdir, capsys):
    for step in (6, 9):
        flip(workdir / "checkpoints" / str(step))
    verbs = [
        (train.main, [*arguments, f"--workdir={workdir}"]),
        (evaluate.main, ["evaluate", f"--workdir={workdir}", "--checkpoint=last"]),
        (generate.main, ["generate", f"--workdir={workdir}", "--prompt=a"]),
    ]
    for main, argv in verbs:
        assert cli.run(main, argv) == 2
        assert "no checkpoint in" in (last := capsys.readouterr().err.splitlines()[-1]) and "is whole" in last
    assert integrity.finished_steps(workdir / "checkpoints") == [6, 9]


def test_an_older_one_without_checksums_opens(workdir, capsys):
    (workdir / "checkpoints" / "9" / "checksums.json").unlink()
    assert loading.load(workdir, "last").step == 9
    assert capsys.readouterr().err == ""


def test_what_only_reading_shows_is_told_as_damage(workdir):
    """In a checkpoint without checksums, damage shows only on reading."""
    (workdir / "checkpoints" / "9" / "checksums.json").unlink()
    (workdir / "checkpoints" / "9" / "state" / "manifest.ocdbt").write_bytes(b"")
    with pytest.raises(UserError, match=r"the checkpoint \S+/9 is damaged: .*Move it away"):
        loading.load(workdir, "last")


TEXTS = [
    *(("config.json", text) for text in (None, '{"model"', "[]", "{}", '{"model": 3}')),
    *(("manifest.json", text) for text in (None, "", "null")),
]


@pytest.mark.parametrize(("name", "text"), TEXTS)
def test_the_files_of_a_run_are_written_anew_from_its_checkpoint(name, text, arguments, whole, workdir, capsys):
    path = workdir / name
    path.unlink() if text is None else path.write_text(text)
    assert cli.run(train.main, [*arguments, f"--workdir={workdir}"]) == 0
    assert f"warning: {path}" in capsys.readouterr().err
    assert json.loads(path.read_text()).keys() == json.loads((whole / name).read_text()).keys()
    assert losses(workdir) == losses(whole)


def test_a_config_that_was_damaged_still_refuses_another(arguments, workdir, capsys):
    (workdir / "config.json").write_text("{")
    assert cli.run(train.main, [*arguments, f"--workdir={workdir}", "--config.seed=5"]) == 2
    assert "data_seed was 0 and is 5 now" in capsys.readouterr().err


def test_the_answer_is_asked_again_when_a_file_has_changed(workdir):
    step = workdir / "checkpoints" / "9"
    assert integrity.fault(step) is None
    path = largest(step / "state")
    data, stamp = path.read_bytes(), path.stat()
    flip(step)
    assert integrity.fault(step) is not None
    path.write_bytes(data)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert integrity.fault(step) is None
