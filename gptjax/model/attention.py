"""Causal attention: which tokens attend to which, the reference for all kernels, rotary positions, dropout."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from gptjax.model.architecture import Architecture

MASKED = -1e30  # finite, so that a row with nothing to attend to (padding) gives numbers and not NaN


class Visibility(NamedTuple):
    """Which keys a query sees, and how their distance counts.

    A query sees a key of the same segment whose place is not later and is fewer than `window` places back (0: any
    distance). Places are indices in the row. Within a document, places and positions differ by a constant.

    Attributes:
      slopes: one per head; ALiBi adds -slope x distance to the scores of the head (Press et al. 2022).
    """

    queries: Int[Array, "batch_or_one length"]
    keys: Int[Array, "batch_or_one keys"]
    segments: tuple[Int[Array, "batch length"], Int[Array, "batch keys"]] | None = None
    window: int = 0
    slopes: Float[Array, "heads"] | None = None

    @classmethod
    def causal(
        cls,
        length: int,
        segment_ids: Int[Array, "batch length"] | None = None,
        *,
        window: int = 0,
        slopes: Float[Array, "heads"] | None = None,
    ) -> "Visibility":
        """For whole rows, as in training. A window as long as the row masks nothing; it is dropped, so that kernels run
        without one."""
        places = jnp.arange(length)[None]
        window = window if window < length else 0
        return cls(places, places, None if segment_ids is None else (segment_ids, segment_ids), window, slopes)

    @classmethod
    def cached(
        cls,
        positions: Int[Array, "batch length"],
        capacity: int,
        *,
        window: int = 0,
        slopes: Float[Array, "heads"] | None = None,
    ) -> "Visibility":
        """For tokens at `positions` over a cache in which slot j holds position j."""
        return cls(positions, jnp.arange(capacity)[None], None, window, slopes)

    def mask(self) -> Bool[Array, "batch_or_one length keys"]:
        """True where a query (second axis) sees a key (last axis)."""
        distance = self.queries[:, :, None] - self.keys[:, None, :]
        mask = distance >= 0
        if self.window:
            mask = mask & (distance < self.window)
        if self.segments is not None:
            mask = mask & (self.segments[0][:, :, None] == self.segments[1][:, None, :])
        return mask

    def bias(self) -> Float[Array, "batch_or_one heads length keys"] | None:
        """The ALiBi term of the scores, or None without ALiBi."""
        if self.slopes is None:
            return None
        distance = self.queries[:, None, :, None] - self.keys[:, None, None, :]
        return -self.slopes[:, None, None] * distance.astype(jnp.float32)


def alibi_slopes(heads: int) -> Float[Array, "heads"]:
    """2^(-8 i / n) for head i of n (Press et al. 2022, section 3), the geometric sequence for any number of heads."""
    return 2.0 ** (-8.0 * jnp.arange(1, heads + 1, dtype=jnp.float32) / heads)


def reference(
    q: Float[Array, "batch length heads head_dim"],
    k: Float[Array, "batch keys kv_heads head_dim"],
    v: Float[Array, "batch keys kv_heads head_dim"],
    visibility: Visibility,
) -> Float[Array, "batch length heads head_dim"]:
    """softmax(q k^T / sqrt(head_dim) + bias) v over the visible keys; softmax in float32. Groups of heads share keys.

    No gradient flows through the maximum, since softmax does not depend on it. The backward pass is cheaper than
    that of jax.nn.softmax.
    """
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    q = (q * head_dim**-0.5).reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    scores = masked_scores(q, k, visibility)
    weights = jnp.exp(scores - lax.stop_gradient(scores.max(-1, keepdims=True)))
    weights = (weights / weights.sum(-1, keepdims=True)).astype(v.dtype)
    return jnp.einsum("bkgqs,bskd->bqkgd", weights, v).reshape(batch, length, heads, head_dim)


def masked_scores(
    q: Float[Array, "batch length kv_heads groups head_dim"],
    k: Float[Array, "batch keys kv_heads head_dim"],
    visibility: Visibility,
) -> Float[Array, "batch kv_heads groups length keys"]:
    """Scores of scaled queries in float32, with bias, MASKED where a key is not seen."""
    return mask_scores(jnp.einsum("bqkgd,bskd->bkgqs", q, k, preferred_element_type=jnp.float32), visibility)


def mask_scores(
    scores: Float[Array, "batch kv_heads groups length keys"], visibility: Visibility
) -> Float[Array, "batch kv_heads groups length keys"]:
    """`scores` with bias, MASKED where a key is not seen."""
    if (bias := visibility.bias()) is not None:
        scores = scores + bias.reshape(-1, *scores.shape[1:3], *bias.shape[2:])
    return jnp.where(visibility.mask()[:, None, None], scores, MASKED)


def rotary_frequencies(a: Architecture) -> Float[Array, "half"]:
    """Radians per position of RoFormer's rotary embedding (Su et al. 2021, equation 15), scaled for longer contexts.

    "linear" (Chen et al. 2023, "Position Interpolation") divides all frequencies by `rope_factor`. "llama3" (Llama
    3.1) divides those with fewer than `rope_low_freq_factor` turns in the original context, keeps those with more than
    `rope_high_freq_factor` turns, and interpolates in between.
    """
    frequencies = a.rope_theta ** (-jnp.arange(0, a.head_dim, 2, dtype=jnp.float32) / a.head_dim)
    if a.rope_scaling == "none":
        return frequencies
    kept = 0.0
    if a.rope_scaling == "llama3":
        low, high = a.rope_low_freq_factor, a.rope_high_freq_factor
        turns = a.rope_original_length * frequencies / (2 * math.pi)
        kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequencies * (kept + (1 - kept) / a.rope_factor)


def rotary_angles(
    positions: Int[Array, "batch length"], frequencies: Float[Array, "half"]
) -> tuple[Float[Array, "batch length 1 half"], Float[Array, "batch length 1 half"]]:
    """Cosines and sines of the rotary embedding, in float32."""
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
    """Dropout with one key per row (`keys`: [batch], or None for evaluation). Each `site` has a mask of its own.

    Because each row has its own key, the mask does not depend on how the batch is split over devices or
    micro-batches.
    """
    if keys is None or rate == 0.0:
        return x

    def one_row(key, row):
        return jax.random.bernoulli(jax.random.fold_in(key, site), 1.0 - rate, row.shape)

    return jnp.where(jax.vmap(one_row)(keys, x), x / (1.0 - rate), 0).astype(x.dtype)
