"""A work directory belongs to one run: what may differ when it continues, and what may not."""

import json

import pytest

from gptjax import config as config_lib
from gptjax.artifacts.workdir import check_data, claim
from gptjax.errors import UserError
from gptjax.files import write_whole

FREE = {
    "model.attention": "xla",
    "model.remat": "full",
    "data.workers": 3,
    "data.source": "text:elsewhere/*.txt",
    "objective.logits_chunk": 64,
    "train.accumulation": 2,
    "train.early_stopping_patience": 7,
    "train.divergence_threshold": 9.0,
    "evaluation.every": "20%",
    "logging.norms_every": 5,
    "mesh.fsdp": 2,
}
DECISIVE = {
    "model.num_layers": 3,
    "model.dropout": 0.1,
    "data.cleaning": "plain",
    "data.split_by": "position",
    "objective.z_loss": 0.1,
    "objective.name": "instruction",
    "optimizer.learning_rate": 0.1,
    "schedule.warmup": 3,
    "train.num_steps": 7,
    "train.batch_size": 64,
    "seed": 1,
    "data_seed": 1,
}


def changed(config: config_lib.Config, path: str, value) -> config_lib.Config:
    config = config.copy_and_resolve_references().unlock()
    section, _, name = path.rpartition(".")
    (config[section] if section else config)[name] = value
    return config


@pytest.fixture
def workdir(tiny_config, tmp_path):
    tiny_config.objective.name, tiny_config.data_seed = "language_modeling", 0
    write_whole(tmp_path / "config.json", config_lib.to_json(tiny_config.copy_and_resolve_references()))
    return tmp_path


@pytest.mark.parametrize(("path", "value"), FREE.items(), ids=FREE)
def test_a_run_continues_with_another(path, value, workdir, tiny_config):
    claim(workdir, changed(tiny_config, path, value))


@pytest.mark.parametrize(("path", "value"), DECISIVE.items(), ids=DECISIVE)
def test_a_run_does_not_continue_with_another(path, value, workdir, tiny_config):
    with pytest.raises(UserError, match=rf"another config.*\n  {path}: .* there, {value!r} now"):
        claim(workdir, changed(tiny_config, path, value))


def test_an_older_run_did_not_say_what_its_objective_was(workdir, tiny_config):
    write_whole(workdir / "config.json", config_lib.to_json(changed(tiny_config, "objective.name", "auto")))
    claim(workdir, tiny_config)
    write_whole(workdir / "config.json", config_lib.to_json(changed(tiny_config, "data_seed", -1)))
    claim(workdir, tiny_config)


def test_the_data_decide_and_not_their_place(tmp_path):
    recorded = {"source_fingerprint": "a", "tokenizer": {"sha256": "b"}, "weights": ["1", "2"]}
    write_whole(tmp_path / "manifest.json", json.dumps({"data": recorded}))
    check_data(tmp_path, {"source": "text:elsewhere", **recorded})
    for key, other in (("source_fingerprint", "c"), ("tokenizer", {}), ("weights", ["1", "3"])):
        with pytest.raises(UserError, match=f"the {key.replace('_', ' ')} of text:x is not the one"):
            check_data(tmp_path, {"source": "text:x", **recorded, key: other})
