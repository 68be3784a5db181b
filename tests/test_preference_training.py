"""Runs on preferences: their loss starts at ln 2, does not depend on how a batch is computed, and resumes bitwise."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from gptjax import config as config_lib
from gptjax.errors import UserError
from gptjax.files import read_json
from gptjax.train import train
from gptjax.training import reference
from gptjax.training.run import Run

REPOSITORY = Path(__file__).parent.parent
CONFIG = """
from gptjax.config import get_default

def get_config(arg=""):
    config = get_default()
    config.tokenizer = "byte"
    config.data.update(source="preference:{data}", test_fraction=0.0, validation_fraction=0.2)
    config.model.update(num_layers=1, num_heads=2, embed_dim=16, context_length=64)
    config.optimizer.update(learning_rate=5e-3, weight_decay=0.0, epsilon=1e-6)
    config.train.update(num_steps=12, batch_size=8, checkpoint_every=4)
    config.evaluation.update(every=6, max_tokens=500)
    config.logging.update(every=1, samples=0, tensorboard=False)
    config.mesh.data = 1
    return config
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Questions whose better answer is polite."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [
        {
            "prompt": f"Where is {i}?",
            "chosen": f"It is {'there ' * (i % 3)}, sir.",
            "rejected": f"No idea{'!' * (i % 5)}",
        }
        for i in range(150)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def config_file(data) -> Path:
    path = data.parent / "config.py"
    path.write_text(CONFIG.format(data=data))
    return path


def config_of(config_file: Path, **changes) -> config_lib.Config:
    """The config with options as "section__name"."""
    namespace: dict = {}
    exec(config_file.read_text(), namespace)
    config = namespace["get_config"]()
    for path, value in changes.items():
        section, _, name = path.rpartition("__")
        (config[section] if section else config)[name] = value
    return config


def lines(workdir: Path, split: str = "train") -> list[dict]:
    found = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if line["split"] == split]


def trained(config_file: Path, workdir: Path, **changes) -> list[dict]:
    train(config_of(config_file, **changes), workdir)
    return lines(workdir)


@pytest.fixture(scope="module")
def plain(config_file, tmp_path_factory) -> Path:
    """The work directory of a run with DPO."""
    workdir = tmp_path_factory.mktemp("dpo")
    trained(config_file, workdir)
    return workdir


def test_dpo_begins_at_ln_2_and_learns(plain):
    first = lines(plain)[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(first["margin"]) < 1e-5
    assert read_json(plain / "config.json")["objective"]["name"] == "preference", "auto, by the data"
    last = lines(plain, "validation")[-1]
    assert last["loss"] < 0.65 and last["accuracy"] > 0.9 and last["margin"] > 0.05
    assert last["margin"] == pytest.approx(last["chosen_reward"] - last["rejected_reward"], abs=1e-5)
    assert {"chosen_log_probability", "rejected_log_probability", "nll", "perplexity"} <= set(last)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_micro_batches_and_meshes_change_nothing(config_file, tmp_path, loss):
    options = {"objective__preference_loss": loss, "train__num_steps": 4, "evaluation__every": 4}
    expected = trained(config_file, tmp_path / "plain", **options)
    ways = [{"mesh__data": 2, "mesh__fsdp": 2, "train__accumulation": 2}]
    ways += [{"mesh__context": 2, "mesh__tensor": 2}] if loss == "dpo" else []
    for number, way in enumerate(ways):
        found = trained(config_file, tmp_path / str(number), **options, **way)
        for ours, theirs in zip(found, expected, strict=True):
            for name in ("loss", "gradient_norm", "margin"):
                assert ours[name] == pytest.approx(theirs[name], rel=2e-5, abs=2e-5), (way, name)
        (ours,), (theirs,) = lines(tmp_path / str(number), "validation"), lines(tmp_path / "plain", "validation")
        if loss != "kto":  # whose estimate is of the batch
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-5)


def test_bfloat16_begins_near_ln_2(config_file, tmp_path):
    first = trained(config_file, tmp_path, model__compute_dtype="bfloat16", train__num_steps=2)[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=2e-3)


