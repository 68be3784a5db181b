"""Failures that say nothing about the arm are no results; divergence is one."""

import json

import pytest

from gptjax.errors import UserError
from gptjax.studies.cell import Cell
from gptjax.studies.local import _ended, packs


@pytest.fixture
def cell(tiny_config, tmp_path) -> Cell:
    config = tiny_config.copy_and_resolve_references()
    return Cell("arm", 0, config, config, "key", tmp_path, num_steps=4)


@pytest.mark.parametrize(
    ("status", "last", "is_result"),
    [
        (1, "failed: the training loss is nan at step 3. Try a lower rate", True),
        (1, "failed: the training loss diverged: 9.000 at step 3", True),
        (1, "failed: the parameters are not finite after step 3", True),
        (1, "failed: /runs/a/metrics.jsonl: the disk is full", False),
        (1, "failed: out of memory: RESOURCE_EXHAUSTED", False),
        (1, "failed: stopped by SIGTERM at step 3; saved in x", False),
        (130, "failed: interrupted", False),
        (2, "error: --workdir=a: process 7 on host writes there", False),
        (-9, "", False),
    ],
)
def test_only_a_divergence_is_a_result(cell, status, last, is_result):
    log = cell.workdir / "log.txt"
    log.write_text(f"before\n{last}\n")
    told = _ended(cell, status, log)
    assert bool(cell.outcome()) == is_result
    assert told.startswith("no result: ") != is_result
    if is_result:
        assert cell.score("loss", uniform=5.0) == 5.0


def test_the_score_is_that_of_the_last_step(cell):
    lines = [{"step": step, "split": "validation", "loss": 9.0 - step} for step in (2, 4)]
    (cell.workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert (cell.outcome(), cell.score("loss", uniform=7.0)) == ("done", 5.0)
    with pytest.raises(UserError, match=r"study.metric is 'bits'; the validation of arm-seed0 has loss"):
        cell.score("bits", uniform=5.0)


def test_what_may_stop_early_is_not_packed(cell, tiny_config):
    assert [len(pack) for pack in packs([cell, cell, cell], most=2)] == [2, 1]
    tiny_config.train.early_stopping_patience = 2
    one, other = (Cell("arm", seed, tiny_config, tiny_config, "key", cell.workdir, num_steps=4) for seed in (0, 1))
    assert [len(pack) for pack in packs([one, other], most=2)] == [1, 1]
