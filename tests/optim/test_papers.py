"""Every algorithm compared with its paper's formulas in NumPy, or with optax's own version, in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptjax import parameters
from gptjax.config import OPTIONS, get_default
from gptjax.model import gpt
from gptjax.model.architecture import Architecture
from gptjax.optim import optimizers
from gptjax.optim.algorithms import adafactor, muon, normuon
from gptjax.optim.hyper import names
from gptjax.parameters import path_string

STEPS = 5
HYPER = {
    "learning_rate": 0.03,
    "muon_learning_rate": 0.05,
    "muon_momentum": 0.95,
    "beta1": 0.8,
    "beta2": 0.9,
    "epsilon": 1e-3,
    "weight_decay": 0.3,
    "clip_norm": np.inf,
}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def tree(seed: int, **model) -> gpt.Params:
    config = get_default()
    config.model.update(num_layers=2, num_heads=2, num_kv_heads=1, embed_dim=8, mlp_dim=20, context_length=16)
    config.model.update(vocab_size=64, **model)
    shapes = gpt.abstract_model(Architecture.from_config(config.model, 0))[1]
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda a: jnp.asarray(random.normal(size=a.shape)), shapes)


def by_path(tree) -> dict[str, np.ndarray]:
    return {path_string(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def trained(name: str, params: gpt.Params, gradients: list[gpt.Params], *, options=(), **hyper):
    """(parameters, state of the optimizer) after these gradients."""
    config = get_default()
    config.optimizer.update(name=name, **dict(options))
    values = dict.fromkeys(names(), 0.0) | HYPER | hyper

    def step(params, state, gradient, values):
        optimizer = optimizers.make_optimizer(config.optimizer, params, values)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizers.make_optimizer(config.optimizer, params, dict.fromkeys(names(), 0.0)).init(params)
    for gradient in gradients:
        params, state = jax.jit(step)(params, state, gradient, values)
    return params, state


def matrices(tree) -> dict[str, np.ndarray]:
    """{path/index: matrix} of all matrices in blocks, one by one."""
    stacks = {path: leaf for path, leaf in by_path(tree).items() if parameters.find(path).matrix}
    flat = {path: leaf.reshape(-1, *leaf.shape[-2:]) for path, leaf in stacks.items()}
    return {f"{path}/{i}": matrix for path, stack in flat.items() for i, matrix in enumerate(stack)}


@pytest.fixture(scope="module", params=["one MLP", "experts"])
def case(request):
    with jax.enable_x64(True):
        model = {"num_experts": 2} if request.param == "experts" else {}
        return tree(0, **model), [tree(seed, **model) for seed in range(1, STEPS + 1)]


# Of one matrix [in, out]: from its values and its gradients to its values after the last.


def adamw_by_hand(w, gradients, *, decayed=True, cautious=False):
    m = v = 0.0
    for t, g in enumerate(gradients, 1):
        m = 0.8 * m + 0.2 * g
        v = 0.9 * v + 0.1 * g**2
        u = (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.9**t)) + 1e-3)
        mask = (u * w >= 0) if cautious else 1.0
        w = w - 0.03 * (u + 0.3 * decayed * mask * w)
    return w


def newton_schulz(x):
    """Jordan et al. 2024."""
    x = x / (np.linalg.norm(x) + 1e-8)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def polar_express(x):
    """Amsel et al. 2025, algorithm 1, with the numbers of the paper."""
    published = [
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    ]
    x = x / (np.linalg.norm(x) * 1.01 + 1e-7)
    for a, b, c in published:
        a, b, c = a / 1.01, b / 1.01**3, c / 1.01**5
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def orthogonal_momentum(gradients, orthogonal=newton_schulz, beta=0.95):
    """Nesterov's momentum with optax's bias correction, made orthogonal at each step."""
    m = 0.0
    for t, g in enumerate(gradients, 1):
        m = beta * m + (1 - beta) * g
        nesterov = beta * m / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t)
        yield orthogonal(nesterov)


def aspect(w):
    return np.sqrt(max(1.0, w.shape[1] / w.shape[0]))


def muon_by_hand(w, gradients, cautious=False, **how):
    for o in orthogonal_momentum(gradients, **how):
        u = aspect(w) * o
        w = w - 0.05 * (u + 0.3 * ((u * w >= 0) if cautious else 1.0) * w)
    return w


def normuon_by_hand(w, gradients):
    """Li et al. 2025, algorithm 1: a neuron is a column of [in, out]; the norm of the update is that of Muon's."""
    v = np.zeros((1, w.shape[1]))
    for o in orthogonal_momentum(gradients):
        v = 0.9 * v + 0.1 * (o**2).mean(0, keepdims=True)
        scaled = o / (np.sqrt(v) + 1e-10)
        w = w - 0.05 * (aspect(w) * scaled * np.linalg.norm(o) / np.linalg.norm(scaled) + 0.3 * w)
    return w


