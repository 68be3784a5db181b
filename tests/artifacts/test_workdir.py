"""A work directory belongs to one run: what may differ when it continues, and what may not."""

import json

import pytest

from gptjax import config as config_lib
from gptjax.artifacts.workdir import check_data, claim, read_changes
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
ON_REQUEST = {
    "model.dropout": 0.1,
    "model.compute_dtype": "bfloat16",
    "data.token_dropout": 0.1,
    "objective.z_loss": 0.1,
    "optimizer.learning_rate": 0.1,
    "optimizer.weight_decay_multipliers": "embedding/.*=0",
    "schedule.warmup": 3,
    "schedule.name": "constant",
    "train.num_steps": 7,
}
FIXED = {
    "model.num_layers": 3,
    "model.context_length": 8,
    "data.cleaning": "plain",
    "data.split_by": "position",
    "objective.name": "instruction",
    "optimizer.name": "lion",
    "train.batch_size": 64,
    "train.ema_decay": 0.9,
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


@pytest.mark.parametrize(("path", "value"), ON_REQUEST.items(), ids=ON_REQUEST)
def test_a_run_continues_on_request_with_another(path, value, workdir, tiny_config):
    config = changed(tiny_config, path, value)
    with pytest.raises(UserError, match=rf"another config: {path} was .* and is {value!r} now. With --allow_changes"):
        claim(workdir, config, step=5)
    before = dict(config_lib.flat_values(tiny_config))[path]
    assert claim(workdir, config, step=5, allow_changes=True) == {path: [before, value]}


@pytest.mark.parametrize(("path", "value"), FIXED.items(), ids=FIXED)
def test_a_run_with_a_checkpoint_never_continues_with_another(path, value, workdir, tiny_config):
    config = changed(tiny_config, path, value)
    with pytest.raises(UserError, match=rf"another config: {path} was .*use the old values, or start a run from this"):
        claim(workdir, config, step=5, allow_changes=True)
    with pytest.raises(UserError, match=f"{path} was .*With --allow_changes it starts over"):
        claim(workdir, config)
    assert path in claim(workdir, config, allow_changes=True)


def test_a_damaged_config_is_named(workdir, tiny_config):
    for text in ('{"train": ', "[]", "null", '{"train": 3}'):
        (workdir / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"config.json(:| is| holds) "):
            claim(workdir, tiny_config, step=5)


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


def test_models_that_a_run_learns_from_are_those_of_before(tmp_path):
    recorded = {"source_fingerprint": "a", "tokenizer": {"sha256": "b"}}
    now = {"source": "text:x", **recorded, "models": {"objective.reward=model:j": "1"}}
    for before in (None, [], {}, {"objective.reward=model:j": "1"}):  # an older run, a damaged manifest, the same
        write_whole(tmp_path / "manifest.json", json.dumps({"data": recorded | {"models": before}}))
        check_data(tmp_path, now)
    other = {"models": {"objective.reward=model:j": "2"}}
    write_whole(tmp_path / "manifest.json", json.dumps({"data": recorded | other}))
    with pytest.raises(UserError, match=r"objective.reward=model:j now has other parameters .*; put that model back"):
        check_data(tmp_path, now)


def test_without_a_manifest_it_is_said_that_the_data_are_not_checked(tmp_path, capsys):
    for text in (None, "", "[]", '{"data": []}'):
        if text is not None:
            (tmp_path / "manifest.json").write_text(text)
        check_data(tmp_path, {"source": "text:x", "source_fingerprint": "a"})
        assert "cannot check whether the data are the same as before" in capsys.readouterr().err
        assert read_changes(tmp_path) == []
        capsys.readouterr()


def test_the_same_tokens_are_the_same_data_whatever_their_files_are_called(tmp_path):
    recorded = {"source_fingerprint": "a", "splits": "s", "tokens": "t", "tokenizer": {"sha256": "b"}}
    write_whole(tmp_path / "manifest.json", json.dumps({"data": recorded}))
    renamed = {"source": "text:renamed.txt", **recorded, "source_fingerprint": "z"}
    check_data(tmp_path, renamed)
    with pytest.raises(UserError, match="source fingerprint of text:renamed"):
        check_data(tmp_path, renamed | {"tokens": "u"})


def test_the_same_text_that_is_split_otherwise_is_other_data(tmp_path):
    recorded = {"source_fingerprint": "a", "splits": "s", "tokens": "t", "tokenizer": {"sha256": "b"}}
    write_whole(tmp_path / "manifest.json", json.dumps({"data": recorded}))
    with pytest.raises(UserError, match=r"the split into training and held-out data .* of store:x is not the one"):
        check_data(tmp_path, {"source": "store:x", **recorded, "splits": "r", "tokens": "u"})
