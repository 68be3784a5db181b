"""The maximal update parametrisation: initial values, rates, logits; and the coordinate check."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import ablate
from gptjax import config as config_lib
from gptjax.errors import UserError
from gptjax.model import gpt
from gptjax.model.architecture import Architecture
from gptjax.optim.optimizers import make_optimizer
from gptjax.parameters import find, path_string
from gptjax.studies import coordinates

VALUES = {
    "learning_rate": 0.01,
    "muon_learning_rate": 0.02,
    "muon_momentum": 0.95,
    "beta1": 0.9,
    "beta2": 0.95,
    "epsilon": 1e-8,
}
VALUES |= {"weight_decay": 0.5, "clip_norm": np.float32(np.inf)}


def architecture(**options) -> Architecture:
    config = config_lib.get_default()
    config.model.update(num_layers=2, num_heads=4, embed_dim=64, context_length=8, vocab_size=50, **options)
    return Architecture.from_config(config.model, 50)


def leaves(tree):
    return {path_string(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_initial_matrices_shrink_by_the_root_of_the_width():
    plain, wide = architecture(), architecture(mup_base_width=16)
    key = jax.random.key(0)
    ours, theirs = leaves(gpt.initialise(wide, key)), leaves(gpt.initialise(plain, key))
    for path, leaf in theirs.items():
        np.testing.assert_allclose(ours[path], leaf * (0.5 if find(path).matrix else 1.0), rtol=1e-6, err_msg=path)


def test_logits_shrink_by_the_width():
    plain, wide = architecture(), architecture(mup_base_width=16)
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 64)), jnp.float32)
    params = gpt.initialise(plain, jax.random.key(0))
    ours, theirs = (gpt.bind(a, params).logits(hidden)[..., :50] for a in (wide, plain))
    np.testing.assert_allclose(ours, theirs / 4, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("adamw", 0.25),
        ("lion", 0.25),
        ("muon", 1.0),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("soap", 0.25), ("normuon", 1.0))),
    ],
)
def test_updates_of_matrices(name, factor):
    """Adam's rate falls with the width, Muon's does not; the decay is the same."""
    params = gpt.initialise(architecture(), jax.random.key(0))
    grads = jax.tree.map(lambda p: jnp.cos(jnp.arange(p.size, dtype=jnp.float32)).reshape(p.shape), params)
    options = config_lib.get_default().optimizer
    options.name = name
    found = []
    for widening in (1.0, 4.0):
        each = []
        for decay in (0.5, 0.0):
            values = VALUES | {"weight_decay": decay}
            optimizer = make_optimizer(options, params, values, widening=widening)
            updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
            each.append(leaves(updates))
        found.append(each)
    (plain, plain_bare), (wide, wide_bare) = found
    for path in plain:
        expected = factor if find(path).matrix else 1.0
        np.testing.assert_allclose(wide_bare[path], expected * plain_bare[path], rtol=1e-5, atol=1e-9, err_msg=path)
        decay, other = wide[path] - wide_bare[path], plain[path] - plain_bare[path]
        np.testing.assert_allclose(decay, other, rtol=1e-3, atol=1e-7, err_msg=path)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("optimizer.name", "sgd"),
        ("optimizer.name", "adafactor"),
        ("model.num_experts", 2),
        ("model.lora_rank", 2),
        ("model.attention_gate", True),
    ],
)
def test_what_muP_does_not_scale_is_refused(option, value):
    config = config_lib.get_default()
    config.model.mup_base_width = 64
    section, _, name = option.partition(".")
    config[section][name] = value
    with pytest.raises(UserError, match=f"mup_base_width is set with {option}"):
        config_lib.validate(config)


def test_exponents_and_what_is_flat():
    check = coordinates.Check((32, 64, 128), 10, {"block 1": (1.0, 1.0, 1.0), "logits": (1.0, 2.0, 4.0)})
    assert check.exponents() == pytest.approx({"block 1": 0.0, "logits": 1.0}, abs=1e-9)
    assert not check.flat
    assert "not flat: logits scales with width^1.00" in check.text()
    assert dataclasses.replace(check, movements={"logits": (1.0, 1.05, 1.1)}).flat


@pytest.mark.parametrize("widths", ["1", "1,1", "0,2", "1,x", "1,-2", "1,9999"])
def test_widths_that_are_none(widths, tmp_path, capsys):
    argv = ["ablate", "--coordinates", "--config=configs/quickstart.py", f"--workdir={tmp_path}", f"--widths={widths}"]
    with pytest.raises(UserError, match="--widths="):
        ablate.main(argv)


@pytest.mark.slow
def test_movements_are_flat_with_muP_and_not_without(tmp_path):
    from gptjax.studies.bases import small

    config = small()
    config.model.update(embed_dim=32, num_heads=2)
    config.optimizer.update(learning_rate=1e-2, weight_decay=0.0)
    config.schedule.update(name="constant", warmup=0)
    config.mesh.data = 1
    found = {}
    for base in (0, 32):
        config.model.mup_base_width = base
        found[base] = coordinates.check(config, (1, 2, 4), steps=10, seeds=1, show=lambda line: None)
    assert found[32].flat
    assert not found[0].flat
    assert {path.name for path in coordinates.write(found[32], tmp_path)} >= {"coordinates.csv"}
