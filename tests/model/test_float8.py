import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import get_default
from gptjax.model import float8, gpt
from gptjax.model.architecture import Architecture
from gptjax.objectives import language_modeling
from gptjax.objectives.objective import Models


def random(*shape: int, scale: float = 1.0, seed: int = 0) -> np.ndarray:
    return scale * np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize(("dtype", "largest", "mantissa"), [(float8.FORWARD, 448, 3), (float8.GRADIENT, 57344, 2)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_values_are_rounded_to_the_mantissa_at_any_scale(dtype, largest, mantissa, scale):
    x = random(1000, scale=scale)
    values, factor = float8.quantise(jnp.float32(x), dtype)
    assert abs(np.float32(values)).max() == largest
    normal = abs(x) > abs(x).max() / 2**6  # e4m3 keeps its precision over 2^-6 and above
    error = abs(np.float64(values) * np.float64(factor) - x)[normal] / abs(x)[normal]
    assert error.max() <= 2.0 ** -(mantissa + 1) * 1.001


def test_products_and_gradients_are_close_to_exact_ones():
    x, kernel, cotangent = (
        jnp.float32(random(4, 16, 64)),
        jnp.float32(random(64, 32, seed=1)),
        random(4, 16, 32, seed=2),
    )
    out, pull = jax.vjp(float8.matmul, x, kernel)
    exact, exact_pull = jax.vjp(jnp.matmul, x, kernel)
    pairs = zip((out, *pull(jnp.float32(cotangent))), (exact, *exact_pull(jnp.float32(cotangent))), strict=True)
    # Rounding errors are at most uniform within 2^-4 (e4m3) and 2^-3 (e5m2), and independent: /sqrt(3), in squares.
    bounds = [(2**-8 + 2**-8) / 3, *[(2**-8 + 2**-6) / 3] * 2]
    for (found, expected), bound in zip(pairs, bounds, strict=True):
        assert 1e-5 < jnp.square(found - expected).sum() / jnp.square(expected).sum() < bound


def test_zeros_stay_zeros():
    out, pull = jax.vjp(float8.matmul, jnp.zeros((2, 4)), jnp.zeros((4, 3)))
    assert not out.any() and not any(g.any() for g in pull(jnp.ones((2, 3))))


def test_a_model_learns_almost_as_with_exact_products():
    losses, objective = {}, language_modeling.make(get_default())
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 97, (4, 17)), jnp.int32)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": jnp.ones((4, 16)),
        "positions": jnp.broadcast_to(jnp.arange(16), (4, 16)),
    }
    for matmul in ("compute_dtype", "float8"):
        config = get_default()
        config.model.update(num_layers=2, num_heads=2, embed_dim=32, context_length=16, matmul=matmul)
        architecture = Architecture.from_config(config.model, 97)
        params = jax.jit(gpt.initialise, static_argnums=0)(architecture, jax.random.key(0))

        @jax.jit
        def step(params, architecture=architecture):
            def loss(params):
                model = gpt.bind(architecture, params)
                hyper = {"z_loss": jnp.float32(0)}
                return objective.loss(Models(model), batch, total_weight=jnp.float32(64), hyper=hyper)[0]

            value, gradient = jax.value_and_grad(loss)(params)
            return value, jax.tree.map(lambda p, g: p - 0.5 * g, params, gradient)

        losses[matmul] = []
        for _ in range(8):  # later, when the rows are known by heart, the loss shows rounding and not learning
            value, params = step(params)
            losses[matmul].append(float(value))
    exact, rounded = map(np.array, (losses["compute_dtype"], losses["float8"]))
    assert exact[-1] < exact[0] - 1  # from log 97 = 4.6
    np.testing.assert_allclose(rounded, exact, rtol=0.01)
    assert (rounded != exact).all()
