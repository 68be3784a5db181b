"""Low-rank adapters by hand: where they are, what they compute, and which parameters training leaves unchanged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gptjax import config as config_lib
from gptjax.artifacts.manifest import parameter_table
from gptjax.errors import UserError
from gptjax.model import gpt, lora
from gptjax.model.architecture import Architecture
from gptjax.parallel.mesh import make_mesh
from gptjax.parameters import path_string
from gptjax.training.program import Program

EVERYWHERE = ".*"


@pytest.fixture
def adapted_config(tiny_config):
    tiny_config.model.update(lora_rank=3, lora_alpha=6.0, lora_targets="attention/(query|out)|mlp/down")
    tiny_config.model.update(activation="swiglu", num_kv_heads=1)
    tiny_config.model.update(value_embeddings=1, residual_scalars=True, attention_gate=True)
    tiny_config.data.isolate_documents = False
    return tiny_config


def with_random_adapters(architecture):
    """Parameters whose adapters are not zero."""
    params = gpt.initialise(architecture, jax.random.key(0))

    def noise(path, leaf):
        if path[-1].key != "lora_b":
            return leaf
        return 0.1 * jax.random.normal(jax.random.key(leaf.shape[-1]), leaf.shape)

    return jax.tree_util.tree_map_with_path(noise, params)


def logits(architecture, params, **options):
    tokens = jax.random.randint(jax.random.key(1), (3, 16), 0, 97)
    positions = jnp.tile(jnp.arange(16), (3, 1))
    hidden = gpt.bind(architecture, params).hidden(tokens, positions=positions, **options)[0]
    return gpt.bind(architecture, params).logits(hidden)[..., :97]


def paths(params):
    return {path_string(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}


def test_adapters_are_where_the_pattern_says(adapted_config):
    _, params = gpt.abstract_model(Architecture.from_config(adapted_config.model, 0))
    trained, frozen = lora.split(params)
    layers = ("attention/query", "attention/out", "mlp/down")
    assert paths(trained) == {f"blocks/{path}/lora_{part}" for path in layers for part in "ab"}
    assert trained["blocks"]["mlp"]["down"]["lora_a"].shape == (2, 64, 3)
    assert trained["blocks"]["mlp"]["down"]["lora_b"].shape == (2, 3, 16)
    assert paths(lora.join(trained, frozen)) == paths(params)
    adapted_config.model.lora_rank = 0
    _, plain = gpt.abstract_model(Architecture.from_config(adapted_config.model, 0))
    assert paths(plain) == paths(frozen) and lora.split(plain) == (plain, {})


def test_training_starts_at_the_model_itself(adapted_config):
    architecture = Architecture.from_config(adapted_config.model, 0)
    params = gpt.initialise(architecture, jax.random.key(0))
    merged, plain = lora.merge(params, architecture)
    np.testing.assert_array_equal(logits(architecture, params), logits(plain, merged))


def test_an_adapter_is_a_low_rank_update(adapted_config):
    architecture = Architecture.from_config(adapted_config.model, 0)
    params = with_random_adapters(architecture)
    merged, plain = lora.merge(params, architecture)
    assert plain.lora_rank == 0 and not any("lora" in path for path in paths(merged))
    node, after = (tree["blocks"]["attention"]["query"] for tree in (params, merged))
    update = np.asarray(after["kernel"], np.float64) - np.asarray(node["kernel"], np.float64)
    expected = 2.0 * np.asarray(node["lora_a"], np.float64) @ np.asarray(node["lora_b"], np.float64)
    np.testing.assert_allclose(update, expected, atol=1e-6)
    assert np.linalg.matrix_rank(expected[0]) == 3
    ours = logits(architecture, params)
    np.testing.assert_allclose(ours, logits(plain, merged), atol=1e-5)
    assert np.abs(ours - logits(architecture, gpt.initialise(architecture, jax.random.key(0)))).max() > 1e-2


def test_dropout_acts_on_adapters_alone_and_depends_on_the_row_only(adapted_config):
    adapted_config.model.lora_dropout = 0.5
    architecture = Architecture.from_config(adapted_config.model, 0)
    keys = jax.random.split(jax.random.key(2), 3)
    fresh = gpt.initialise(architecture, jax.random.key(0))
    np.testing.assert_array_equal(logits(architecture, fresh, dropout_keys=keys), logits(architecture, fresh))
    params = with_random_adapters(architecture)
    dropped = logits(architecture, params, dropout_keys=keys)
    assert np.abs(dropped - logits(architecture, params)).max() > 1e-3
    other = logits(architecture, params, dropout_keys=keys[jnp.array([0, 2, 1])])
    np.testing.assert_array_equal(dropped[0], other[0])
    assert np.abs(dropped[1:] - other[1:]).max() > 1e-3


def test_dropout_keeps_the_mean(adapted_config):
    adapted_config.model.lora_dropout = 0.25
    architecture = Architecture.from_config(adapted_config.model, 0)
    layer = lora.Linear(architecture, "attention/query", 16, 8, nnx.Rngs(0))
    layer.lora_b[...] = jax.random.normal(jax.random.key(1), (3, 8))
    x = jnp.tile(jax.random.normal(jax.random.key(2), (1, 1, 16)), (4000, 1, 1))
    drop = lora.Dropout(jax.random.split(jax.random.key(3), 4000), jnp.int32(1))
    plain, dropped = layer(x)[0, 0], layer(x, drop)[:, 0]
    error = dropped.std(0) / 4000**0.5
    assert (np.abs(dropped.mean(0) - plain) < 4 * error).all() and (error > 0).all()


@pytest.mark.parametrize(
    ("optimizer", "ema", "accumulation"), [pytest.param("adamw", 0.9, 2, marks=pytest.mark.slow), ("muon", 0.0, 1)]
)
def test_training_changes_adapters_and_nothing_else(adapted_config, optimizer, ema, accumulation):
    config = adapted_config
    config.model.update(lora_targets=EVERYWHERE, lora_dropout=0.1, dropout=0.1)
    config.optimizer.update(name=optimizer, weight_decay=0.5)
    config.train.update(ema_decay=ema, accumulation=accumulation)
    program = Program.of(config, make_mesh(config.mesh, jax.devices()[:2]))
    moments = [leaf for leaf in jax.tree.leaves(program.target.opt_state) if leaf.ndim > 1]
    trained = gpt.parameter_count(lora.split(program.abstract_params)[0])
    assert sum(leaf.size for leaf in moments) == 2 * trained
    state = program.initial_state()
    before = jax.tree.map(np.asarray, state.params)
    losses = []
    batch = {
        "tokens": np.tile(np.arange(16, dtype=np.int32), (8, 1)),
        "targets": np.tile(np.arange(1, 17, dtype=np.int32), (8, 1)),
        "positions": np.tile(np.arange(16, dtype=np.int32), (8, 1)),
        "weights": np.ones((8, 16), np.float32),
    }
    for i in range(8):
        state, metrics = program.step(state, program.to_device(batch), program.hyper(i))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    for tree in filter(None, (state.params, state.ema_params)):
        for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(tree), strict=True):
            same = np.array_equal(old, new)
            assert same != path[-1].key.startswith("lora_"), path_string(path)


@pytest.mark.slow
def test_losses_do_not_depend_on_the_mesh(adapted_config):
    config = adapted_config
    config.model.update(lora_targets=EVERYWHERE, lora_dropout=0.2, num_kv_heads=2)
    config.optimizer.learning_rate = 0.05
    batch = {name: np.tile(np.arange(16, dtype=np.int32), (8, 1)) for name in ("tokens", "positions", "targets")}
    batch["weights"] = np.ones((8, 16), np.float32)
    traces = []
    for devices, sizes in ((1, {}), (8, {"fsdp": 2, "tensor": 2})):
        config.mesh.update(data=-1, **sizes)
        program = Program.of(config, make_mesh(config.mesh, jax.devices()[:devices]))
        state = program.initial_state()
        losses = []
        for i in range(4):
            state, metrics = program.step(state, program.to_device(batch), program.hyper(i))
            losses.append(float(metrics["loss"]))
        traces.append(losses)
    np.testing.assert_allclose(*traces, rtol=1e-5)
    assert abs(traces[0][0] - traces[0][-1]) > 1e-3


def test_the_manifest_says_what_is_frozen(adapted_config):
    _, params = gpt.abstract_model(Architecture.from_config(adapted_config.model, 0))
    rows = {row["path"]: row for row in parameter_table(adapted_config, make_mesh(adapted_config.mesh), params)}
    assert rows["blocks/attention/query/kernel"]["optimizer"] == "none"
    assert not rows["blocks/attention/query/kernel"]["decay"]
    assert rows["blocks/attention/query/lora_a"]["optimizer"] == "adamw"
    assert rows["blocks/attention/query/lora_b"]["init"] == "zeros"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_targets": "attention/("}, "is not a regular expression"),
        ({"lora_targets": "q_proj"}, "'q_proj' matches none of attention/query, "),
        ({"lora_targets": "mlp/gate", "activation": "gelu"}, "matches none of"),
        ({"lora_targets": "mlp/.*", "num_experts": 2}, "matches none of"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused(options, message):
    config = config_lib.get_default()
    config.model.update(lora_rank=4, **options)
    with pytest.raises(UserError, match=r"model\.lora_targets") as caught:
        config_lib.validate(config)
    assert message in str(caught.value)
    config.model.lora_rank = 0
    config_lib.validate(config)
