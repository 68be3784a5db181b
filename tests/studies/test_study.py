"""A study is checked before anything runs; its cells run once, and its report is made from them."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gptjax.errors import UserError
from gptjax.studies import study as studies
from gptjax.studies.cells import Plan
from gptjax.studies.study import Study, apply_arg

REPOSITORY = Path(__file__).parent.parent.parent
STUDY = """
from gptjax.config import get_default
from gptjax.studies.study import Study, apply_arg


def get_study(arg=""):
    base = get_default()
    base.tokenizer = "byte"
    base.data.update(source="text:{corpus}/*.txt", split_by="position", validation_fraction=0.1)
    base.model.update(num_layers=1, num_heads=2, embed_dim=16, context_length=16)
    base.train.update(num_steps=8, batch_size=4)
    base.evaluation.update(every=4, max_tokens=200)
    base.logging.update(every=1, samples=0, tensorboard=False)
    arms = {{"slow": {{"optimizer.learning_rate": 1e-5}}, "fast": {{"optimizer.learning_rate": 1e-2}}}}
    arms["wild"] = {{"optimizer.learning_rate": 1e10, "optimizer.clip_norm": 0.0}}
    return apply_arg(Study(question="Does a rate matter?", base=base, arms=arms, claims=("fast < slow",), seeds=2), arg)
"""


@pytest.fixture
def study(tiny_config) -> Study:
    arms = {"none": {}, "norm": {"model.norm": "layernorm"}}
    return Study(question="?", base=tiny_config, arms=arms, claims=("norm < none",))


@pytest.fixture(scope="module")
def study_file(tiny_corpus, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("study") / "rates.py"
    path.write_text(STUDY.format(corpus=tiny_corpus))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"claims": ("norm < nonne",)}, "names 'nonne', no arm; did you mean none"),
        ({"claims": ("norm better",)}, "is not of the form"),
        ({"claims": ("norm < norm",)}, "compares an arm with itself"),
        ({"claims": ("norm = none",)}, "needs a margin"),
        ({"seeds": 1}, "a claim needs at least 2"),
        ({"seeds": 0, "claims": ()}, "at least one seed"),
        ({"margin": -0.1}, "at least 0"),
        ({"margin": float("nan")}, "at least 0"),
        ({"arms": {}, "claims": ()}, "at least one arm"),
        ({"arms": {"a": {}, "b": {}}, "claims": ()}, "the arms 'a' and 'b' are the same"),
        ({"arms": {"a": {"seed": 1}}, "claims": ()}, "arm 'a' sets seed; all arms use the seeds of the study"),
        ({"arms": {"a": {"model.layers": 1}}, "claims": ()}, "arm 'a': model.layers is not an option; did you mean"),
        ({"arms": {"a": {"model.num_layers": -1}}, "claims": ()}, "(?s)arm 'a': .*model.num_layers is -1"),
        ({"arms": {"a/b": {}}, "claims": ()}, "'a/b' is no name of an arm"),
        ({"claims": "norm < none"}, "study.claims must be texts"),
        ({"seeds": "3"}, "study.seeds is '3'; it must be a whole number"),
        ({"unmatched": {"speed": "x"}}, "study.unmatched names 'speed'"),
    ],
)
def test_what_is_wrong_is_named_before_anything_runs(study, change, message):
    for name, value in change.items():
        setattr(study, name, value)
    with pytest.raises(UserError, match=message):
        study.check()


@pytest.mark.parametrize(
    ("text", "margin", "both_ways"),
    [
        ("a < b", 0, False),
        ("a < b - 0.01", -0.01, False),
        ("a <= b", 0.5, False),
        ("a<=b+1e-3", 1e-3, False),
        ("a = b", 0.5, True),
        ("a = b + 0.02", 0.02, True),
    ],
)
def test_claims(study, text, margin, both_ways):
    study.arms, study.claims, study.margin = {"a": {}, "b": {"seed": 1}}, (text,), 0.5
    (claim,) = study.parsed_claims()
    assert (claim.ours, claim.theirs, claim.margin, claim.both_ways) == ("a", "b", margin, both_ways)


def test_a_study_has_two_other_sizes(study):
    study.smoke, study.full = {"train.num_steps": 3, "seeds": 2}, {"model.num_layers": 24}
    smoke, full = apply_arg(study, "smoke"), apply_arg(study, "full")
    assert (smoke.base.train.num_steps, smoke.seeds, full.base.model.num_layers) == (3, 2, 24)
    with pytest.raises(UserError, match="unknown argument 'huge'"):
        apply_arg(study, "huge")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_study(:", "failed at line 1: SyntaxError"),
        ("x = 1", "has no function get_study"),
        ("def get_study(arg):\n    return arg.x", "failed at line 2: AttributeError"),
        ("def get_study(arg):\n    return 3", "returned int, not a Study"),
    ],
)
def test_a_file_that_is_no_study(tmp_path, text, message):
    (tmp_path / "s.py").write_text(text)
    with pytest.raises(UserError, match=message):
        studies.read(f"{tmp_path}/s.py")
    with pytest.raises(UserError, match="no such file"):
        studies.read(f"{tmp_path}/other.py")


def test_arms_that_do_not_match_are_refused_unless_the_study_says_why(study_file, tmp_path):
    study = studies.read(str(study_file))
    study.arms["big"] = {"model.num_layers": 2}
    with pytest.raises(UserError, match=r"big has .* parameters, slow .*\(\+\d+.*big has .* flops per token"):
        Plan(study, tmp_path).check_matched()
    study.unmatched = {"parameters": "depth is the question", "flops_per_token": "the same"}
    plan = Plan(study, tmp_path)
    plan.check_matched()
    assert plan.differences()["big"] == {"model.num_layers": [1, 2], "optimizer.learning_rate": [1e-5, 1e-3]}
    assert len({cell.key for cell in plan.cells}) == len(plan.cells) == 8
    plan.claim()
    (tmp_path / "study.json").write_text((tmp_path / "study.json").read_text().replace(plan.code, "0" * 64))
    with pytest.raises(UserError, match="made by other code"):
        plan.claim()


def ablate(study_file: Path, workdir: Path, *options: str) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["XLA_FLAGS"] = " ".join(re.findall(r"--xla_cpu_max_isa=\S+", os.environ["XLA_FLAGS"]))
    command = [sys.executable, "-m", "gptjax.ablate", f"--study={study_file}", f"--workdir={workdir}", *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, **pipes)


@pytest.mark.slow
def test_killed_half_way_it_runs_what_is_missing_and_the_report_is_the_same(study_file, tmp_path):
    process = ablate(study_file, tmp_path / "killed")
    done = tmp_path / "killed" / "cells"
    while process.poll() is None and not (done.is_dir() and any(done.glob("*/report.html"))):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    stamps = {path: path.stat().st_mtime_ns for path in done.glob("*/report.html")}
    known = {path.parent.name.rpartition("-")[0] for path in done.glob("*/diverged.txt")}
    out, errors = ablate(study_file, tmp_path / "killed").communicate(timeout=400)
    assert "fast < slow: supported" in out, errors
    assert len(list(done.iterdir())) == 6, "a cell never runs twice"
    for path, stamp in stamps.items():
        assert path.stat().st_mtime_ns == stamp
    for name in {"wild-seed0", "wild-seed1"} - known:
        assert f"{name}: failed: " in errors
    out, errors = ablate(study_file, tmp_path / "straight").communicate(timeout=400)
    for name in ("report.md", "results.csv"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