def test_with_adapters_the_reference_is_the_model_without_them(config_file, plain, tmp_path):
    options = {"init_from": str(plain), "train__num_steps": 6, "model__lora_rank": 2, "model__lora_targets": ".*"}
    found = trained(config_file, tmp_path / "lora", **options)
    assert found[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert found[-1]["loss"] < math.log(2)
    alone = trained(config_file, tmp_path / "full", init_from=str(plain), train__num_steps=1)
    assert (tmp_path / "lora/reference.json").read_text() == (tmp_path / "full/reference.json").read_text()
    assert alone[0]["chosen_log_probability"] == pytest.approx(found[0]["chosen_log_probability"], abs=1e-3)


@pytest.mark.slow
def test_a_table_is_of_one_model_and_of_one_data(config_file, plain, tmp_path):
    cache = str(tmp_path / "cache")
    folder = tmp_path / "cache" / "references"

    def opened(name: str, **changes) -> Run:
        run = Run.open(config_of(config_file, data__cache_dir=cache, **changes), tmp_path / name)
        run.told = [run.state(), *run.notes()][1:]
        run.close()
        return run

    def tables() -> set[str]:
        return {path.name for path in folder.iterdir()}

    first = opened("a")
    assert any("the untrained model" in note and "computed, and kept" in note for note in first.told)
    assert len(known := tables()) == 2, "train and validation"
    assert any("found in" in note for note in opened("b").told) and tables() == known
    opened("c", seed=1)
    assert len(tables()) == 4, "another model"
    opened("d", init_from=str(plain))
    assert len(tables()) == 6
    opened("e", model__context_length=48)
    assert len(tables()) == 8, "shorter texts"
    opened("f", objective__preference_loss="kto")
    assert len(tables()) == 10
    opened("g", objective__preference_loss="simpo")
    assert len(tables()) == 10 and not (tmp_path / "g" / "reference.json").exists()
    for path in folder.iterdir():  # what is cut off is not a table
        path.write_bytes(path.read_bytes()[:-4])
    again = opened("h")
    assert any("computed, and kept" in note for note in again.told)
    examples = again.data.examples(again.program.config, "train", judged=False)["pairs"]
    np.testing.assert_array_equal(
        examples.reference, first.data.examples(first.program.config, "train", judged=False)["pairs"].reference
    )


def test_a_fingerprint_sees_every_value_and_its_place(config_file, tmp_path):
    run = Run.open(config_of(config_file), tmp_path)
    params = run.program.initial_state().params
    run.close()
    known = reference.fingerprint(params)
    leaves, tree = jax.tree.flatten(params)
    for number, leaf in enumerate(leaves):
        for changed in (leaf.at[(0,) * leaf.ndim].add(1e-6), leaf.at[(-1,) * leaf.ndim].multiply(-1.0)):
            assert (
                reference.fingerprint(jax.tree.unflatten(tree, [*leaves[:number], changed, *leaves[number + 1 :]]))
                != known
            )
    table = params["embedding"]["embedding"]
    params["embedding"]["embedding"] = table[::-1]
    assert reference.fingerprint(params) != known
    params["embedding"]["embedding"] = table
    assert reference.fingerprint(params) == known


# ---- Killed and continued ------------------------------------------------------------------------------------------


def start(config_file: Path, workdir: Path, *options: str, devices: int = 1) -> subprocess.Popen:
    flags = " ".join(flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag)
    flags += f" --xla_force_host_platform_device_count={devices}"
    command = [sys.executable, "-m", "gptjax.train", f"--config={config_file}", f"--workdir={workdir}", *options]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=REPOSITORY, env=os.environ | {"XLA_FLAGS": flags}, **pipes)


def finish(process: subprocess.Popen, status: int = 0) -> str:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == status, errors
    return errors


@pytest.mark.slow
def test_two_processes_are_one_run(config_file, plain, tmp_path):
    """With KTO, which has both a reference and a value of the whole batch."""
    options = ["--config.objective.preference_loss=kto", f"--config.init_from={plain}", "--config.mesh.data=2"]
    options += [f"--config.data.cache_dir={tmp_path}/cache"]
    finish(start(config_file, tmp_path / "alone", *options, devices=2))
    for path in (tmp_path / "cache").glob("references/*"):
        path.unlink()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    numbers = [f"--coordinator={address}", "--num_processes=2"]
    both = tmp_path / "both"
    processes = [start(config_file, both, *options, *numbers, f"--process_id={index}") for index in range(2)]
    for process in processes:
        finish(process)
    for split in ("train", "validation"):
        for ours, theirs in zip(lines(both, split), lines(tmp_path / "alone", split), strict=True):
            for name in ("loss", "margin", "accuracy"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-6), (split, ours["step"], name)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_killed_it_continues_bitwise_also_without_its_table(config_file, plain, tmp_path, loss):
    options = [f"--config.init_from={plain}", f"--config.objective.preference_loss={loss}"]
    options += [f"--config.data.cache_dir={tmp_path}/cache", "--config.train.num_steps=40"]
    finish(start(config_file, tmp_path / "whole", *options))
    killed = tmp_path / "killed"
    process = start(config_file, killed, *options)
    while process.poll() is None and not (killed / "checkpoints" / "8").exists():
        time.sleep(0.01)
    process.kill()
    finish(process, -signal.SIGKILL)
    for path in (tmp_path / "cache" / "references").iterdir():
        path.unlink()
    finish(start(config_file, killed, *options))
    for split in ("train", "validation"):
        told = [
            [(line["step"], line["loss"], line["margin"]) for line in lines(w, split)]
            for w in (tmp_path / "whole", killed)
        ]
        assert told[0] == told[1]


def test_a_run_whose_table_and_beginning_are_gone_is_not_continued(config_file, plain, tmp_path):
    options = {"data__cache_dir": str(tmp_path / "cache"), "train__num_steps": 4}
    trained(config_file, tmp_path / "run", **options)
    for path in (tmp_path / "cache" / "references").iterdir():
        path.unlink()
    (tmp_path / "run" / "reference.json").write_text('{"parameters": "of another model"}')
    with pytest.raises(UserError, match="is no longer the model that the run started with"):
        Run.open(config_of(config_file, **options), tmp_path / "run").state()


def test_evaluate_says_how_often_the_better_answer_is_preferred(plain, tmp_path):
    from gptjax.evaluate import main

    main(["evaluate", f"--workdir={plain}", "--checkpoint=last", "--tasks=preference", f"--output={tmp_path}/e.json"])
    found, told = read_json(tmp_path / "e.json")["results"]["preference"], lines(plain, "validation")[-1]
    for name in ("accuracy", "margin"):
        assert found[name]["value"] == pytest.approx(told[name], rel=1e-4), name
        assert found[name]["ci95"][0] <= found[name]["value"] <= found[name]["ci95"][1]
    assert found["accuracy"]["n"] == found["accuracy_likelihood"]["n"] > 10
