import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gptjax.config import MESH_AXES, get_default, validate
from gptjax.errors import UserError
from gptjax.model import sharding
from gptjax.model.activations import ACTIVATIONS
from gptjax.model.architecture import Architecture
from gptjax.model.experts import Experts, balance_loss

BATCH, LENGTH, EMBED, EXPERTS = 4, 8, 16, 4


def layer(**options) -> Experts:
    config = get_default()
    config.model.update(num_heads=2, embed_dim=EMBED, mlp_dim=24, num_experts=EXPERTS, init_std=0.5, **options)
    return Experts(Architecture.from_config(config.model, 97), rngs=nnx.Rngs(0))


def inputs() -> jax.Array:
    return jax.random.normal(jax.random.key(1), (BATCH, LENGTH, EMBED))


def mesh_of(axes: dict[str, int]) -> jax.sharding.Mesh:
    sizes = tuple(axes.get(axis, 1) for axis in MESH_AXES)
    return jax.make_mesh(sizes, MESH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(MESH_AXES))


def by_hand(experts: Experts, x: np.ndarray, chosen: int) -> np.ndarray:
    """Token by token, in float64."""
    a, out = experts.architecture, np.zeros_like(x)
    kernel = lambda name: np.float64(getattr(experts, name).kernel[...])  # noqa: E731
    for row, place in np.ndindex(x.shape[:2]):
        token = x[row, place]
        scores = token @ kernel("router")
        top = np.argsort(-scores)[:chosen]
        gates = np.exp(scores[top] - scores[top].max())
        for expert, gate in zip(top, gates / gates.sum(), strict=True):
            hidden = token @ kernel("expert_up")[expert]
            activation = lambda y: np.float64(ACTIVATIONS[a.activation](jnp.float32(y)))  # noqa: E731
            if a.activation == "swiglu":
                hidden = activation(token @ kernel("expert_gate")[expert]) * hidden
            else:
                hidden = activation(hidden)
            out[row, place] += gate * (hidden @ kernel("expert_down")[expert])
    return out


@pytest.mark.parametrize("activation", ["swiglu", "squared_relu"])
@pytest.mark.parametrize("chosen", [1, 2, EXPERTS])
def test_every_token_gets_its_experts(activation, chosen):
    experts, x = layer(activation=activation, experts_per_token=chosen), inputs()
    found, _ = experts(x)
    np.testing.assert_allclose(found, by_hand(experts, np.float64(x), chosen), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("axes", [{}, {"expert": 4}, {"expert": 2, "tensor": 2}], ids=str)
def test_no_token_is_dropped_when_all_want_the_same_expert(axes):
    experts = layer(experts_per_token=1)
    experts.router.kernel[...] = jnp.zeros((EMBED, EXPERTS)).at[:, 2].set(1.0)
    x = abs(inputs())  # all scores of expert 2 are the highest
    graphdef, params = nnx.split(experts)
    with jax.set_mesh(mesh_of(axes)):
        found, balance = jax.jit(lambda params, x: nnx.merge(graphdef, params)(x))(params, x)
    np.testing.assert_allclose(found, by_hand(experts, np.float64(x), 1), rtol=1e-4, atol=1e-4)
    assert (balance > 3.5).all()  # EXPERTS would be all the load, with certainty, on one


def test_balance_loss_of_an_even_load_is_one():
    scores = jnp.zeros((2, EXPERTS, EXPERTS))
    chosen = jnp.broadcast_to(jnp.arange(EXPERTS)[:, None], (2, EXPERTS, 1))
    np.testing.assert_allclose(balance_loss(scores, chosen), 1, rtol=1e-6)


def test_balance_loss_by_hand():
    scores = np.random.default_rng(0).normal(size=(1, 5, 3))
    chosen = np.array([[[0], [0], [2], [1], [0]]])
    probabilities = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    expected = 3 * (np.array([3, 1, 1]) / 5 * probabilities.mean(1)[0]).sum()
    np.testing.assert_allclose(balance_loss(jnp.float32(scores), jnp.asarray(chosen)), expected, rtol=1e-5)


MESHES = [
    {"data": 2, "tensor": 2},
    {"fsdp": 2, "context": 2},
    {"tensor": 4},
    {"expert": 4},
    {"fsdp": 2, "expert": 2, "tensor": 2},
    {"data": 2, "expert": 2, "context": 2},
    {"data": 2, "expert": 4},  # does not divide the rows: experts are split, tokens are not
    {"expert": 4, "tensor": 2},  # does not divide the experts
]


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_experts_split_over_a_mesh_give_the_same(axes):
    experts, x = layer(activation="swiglu"), inputs()
    graphdef, params = nnx.split(experts)

    def run(params, x):
        out, balance = nnx.merge(graphdef, params)(x)
        return (out**2).sum() + balance.sum(), out

    expected = jax.jit(jax.grad(run, has_aux=True))(params, x)
    mesh = mesh_of(axes)
    with jax.set_mesh(mesh):
        x = jax.device_put(x, jax.NamedSharding(mesh, sharding.fitting(x.shape, sharding.INSIDE)))
        params = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
        found = jax.jit(jax.grad(run, has_aux=True))(params, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected)


def test_more_choices_than_experts_are_refused():
    config = get_default()
    config.model.update(num_experts=4, experts_per_token=5)
    with pytest.raises(UserError, match="experts_per_token 5"):
        validate(config)
