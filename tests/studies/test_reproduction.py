"""A run that is trained again is bit-identical; if it departs, the step, the values and the causes are reported."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gptjax import ablate
from gptjax import config as config_lib
from gptjax.errors import RunError, UserError
from gptjax.studies import differences, local, reproduction

REPOSITORY = Path(__file__).parent.parent.parent


@pytest.fixture
def base(tiny_config, tiny_corpus):
    tiny_config.tokenizer, tiny_config.model.vocab_size = "byte", 0
    tiny_config.data.update(source=f"text:{tiny_corpus}/*.txt", split_by="position", validation_fraction=0.1)
    tiny_config.model.dropout = 0.1
    tiny_config.train.update(num_steps=8, batch_size=8, checkpoint_every=4)
    tiny_config.evaluation.update(every=4, max_tokens=200)
    tiny_config.logging.update(every=1, samples=0, tensorboard=False)
    return tiny_config


@pytest.mark.slow
def test_a_run_is_reproduced_to_the_bit(base, tmp_path):
    text = f"def get_config():\n    return from_json({config_lib.to_json(base)!r})\n"
    text = "from gptjax.config import from_json\n\n\n" + text
    (tmp_path / "config.py").write_text(text)
    for verb, *words in (
        ("train", f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'a'}"),
        ("ablate", f"--reproduce={tmp_path / 'a'}"),
    ):
        command = [sys.executable, "-m", f"gptjax.{verb}", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=REPOSITORY)
        assert done.returncode == 0, done.stderr
    assert "bit-identical: all numbers of 10 lines up to step 8 are equal" in done.stdout
    assert (tmp_path / "a-reproduced" / "metrics.jsonl").exists()
    assert differences.manifest(tmp_path / "a")["processor"]


@pytest.fixture
def run_of(base, tmp_path, monkeypatch):
    """A made-up run, whose repetition writes the same files with changes."""
    run, changes = tmp_path / "run", {"loss": {}, "manifest": {}}
    run.mkdir()
    config = base.copy_and_resolve_references()
    config.train.num_steps = 40
    (run / "config.json").write_text(config_lib.to_json(config))
    about = {"devices": {"platform": "cpu", "count": 3, "kind": "cpu"}, "processor": "x", "environment": {}}
    (run / "manifest.json").write_text(json.dumps(about))
    lines = [{"step": i, "split": "train", "loss": 2.0, "wall_time_s": i, "accuracy": 0.5} for i in range(1, 41)]

    def write(place, lines):
        (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def stops_at(cell, step, halt) -> bool:
        write(cell.workdir, lines[:step])
        return halt(cell)

    def train_anew(jobs, **options):
        ((cell,),) = jobs
        changes["environment"] = {
            name: reproduction.os.environ.get(name) for name in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")
        }
        shutil.copy(run / "config.json", cell.workdir)
        (cell.workdir / "manifest.json").write_text(json.dumps(about | changes["manifest"]))
        changes["halted"] = [step for step in range(1, 41) if stops_at(cell, step, options["halt"])]
        new = [line | {"wall_time_s": 0.1, "loss": changes["loss"].get(line["step"], 2.0)} for line in lines]
        write(cell.workdir, new[: changes.get("ends", 40)])
        if changes.get("diverges"):
            cell.fail("failed: the training loss is nan at step 9")

    write(run, lines)
    monkeypatch.setattr(local, "run", train_anew)
    return run, changes


def again(run, steps=0):
    return reproduction.rerun(run, reproduction.beside(run), steps=steps, show=lambda states: None)


def test_only_the_first_steps_may_be_compared(run_of):
    run, changes = run_of
    changes["loss"][7] = 3.0
    found = again(run, steps=6)
    assert found.in_words().startswith("bit-identical: all numbers of 6 lines up to step 6")
    assert changes["halted"][0] == 6


def test_the_devices_of_the_run_are_used(run_of):
    run, changes = run_of
    assert again(run).in_words().startswith("bit-identical: all numbers of 40 lines")
    assert changes["environment"] == {"JAX_NUM_CPU_DEVICES": "3", "XLA_FLAGS": None}


def test_on_the_same_processor_the_last_bit_counts(run_of):
    run, changes = run_of
    changes["loss"][7] = 2.0 + 1e-7
    found = again(run)
    assert (found.exact, found.holds) == (True, False)
    words = (
        "it departs at step 7, train loss: 2.0 at first, 2.0000001 now (the same code on the same CPU repeats every bit"
    )
    assert found.in_words().startswith(words)
    assert "the records do not differ" in found.in_words()


@pytest.mark.parametrize(("step", "value", "holds"), [(7, 2 + 1e-5, True), (7, 2 + 4e-5, False), (40, 2 + 4e-5, True)])
def test_on_another_processor_rounding_is_expected_to_grow(run_of, step, value, holds, capsys):
    run, changes = run_of
    changes["loss"][step], changes["manifest"] = value, {"processor": "y"}
    if holds:
        ablate.main(["ablate", f"--reproduce={run}"])
        assert "equal within the tolerance: up to step 40" in capsys.readouterr().out
    else:
        with pytest.raises(
            RunError, match=r"departs at step 7, .* 1e-05 of the loss .* what differs: processor 'x' at"
        ):
            ablate.main(["ablate", f"--reproduce={run}"])


def test_what_differs_is_a_cause(run_of):
    run, changes = run_of
    changes["loss"] = dict.fromkeys(range(5, 41), 1.0)
    changes["manifest"] = {"data": {"source_fingerprint": "z"}}
    found = again(run)
    assert "it departs at step 5, train loss: 2.0 at first, 1.0 now" in found.in_words()
    assert [cause.name for cause in found.causes] == ["data"]


@pytest.mark.parametrize(
    ("diverges", "message"),
    [
        (True, "departs: the run diverged after step 8, and .* step 40; .* loss is nan"),
        (False, "did not finish: it stopped at step 8"),
    ],
)
def test_a_repetition_that_ends_early_is_no_agreement(run_of, diverges, message):
    run, changes = run_of
    changes |= {"ends": 8, "diverges": diverges}
    with pytest.raises(RunError, match=message):
        again(run)


def test_what_is_expected_of_a_step():
    steps = (1, 10, 20, 2000, 10**6)
    assert [differences.expected(step) for step in steps] == pytest.approx([1e-5, 1e-5, 2e-5, 2e-3, 1e-2])


def test_what_cannot_be_reproduced(run_of, tmp_path):
    run, _ = run_of
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(UserError, match="other exists already"):
        reproduction.rerun(run, tmp_path / "other", show=print)
    with pytest.raises(UserError, match=r"is not a work directory: it has no config.json"):
        reproduction.rerun(tmp_path / "other", tmp_path / "new", show=print)
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="has no step to compare with"):
        reproduction.rerun(run, tmp_path / "new", show=print)
    (run / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json"):
        reproduction.rerun(run, tmp_path / "new", show=print)
