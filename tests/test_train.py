"""The verbs from end to end, in processes of their own: from a corpus to a work directory and numbers."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gptjax import cli

REPOSITORY = Path(__file__).parent.parent
VERBS = sorted(cli.VERBS)
CONFIG = """
from gptjax.config import apply_arg, get_default

def get_config(arg=""):
    config = get_default()
    config.tokenizer = "byte"
    config.data.update(source="text:{corpus}/*.txt", split_by="position", validation_fraction=0.1)
    config.model.update(num_layers=1, num_heads=2, embed_dim=16, context_length=16)
    config.optimizer.learning_rate = 1e-2
    config.train.update(num_steps=40, batch_size=8)
    config.evaluation.update(every=20, tasks="perplexity")
    config.logging.update(every=5, samples=1, sample_tokens=8)
    return apply_arg(config, arg)
"""


def run(*command: str, timeout: float = 300) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["XLA_FLAGS"] = " ".join(re.findall(r"--xla_cpu_max_isa=\S+", os.environ["XLA_FLAGS"]))
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=timeout)
    assert result.returncode == 0, result.stderr
    return result


def gptjax(verb: str, *options: str) -> subprocess.CompletedProcess:
    return run(sys.executable, "-m", f"gptjax.{verb}", *options)


def metrics(workdir: Path, split: str) -> list[dict]:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["split"] == split]


@pytest.fixture(scope="module")
def config_file(tiny_corpus, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(CONFIG.format(corpus=tiny_corpus))
    return path


@pytest.fixture(scope="module")
def workdir(config_file, tmp_path_factory) -> Path:
    """The work directory of a finished run."""
    path = tmp_path_factory.mktemp("run") / "below" / "that"
    printed = gptjax("train", f"--config={config_file}", f"--workdir={path}").stdout
    assert printed.startswith("done; best validation loss")
    return path


def test_workdir_has_everything(workdir):
    assert {path.name for path in workdir.iterdir()} >= {
        "config.json", "manifest.json", "metrics.jsonl", "checkpoints", "samples.jsonl", "report.html"
    }  # fmt: skip
    config = json.loads((workdir / "config.json").read_text())
    assert config["train"]["checkpoint_every"] == 10  # "25%", resolved
    manifest = json.loads((workdir / "manifest.json").read_text())
    assert manifest["data"]["source_fingerprint"] and manifest["data"]["tokenizer"]["sha256"]
    assert {"git", "packages", "devices", "mesh", "prng", "parameters"} <= manifest.keys()
    samples = [json.loads(line) for line in (workdir / "samples.jsonl").read_text("utf-8").splitlines()]
    assert [sample["step"] for sample in samples] == [20, 40]
    page = (workdir / "report.html").read_text("utf-8")
    assert "<svg" in page
    assert "http://" not in page and "https://" not in page  # needs no network


def test_metrics_have_the_keys_of_the_contract(workdir):
    everywhere = {"step", "split", "loss", "accuracy", "tokens_seen", "wall_time_s"}
    speed = {"tokens_per_second", "step_time_s", "data_wait_s", "mfu", "mfu_convention"}
    for line in metrics(workdir, "train"):
        assert line.keys() >= everywhere | speed | {
            "learning_rate",
            "gradient_norm",
            "parameter_norm",
            "epoch",
        }
        assert line["tokens_seen"] == line["step"] * 8 * 16
    for line in metrics(workdir, "validation"):
        assert line.keys() >= everywhere | {"perplexity", "bits_per_byte"}


def test_loss_goes_down(workdir):
    first, *_, last = (line["loss"] for line in metrics(workdir, "train"))
    assert first > 4.0  # at step 5, from ln 257 = 5.55
    assert last < 3.0
    first, last = (line["loss"] for line in metrics(workdir, "validation"))
    assert last < first


def test_evaluate_writes_the_contract(workdir, tmp_path):
    output = tmp_path / "results.json"
    gptjax("evaluate", f"--workdir={workdir}", "--checkpoint=last", f"--output={output}")
    answer = json.loads(output.read_text())
    assert answer["checkpoint"].keys() == {"path", "step", "config_sha256"}
    assert answer["checkpoint"]["step"] == 40
    scores = answer["results"]["perplexity"]
    assert scores.keys() >= {"perplexity", "nll", "bits_per_byte", "accuracy"}
    for score in scores.values():
        assert score.keys() == {"value", "ci95", "n", "signature"}
    low, high = scores["nll"]["ci95"]
    assert low < scores["nll"]["value"] < high
    # Training evaluated the same parameters on the same text.
    assert scores["nll"]["value"] == pytest.approx(metrics(workdir, "validation")[-1]["loss"], rel=1e-6)
    assert [json.loads(path.read_text()) for path in (workdir / "evaluation").glob("*.json")] == [answer]


def test_continues_from_the_parameters_of_another_run(config_file, workdir, tmp_path):
    options = [
        f"--config.init_from={workdir}",
        "--config.optimizer.learning_rate=0.0",
        "--config.logging.samples=0",
    ]
    gptjax("train", f"--config={config_file}", f"--workdir={tmp_path}", *options)
    ours = [line["loss"] for line in metrics(tmp_path, "validation")]
    best = min(line["loss"] for line in metrics(workdir, "validation"))
    assert ours == pytest.approx([best, best], rel=1e-6)


def test_finished_run_is_left_alone(config_file, workdir):
    before = (workdir / "metrics.jsonl").read_text()
    printed = gptjax("train", f"--config={config_file}", f"--workdir={workdir}").stdout
    assert printed.startswith("done; best validation loss")
    assert (workdir / "metrics.jsonl").read_text() == before


@pytest.mark.slow
def test_the_gptjax_command_is_the_same_as_the_module(config_file, tmp_path):
    command = Path(sys.executable).with_name("gptjax")
    run(
        str(command),
        "train",
        f"--config={config_file}:runlocal",
        f"--workdir={tmp_path}",
        "--config.logging.samples=0",
    )
    assert [line["step"] for line in metrics(tmp_path, "validation")] == [10, 20]


def test_prepared_store_trains_the_same_as_its_source(config_file, tiny_corpus, workdir, tmp_path):
    store = tmp_path / "store"
    options = ["--split_by=position", "--validation_fraction=0.1", "--tokenizer=byte"]
    gptjax("prepare", f"--source=text:{tiny_corpus}/*.txt", f"--output={store}", *options)
    options = [
        f"--workdir={tmp_path / 'run'}",
        f"--config.data.source=store:{store}",
        "--config.logging.samples=0",
    ]
    gptjax("train", f"--config={config_file}", *options)
    ours, theirs = ([line["loss"] for line in metrics(w, "train")] for w in (tmp_path / "run", workdir))
    assert ours == theirs


# ---- Start-up --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_the_flags_of_the_verb_and_starts_no_jax(verb):
    script = (
        f"import sys; sys.argv = ['gptjax', '{verb}', '--help']\n"
        "from gptjax import cli\n"
        "try: cli.main()\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'jax', 'flax', 'orbax', 'grain'} & sys.modules.keys(), sorted(sys.modules)"
    )
    text = run(sys.executable, "-c", script).stdout
    flags = {line.strip() for line in text.splitlines() if line.startswith("  --")}
    expected = {
        "train": {"--config", "--workdir"},
        "prepare": {"--source", "--output", "--tokenizer"},
        "evaluate": {"--workdir", "--checkpoint", "--tasks", "--output"},
        "generate": {"--workdir", "--prompt", "--prompts", "--output", "--temperature"},
    }
    assert flags >= expected.get(verb, set())
    assert not flags & {"--alsologtostderr", "--pdb", "--v"}
    assert "e.g. --" in text


def test_no_verb_loads_tensorflow_or_torch(workdir):
    script = (
        "import sys\n"
        f"for verb in {VERBS}: __import__('gptjax.' + verb)\n"
        "from gptjax import cli, evaluate\n"
        f"assert cli.run(evaluate.main, ['evaluate', '--workdir={workdir}']) == 0\n"
        "assert not {'tensorflow', 'torch', 'transformers'} & sys.modules.keys()"
    )
    run(sys.executable, "-c", script)


def test_the_base_package_imports_nothing_heavy():
    """So that the command line starts quickly: NumPy and JAX alone would take more than a second."""
    script = (
        "import sys, gptjax, gptjax.cli, gptjax.config\n"
        "heavy = {'numpy', 'jax', 'flax', 'optax', 'orbax', 'grain', 'pyarrow', 'rich', 'tensorflow', 'torch'}\n"
        "assert not heavy & sys.modules.keys(), sorted(sys.modules)"
    )
    run(sys.executable, "-c", script)
