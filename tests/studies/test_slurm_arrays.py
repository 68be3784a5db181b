"""A study as a Slurm job array: the script, its options, and a complete pass through a queue on this machine."""

import json
import os
import sys
from pathlib import Path

import pytest

from gptjax import ablate
from gptjax import config as config_lib
from gptjax.errors import RunError, UserError
from gptjax.studies import slurm

SBATCH = """#!{python}
import json, os, re, subprocess, sys
script = sys.stdin.read()
last = int(re.search(r"--array=0-([0-9]+)", script)[1])
command = script.splitlines()[-1].partition(":-1}}" + " ")[2]
for index in range(last + 1):
    environment = os.environ | {{"SLURM_ARRAY_TASK_ID": str(index)}}
    subprocess.run(command, shell=True, env=environment, check=True)
print(1)
"""
STUDY = """
from gptjax.config import get_default
from gptjax.studies.study import Study, apply_arg


def get_study(arg=""):
    base = get_default()
    base.tokenizer = "byte"
    base.model.update(num_layers=1, num_heads=2, embed_dim=8, context_length=8)
    base.train.update(num_steps=2, batch_size=2)
    base.data.source = "text:{texts}"
    base.mesh.data = 1
    base.logging.update(samples=0, tensorboard=False)
    arms = {{"slow": {{}}, "fast": {{"optimizer.learning_rate": 0.01}}}}
    return apply_arg(Study(question="Which rate?", base=base, arms=arms, claims=("fast < slow",), seeds=2), arg)
"""


@pytest.fixture
def study(tmp_path) -> Path:
    (tmp_path / "a.txt").write_text("a corpus of some words. " * 400)
    path = tmp_path / "rates.py"
    path.write_text(STUDY.format(texts=tmp_path / "a.txt"))
    return path


def test_the_script_of_an_array(tmp_path):
    text = slurm.script("gptjax-0", 12, tmp_path / "a b", {"partition": "gpu", "exclusive": ""}, at_once=4)
    lines = text.splitlines()
    assert lines[0] == "#!/bin/bash"
    assert {"#SBATCH --array=0-11%4", "#SBATCH --partition=gpu", "#SBATCH --exclusive", "#SBATCH --requeue"} <= {*lines}
    assert lines[-1].startswith("exec srun --ntasks=1 --cpus-per-task=${SLURM_CPUS_PER_TASK:-1} ")
    assert lines[-1].endswith(f"-m gptjax.studies.slurm '{tmp_path}/a b/slurm/gptjax-0.json'")


@pytest.mark.parametrize(
    ("option", "message"),
    [("array=0-3", "sets --array itself"), ("Partition=x", "long option of sbatch"), ("comment=a\nb", "a single line")],
)
def test_options_of_sbatch_that_are_none(option, message):
    with pytest.raises(UserError, match=message):
        slurm.read_options([option])


def test_flags_without_the_launcher(study, tmp_path):
    with pytest.raises(UserError, match="needs --launcher=slurm"):
        ablate.main(["ablate", f"--study={study}", f"--workdir={tmp_path / 'w'}", "--slurm.partition=gpu"])


def test_sbatch_is_missing(study, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="needs sbatch"):
        ablate.main(["ablate", f"--study={study}", f"--workdir={tmp_path / 'w'}", "--launcher=slurm"])


def test_a_dry_run_prints_the_script(study, tmp_path, capsys):
    ablate.main(["ablate", f"--study={study}", f"--workdir={tmp_path / 'w'}", "--launcher=slurm", "--dry_run"])
    assert "#SBATCH --array=0-3" in capsys.readouterr().out
    assert not (tmp_path / "w").exists()


@pytest.mark.slow
def test_an_array_gives_the_table_of_this_machine(study, tmp_path, monkeypatch, capsys):
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (("sbatch", SBATCH.format(python=sys.executable)), ("squeue", "#!/bin/sh\n")):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    ablate.main(["ablate", f"--study={study}", f"--workdir={tmp_path / 'array'}", "--launcher=slurm"])
    ablate.main(["ablate", f"--study={study}", f"--workdir={tmp_path / 'here'}"])
    assert (tmp_path / "array" / "results.csv").read_bytes() == (tmp_path / "here" / "results.csv").read_bytes()
    (listed,) = (tmp_path / "array" / "slurm").glob("*.json")
    assert len(json.loads(listed.read_text())) == 4


def test_what_is_in_the_queue(tmp_path, monkeypatch):
    """Elements of an array are read from squeue's names and numbers; all others have ended."""
    (tmp_path / "slurm").mkdir()
    jobs = [[{"workdir": "/w/a"}], [{"workdir": "/w/b"}, {"workdir": "/w/c"}], [{"workdir": "/w/d"}]]
    (tmp_path / "slurm" / "gptjax-0.json").write_text(json.dumps(jobs))
    squeue = tmp_path / "squeue"
    squeue.write_text("#!/bin/sh\necho 'gptjax-0|1|RUNNING'\necho 'gptjax-0|2|PENDING'\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert slurm._queued(tmp_path, ["gptjax-0"]) == {"/w/b": "running", "/w/c": "running", "/w/d": "pending"}
    squeue.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RunError, match="squeue is not on this machine"):
        slurm._queued(tmp_path, ["gptjax-0"])


def test_an_element_without_a_result_fails(tmp_path, monkeypatch):
    (tmp_path / "cell.json").write_text(config_lib.to_json(config_lib.get_default()))
    entry = {"arm": "a", "seed": 0, "point": "", "workdir": str(tmp_path), "num_steps": 4}
    (tmp_path / "list.json").write_text(json.dumps([[entry]]))
    monkeypatch.setattr(slurm.local, "run", lambda jobs, **options: None)
    with pytest.raises(RunError, match="no result: a-seed0"):
        slurm.main([str(tmp_path / "list.json"), "0"])
