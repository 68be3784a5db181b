"""Mistakes in a request are reported in the last line on stderr, without a traceback, and nothing is lost."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import absl.flags
import pytest

from gptjax import cli, evaluate, generate, prepare, train
from gptjax.artifacts import loading

CONFIG = """
from gptjax.config import get_default

def get_config():
    config = get_default()
    config.tokenizer = "byte"
    config.data.update(source="text:{corpus}/*.txt", split_by="position", validation_fraction=0.1)
    config.model.update(num_layers=1, num_heads=2, embed_dim=16, context_length=16)
    config.train.update(num_steps=4, batch_size=8, checkpoint_every=2)
    config.evaluation.update(every=4, max_tokens=200, tasks="perplexity")
    config.logging.update(samples=0, tensorboard=False)
    return config
"""


@pytest.fixture(scope="module")
def config_file(tiny_corpus, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(CONFIG.format(corpus=tiny_corpus))
    return path


@pytest.fixture(scope="module")
def trained(config_file, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("trained")
    assert cli.run(train.main, ["train", f"--config={config_file}", f"--workdir={workdir}"]) == 0
    return workdir


@pytest.fixture
def refuses(capsys):
    """Runs a verb that should end with `status`; returns its stderr, which must have no traceback."""

    def run(verb, *options: str, status: int = 2) -> str:
        capsys.readouterr()
        assert cli.run(verb.main, [verb.__name__, *options]) == status
        message = capsys.readouterr().err
        assert message.startswith({1: "failed: ", 2: "error: "}[status])
        assert "Traceback" not in message
        return message

    return run


@pytest.fixture
def refuses_to_train(refuses, config_file, tmp_path):
    """Trains with the tiny config and the given options, by default in a new work directory."""

    def run(*options: str, status: int = 2) -> str:
        where = [] if any("workdir" in option for option in options) else [f"--workdir={tmp_path / 'run'}"]
        return refuses(train, f"--config={config_file}", *where, *options, status=status)

    return run


# ---- The command line and the config ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "parts"),
    [
        ("--config.train.batch_sise=3", ["config.train.batch_sise", "did you mean --config.train.batch_size?"]),
        ("--wrkdir=x", ["unknown option --wrkdir", "did you mean --workdir?"]),
        ("--config.train.batch_size=many", ["train.batch_size is 'many'; it must be a whole number"]),
        ("--config.train.batch_size=0", ["train.batch_size is 0; it must be at least 1"]),
        ("--config.train.num_steps=soon", ["train.num_steps is 'soon'", "'10M tokens'"]),
        ("--config.optimizer.name=adamm", ["optimizer.name is 'adamm'", "did you mean adamw?"]),
        ("--config.tokenizer=bp:300", ["unknown tokenizer 'bp:300'", "bpe:VOCAB_SIZE"]),
        ("--config.data.source=txt:a.txt", ["unknown data source", "Did you mean 'text:a.txt'?"]),
        ("--config.model.attention=cudnn", ["cudnn computes in bfloat16, not float32", "use xla or auto"]),
        ("--config.model.attention=splash", ["needs rows that are a multiple of 128 tokens", "not 16"]),
        ("now", ["unexpected argument 'now'", "--name=value"]),
        ("configs/quickstart.py", ["did you mean --config=configs/quickstart.py?"]),
        ("runs/mine", ["did you mean --workdir=runs/mine?"]),
        ("--config.train.num-steps=5", ["did you mean --config.train.num_steps?"]),
        ("--config.data.source=books/*.txt", ["Did you mean 'text:books/*.txt'?"]),
    ],
)
def test_wrong_option(refuses_to_train, option, parts):
    message = refuses_to_train(option)
    assert all(part in message for part in parts), message


def test_every_problem_of_the_config_is_told_at_once(refuses_to_train):
    message = refuses_to_train(
        "--config.model.embed_dim=30", "--config.model.num_heads=4", "--config.train.accumulation=3"
    )
    assert "the config has 3 problems" in message
    assert "model.embed_dim 30 is not divisible by model.num_heads 4" in message
    assert "train.batch_size 8 is not divisible by train.accumulation 3" in message


def test_batch_that_does_not_divide_over_the_devices(refuses_to_train):
    message = refuses_to_train("--config.train.batch_size=4")  # mesh.data=-1 is all eight
    assert "a micro-batch of 4 rows" in message
    assert "mesh.data x mesh.fsdp x mesh.expert = 8" in message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["mesh.data=1000", "train.batch_size=8000"], "does not fit 8 cpu device(s)"),
        (["train.batch_size=1048576", "model.context_length=65536"], "rows of 65536 tokens need 1 TiB of this machine"),
        (["model.num_layers=100", "model.embed_dim=2e5", "model.head_dim=2"], "the training state needs"),
        (["model.ngram_order=32", "model.ngram_rows=1e9"], "the training state needs"),
        (
            ["train.batch_size=65536", "model.context_length=1024", "model.num_layers=1000", "model.embed_dim=1024"],
            "a micro-batch of 65536 rows of 1024 tokens needs more than",
        ),
    ],
)
def test_what_the_machine_cannot_hold_is_refused_before_it_is_taken(refuses_to_train, options, words):
    assert words in refuses_to_train(*(f"--config.{option}" for option in options))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--flagfile=/dev/zero"], "unknown option --flagfile"),
        (["--config.seed"], "--config.seed has no value; write --config.seed=VALUE"),
        (["--noconfig.seed"], "--noconfig.seed is not an option"),
        (["--config.model=5"], "unknown option --config.model"),
        (["--profile=0:0"], "--profile=0:0: expected STEP:COUNT"),
        (["--profile=x"], "--profile=x: expected STEP:COUNT"),
        (["--join_timeout=nan"], "--join_timeout=nan: expected a finite number"),
        (["--num_processes=many"], "--num_processes=many: expected a whole number"),
        (["--workdir=a\0b"], "has a zero byte in it"),
    ],
)
def test_wrong_flag(refuses_to_train, options, words):
    message = refuses_to_train(*options)
    assert words in message, message


def test_options_of_a_config_may_stand_apart_and_without_a_value(config_file):
    flag_values = absl.flags.FlagValues()
    cli.define_config(flag_values)
    argv = ["train", "--config.seed", "7", "--noconfig.model.qk_norm", f"--config={config_file}", "--config.mesh.data"]
    cli.parse(flag_values, [*argv, "-1", "-config.logging.tensorboard"], "")
    config = cli.read_config(flag_values)
    assert (config.seed, config.model.qk_norm, config.mesh.data, config.logging.tensorboard) == (7, False, -1, True)
    assert cli.chosen_options(flag_values) == {"seed", "model.qk_norm", "mesh.data", "logging.tensorboard"}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["trian", "--workdir=runs/a"], "unknown verb 'trian'; did you mean: gptjax train --workdir=runs/a"),
        (["finetune"], "did you mean: gptjax train"),
        (["Evaluate.py"], "did you mean: gptjax evaluate"),
        (["xyz"], "the verbs are train, evaluate, prepare"),
        (["--workdir=runs/a"], "the verb comes first: gptjax VERB --workdir=runs/a"),
    ],
)
def test_wrong_verb(words, told, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gptjax", *words])
    assert cli.main() == 2
    assert told in capsys.readouterr().err


def test_no_config_no_workdir(refuses, config_file):
    assert "--config is missing; e.g. --config=" in refuses(train, "--workdir=x")
    assert "--workdir is missing; e.g. --workdir=" in refuses(train, f"--config={config_file}")


@pytest.mark.parametrize("options", [[], ["--config.train.batch_size=8"]])
def test_config_file_that_is_not_there(refuses, options):
    message = refuses(train, "--config=nowhere.py", "--workdir=x", *options)
    assert message == "error: --config=nowhere.py: there is no such file\n"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("def get_config():\n    return 1 / 0\n", "failed at line 2: ZeroDivisionError: division by zero"),
        ("import nonexistent_module\n", "failed at line 1: ModuleNotFoundError"),
        ("x = (\n", "failed at line 1: SyntaxError"),
        ("x = 1\n", "has no function get_config()"),
        ("\0\1", "is not a Python file"),
        ("def get_config():\n    return {}\n", "returns no config"),
        (
            "from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({'seed': 0})\n",
            "returns a config without 161 options, such as model.num_layers",
        ),
    ],
)
def test_config_file_that_fails(refuses, tmp_path, monkeypatch, text, reason):
    path = tmp_path / "broken.py"
    path.write_text(text)
    assert f"--config={path} {reason}" in refuses(train, f"--config={path}", "--workdir=x")


# ---- Data ------------------------------------------------------------------------------------------------


def test_data_file_that_is_not_there(refuses_to_train, tmp_path):
    source = f"text:{tmp_path}/a.txt"
    assert f"no file matches {source!r}"[:60] in refuses_to_train(f"--config.data.source={source}")


def test_empty_data_file(refuses_to_train, tmp_path):
    (tmp_path / "a.txt").touch()
    assert "has no text" in refuses_to_train(f"--config.data.source=text:{tmp_path}/a.txt")


def test_bytes_that_are_not_utf8(refuses_to_train, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 au lait. " * 200)
    source = f"--config.data.source=text:{tmp_path}/a.txt"
    message = refuses_to_train(source)
    assert f"{tmp_path}/a.txt: byte 0xe9 at offset 3 is not UTF-8" in message
    assert "data.decode_errors=replace" in message
    # What it advises gets past the data, to the next mistake.
    assert "too small for one batch" in refuses_to_train(
        source, "--config.data.decode_errors=replace", "--config.model.context_length=4096"
    )


def test_split_without_documents(refuses_to_train, tmp_path):
    (tmp_path / "a.txt").write_text("one document " * 100)
    message = refuses_to_train(f"--config.data.source=text:{tmp_path}/a.txt", "--config.data.split_by=document")
    assert "split is empty" in message
    assert "use --config.data.split_by=position" in message


def test_without_a_validation_split_a_run_trains_and_says_so(config_file, tmp_path, capsys):
    options = ["--config.data.validation_fraction=0.0", f"--workdir={tmp_path}"]
    assert cli.run(train.main, ["train", f"--config={config_file}", *options]) == 0
    assert "done; nothing was validated" in capsys.readouterr().out
    assert loading.load(tmp_path, "best").step == loading.load(tmp_path, "last").step > 0


def test_split_too_small_for_a_batch(refuses_to_train, tmp_path):
    (tmp_path / "a.txt").write_text("only a few words")
    message = refuses_to_train(f"--config.data.source=text:{tmp_path}/a.txt")
    assert "the train split is too small for one batch" in message
    assert "use more text, a smaller batch, or a shorter context" in message


def test_prepare_keeps_what_is_there(refuses, tmp_path):
    precious = tmp_path / "out" / "precious.txt"
    precious.parent.mkdir()
    precious.write_text("words")
    message = refuses(prepare, f"--source=text:{precious}", f"--output={precious.parent}")
    assert "remove it or choose another directory" in message
    assert precious.read_text() == "words"
    refuses(prepare, f"--source=text:{precious}", f"--output={precious}/below_a_file")


# ---- Work directories and checkpoints --------------------------------------------------------------------


def test_workdir_of_another_config(refuses_to_train, trained):
    before = (trained / "config.json").read_text()
    message = refuses_to_train(
        f"--workdir={trained}", "--config.optimizer.learning_rate=0.5", "--config.model.num_layers=2"
    )
    assert "holds a run of another config" in message
    assert "model.num_layers was 1 and is 2 now" in message
    assert f"--config.init_from={trained}" in message
    assert "\n" not in message.strip()
    message = refuses_to_train(f"--workdir={trained}", "--config.optimizer.learning_rate=0.5")
    assert "optimizer.learning_rate was 0.001 and is 0.5 now. With --allow_changes it goes on from step" in message
    assert (trained / "config.json").read_text() == before


def test_workdir_whose_data_changed(refuses_to_train, config_file, tiny_corpus, tmp_path):
    corpus = tmp_path / "corpus"
    shutil.copytree(tiny_corpus, corpus)
    options = [f"--workdir={tmp_path / 'run'}", f"--config.data.source=text:{corpus}/*.txt"]
    assert cli.run(train.main, ["train", f"--config={config_file}", *options]) == 0
    (corpus / "000.txt").write_text("something else")
    assert "is not the one" in refuses_to_train(*options)


def test_workdir_that_cannot_be_made(refuses_to_train, tmp_path):
    (tmp_path / "file").write_text("precious")
    assert "cannot be made: it exists" in refuses_to_train(f"--workdir={tmp_path}/file")
    assert "cannot be made: a part of the path is a file" in refuses_to_train(f"--workdir={tmp_path}/file/run")
    assert (tmp_path / "file").read_text() == "precious"


def test_init_from_another_model(refuses_to_train, trained):
    message = refuses_to_train(f"--config.init_from={trained}", "--config.model.embed_dim=8")
    assert "options do not fit the model of init_from=" in message
    assert "--config.model.embed_dim=8: the model has 16\n" in message


def test_init_from_nothing(refuses_to_train, tmp_path):
    assert "no checkpoint in" in refuses_to_train(f"--config.init_from={tmp_path}")


def test_evaluate_without_a_checkpoint(refuses, tmp_path):
    message = refuses(evaluate, f"--workdir={tmp_path}")
    assert f"no checkpoint in {tmp_path}/checkpoints; train one with" in message


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "--tasks=perplexty",
            "unknown task 'perplexty'; choose from perplexity, preference, bleu, bleu_lowercase, ",
        ),
        ("--tasks=bleu", "the task bleu needs prompts with references: --prompts=FILE.jsonl"),
        ("--checkpoint=7", "--checkpoint=7: choose best, last or one of 2, 4"),
        ("--batch_size=-1", "--batch_size=-1: expected a whole number from 1 to 1048576"),
        ("--stride=17", "evaluation.stride 17 is larger than model.context_length 16"),
        ("--output=/", "--output=/ is a directory; name a file"),
        ("--output=/dev/null/results.json", "--output=/dev/null/results.json cannot be written: it exists"),
    ],
)
def test_evaluate_with_a_wrong_option(refuses, trained, option, message):
    assert message in refuses(evaluate, f"--workdir={trained}", option)


def test_generate_with_a_wrong_prompt(refuses, trained):
    workdir = f"--workdir={trained}"
    assert "give either --prompt=TEXT or --prompts=FILE.jsonl" in refuses(generate, workdir)
    message = refuses(generate, workdir, "--prompt=more than sixteen bytes of a text")
    assert "has 34 tokens, more than the model's context_length 16; shorten it" in message


def test_full_disk_leaves_the_last_good_checkpoint(config_file, trained, tmp_path, capfd):
    disk = tmp_path / "disk"
    disk.mkdir()
    # A whole run of two checkpoints fits twice; what it takes depends on the machine and the length of its paths.
    size = 2 * sum(-(-path.lstat().st_size // 4096) * 4096 + 4096 for path in trained.rglob("*"))
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can make a small disk")
    try:
        many = [
            "--config.train.num_steps=100",
            "--config.train.checkpoint_every=1",
            "--config.train.keep_checkpoints=100",
        ]
        workdir = disk / "run"
        status = cli.run(train.main, ["train", f"--config={config_file}", f"--workdir={workdir}", *many])
        message = capfd.readouterr().err.strip().splitlines()[-1]
        assert status == 1
        last = loading.find(workdir, "last")
        assert message.startswith(f"failed: {workdir}/") and ": the disk is full (" in message
        assert f"Make room; the same command then goes on from step {last.name} ({last})" in message
        assert loading.load(workdir, "last").step == int(last.name)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("code", [errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("verb", [train, evaluate, generate, prepare], ids=lambda verb: verb.__name__)
def test_a_disk_that_does_not_keep_what_is_written(
    refuses, config_file, trained, tiny_corpus, tmp_path, monkeypatch, verb, code
):
    place = tmp_path / "out" / "result"
    options = {
        train: [f"--config={config_file}", f"--workdir={place}"],
        evaluate: [f"--workdir={trained}", "--tasks=perplexity", f"--output={place}"],
        generate: [f"--workdir={trained}", f"--prompts={tmp_path}/p.txt", "--max_new_tokens=2", f"--output={place}"],
        prepare: [f"--source=text:{tiny_corpus}/*.txt", f"--output={place}", "--tokenizer=byte"],
    }

    (tmp_path / "p.txt").write_text("a\n")
    place.parent.mkdir()

    def fsync(descriptor):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        last = refuses(verb, *options[verb], status=1).splitlines()[-1]
    assert f"{tmp_path}/out/" in last and "; the same command then goes on" in last and "bug" not in last
    assert verb is train or not [path for path in place.parent.rglob("*") if path.name == place.name]
    assert cli.run(verb.main, [verb.__name__, *options[verb]]) == 0


def test_a_checkpoint_that_a_disk_refuses_otherwise(config_file, tmp_path, capfd):
    """Really, in TensorStore's own threads: a file may not be as large as the limit of this process."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, before[1]))
    try:
        assert cli.run(train.main, ["train", f"--config={config_file}", f"--workdir={tmp_path / 'run'}"]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    *_, last = capfd.readouterr().err.splitlines()
    assert last.startswith(f"failed: {tmp_path}/run/checkpoints: the file would be larger than is allowed. Raise the ")


def test_out_of_memory_says_what_to_lower(capsys):
    def main(argv):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 90000000000 bytes.\nmore")

    assert cli.run(main, ["train"]) == 1
    message = capsys.readouterr().err
    assert "out of memory" in message and "train.batch_size" in message and "more" not in message
