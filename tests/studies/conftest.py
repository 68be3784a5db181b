"""A study whose cells have ended, with scores that are known, without a training."""

import json
import math
from collections.abc import Callable

import pytest

from gptjax.studies.cells import Plan
from gptjax.studies.study import Grid, Study

RATE = "optimizer.learning_rate"
STEPS = 4


@pytest.fixture
def small_base(tiny_config, tiny_corpus):
    tiny_config.tokenizer, tiny_config.model.vocab_size = "byte", 0
    tiny_config.data.update(source=f"text:{tiny_corpus}/*.txt", split_by="position", validation_fraction=0.1)
    tiny_config.train.num_steps = STEPS
    return tiny_config


@pytest.fixture
def finish() -> Callable[..., None]:
    return _finish


def _finish(cell, final: float, *, seconds: float = 1.0) -> None:
    """What a run leaves: a loss that falls from 5 to `final`, a quarter of the way with each step."""
    cell.workdir.mkdir(parents=True, exist_ok=True)
    lines = []
    for step in range(1, STEPS + 1):
        loss = 5 + (final - 5) * step / STEPS
        told = {"step": step, "loss": loss, "tokens_seen": 64 * step, "wall_time_s": 9 + seconds * step}
        told |= {"seconds/compile": 9.0, "seconds/step": seconds * step, "tokens_per_second": 64 / seconds}
        lines += [told | {"split": split, "bits_per_byte": loss / math.log(2)} for split in ("train", "validation")]
    (cell.workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def tuned_study(small_base) -> Callable[..., Study]:
    """tuned_study(*rates): two arms with grids, and three seeds; the rates are those of the baseline."""

    def study(*rates: float) -> Study:
        rates = rates or (1e-4, 1e-3, 1e-2)
        arms = {"adamw": {RATE: Grid(*rates)}, "muon": {"optimizer.name": "muon", RATE: Grid(1e-4, 1e-3, 1e-2)}}
        told = {"question": "Is <muon> better?", "source": "Jordan 2024", "found": "fewer steps"}
        return Study(base=small_base, arms=arms, claims=("muon < adamw",), seeds=3, **told)

    return study


@pytest.fixture
def ended(finish) -> Callable[..., Plan]:
    """The plan of such a study whose cells have all ended: muon is better by 0.49; a rate of 1e-3 is the best."""

    def plan(study: Study, workdir) -> Plan:
        for known in (lambda plan: plan.tuning, lambda plan: plan.cells):
            for cell in known(Plan(study, workdir)):
                muon, off = cell.arm == "muon", abs(math.log10(cell.config.optimizer.learning_rate / 1e-3))
                finish(cell, 3 - 0.5 * muon + off + 0.01 * (cell.seed % 3) * (1 + muon), seconds=1.0 + muon)
        return Plan(study, workdir)

    return plan
