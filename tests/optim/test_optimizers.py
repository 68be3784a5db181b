import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptjax import parameters
from gptjax.config import AVERAGING, flat_options, get_default
from gptjax.errors import UserError
from gptjax.model import gpt
from gptjax.model.architecture import Architecture
from gptjax.optim.algorithms import muon
from gptjax.optim.hyper import Hyperparameters
from gptjax.optim.optimizers import make_optimizer
from gptjax.optim.schedules import make_schedule
from gptjax.parameters import path_string

GPT2 = {"norm": "layernorm", "positions": "learned", "activation": "gelu", "use_bias": True, "qk_norm": False}
MODERN = {"activation": "swiglu", "tie_embeddings": False, "num_kv_heads": 1}


def shapes(**model) -> gpt.Params:
    config = get_default()
    config.model.update(num_layers=2, num_heads=2, embed_dim=8, context_length=16, vocab_size=64, **model)
    return gpt.abstract_model(Architecture.from_config(config.model, 0))[1]


def random_tree(tree: gpt.Params, seed: int) -> gpt.Params:
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda a: jnp.asarray(random.normal(size=a.shape), jnp.float32), tree)


def optimizer_of(params: gpt.Params, **options):
    """A constant schedule, so that the learning rate is the peak at every step."""
    config = get_default()
    config.optimizer.update({"clip_norm": 0.0} | options)
    config.schedule.update(name="constant", warmup=0)
    return make_optimizer(config.optimizer, params, Hyperparameters(config).at(0))


def updated(optimizer, params: gpt.Params, gradients: list[gpt.Params]) -> gpt.Params:
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


