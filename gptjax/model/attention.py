"""Causal attention behind one interface. `reference` defines what every other implementation must return."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

MASKED = -1e30  # finite, so that a row with nothing to attend to (padding) gives numbers and not NaN


def causal_mask(
    segment_ids: Int[Array, "batch length"] | None, length: int
) -> Bool[Array, "batch_or_one length length"]:
    """True where a query (second axis) may see a key (last axis): not later, and in the same segment."""
    index = jnp.arange(length)
    mask = (index[:, None] >= index[None, :])[None]
    if segment_ids is not None:
        mask = mask & (segment_ids[:, :, None] == segment_ids[:, None, :])
    return mask


def cache_mask(positions: Int[Array, "batch length"], capacity: int) -> Bool[Array, "batch length capacity"]:
    """True where a query at a position may see a cache slot: slot j holds position j."""
    return jnp.arange(capacity)[None, None, :] <= positions[:, :, None]


def reference(
    q: Float[Array, "batch length heads head_dim"],
    k: Float[Array, "batch keys kv_heads head_dim"],
    v: Float[Array, "batch keys kv_heads head_dim"],
    mask: Bool[Array, "batch_or_one length keys"],
) -> Float[Array, "batch length heads head_dim"]:
    """softmax(q k^T / sqrt(head_dim)) v with a mask; softmax in float32. Heads share keys in groups.

    The maximum is taken out of the gradient: softmax does not depend on it, and the backward pass is cheaper
    than that of jax.nn.softmax.
    """
    batch, length, heads, head_dim = q.shape
    groups = heads // k.shape[2]
    q = (q * head_dim**-0.5).reshape(batch, length, k.shape[2], groups, head_dim)
    scores = jnp.einsum("bqkgd,bskd->bkgqs", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores, MASKED)
    weights = jnp.exp(scores - lax.stop_gradient(scores.max(-1, keepdims=True)))
    weights = (weights / weights.sum(-1, keepdims=True)).astype(v.dtype)
    return jnp.einsum("bkgqs,bskd->bqkgd", weights, v).reshape(batch, length, heads, head_dim)


def rotary_angles(
    positions: Int[Array, "batch length"], head_dim: int, theta: float
) -> tuple[Float[Array, "batch length 1 half"], Float[Array, "batch length 1 half"]]:
    """Cosines and sines of RoFormer's rotary embedding (Su et al. 2021, equation 15), in float32."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "batch length heads head_dim"],
    angles: tuple[Float[Array, "batch length 1 half"], Float[Array, "batch length 1 half"]],
) -> Float[Array, "batch length heads head_dim"]:
    """Rotates the pairs (x[i], x[i + head_dim/2]), the half-split layout of Llama checkpoints."""
    cos, sin = angles
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def dropout(
    x: Float[Array, "batch *rest"], rate: float, keys: jax.Array | None, site: int | Int[Array, ""]
) -> Float[Array, "batch *rest"]:
    """Dropout with one key a row (`keys`: [batch] or None for evaluation), told apart by `site`.

    A key for each row, and not one for the batch, makes the mask the same however the batch is split over
    devices or micro-batches.
    """
    if keys is None or rate == 0.0:
        return x

    def one_row(key, row):
        return jax.random.bernoulli(jax.random.fold_in(key, site), 1.0 - rate, row.shape)

    return jnp.where(jax.vmap(one_row)(keys, x), x / (1.0 - rate), 0).astype(x.dtype)
