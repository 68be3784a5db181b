"""The cache of decoding: ids, keys and values of the tokens so far, and attention over them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gptjax.model import sharding
from gptjax.model.architecture import Architecture
from gptjax.model.attention import Visibility, mask_scores

# Rows and their heads share one axis, and each layer has its own array. Otherwise XLA does not update a cache in
# place: on a CPU, a cache [layers, 1, capacity, heads, head_dim] is copied for every token, which takes six times as
# long as the attention.
Memory = Float[Array, "rows_x_heads capacity head_dim"]
HEADS_OF_ROWS = (*sharding.BATCH, "tensor")


class Cache(NamedTuple):
    """Slot j of a row holds its position j.

    Attributes:
      keys: one array per layer; head h of row r is at index r x kv_heads + h.
      values: in the same form.
    """

    keys: tuple[Memory, ...]
    values: tuple[Memory, ...]
    tokens: Int[Array, "batch capacity"]

    @property
    def capacity(self) -> int:
        return self.tokens.shape[1]


def empty_cache(architecture: Architecture, batch_size: int, capacity: int) -> Cache:
    """A cache of zeros in the compute dtype."""
    a = architecture
    shape = (batch_size * a.num_kv_heads, capacity, a.head_dim)
    keys, values = (tuple(_split(jnp.zeros(shape, a.compute_dtype)) for _ in range(a.num_layers)) for _ in range(2))
    return Cache(keys, values, jnp.zeros((batch_size, capacity), jnp.int32))


def fold(x: Float[Array, "batch length kv_heads head_dim"]) -> Memory:
    """Keys or values in the order of the cache."""
    batch, length, kv_heads, head_dim = x.shape
    return _split(x.swapaxes(1, 2).reshape(batch * kv_heads, length, head_dim))


def write(
    memory: Memory, new: Float[Array, "batch length kv_heads head_dim"], positions: Int[Array, "batch length"]
) -> Memory:
    """`memory` with `new` at `positions`; positions outside the cache are not written."""
    slots = jnp.repeat(positions, new.shape[2], axis=0)
    return _split(jax.vmap(lambda old, at, new: old.at[at].set(new, mode="drop"))(memory, slots, fold(new)))


def attend(
    q: Float[Array, "batch length heads head_dim"], keys: Memory, values: Memory, visibility: Visibility
) -> Float[Array, "batch length heads head_dim"]:
    """The same result as `attention.reference`, for keys and values in a cache."""
    batch, length, heads, head_dim = q.shape
    kv_heads, capacity = keys.shape[0] // batch, keys.shape[1]
    grouped = (batch, kv_heads, heads // kv_heads, length)
    q = (q * head_dim**-0.5).swapaxes(1, 2).reshape(batch * kv_heads, -1, head_dim)
    scores = jnp.einsum("nqd,nsd->nqs", q, keys, preferred_element_type=jnp.float32)
    scores = mask_scores(scores.reshape(*grouped, capacity), visibility)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype).reshape(batch * kv_heads, -1, capacity)
    mixed = jnp.einsum("nqs,nsd->nqd", weights, values)
    return mixed.reshape(batch, heads, length, head_dim).swapaxes(1, 2)


def _split(memory: Memory) -> Memory:
    return sharding.constrain(memory, HEADS_OF_ROWS, None, None)
