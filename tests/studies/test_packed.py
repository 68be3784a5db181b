"""Packed cells equal the same cells run alone; a diverging one does not disturb the others."""

import json
from pathlib import Path

import numpy as np
import pytest

from gptjax import config as config_lib
from gptjax import train
from gptjax.artifacts import checkpoints
from gptjax.config import Config
from gptjax.studies import packed
from gptjax.studies.cell import signature


@pytest.fixture
def base(tiny_config, tiny_corpus) -> Config:
    tiny_config.tokenizer, tiny_config.model.vocab_size = "byte", 0
    tiny_config.data.update(source=f"text:{tiny_corpus}/*.txt", split_by="position", validation_fraction=0.1)
    tiny_config.model.dropout = 0.1
    tiny_config.train.update(num_steps=12, batch_size=4, checkpoint_every=6)
    tiny_config.evaluation.update(every=4, max_tokens=200)
    tiny_config.logging.update(every=1, samples=0, tensorboard=False)
    tiny_config.mesh.data = 1
    return tiny_config


def cell(base: Config, seed: int, rate: float) -> Config:
    config = config_lib.from_json(config_lib.to_json(base.copy_and_resolve_references())).unlock()
    config.seed = config.data_seed = seed
    config.optimizer.learning_rate = rate
    return config.lock()


def losses(workdir: Path) -> dict[tuple[str, int], float]:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {(line["split"], line["step"]): line["loss"] for line in lines}


def assert_same(ours: Path, theirs: Path) -> None:
    one, other = losses(ours), losses(theirs)
    assert one.keys() == other.keys()
    np.testing.assert_allclose(list(one.values()), list(other.values()), rtol=1e-5)
    assert checkpoints.finished_steps(ours / "checkpoints") == checkpoints.finished_steps(theirs / "checkpoints")


@pytest.mark.slow
def test_packed_cells_are_their_solo_runs_and_go_on_alone(base, tmp_path, capsys):
    cells = [cell(base, 0, 1e-3), cell(base, 1, 1e-2), cell(base, 2, 1e10), cell(base, 3, 3e-3)]
    assert len({signature(config) for config in cells}) == 1
    together = [(config, tmp_path / f"packed{i}") for i, config in enumerate(cells)]
    failed = packed.train(together)
    assert list(failed) == [tmp_path / "packed2"]
    assert "the training loss" in failed[tmp_path / "packed2"] or "not finite" in failed[tmp_path / "packed2"]
    for i in (0, 1, 3):
        train.train(cells[i], tmp_path / f"solo{i}")
        assert_same(tmp_path / f"packed{i}", tmp_path / f"solo{i}")
        assert (tmp_path / f"packed{i}" / "report.html").exists()
    longer = config_lib.from_json(config_lib.to_json(cells[1])).unlock()
    longer.train.num_steps = 16
    for name in ("packed1", "solo1"):
        train.train(longer, tmp_path / name, allow_changes=True)
    assert_same(tmp_path / "packed1", tmp_path / "solo1")


@pytest.mark.parametrize(
    ("path", "value", "together"),
    [
        ("seed", 5, True),
        ("data_seed", 5, True),
        ("optimizer.weight_decay", 0.3, True),
        ("schedule.name", "linear", True),
        ("logging.samples", 3, True),
        ("model.num_layers", 3, False),
        ("model.dropout", 0.2, False),
        ("train.num_steps", 9, False),
        ("train.ema_decay", 0.9, False),
        ("objective.label_smoothing", 0.1, False),
        ("optimizer.name", "lion", False),
        ("evaluation.every", 7, False),
    ],
)
def test_what_can_be_packed(base, path, value, together):
    other = config_lib.from_json(config_lib.to_json(base.copy_and_resolve_references())).unlock()
    section, _, name = path.rpartition(".")
    (other[section] if section else other)[name] = value
    assert (signature(base) == signature(other)) == together


def test_cells_that_a_kill_has_parted_go_on_in_groups(tmp_path, monkeypatch):
    """Packed cells must be at the same step."""
    starts = {"a": 0, "b": 8, "c": 0}
    for name in starts:
        (tmp_path / name).mkdir()
        (tmp_path / name / "cell.json").write_text(config_lib.to_json(config_lib.get_default()))
    monkeypatch.setattr(packed.integrity, "newest_whole", lambda directory: starts[directory.parent.name])
    groups = []
    monkeypatch.setattr(packed, "train", lambda cells: groups.append([place.name for _, place in cells]) or {})
    packed.main([str(tmp_path / name) for name in starts])
    assert groups == [["a", "c"], ["b"]]
