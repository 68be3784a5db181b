"""One transformer block: attention and MLP, each behind a norm, each added to the residual stream."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from gptjax.model import attention as attention_lib
from gptjax.model import cache as cache_lib
from gptjax.model import kernels, sharding
from gptjax.model.activations import ACTIVATIONS
from gptjax.model.architecture import Architecture
from gptjax.model.experts import Experts
from gptjax.model.lora import Dropout, Linear


def norm(a: Architecture, features: int, rngs: nnx.Rngs) -> nnx.Module:
    dtype = jnp.dtype(a.compute_dtype)
    if a.norm == "rmsnorm":
        return nnx.RMSNorm(features, epsilon=a.norm_epsilon, dtype=dtype, rngs=rngs)
    return nnx.LayerNorm(
        features,
        epsilon=a.norm_epsilon,
        use_bias=a.use_bias,
        use_fast_variance=True,
        dtype=dtype,
        rngs=rngs,
    )


def ngram_rows(
    a: Architecture,
    tokens: Int[Array, "batch length"],
    positions: Int[Array, "batch length"],
    history: Int[Array, "batch capacity"] | None,
) -> Int[Array, "batch length orders"]:
    """Rows of the n-gram table for the 2, 3, ... ngram_order tokens that end at each position.

    The token k places back is read from `tokens`, or when decoding from `history` (slot j: position j). It is used
    only where `positions` >= k, so that an n-gram never begins before its document. Hash collisions
    are accepted.
    """
    code, rows = tokens.astype(jnp.uint32), []
    for back in range(1, a.ngram_order):
        if history is None:
            earlier = jnp.pad(tokens, ((0, 0), (back, 0)))[:, : tokens.shape[1]]
        else:
            earlier = jnp.take_along_axis(history, jnp.maximum(positions - back, 0), axis=1, mode="clip")
        earlier = jnp.where(positions >= back, earlier, a.vocab_size).astype(jnp.uint32)
        code = (code + 1) * jnp.uint32(0x9E3779B1) + earlier
        mixed = (code ^ (code >> 15)) * jnp.uint32(0x85EBCA6B)
        rows.append(((mixed ^ (mixed >> 13)) % a.ngram_rows).astype(jnp.int32) + (back - 1) * a.ngram_rows)
    return jnp.stack(rows, axis=-1)


class Gate(nnx.Module):
    """sigmoid(x W), one number per head. W starts at zero, so that gates start at 1/2."""

    def __init__(self, a: Architecture, heads: int):
        self.kernel = nnx.Param(jnp.zeros((a.embed_dim, heads)))

    def __call__(self, x: Float[Array, "batch length embed"]) -> Float[Array, "batch length heads 1"]:
        return nnx.sigmoid(x @ self.kernel[...].astype(x.dtype))[..., None]


class Attention(nnx.Module):
    """Multi-head attention with grouped keys and values, optional rotary positions and QK-norm.

    `attention_gate` multiplies the output of each head by a gate (Qiu et al. 2025, arXiv:2505.06708, "headwise").
    `value_embeddings` adds 2 x gate x a row of a table to the values of each head (modded-nanogpt; gated as nanochat
    does).
    """

    def __init__(self, a: Architecture, *, rngs: nnx.Rngs):
        self.architecture = a
        heads, kv_heads = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
        self.query = Linear(a, "attention/query", a.embed_dim, heads, rngs)
        self.key = Linear(a, "attention/key", a.embed_dim, kv_heads, rngs)
        self.value = Linear(a, "attention/value", a.embed_dim, kv_heads, rngs)
        self.out = Linear(a, "attention/out", heads, a.embed_dim, rngs)
        if a.qk_norm:
            dtype = jnp.dtype(a.compute_dtype)
            self.query_norm = nnx.RMSNorm(a.head_dim, epsilon=a.norm_epsilon, dtype=dtype, rngs=rngs)
            self.key_norm = nnx.RMSNorm(a.head_dim, epsilon=a.norm_epsilon, dtype=dtype, rngs=rngs)
        if a.attention_gate:
            self.gate = Gate(a, a.num_heads)
        if a.value_embeddings:
            self.value_gate = Gate(a, a.num_kv_heads)

    def __call__(
        self,
        x: Float[Array, "batch length embed"],
        *,
        visibility: attention_lib.Visibility,
        angles: tuple[Array, Array] | None,
        positions: Int[Array, "batch length"],
        values: Float[Array, "batch length kv_heads head_dim"] | None = None,
        cache: tuple[Array, Array] | None = None,
        drop: Dropout | None = None,
    ) -> tuple[Float[Array, "batch length embed"], tuple[Array, Array]]:
        """(output, keys and values). With a cache the latter are the cache after `x` is written to it at `positions`;
        positions out of range are not written. `values`: the value embeddings of the tokens."""
        a = self.architecture
        q = self._heads(self.query(x, drop), a.num_heads)
        k = self._heads(self.key(x, drop), a.num_kv_heads)
        v = self._heads(self.value(x, drop), a.num_kv_heads)
        if values is not None:
            v = v + 2 * self.value_gate(x) * values
        if a.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        if angles is not None:
            q, k = attention_lib.rotate(q, angles), attention_lib.rotate(k, angles)
        if cache is not None:
            memory = tuple(cache_lib.write(old, new, positions) for old, new in zip(cache, (k, v), strict=True))
            mixed = cache_lib.attend(q, *memory, visibility)
        else:
            memory = k, v
            mixed = kernels.attend(q, k, v, visibility, implementation=a.attention)
        if a.attention_gate:
            mixed = mixed * self.gate(x)
        return self.out(mixed.reshape(*x.shape[:2], -1), drop), memory

    def _heads(self, x: Array, heads: int) -> Array:
        return x.reshape(*x.shape[:2], heads, self.architecture.head_dim)


class MLP(nnx.Module):
    """down(activation(up(x))), or down(silu(gate(x)) * up(x)) for swiglu."""

    def __init__(self, a: Architecture, *, rngs: nnx.Rngs):
        self.activation, self.remat = a.activation, a.remat
        self.up = Linear(a, "mlp/up", a.embed_dim, a.mlp_dim, rngs)
        if a.activation == "swiglu":
            self.gate = Linear(a, "mlp/gate", a.embed_dim, a.mlp_dim, rngs)
        self.down = Linear(a, "mlp/down", a.mlp_dim, a.embed_dim, rngs)

    def __call__(
        self, x: Float[Array, "batch length embed"], drop: Dropout | None = None
    ) -> tuple[Float[Array, "batch length embed"], None]:
        """(output, None): a single MLP has no load to balance."""
        up, activation = self.up(x, drop), ACTIVATIONS[self.activation]
        if self.remat == "none" and sharding.platform() == "gpu":
            # XLA would store values of the activation for the backward pass; reading `up` again costs less.
            activation = jax.checkpoint(activation)
        hidden = activation(self.gate(x, drop)) * up if self.activation == "swiglu" else activation(up)
        return self.down(sharding.constrain(hidden, sharding.BATCH, "context", "tensor"), drop), None


class Block(nnx.Module):
    """Two residual branches. norm_placement: "pre" (Radford et al. 2019) x + f(norm(x)); "post" (Vaswani et al. 2017)
    norm(x + f(x)).

    `residual_scalars` (modded-nanogpt; nanochat): x starts as residual_scale x + embedding_scale x0, two numbers of the
    block that start at 1 and 0. x0 is the normalised embedding."""

    def __init__(self, a: Architecture, *, rngs: nnx.Rngs):
        self.rate, self.post_norm = a.dropout, a.norm_placement == "post"
        self.attention_norm = norm(a, a.embed_dim, rngs)
        self.attention = Attention(a, rngs=rngs)
        self.mlp_norm = norm(a, a.embed_dim, rngs)
        self.mlp = (Experts if a.num_experts else MLP)(a, rngs=rngs)
        if a.residual_scalars:
            self.residual_scale, self.embedding_scale = nnx.Param(jnp.ones(())), nnx.Param(jnp.zeros(()))

    def __call__(
        self,
        x: Float[Array, "batch length embed"],
        *,
        layer: Int[Array, ""],
        dropout_keys: jax.Array | None,
        cache: tuple[Array, Array] | None,
        embedded: Float[Array, "batch length embed"] | None = None,
        **attention_inputs,
    ) -> tuple[Float[Array, "batch length embed"], tuple[Array, Array], Float[Array, "batch"] | None]:
        """(output, keys and values, load-balancing loss of each row if there are experts). `embedded`: x0."""
        drop = Dropout(dropout_keys, layer)
        if embedded is not None:
            # In float32: numbers near 1 are 0.008 apart in bfloat16, and what a scale learns would be rounded away.
            x = (self.residual_scale[...] * x + self.embedding_scale[...] * embedded).astype(x.dtype)
        inputs = sharding.gather(x if self.post_norm else self.attention_norm(x), sharding.BETWEEN, sharding.INSIDE)
        mixed, memory = self.attention(inputs, cache=cache, drop=drop, **attention_inputs)
        mixed = sharding.constrain(mixed, *sharding.BETWEEN)
        x = x + attention_lib.dropout(mixed, self.rate, dropout_keys, 2 * layer + 1)
        x = self.attention_norm(x) if self.post_norm else x
        inputs = sharding.gather(x if self.post_norm else self.mlp_norm(x), sharding.BETWEEN, sharding.INSIDE)
        hidden, balance = self.mlp(inputs, drop)
        hidden = sharding.constrain(hidden, *sharding.BETWEEN)
        x = x + attention_lib.dropout(hidden, self.rate, dropout_keys, 2 * layer + 2)
        x = self.mlp_norm(x) if self.post_norm else x
        return sharding.constrain(x, *sharding.BETWEEN), memory, balance
