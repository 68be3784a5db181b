"""Distillation: the divergence by hand, exact over the full vocabulary, and a run with a teacher."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import config as config_lib
from gptjax.artifacts import checkpoints, loading
from gptjax.errors import UserError
from gptjax.objectives import distillation, teacher
from gptjax.train import train


def log_softmax(x):
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_the_divergence_by_hand():
    random = np.random.default_rng(0)
    p, q = (log_softmax(random.normal(0, 2, (2, 3, 7))) for _ in range(2))
    exact = (np.exp(p) * (p - q)).sum(-1)
    order = np.argsort(-p, axis=-1)
    p, q = (jnp.asarray(np.take_along_axis(x, order, -1), jnp.float32) for x in (p, q))
    np.testing.assert_allclose(teacher.divergence(p, q, whole=True), exact, rtol=1e-4)
    for k in (6, 3, 1):
        found = np.asarray(teacher.divergence(p[..., :k], q[..., :k], whole=False))
        p_rest, q_rest = np.exp(p[..., k:]).sum(-1), np.exp(q[..., k:]).sum(-1)
        expected = (np.exp(p) * (p - q))[..., :k].sum(-1) + p_rest * np.log(p_rest / q_rest)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
        assert (found <= exact + 1e-5).all(), "tokens that count together cannot differ more than each by itself"
        if k == 6:
            np.testing.assert_allclose(found, exact, rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module")
def options(tiny_corpus, tmp_path_factory) -> dict:
    return {"source": f"text:{tiny_corpus}/*.txt", "cache": str(tmp_path_factory.mktemp("cache"))}


def config_of(options, **changes) -> config_lib.Config:
    config = config_lib.get_default()
    config.tokenizer = "byte"
    config.data.update(source=options["source"], cache_dir=options["cache"], split_by="position")
    config.model.update(num_layers=1, num_heads=2, embed_dim=16, context_length=16)
    config.train.update(num_steps=3, batch_size=8)
    config.optimizer.epsilon = 1e-6
    config.evaluation.max_tokens = 200
    config.logging.update(every=1, samples=0, tensorboard=False)
    config.mesh.data = 1
    for path, value in changes.items():
        section, _, name = path.rpartition("__")
        (config[section] if section else config)[name] = value
    return config


def trained(options, workdir: Path, **changes) -> list[dict]:
    train(config_of(options, **changes), workdir)
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["split"] == "train"]


@pytest.fixture(scope="module")
def master(options, tmp_path_factory) -> Path:
    """The work directory of a teacher."""
    workdir = tmp_path_factory.mktemp("teacher")
    trained(options, workdir, model__embed_dim=32, train__num_steps=30, optimizer__learning_rate=1e-2)
    return workdir


def test_a_student_like_its_teacher_does_not_diverge(options, master, tmp_path):
    told = {"objective__name": "distillation", "objective__teacher": str(master), "init_from": str(master)}
    first = trained(options, tmp_path, **told, objective__teacher_top_k=257, train__num_steps=1)[0]
    assert abs(first["teacher_divergence"]) < 1e-5


@pytest.mark.slow
def test_a_student_comes_nearer_to_its_teacher_whatever_the_micro_batches(options, master, tmp_path):
    told = {"objective__name": "distillation", "objective__teacher": str(master), "objective__teacher_top_k": 16}
    told |= {"objective__distillation_temperature": 2.0, "objective__distillation_weight": 0.8}
    told |= {"optimizer__learning_rate": 1e-2, "train__num_steps": 12}
    lines = trained(options, tmp_path / "plain", **told)
    assert lines[-1]["teacher_divergence"] < 0.8 * lines[0]["teacher_divergence"]
    split = trained(options, tmp_path / "split", **told, train__accumulation=2, mesh__data=2, mesh__context=2)
    for ours, theirs in zip(split, lines, strict=True):
        for name in ("loss", "teacher_divergence", "gradient_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name


def test_a_teacher_that_does_not_fit_is_refused(options, master, tmp_path):
    told = {"objective__name": "distillation", "objective__teacher": str(master)}
    for changes, message in (
        ({"objective__teacher": ""}, "needs a teacher"),
        ({"tokenizer": "char"}, "has another tokenizer than"),
        ({"model__context_length": 32}, "has a context of 16 tokens"),
        ({"objective__teacher_top_k": 300}, "the vocabulary has 257 tokens"),
        ({"objective__logits_chunk": 8}, "objective.logits_chunk is 8"),
    ):
        with pytest.raises(UserError, match=message):
            train(config_of(options, **(told | changes)), tmp_path / "refused")


def test_a_teacher_that_is_changed_in_its_place_is_told_apart(options, master, tmp_path):
    place, student = tmp_path / "teacher", tmp_path / "student"
    told = {"objective__name": "distillation", "objective__teacher": str(place), "train__num_steps": 1}
    shutil.copytree(master, place)
    trained(options, student, **told)
    train(config_of(options, **told), student)  # the same teacher
    shutil.rmtree(place)
    before = loading.load(master)
    params = jax.tree.map(lambda leaf: leaf * 1.01, before.params)
    checkpoints.write_parameters(place, params, config=before.config, tokenizer=before.tokenizer)
    with pytest.raises(UserError, match=rf"objective.teacher={place} now has other parameters than those that"):
        train(config_of(options, **told), student)


def test_what_a_batch_must_have_is_known_without_the_teacher(options):
    config = config_of(options, objective__name="distillation", objective__teacher="somewhere")
    objective = distillation.make(config)
    assert objective.sizes == {"candidate": 64}
    assert objective.fields["teacher_tokens"].axes == ("row", "length", "candidate")
