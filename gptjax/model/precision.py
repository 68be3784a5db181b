"""Float32 means float32, on every kind of device."""

import contextlib
from collections.abc import Callable
from functools import wraps

import jax
import jax.numpy as jnp


def products_in(dtype: jax.typing.DTypeLike) -> contextlib.AbstractContextManager:
    """A context for tracing matrix products of operands in `dtype`: float32 operands are multiplied in float32.

    By default, JAX multiplies them in TF32 on a GPU (on an H200 a relative error of 3e-4, against 3e-7 in float32) and
    in bfloat16 on a TPU, so that the same model gives other losses than on a CPU.
    """
    exact = jnp.dtype(dtype) == jnp.float32
    return jax.default_matmul_precision("float32") if exact else contextlib.nullcontext()


def in_compute_dtype(method: Callable) -> Callable:
    """Runs a method of a model in `products_in` of the compute dtype of its architecture."""

    @wraps(method)
    def traced(self, *args, **kwargs):
        with products_in(self.architecture.compute_dtype):
            return method(self, *args, **kwargs)

    return traced
