"""Studies with made-up cells: nothing is trained."""

import json

import numpy as np
import pytest

from gptjax.studies.cells import Plan
from gptjax.studies.study import Study

RATE = "optimizer.learning_rate"
STEPS = 8


@pytest.fixture
def small_base(tiny_config, tiny_corpus):
    tiny_config.tokenizer, tiny_config.model.vocab_size = "byte", 0
    tiny_config.data.update(source=f"text:{tiny_corpus}/*.txt", split_by="position", validation_fraction=0.1)
    tiny_config.train.num_steps = STEPS
    return tiny_config


@pytest.fixture
def made(small_base, tmp_path):
    """A study with made-up cells: the loss depends on the rate, plus 0.1 per seed; the arm "wild" diverges."""

    def make(name: str = "study", **arms) -> Plan:
        arms = arms or {f"at_{rate:g}": {RATE: rate} for rate in (1e-4, 1e-3, 1e-2)} | {"wild": {RATE: 1e3}}
        claims = (f"{list(arms)[1]} < {next(iter(arms))}",)
        study = Study(question="?", base=small_base, arms=arms, claims=claims, seeds=2, source="a paper", name="rates")
        plan = Plan(study, tmp_path / name)
        plan.claim()
        while missing := plan.missing():
            for cell in missing:
                fill(cell)
        return plan

    return make


def fill(cell) -> None:
    """A step takes a second, in the arm "slow" two: half of it on the device, half waiting for data and in the loop."""
    cell.workdir.mkdir(parents=True)
    rate, pace = cell.config.optimizer.learning_rate, 2.0 if cell.arm == "slow" else 1.0
    last = 3 if rate > 1 else STEPS
    level = 3 + abs(np.log10(rate) + 3) + (0.11 if cell.arm == "slow" else 0.1) * (cell.seed % 10)
    lines = []
    for step in range(1, last + 1):
        clock = {
            "seconds/step": pace * step / 2,
            "seconds/data": pace * step / 4,
            "seconds/idle": pace * step / 4,
            "seconds/eval": 9.0,
        }
        line = {"step": step, "split": "train", "loss": level + 1 / step, "tokens_per_second": 64 / pace}
        lines.append(line | clock)
        if step % 4 == 0:
            lines.append({"step": step, "split": "validation", "loss": level + 1 / step} | clock)
    (cell.workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if rate > 1:
        cell.fail("failed: the training loss is nan at step 4")