def muonh_by_hand(w, gradients):
    """Wen et al. 2025: W' = r unit(W - rate r unit(u)), with the norm r of the initial matrix."""
    r = np.linalg.norm(w)
    for o in orthogonal_momentum(gradients):
        moved = w - 0.05 * r * o / np.linalg.norm(o)
        w = r * moved / np.linalg.norm(moved)
    return w


def soap_by_hand(w, gradients):
    """Vyas et al. 2024, algorithms 3 and 4, with a refresh after steps 2 and 4; the basis begins as the identity."""

    def turned(a, q):
        return np.linalg.qr((a + 1e-4 * np.trace(a) / len(a) * np.eye(len(a))) @ q).Q

    (rows, columns), m, v = w.shape, 0.0, 0.0
    left, right, ql, qr = np.zeros((rows, rows)), np.zeros((columns, columns)), np.eye(rows), np.eye(columns)
    for t, g in enumerate(gradients, 1):
        m = 0.8 * m + 0.2 * g
        v = 0.9 * v + 0.1 * (ql.T @ g @ qr) ** 2
        n = (ql.T @ m @ qr) / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.9**t)) + 1e-3)
        w = w - 0.03 * (ql @ n @ qr.T + 0.3 * w)
        left, right = 0.9 * left + 0.1 * g @ g.T, 0.9 * right + 0.1 * g.T @ g
        if t % 2 == 0:
            ql, qr = turned(left, ql), turned(right, qr)
    return w


BY_HAND = {
    "muon": (muon_by_hand, {}),
    "muon, polar express": (partial(muon_by_hand, orthogonal=polar_express), {"orthogonalization": "polar_express"}),
    "muon, cautious": (partial(muon_by_hand, cautious=True), {"cautious_weight_decay": True}),
    "normuon": (normuon_by_hand, {}),
    "muonh": (muonh_by_hand, {}),
    "soap": (soap_by_hand, {"soap_refresh": 2}),
}


@pytest.mark.parametrize("named", BY_HAND)
def test_matrices_in_blocks_follow_the_paper_and_the_rest_adamw(named, case):
    params, gradients = case
    by_hand, options = BY_HAND[named]
    found, _ = trained(named.partition(",")[0], params, gradients, options=options)
    steps = [matrices(gradient) for gradient in gradients]
    for path, start in matrices(params).items():
        expected = by_hand(start, [step[path] for step in steps])
        np.testing.assert_allclose(matrices(found)[path], expected, rtol=1e-6, atol=1e-8, err_msg=path)
    for path, start in by_path(params).items():
        row = parameters.find(path)
        if not row.matrix:
            own = [by_path(gradient)[path] for gradient in gradients]
            expected = adamw_by_hand(start, own, decayed=row.decayed, cautious="cautious" in named)
            np.testing.assert_allclose(by_path(found)[path], expected, rtol=1e-6, atol=1e-8, err_msg=path)


