import jax
import jax.extend
import jax.numpy as jnp
import pytest

from gptjax.model import gpt
from gptjax.model.architecture import Architecture
from gptjax.objectives import language_modeling
from gptjax.objectives.objective import Models

EXACT = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)


def products(jaxpr: jax.extend.core.Jaxpr):
    """All matrix products of a program, including those of nested programs."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "ragged_dot_general"):
            yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from products(inner)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "options",
    [
        {"attention": "reference"},
        {"attention": "xla", "remat": "full"},
        {"num_experts": 4, "activation": "swiglu"},
        {"lora_rank": 2, "tie_embeddings": False},
    ],
    ids=lambda options: next(iter(options)) + "=" + str(next(iter(options.values()))),
)
def test_every_product_of_float32_and_its_gradient_is_made_in_float32(tiny_config, options, dtype):
    tiny_config.model.update(**options, compute_dtype=dtype)
    architecture = Architecture.from_config(tiny_config.model, 0)
    params = gpt.abstract_params(architecture)
    shape = (2, architecture.context_length)
    batch = {
        "tokens": jax.ShapeDtypeStruct(shape, jnp.int32),
        "targets": jax.ShapeDtypeStruct(shape, jnp.int32),
        "positions": jax.ShapeDtypeStruct(shape, jnp.int32),
        "weights": jax.ShapeDtypeStruct(shape, jnp.float32),
    }

    objective = language_modeling.make(tiny_config)
    hyper = {"z_loss": jnp.float32(0), "balance_loss": jnp.float32(0.01)}

    def loss(params, batch):
        models = Models(gpt.bind(architecture, params))
        return objective.loss(models, batch, total_weight=jnp.float32(1), hyper=hyper)[0]

    found = list(products(jax.make_jaxpr(jax.grad(loss))(params, batch).jaxpr))
    assert len(found) > 20
    inexact = [
        f"{equation.outvars[0].aval}: {equation.params['precision']}, {equation.source_info}"
        for equation in found
        if all(operand.aval.dtype == jnp.float32 for operand in equation.invars[:2])
        and equation.params["precision"] not in (EXACT, jax.lax.Precision.HIGHEST)
    ]
    assert not inexact, inexact
    if dtype == "bfloat16":  # where float32 is not what was asked for, nothing is slowed down
        rounded = [e for e in found if e.invars[0].aval.dtype == jnp.bfloat16]
        assert rounded and all(equation.params["precision"] is None for equation in rounded)
