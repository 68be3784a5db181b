import jax
import jax.numpy as jnp
import pytest

from gptjax import config as config_lib
from gptjax.model import kernels
from gptjax.model.architecture import Architecture
from gptjax.model.attention import Visibility
from gptjax.planning.compilation import compile_step
from gptjax.planning.flops import program_flops


def flops(function, *shapes) -> float:
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return program_flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def test_products_in_loops_and_branches():
    product = 2 * 8 * 16 * 16
    assert flops(jnp.dot, (8, 16), (16, 16)) == product
    assert flops(lambda x, ws: jax.lax.scan(lambda x, w: (x @ w, None), x, ws)[0], (8, 16), (5, 16, 16)) == 5 * product
    assert flops(lambda x, y: jnp.einsum("bij,bjk->bik", x, y), (3, 8, 16), (3, 16, 4)) == 2 * 3 * 8 * 16 * 4

    def either(x, w):
        return jax.lax.cond(x.sum() > 0, lambda: x @ w @ w, lambda: x @ w)

    assert flops(either, (8, 16), (16, 16)) == 2 * product


def test_a_kernel_without_an_estimate_counts_by_its_grid():
    """Splash: two products forward; backward four for keys and values, which make the scores again, three for queries.
    The reference has two and four. Beside them splash sums gradient x output for each query."""

    def gradients(name):
        def total(q, k, v):
            return kernels.attend(q, k, v, Visibility.causal(256), implementation=name).sum()

        return flops(jax.grad(total, (0, 1, 2)), *[(2, 256, 4, 64)] * 3)

    assert gradients("splash") == pytest.approx(gradients("reference") * 9 / 6, rel=1e-3)


@pytest.mark.parametrize(("remat", "passes"), [("none", 3), ("full", 4)])
def test_a_train_step_runs_what_the_convention_counts(tiny_config, remat, passes):
    """Full attention squares; rematerialised blocks run forward once more, except for their last product."""
    tiny_config.model.update(vocab_size=128, remat=remat, scan_unroll=1, attention="reference")
    config = config_lib.resolve(tiny_config, 128, 10.0)
    facts = compile_step(config, jax.devices()[:1], topology="local")
    a = Architecture.from_config(config.model, 128)
    head = a.embed_dim * a.vocab_size
    blocks = (a.flops_per_token() - 6 * a.num_layers * a.num_heads * a.head_dim * a.context_length) / 6 - head
    attention = 2 * a.num_layers * a.num_heads * a.head_dim * a.context_length  # both products, one pass
    last = 2 * a.num_layers * a.embed_dim * a.mlp_dim * (passes - 3)
    assert facts.executed_flops == facts.tokens_per_step * (6 * head + passes * 2 * (blocks + attention) - last)
