"""Matrix products in 8-bit floats, for GPUs that have them (Hopper and later).

Forward operands are e4m3, gradients e5m2 (Micikevicius et al. 2022, "FP8 formats for deep learning"); each tensor is
scaled by its own largest value in this step. Sums are float32. Weights and optimizer state keep their types.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

FORWARD, GRADIENT = jnp.float8_e4m3fn, jnp.float8_e5m2


def dot_general(x: Array, kernel: Array, dimension_numbers: Any, **options: Any) -> Array:
    """`jax.lax.dot_general` of activations [..., in] and a kernel [in, out], as `nnx.Linear` calls it."""
    del options  # the precision and the type of sums are fixed here
    assert dimension_numbers == (((x.ndim - 1,), (0,)), ((), ())), dimension_numbers
    return matmul(x, kernel)


@jax.custom_vjp
def matmul(x: Float[Array, "*batch inputs"], kernel: Float[Array, "inputs outputs"]) -> Float[Array, "*batch outputs"]:
    """x @ kernel, both rounded to e4m3, in the type of x. The gradient is that of the exact product, computed from
    rounded operands."""
    return _forward(x, kernel)[0]


def _forward(x, kernel):
    x8, kernel8 = quantise(x, FORWARD), quantise(kernel, FORWARD)
    like = (jnp.zeros((), x.dtype), jnp.zeros((), kernel.dtype))
    return _product(x8, kernel8, ((x.ndim - 1,), (0,))).astype(x.dtype), (x8, kernel8, like)


def _backward(residuals, gradient):
    x8, kernel8, (x_like, kernel_like) = residuals
    gradient8 = quantise(gradient, GRADIENT)
    batch = tuple(range(gradient.ndim - 1))
    dx = _product(gradient8, kernel8, ((gradient.ndim - 1,), (1,)))
    dkernel = _product(x8, gradient8, (batch, batch))
    return dx.astype(x_like.dtype), dkernel.astype(kernel_like.dtype)


matmul.defvjp(_forward, _backward)


def quantise(x: Array, dtype: jax.typing.DTypeLike) -> tuple[Array, Float[Array, ""]]:
    """(x / scale in 8 bits, scale). The scale maps the largest magnitude of x to the largest number of the type."""
    scale = jnp.maximum(jnp.abs(x).max().astype(jnp.float32), 1e-30) / float(jnp.finfo(dtype).max)
    return (x.astype(jnp.float32) / scale).astype(dtype), scale


def _product(a: tuple[Array, Array], b: tuple[Array, Array], contracted: tuple[tuple, tuple]) -> Array:
    product = jax.lax.dot_general(a[0], b[0], (contracted, ((), ())), preferred_element_type=jnp.float32)
    return product * (a[1] * b[1])