def test_cautious_decay_of_adamw_is_the_published_formula(case):
    """Chen et al. 2025: decay only where the update and the parameter have the same sign."""
    params, gradients = case
    found, _ = trained("adamw", params, gradients, options={"cautious_weight_decay": True})
    for path, start in by_path(params).items():
        own = [by_path(gradient)[path] for gradient in gradients]
        expected = adamw_by_hand(start, own, decayed=parameters.find(path).decayed, cautious=True)
        np.testing.assert_allclose(by_path(found)[path], expected, rtol=1e-6, atol=1e-9, err_msg=path)


def test_muon_without_momentum(case):
    """Its update is the orthogonal matrix of the last gradient, whatever came before."""
    params, gradients = case
    found, _ = trained("muon", params, gradients, muon_momentum=0.0, weight_decay=0.0)
    steps = [matrices(gradient) for gradient in gradients]
    for path, start in matrices(params).items():
        expected = start - 0.05 * aspect(start) * sum(newton_schulz(step[path]) for step in steps)
        np.testing.assert_allclose(matrices(found)[path], expected, rtol=1e-6, atol=1e-8, err_msg=path)


def test_polar_express_is_nearer_to_orthogonal_than_newton_schulz():
    """The paper's point: after five steps singular values from 1e-2 of the norm on are near 1."""
    values = np.geomspace(1e-2, 1, 200)

    def last(name: str) -> np.ndarray:
        x = values
        for a, b, c in np.broadcast_to(muon.COEFFICIENTS[name], (5, 3)):
            x = a * x + b * x**3 + c * x**5
        return abs(x - 1).max()

    assert last("polar_express") < 0.15 < 0.25 < last("newton_schulz")


def test_hyperball_holds_the_norm_of_every_matrix(case):
    params, gradients = case
    found, _ = trained("muonh", params, gradients * 10, weight_decay=100.0)
    for path, start in matrices(params).items():
        np.testing.assert_allclose(np.linalg.norm(matrices(found)[path]), np.linalg.norm(start), rtol=1e-12)


@pytest.mark.parametrize("name", ["adamw", "muonh", "schedule_free_adamw"])
def test_a_multiplier_of_zero_holds_a_matrix_still(name):
    """Multipliers scale the rate only: a sphere constraint or an average after it keeps its meaning."""
    params, gradients = tree(0), [tree(1), tree(2)]
    found, _ = trained(name, params, gradients, options={"learning_rate_multipliers": "blocks/attention/.*=0"})
    for path, start in by_path(params).items():
        still = path.startswith("blocks/attention/")
        assert np.allclose(by_path(found)[path], start, rtol=1e-12) == still, path


