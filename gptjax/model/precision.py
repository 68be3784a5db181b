"""Float32 means float32, on every kind of device."""

import contextlib
from collections.abc import Callable
from functools import wraps

import jax
import jax.numpy as jnp


def products_in(dtype: jax.typing.DTypeLike) -> contextlib.AbstractContextManager:
    """Around the tracing of matrix products of operands in `dtype`: those of float32 are made in float32.

    Left alone, JAX makes them in TF32 on a GPU (a relative error of 3e-4 where float32 has 3e-7, on an H200) and in
    bfloat16 on a TPU, and the same model gives other losses than on a CPU.
    """
    exact = jnp.dtype(dtype) == jnp.float32
    return jax.default_matmul_precision("float32") if exact else contextlib.nullcontext()


def in_compute_dtype(method: Callable) -> Callable:
    """`products_in` around a method of a model with an architecture."""

    @wraps(method)
    def traced(self, *args, **kwargs):
        with products_in(self.architecture.compute_dtype):
            return method(self, *args, **kwargs)

    return traced
