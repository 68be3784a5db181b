"""The head: from final hidden states to the scores of the vocabulary."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gptjax import parameters
from gptjax.model import sharding
from gptjax.model.architecture import Architecture
from gptjax.model.attention import MASKED
from gptjax.model.precision import products_in

Hidden = Float[Array, "batch length embed"]
Table = Float[Array, "embed vocab"]
Scores = Float[Array, "batch length vocab"]

TABLE = parameters.find("head/kernel").split  # the mesh axes over which a table and its gradient are split


def scores(a: Architecture, hidden: Hidden, table: Table) -> Scores:
    """Float32 scores of the next token; the scores of the vocabulary's padding are -1e30."""
    hidden = sharding.gather(hidden, sharding.BETWEEN, sharding.INSIDE)
    logits = _product(hidden, table)
    logits = logits / a.widening if a.mup_base_width else logits
    logits = sharding.constrain(logits, sharding.BATCH, "context", "tensor")
    if a.logit_softcap:
        logits = a.logit_softcap * jnp.tanh(logits / a.logit_softcap)
    if a.padded_vocab_size > a.vocab_size:
        logits = jnp.where(jnp.arange(a.padded_vocab_size) < a.vocab_size, logits, MASKED)
    return logits


@jax.custom_vjp
def _product(hidden: Hidden, table: Table) -> Scores:
    """hidden @ table in float32.

    The incoming gradient is rounded to the compute dtype before it is multiplied, as everywhere else in the model.
    Otherwise the two largest products of a small model's backward pass are computed in float32 (TF32 on a GPU: three
    times the time), and read twice the bytes.
    """
    with products_in(hidden.dtype):
        return jnp.einsum("ble,ev->blv", hidden, table, preferred_element_type=jnp.float32)


def _product_forward(hidden: Hidden, table: Table) -> tuple[Scores, tuple[Hidden, Table]]:
    return _product(hidden, table), (hidden, table)


def _product_backward(inputs: tuple[Hidden, Table], gradient: Scores) -> tuple[Hidden, Table]:
    hidden, table = inputs
    gradient = gradient.astype(hidden.dtype)
    with products_in(hidden.dtype):
        return jnp.einsum("blv,ev->ble", gradient, table), jnp.einsum("ble,blv->ev", hidden, gradient)


_product.defvjp(_product_forward, _product_backward)
