"""Two runs are compared by what produced them, and by where their losses part."""

import json
from pathlib import Path

import pytest

from gptjax import config as config_lib
from gptjax.errors import UserError
from gptjax.studies.differences import compare, parting


def write(workdir: Path, config, losses: list[float | None], **manifest) -> Path:
    workdir.mkdir()
    (workdir / "config.json").write_text(config_lib.to_json(config.copy_and_resolve_references()))
    lines = [{"step": i, "split": "train", "loss": loss} for i, loss in enumerate(losses, 1)]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    about = {"packages": {"jax": "1", "flax": "2"}, "devices": {"kind": "cpu", "count": 1}, "git": None}
    (workdir / "manifest.json").write_text(json.dumps(about | manifest))
    return workdir


def test_the_same_run_is_the_same(tiny_config, tmp_path):
    one, other = (write(tmp_path / name, tiny_config, [2.0, 1.5]) for name in "ab")
    differences, where = compare(one, other)
    assert differences == []
    assert where.step is None
    assert "all 2 common steps are bit-identical" in where.in_words()


def test_what_differs_is_named_the_likeliest_cause_first(tiny_config, tmp_path):
    one = write(tmp_path / "a", tiny_config, [2.0, 1.5, None])
    tiny_config.logging.every, tiny_config.optimizer.learning_rate, tiny_config.model.num_layers = 3, 0.5, 7
    devices = {"kind": "H100", "count": 1}
    other = write(tmp_path / "b", tiny_config, [2.0, 1.4, 1.0], packages={"jax": "1", "flax": "3"}, devices=devices)
    differences, where = compare(one, other)
    names = [difference.name for difference in differences]
    assert names == ["model.num_layers", "optimizer.learning_rate", "logging.every", "packages: flax", "device"]
    assert (differences[3].ours, differences[3].theirs) == ("2", "3")
    assert (where.step, where.shared) == (2, 3)
    assert "which is more than rounding" in where.in_words()


def test_rounding_is_known_from_another_training(tiny_config, tmp_path):
    one = write(tmp_path / "a", tiny_config, [2.0] * 20)
    other = write(tmp_path / "b", tiny_config, [2.0] * 5 + [2.0 + 1e-6] * 10 + [2.01] * 5)
    where = parting(one, other)
    assert (where.step, where.shared) == (6, 20)
    assert where.early == pytest.approx(5e-7, rel=0.1)
    assert "part at step 6" in where.in_words()
    assert "as rounding does" in where.in_words()


def test_what_is_no_run_is_refused(tiny_config, tmp_path):
    one = write(tmp_path / "a", tiny_config, [2.0])
    with pytest.raises(UserError, match="is not a work directory"):
        compare(one, tmp_path / "b")
    with pytest.raises(UserError, match=r"manifest\.json is not a work directory: it is a file"):
        compare(one / "manifest.json", one)
    (one / "config.json").write_text("[]")
    with pytest.raises(UserError, match="is damaged"):
        compare(one, one)


def test_what_a_damaged_manifest_does_not_say_is_told(tiny_config, tmp_path):
    one, other = (write(tmp_path / name, tiny_config, [2.0]) for name in "ab")
    (other / "manifest.json").write_text("[]")
    (difference,), _ = compare(one, other)
    assert (difference.name, difference.ours, difference.theirs) == (
        "manifest.json",
        "is there",
        "is missing or damaged",
    )