def optax_of(optimizer: optax.GradientTransformation, start, gradients):
    params, state = jnp.asarray(start), optimizer.init(jnp.asarray(start))
    for gradient in gradients:
        updates, state = optimizer.update(jnp.asarray(gradient), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("beta1", [0.8, 0.0])
def test_sgd_is_that_of_optax(case, beta1):
    params, gradients = case
    found, _ = trained("sgd", params, gradients, beta1=beta1, weight_decay=0.0)
    decayed, _ = trained("sgd", params, gradients, beta1=beta1)
    for path, start in by_path(params).items():
        own = [by_path(gradient)[path] for gradient in gradients]
        expected, _ = optax_of(optax.sgd(0.03, momentum=beta1 or None), start, own)
        np.testing.assert_allclose(by_path(found)[path], expected, rtol=1e-12, err_msg=path)
        weights = optax.chain(
            optax.trace(beta1), optax.add_decayed_weights(0.3 * parameters.find(path).decayed), optax.scale(-0.03)
        )
        np.testing.assert_allclose(by_path(decayed)[path], optax_of(weights, start, own)[0], rtol=1e-12, err_msg=path)


@pytest.mark.parametrize("model", [{}, {"num_experts": 2}])
def test_adafactor_is_that_of_optax_for_each_matrix(model):
    """A layer, or an expert, of a stack is a matrix of its own; its second moment is factored from 128 x 128 on."""
    big = {"embed_dim": 128, "mlp_dim": 130} | model
    params, gradients = tree(0, **big), [tree(seed, **big) for seed in (1, 2, 3)]
    found, state = trained("adafactor", params, gradients)
    kept = sum(leaf.size for leaf in jax.tree.leaves(state))
    assert kept < 0.3 * sum(leaf.size for leaf in jax.tree.leaves(params))
    axes = {path: parameters.find(path) for path in by_path(params)}
    for path, start in by_path(params).items():
        stacked = path.startswith("blocks/")
        depth = stacked + (stacked and start.ndim == 4)
        decay = 0.03 * 0.3 if axes[path].decayed else None
        optimizer = optax.adafactor(0.03, weight_decay_rate=decay)
        for index in np.ndindex(start.shape[:depth]):
            own = [by_path(gradient)[path][index] for gradient in gradients]
            expected, _ = optax_of(optimizer, start[index], own)
            np.testing.assert_allclose(by_path(found)[path][index], expected, rtol=1e-9, atol=1e-12, err_msg=path)
    labels = by_path(adafactor._labels(params))
    assert {str(label) for label in labels.values()} == {"whole", "layers"} | ({"experts"} if model else set())


def test_schedule_free_adamw_is_that_of_its_paper_and_of_optax():
    """With a rising learning rate compared with y and x of the paper; with a constant one, with optax."""
    params, gradients = tree(0), [tree(seed) for seed in range(1, STEPS + 1)]
    rates = [0.01, 0.02, 0.03, 0.03, 0.03]
    config = get_default()
    config.optimizer.name = "schedule_free_adamw"
    values = dict.fromkeys(names(), 0.0) | HYPER
    state = optimizers.make_optimizer(config.optimizer, params, dict.fromkeys(names(), 0.0)).init(params)
    y = params
    for gradient, rate in zip(gradients, rates, strict=True):
        optimizer = optimizers.make_optimizer(config.optimizer, params, values | {"learning_rate": rate})
        updates, state = jax.jit(optimizer.update)(gradient, state, y)
        y = optax.apply_updates(y, updates)
    average = optimizers.average(config.optimizer)
    x = average(values, state, y)
    found, last = trained("schedule_free_adamw", params, gradients)
    averaged = by_path(average(values, last, found))
    for path, start in by_path(params).items():
        own = [by_path(gradient)[path] for gradient in gradients]
        decay = 0.3 * parameters.find(path).decayed
        z = mean = at = start
        v = total = 0.0
        for t, (g, rate) in enumerate(zip(own, rates, strict=True), 1):
            v = 0.9 * v + 0.1 * g**2
            z = z - rate * (g / (np.sqrt(v / (1 - 0.9**t)) + 1e-3) + decay * at)
            total += rate**2
            mean = mean + rate**2 / total * (z - mean)
            at = 0.2 * z + 0.8 * mean
        np.testing.assert_allclose(by_path(y)[path], at, rtol=1e-6, atol=1e-9, err_msg=path)
        np.testing.assert_allclose(by_path(x)[path], mean, rtol=1e-6, atol=1e-9, err_msg=path)
        theirs = optax.contrib.schedule_free_adamw(0.03, b1=0.8, b2=0.9, eps=1e-3, weight_decay=decay)
        expected, own_state = optax_of(theirs, start, own)
        np.testing.assert_allclose(by_path(found)[path], expected, rtol=1e-9, atol=1e-12, err_msg=path)
        expected = optax.contrib.schedule_free_eval_params(own_state, expected)
        np.testing.assert_allclose(averaged[path], expected, rtol=1e-9, atol=1e-12, err_msg=path)


def test_every_algorithm_is_named_here():
    here = {named.partition(",")[0] for named in BY_HAND}
    assert set(OPTIONS["optimizer"]["name"].choices) == here | {
        "adamw", "lion", "sgd", "adafactor", "schedule_free_adamw"  # the first two in test_optimizers.py
    }  # fmt: skip


def test_normuon_of_a_zero_gradient_is_zero():
    zero = {"w": jnp.zeros((2, 3, 4))}
    transform = normuon.scale_by_neuron(0.9)
    updates, _ = transform.update(zero, transform.init(zero))
    np.testing.assert_array_equal(updates["w"], 0)
