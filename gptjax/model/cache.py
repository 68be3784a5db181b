"""What is kept of the tokens decoded so far: their ids, keys and values."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gptjax.model.architecture import Architecture


class Cache(NamedTuple):
    """Slot j of a row holds its position j. Keys and values are stacked over layers, like the parameters."""

    keys: Float[Array, "layers batch capacity kv_heads head_dim"]
    values: Float[Array, "layers batch capacity kv_heads head_dim"]
    tokens: Int[Array, "batch capacity"]

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]


def empty_cache(architecture: Architecture, batch_size: int, capacity: int) -> Cache:
    """A cache of zeros in the compute dtype."""
    a = architecture
    shape = (a.num_layers, batch_size, capacity, a.num_kv_heads, a.head_dim)
    tokens = jnp.zeros((batch_size, capacity), jnp.int32)
    return Cache(jnp.zeros(shape, a.compute_dtype), jnp.zeros(shape, a.compute_dtype), tokens)
