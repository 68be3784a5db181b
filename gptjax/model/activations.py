"""Non-linearities of the MLP by name."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Exact GELU (Hendrycks and Gimpel 2016), with erf, which costs half as much as the erfc of jax.nn.gelu."""
    return 0.5 * x * (1.0 + jax.lax.erf(x * 2.0**-0.5))


ACTIVATIONS: dict[str, Callable] = {
    "gelu": gelu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "squared_relu": lambda x: jnp.square(jax.nn.relu(x)),  # So et al. 2021, "Primer"
    "swiglu": jax.nn.silu,  # the gate of Shazeer 2020, "GLU variants"
}