def by_path(tree) -> dict[str, object]:
    return {path_string(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def decayed_of(params) -> gpt.Params:
    """True for every parameter that weight decay acts on."""
    return parameters.map_rows(lambda row, _: row.decayed, params)


def test_gpt2_decays_matrices_and_tables_and_nothing_else():
    """nanoGPT decays everything with two axes; here stacked biases and scales also have two, and must not decay."""
    mask = by_path(decayed_of(shapes(**GPT2)))
    assert sorted(name for name, decayed in mask.items() if decayed) == [
        "blocks/attention/key/kernel",
        "blocks/attention/out/kernel",
        "blocks/attention/query/kernel",
        "blocks/attention/value/kernel",
        "blocks/mlp/down/kernel",
        "blocks/mlp/up/kernel",
        "embedding/embedding",
        "position_embedding/embedding",
    ]
    assert all(name.endswith(("bias", "scale")) for name, decayed in mask.items() if not decayed)


def test_a_modern_model_decays_its_gate_and_head_but_no_norm():
    mask = by_path(decayed_of(shapes(**MODERN)))
    assert mask["blocks/mlp/gate/kernel"] and mask["head/kernel"]
    assert sorted(name for name, decayed in mask.items() if not decayed) == [
        "blocks/attention/key_norm/scale",
        "blocks/attention/query_norm/scale",
        "blocks/attention_norm/scale",
        "blocks/mlp_norm/scale",
        "final_norm/scale",
    ]


@pytest.mark.parametrize("model", [GPT2, MODERN])
def test_muon_gets_the_matrices_in_blocks_only(model):
    labels = by_path(muon.labels(shapes(**model)))
    for name, label in labels.items():
        matrix_in_block = name.startswith("blocks/") and name.endswith("/kernel")
        assert label == ("muon" if matrix_in_block else "adamw"), name
    assert labels["embedding/embedding"] == labels["blocks/attention_norm/scale"] == "adamw"


def adamw_by_hand(param, gradients, *, rate, b1, b2, epsilon, decay) -> np.ndarray:
    """Loshchilov and Hutter 2019, algorithm 2, in float64."""
    param, first, second = np.float64(param), 0.0, 0.0
    for step, gradient in enumerate(map(np.float64, gradients), 1):
        first = b1 * first + (1 - b1) * gradient
        second = b2 * second + (1 - b2) * gradient**2
        direction = (first / (1 - b1**step)) / (np.sqrt(second / (1 - b2**step)) + epsilon)
        param = param - rate * (direction + decay * param)
    return param


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_adamw_is_the_published_formula(name):
    """For every parameter, and with Muon for those that it leaves to AdamW."""
    params = random_tree(shapes(**GPT2), 0)
    gradients = [random_tree(params, seed) for seed in (1, 2, 3)]
    settings = {"learning_rate": 0.01, "beta1": 0.8, "beta2": 0.9, "epsilon": 1e-3, "weight_decay": 0.3}
    found = by_path(updated(optimizer_of(params, name=name, **settings), params, gradients))
    decayed, labels = by_path(decayed_of(params)), by_path(muon.labels(params))
    for path, param in by_path(params).items():
        if name == "muon" and labels[path] == "muon":
            continue
        expected = adamw_by_hand(
            param,
            [by_path(gradient)[path] for gradient in gradients],
            rate=0.01,
            b1=0.8,
            b2=0.9,
            epsilon=1e-3,
            decay=0.3 if decayed[path] else 0.0,
        )
        np.testing.assert_allclose(found[path], expected, rtol=1e-5, atol=1e-6, err_msg=path)


@pytest.mark.parametrize(("norm", "expected"), [(40.0, 0.5), (0.1, 0.1)])
def test_gradients_are_clipped_by_their_global_norm(norm, expected):
    """With a large epsilon AdamW's first update, -rate * gradient / epsilon, shows the clipped gradient."""
    params = random_tree(shapes(), 0)
    optimizer = optimizer_of(params, clip_norm=0.5, epsilon=1e4, learning_rate=1e4, weight_decay=0.0)
    unit = random_tree(params, 1)
    length = np.sqrt(sum((np.float64(g) ** 2).sum() for g in jax.tree.leaves(unit)))
    unit = jax.tree.map(lambda g: g / length, unit)
    gradient = jax.tree.map(lambda g: g * norm, unit)
    updates, _ = jax.jit(optimizer.update)(gradient, optimizer.init(params), params)
    for update, direction in zip(jax.tree.leaves(updates), jax.tree.leaves(unit), strict=True):
        np.testing.assert_allclose(update, -expected * direction, rtol=1e-3, atol=1e-7)


def test_the_rate_of_a_step_is_the_schedules():
    config = get_default()
    config.optimizer.update(learning_rate=0.5, weight_decay=0.0, clip_norm=0.0, epsilon=0.0)
    config.schedule.update(name="linear", warmup=2)
    config.train.num_steps = 4
    params = {"final_norm": {"scale": jnp.ones(3)}}
    gradient = jax.tree.map(jnp.ones_like, params)  # AdamW's direction is then 1 at every step
    hyper, schedule = Hyperparameters(config), make_schedule(config.schedule, peak=0.5, num_steps=4)
    state = make_optimizer(config.optimizer, params, hyper.at(0)).init(params)
    for step in range(4):
        optimizer = make_optimizer(config.optimizer, params, hyper.at(step))
        updates, state = optimizer.update(gradient, state, params)
        np.testing.assert_allclose(updates["final_norm"]["scale"], -float(schedule(step)), rtol=1e-5)


@pytest.mark.parametrize(
    ("option", "value"),
    [("learning_rate", 1e39), ("weight_decay", float("nan")), ("muon_learning_rate", float("inf"))],
)
def test_what_is_not_finite_in_float32_is_named(option, value):
    config = get_default()
    config.optimizer[option] = value
    with pytest.raises(UserError, match=rf"optimizer\.{option} is .*not a finite number in float32"):
        Hyperparameters(config)


def test_multipliers_scale_rate_and_decay_by_path():
    params = random_tree(shapes(), 0)
    gradients = [random_tree(params, 1)]
    plain = by_path(updated(optimizer_of(params, weight_decay=0.0), params, gradients))
    factors = {"learning_rate_multipliers": "embedding/.*=0.5 blocks/mlp/.*=0", "weight_decay": 0.0}
    scaled = by_path(updated(optimizer_of(params, **factors), params, gradients))
    before = by_path(params)
    moved = {path: np.float64(plain[path]) - np.float64(before[path]) for path in before}
    for path, factor in {"embedding/embedding": 0.5, "blocks/mlp/up/kernel": 0, "final_norm/scale": 1}.items():
        np.testing.assert_allclose(scaled[path] - before[path], factor * moved[path], atol=1e-6)
    zeros = [jax.tree.map(jnp.zeros_like, params)]
    decay = {"weight_decay": 0.5, "learning_rate": 0.1, "weight_decay_multipliers": "embedding/.*=0 blocks/.*=2"}
    decayed = by_path(updated(optimizer_of(params, **decay), params, zeros))
    for path, factor in {"embedding/embedding": 1, "blocks/mlp/up/kernel": 0.9, "final_norm/scale": 1}.items():
        np.testing.assert_allclose(decayed[path], factor * before[path], rtol=1e-6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing=2", "'nothing' matches no parameter; these are: blocks/"),
        ("embedding", "'embedding' is not PATTERN=FACTOR"),
        ("(=2", r"'\(=2' is not PATTERN=FACTOR"),
        (".*=nan", "is not PATTERN=FACTOR"),
    ],
)
def test_multipliers_that_say_nothing_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        optimizer_of(shapes(), weight_decay_multipliers=text)


def test_lion_is_the_published_formula():
    """Chen et al. 2023, algorithm 2."""
    params = random_tree(shapes(), 0)
    gradients = [random_tree(params, seed) for seed in (1, 2)]
    settings = {"name": "lion", "learning_rate": 0.01, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.3}
    found = by_path(updated(optimizer_of(params, **settings), params, gradients))
    for path, start in by_path(params).items():
        param, momentum = np.float64(start), 0.0
        decay = 0.3 if parameters.find(path).decayed else 0.0
        for gradient in gradients:
            gradient = np.float64(by_path(gradient)[path])
            param = param - 0.01 * (np.sign(0.9 * momentum + 0.1 * gradient) + decay * param)
            momentum = 0.99 * momentum + 0.01 * gradient
        np.testing.assert_allclose(found[path], param, rtol=1e-5, atol=1e-6, err_msg=path)


ASPECT = {  # sqrt(max(1, out / in)) of [in, out]
    "attention/query": 1.0,
    "attention/key": 1.0,  # 8 -> 4
    "mlp/up": 8**0.5,  # 8 -> 64
    "mlp/down": 1.0,  # 64 -> 8
}


def muon_update(params, gradients) -> dict[str, np.ndarray]:
    optimizer = optimizer_of(params, name="muon", muon_learning_rate=1.0, weight_decay=0.0)
    after = updated(optimizer, params, gradients)
    return {name: np.float64(after_) - np.float64(by_path(params)[name]) for name, after_ in by_path(after).items()}


@pytest.fixture(scope="module")
def muon_case():
    params = random_tree(shapes(num_kv_heads=1, mlp_dim=64), 0)
    gradients = [random_tree(params, 1)]
    return params, gradients, muon_update(params, gradients)


@pytest.mark.parametrize("name", ASPECT)
def test_muon_makes_each_layer_orthogonal(muon_case, name):
    """Newton-Schulz with Jordan's coefficients gives singular values of 0.7 to 1.2, times the aspect."""
    params, _, update = muon_case
    stacked = update[f"blocks/{name}/kernel"]
    assert stacked.shape == by_path(params)[f"blocks/{name}/kernel"].shape
    for layer in stacked:
        values = np.linalg.svd(layer, compute_uv=False) / ASPECT[name]
        assert (values > 0.5).all() and (values < 1.3).all(), values


def newton_schulz_by_hand(matrix: np.ndarray) -> np.ndarray:
    """Five quintic steps (Jordan et al. 2024) in float64."""
    x = np.float64(matrix) / np.linalg.norm(matrix)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


@pytest.mark.parametrize("name", ASPECT)
def test_muon_treats_a_layer_of_a_stack_like_a_matrix_of_its_own(muon_case, name):
    _, gradients, update = muon_case
    path = f"blocks/{name}/kernel"
    for found, gradient in zip(update[path], by_path(gradients[0])[path], strict=True):
        np.testing.assert_allclose(found, -ASPECT[name] * newton_schulz_by_hand(gradient), rtol=1e-3, atol=1e-4)


def test_muon_follows_the_singular_vectors_of_the_gradient(muon_case):
    """The first update is close to -U V^T of the gradient's U S V^T, without transposed or mixed-up stacks."""
    _, gradients, update = muon_case
    for layer in range(2):
        u, _, vt = np.linalg.svd(np.float64(by_path(gradients[0])["blocks/attention/query/kernel"][layer]))
        overlap = np.diag(u.T @ -update["blocks/attention/query/kernel"][layer] @ vt.T)
        assert (overlap > 0.5).all()


def test_muon_decays_its_matrices_by_the_rate_of_muon():
    params = random_tree(shapes(), 0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    optimizer = optimizer_of(params, name="muon", muon_learning_rate=0.1, learning_rate=0.01, weight_decay=0.5)
    after = by_path(updated(optimizer, params, [zeros]))
    before = by_path(params)
    np.testing.assert_allclose(after["blocks/mlp/up/kernel"], before["blocks/mlp/up/kernel"] * 0.95, rtol=1e-5)
    np.testing.assert_allclose(after["embedding/embedding"], before["embedding/embedding"] * 0.995, rtol=1e-5)
    np.testing.assert_array_equal(after["blocks/mlp_norm/scale"], before["blocks/mlp_norm/scale"])


def test_optimizers_that_average_are_those_of_the_table():
    """`config.options` must list them without importing them."""
    names = flat_options()["optimizer.name"].choices
    modules = {name: importlib.import_module(f"gptjax.optim.algorithms.{name}") for name in names}
    assert {name for name, module in modules.items() if hasattr(module, "average")} == {*AVERAGING}
