"""Attention by blocks of keys with a running softmax, in plain XLA: on one device, or along a ring of devices.

Neither pass holds more than [batch, heads, length, block] scores (Dao et al. 2022; Rabe and Staats 2021). The backward
pass computes the scores of each block again (Dao 2023, algorithm 2).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from gptjax.model import sharding
from gptjax.model.attention import Visibility, masked_scores
from gptjax.model.precision import products_in

Queries = Float[Array, "batch length heads head_dim"]
Keys = Float[Array, "batch keys kv_heads head_dim"]

BLOCK = 512  # tokens in a block of keys


def blocked(q: Queries, k: Keys, v: Keys, visibility: Visibility) -> Queries:
    """Attention over keys that are all on this device, or are split over devices by XLA."""
    return _attend(q, k, v, visibility._replace(window=0), window=visibility.window, devices=1)


def ring(q: Queries, k: Keys, v: Keys, visibility: Visibility) -> Queries:
    """Attention where each device of the context axis has a part of the row (Liu et al. 2023, "Ring Attention").

    Each device keeps its queries. The parts of keys and values go around the ring; in the backward pass their gradients
    go with them. No device ever holds a whole row, so that a longer axis needs less memory per device. A device passes
    on a part without multiplying if none of its queries sees it. The device with the last queries multiplies all parts,
    and the others wait for it.
    """
    devices = sharding.axis_size("context")
    if devices == 1:
        return blocked(q, k, v, visibility)

    def split(x: jax.Array, *axes: sharding.Axis) -> jax.P:
        return sharding.fitting(x.shape, axes)

    def split_rows(x: jax.Array) -> jax.P:
        return split(x, sharding.BATCH, "context")

    heads = (sharding.BATCH, "context", "tensor", None)
    seen = Visibility(
        queries=split_rows(visibility.queries),
        keys=split_rows(visibility.keys),
        segments=jax.tree.map(split_rows, visibility.segments),
        window=jax.P(),
        slopes=jax.tree.map(lambda slopes: split(slopes, "tensor"), visibility.slopes),
    )
    return jax.shard_map(
        partial(_attend, window=visibility.window, devices=devices),
        in_specs=(split(q, *heads), split(k, *heads), split(v, *heads), seen),
        out_specs=split(q, *heads),
        check_vma=False,
    )(q, k, v, visibility._replace(window=0))


def _attend(q: Queries, k: Keys, v: Keys, visibility: Visibility, *, window: int, devices: int) -> Queries:
    """`window` is an argument of its own because it is static: a number when the program is traced, not an array."""
    batch, length, heads, head_dim = q.shape
    kv_heads, block = k.shape[2], min(BLOCK, k.shape[1])
    padding = -k.shape[1] % block
    if padding:  # keys that no query sees
        k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (k, v))
        never = jnp.iinfo(jnp.int32).max
        keys = jnp.pad(visibility.keys, ((0, 0), (0, padding)), constant_values=never)
        segments = visibility.segments
        if segments is not None:
            segments = (segments[0], jnp.pad(segments[1], ((0, 0), (0, padding))))
        visibility = visibility._replace(keys=keys, segments=segments)
    q = (q * head_dim**-0.5).reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    out = _blocked(q, k, v, visibility, window, block, devices)
    return out.reshape(batch, length, heads, head_dim)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _blocked(q, k, v, visibility, window, block, devices):
    return _forward(q, k, v, visibility, window, block, devices)[0]


class _Part(NamedTuple):
    """Keys and values, with the places and segments that decide which queries see them."""

    k: Keys
    v: Keys
    places: Int[Array, "batch_or_one keys"]
    segments: Int[Array, "batch keys"] | None

    @classmethod
    def of(cls, k: Keys, v: Keys, visibility: Visibility) -> "_Part":
        return cls(k, v, visibility.keys, None if visibility.segments is None else visibility.segments[1])

    def block(self, start: Int[Array, ""], size: int) -> "_Part":
        return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, size, axis=1), self)

    def seen_by(self, visibility: Visibility) -> Visibility:
        segments = None if self.segments is None else (visibility.segments[0], self.segments)
        return visibility._replace(keys=self.places, segments=segments)


def _forward(q, k, v, visibility, window, block, devices):
    batch, length, kv_heads, groups, head_dim = q.shape
    q, sight = _together(q, visibility._replace(window=window))

    def add_part(sums, part):
        def add_block(sums, start):
            top, total, mixed = sums
            here = part.block(start, block)
            scores = masked_scores(q, here.k, here.seen_by(sight))
            new_top = jnp.maximum(top, scores.max(-1))
            weights, old = jnp.exp(scores - new_top[..., None]), jnp.exp(top - new_top)
            values = jnp.einsum("bkgqs,bskd->bkgqd", weights.astype(v.dtype), here.v)
            return (new_top, total * old + weights.sum(-1), mixed * old[..., None] + values), None

        return lax.scan(add_block, sums, jnp.arange(0, k.shape[1], block))[0]

    rows = (batch, kv_heads, groups, length)
    sums = (jnp.full(rows, -jnp.inf), jnp.zeros(rows), jnp.zeros((*rows, head_dim)))
    (top, total, mixed), _ = _around(
        devices, sight, lambda s, part, _: (add_part(s, part), ()), sums, _Part.of(k, v, sight), ()
    )
    out = jnp.moveaxis(mixed / total[..., None], 3, 1).astype(q.dtype)
    return out, (q, k, v, visibility, out, top + jnp.log(total))


def _backward(window, block, devices, residuals, gradient):
    with products_in(gradient.dtype):
        return _gradients(window, block, devices, residuals, gradient)


def _gradients(window, block, devices, residuals, gradient):
    q, k, v, visibility, out, log_total = residuals
    gradient, sight = _together(gradient, visibility._replace(window=window))
    mean = jnp.einsum("bqkgd,bqkgd->bkgq", gradient, out, preferred_element_type=jnp.float32)

    def add_part(dq, part, sums):
        def add_block(dq, start):
            here = part.block(start, block)
            weights = jnp.exp(masked_scores(q, here.k, here.seen_by(sight)) - log_total[..., None])
            dv = jnp.einsum("bkgqs,bqkgd->bskd", weights.astype(v.dtype), gradient)
            dweights = jnp.einsum("bqkgd,bskd->bkgqs", gradient, here.v, preferred_element_type=jnp.float32)
            dscores = (weights * (dweights - mean[..., None])).astype(q.dtype)
            dq = dq + jnp.einsum("bkgqs,bskd->bqkgd", dscores, here.k, preferred_element_type=jnp.float32)
            return dq, (jnp.einsum("bkgqs,bqkgd->bskd", dscores, q), dv)

        dq, blocks = lax.scan(add_block, dq, jnp.arange(0, k.shape[1], block))
        of_part = tuple(jnp.moveaxis(x, 0, 1).reshape(k.shape) for x in blocks)
        return dq, jax.tree.map(jnp.add, sums, of_part) if devices > 1 else of_part

    # Summed over the devices in float32.
    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (k, v)) if devices > 1 else ()
    dq = jnp.zeros(q.shape, jnp.float32)
    dq, (dk, dv) = _around(devices, sight, add_part, dq, _Part.of(k, v, sight), zeros)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), jax.tree.map(_no_gradient, visibility)


_blocked.defvjp(_forward, _backward)


def _together(x: Array, sight: Visibility) -> tuple[Array, Visibility]:
    """Both unchanged, behind a barrier: neither can be used before both are computed.

    Masks do not depend on parameters. Without the barrier, the masks of all blocks would be computed once and kept for
    all layers: 30 GiB of booleans for rows of 131,072 tokens on 16 devices.
    """
    window = sight.window
    x, sight = lax.optimization_barrier((x, sight._replace(window=0)))
    return x, sight._replace(window=window)


def _around(
    devices: int, sight: Visibility, add_part: Callable[..., tuple[Any, Any]], sums: Any, part: _Part, of_part: Any
) -> tuple[Any, Any]:
    """Passes each part around the ring: `sums, of_part = add_part(sums, part, of_part)` on each device that sees it.

    `sums` stay on their device. `of_part`, the sums for the part, travel with it and end on the device of the part.
    """
    if devices == 1:
        return add_part(sums, part, of_part)

    def pass_on(x: Any) -> Any:
        ring = [(i, (i + 1) % devices) for i in range(devices)]
        return jax.tree.map(lambda leaf: lax.ppermute(leaf, "context", ring), x)

    def visit(sums, part, of_part):
        seen = part.places.min() <= sight.queries.max()
        if sight.window:
            seen &= sight.queries.min() - part.places.max() < sight.window
        return lax.cond(seen, lambda *state: add_part(state[0], part, state[1]), lambda *state: state, sums, of_part)

    def turn(state, _):
        sums, part, of_part = state
        following = pass_on(part)  # on its way while this part is multiplied
        sums, of_part = visit(sums, part, of_part)
        return (sums, following, pass_on(of_part)), None

    (sums, part, of_part), _ = lax.scan(turn, (sums, part, of_part), length=devices - 1)
    sums, of_part = visit(sums, part, of_part)
    return sums, pass_on(of_part)


def _no_gradient(x: jax.typing.ArrayLike) -> np.ndarray:
    x = jnp.asarray(x)
    dtype = x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else jax.dtypes.float0
    return np.zeros(x.shape, dtype)
