"""The GPT: embeddings, a scan over stacked blocks, a head.

Outside this room a model is an `Architecture` and a plain pytree of parameters, {"blocks": {...}, ...}, whose leaves
under "blocks" are stacked over layers. `bind` puts the two together inside a pure function.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from gptjax import parameters
from gptjax.model import attention as attention_lib
from gptjax.model import head, sharding
from gptjax.model.architecture import Architecture
from gptjax.model.cache import Cache, fold
from gptjax.model.layers import Block, ngram_rows, norm
from gptjax.model.precision import in_compute_dtype

Params = dict[str, Any]

BLOCK_INPUT = "block_input"
REMAT_POLICIES: dict[str, Callable] = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[BLOCK_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


class GPT(nnx.Module):
    """A decoder-only transformer (Radford et al. 2019), with the options of `Architecture`."""

    def __init__(self, a: Architecture, *, rngs: nnx.Rngs):
        self.architecture = a

        def init(path: str) -> Callable:
            return nnx.initializers.normal(a.deviation(path))

        # Looked up in float32 and then cast: the gradients of a token's occurrences add up in float32.
        def table(name: str, rows: int, width: int = a.embed_dim) -> nnx.Embed:
            return nnx.Embed(rows, width, embedding_init=init(f"{name}/embedding"), rngs=rngs)

        self.embedding = table("embedding", a.padded_vocab_size)
        if a.positions == "learned":
            self.position_embedding = table("position_embedding", a.context_length)
        if a.ngram_order > 1:
            self.ngram_embedding = table("ngram_embedding", (a.ngram_order - 1) * a.ngram_rows)
        layer_rngs = nnx.Rngs(params=jax.random.split(rngs.params(), a.num_layers))
        self.blocks = nnx.vmap(lambda rngs: Block(a, rngs=rngs))(layer_rngs)
        if a.norm_placement == "pre":  # a post-norm model already ends in the norm of its last block
            self.final_norm = norm(a, a.embed_dim, rngs)
        if not a.tie_embeddings:
            self.head = nnx.Linear(
                a.embed_dim,
                a.padded_vocab_size,
                use_bias=False,
                dtype=jnp.dtype(a.compute_dtype),
                kernel_init=init("head/kernel"),
                rngs=rngs,
            )
        # Made last: with and without it, the other parameters start at the same values.
        if a.value_embeddings:  # the tables lie side by side
            width = a.value_embeddings * a.num_kv_heads * a.head_dim
            self.value_embedding = table("value_embedding", a.padded_vocab_size, width)

    def hidden(self, tokens: Int[Array, "batch length"], **inputs) -> tuple[Array, Cache | None]:
        """`forward` without its last result."""
        return self.forward(tokens, **inputs)[:2]

    @in_compute_dtype
    def forward(
        self,
        tokens: Int[Array, "batch length"],
        *,
        positions: Int[Array, "batch length"],
        segment_ids: Int[Array, "batch length"] | None = None,
        dropout_keys: jax.Array | None = None,
        cache: Cache | None = None,
        new_cache: bool = False,
        layers: Sequence[Params] | None = None,
    ) -> tuple[Float[Array, "batch length embed"], Cache | None, Float[Array, "batch"] | None]:
        """(final hidden states, cache, load-balancing loss of each row as the mean over layers).

        The cache is the given one with these tokens added, or a new one with `new_cache`, or None. The loss is None in
        a model without experts, and with a cache.

        Args:
          tokens: token ids.
          positions: index of each token in its document. With a cache this is also the slot it is written to;
            a position beyond the capacity marks padding and is not written.
          segment_ids: which document of the row a token belongs to; tokens of different segments do not attend to
            each other. None: one document per row. Not used with a cache.
          dropout_keys: one random key per row, or None to evaluate.
          cache: keys and values of earlier tokens.
          new_cache: whether to return a cache of these tokens, in their order. Not with `cache` or `segment_ids`.
          layers: the parameters of each block, if the caller has them unstacked. Only with a cache.
        """
        a = self.architecture
        # 1. Embeddings: everything that is added to the residual stream before the first block.
        x = self.embedding(tokens)
        if a.positions == "learned":
            x = x + self.position_embedding(jnp.minimum(positions, a.context_length - 1))
        history = None
        # These tokens enter the history before n-grams are looked up: an n-gram may begin within the same call.
        if cache is not None:
            history = cache.tokens.at[jnp.arange(tokens.shape[0])[:, None], positions].set(tokens, mode="drop")
        if a.ngram_order > 1:
            x = x + self.ngram_embedding(ngram_rows(a, tokens, positions, history)).sum(axis=2)
        # Cast only after the sum: embeddings and their gradients add up in float32.
        x = sharding.constrain(x.astype(a.compute_dtype), *sharding.BETWEEN)
        x = attention_lib.dropout(x, a.dropout, dropout_keys, 0)
        # 2. What all blocks share is computed once, outside of the scan.
        embedded, values = _unit(x, a.norm_epsilon) if a.residual_scalars else None, None
        if a.value_embeddings:
            values = self.value_embedding(tokens).astype(a.compute_dtype)
            values = values.reshape(*tokens.shape, a.value_embeddings, a.num_kv_heads, a.head_dim)
            values = sharding.constrain(values, sharding.BATCH, "context", None, "tensor", None)
        slopes = attention_lib.alibi_slopes(a.num_heads) if a.positions == "alibi" else None
        sight = {"window": a.sliding_window, "slopes": slopes}
        if cache is None:
            visibility = attention_lib.Visibility.causal(tokens.shape[1], segment_ids, **sight)
        else:
            visibility = attention_lib.Visibility.cached(positions, cache.capacity, **sight)
        angles = None
        if a.positions == "rope":
            angles = attention_lib.rotary_angles(positions, attention_lib.rotary_frequencies(a))
        # 3. The blocks: one body for all of them, run layer by layer with a cache, else scanned.
        graphdef, stacked = nnx.split(self.blocks)
        keep = new_cache or cache is not None

        def body(x, layer_inputs):
            layer, params, layer_cache = layer_inputs
            # Named before the gather: "offload" keeps the input of the block, never its gathered parameters.
            x = checkpoint_name(x, BLOCK_INPUT)
            x, memory, balance = nnx.merge(graphdef, sharding.gather_layer(params))(
                x,
                embedded=embedded,
                values=None if values is None else values[:, :, layer % a.value_embeddings],
                visibility=visibility,
                angles=angles,
                positions=positions,
                layer=layer,
                dropout_keys=dropout_keys,
                cache=layer_cache,
            )
            return x, (memory if keep else None, balance)

        if keep:  # layer by layer: a scan would copy the caches, and the slices of stacked parameters
            layers = layers or [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(a.num_layers)]
            body = jax.jit(body)  # traced once; the compiler sees each layer in its place
            memories = zip(cache.keys, cache.values, strict=True) if cache else [None] * a.num_layers
            kept = []
            for layer, (params, memory) in enumerate(zip(layers, memories, strict=True)):
                x, (new, _) = body(x, (jnp.int32(layer), params, memory))
                kept.append(new if cache else tuple(map(fold, new)))
            keys, values = zip(*kept, strict=True)
            cache = Cache(keys, values, tokens if history is None else history)
            return self.final_norm(x) if a.norm_placement == "pre" else x, cache, None
        # prevent_cse=False: within a scan, XLA does not merge the recomputation with the forward pass.
        if a.remat != "none":
            body = jax.checkpoint(body, policy=REMAT_POLICIES[a.remat], prevent_cse=False)
        x, (_, balance) = jax.lax.scan(body, x, (jnp.arange(a.num_layers), stacked, None), unroll=a.scan_unroll)
        x = self.final_norm(x) if a.norm_placement == "pre" else x
        return x, None, None if balance is None else balance.mean(0)

    def logits(self, hidden: Float[Array, "batch length embed"]) -> Float[Array, "batch length vocab"]:
        """Float32 scores of the next token; the scores of the vocabulary's padding are -1e30."""
        return head.scores(self.architecture, hidden, self.table())

    def table(self) -> Float[Array, "embed vocab"]:
        """The output matrix, by which final hidden states are multiplied, in the compute dtype."""
        a = self.architecture
        table = self.embedding.embedding[...].T if a.tie_embeddings else self.head.kernel[...]
        return sharding.gather(table.astype(a.compute_dtype), head.TABLE, (None, "tensor"))


def initialise(architecture: Architecture, key: jax.Array) -> Params:
    """Fresh parameters in float32. Jit it with out_shardings: the values do not depend on the sharding."""
    return nnx.to_pure_dict(nnx.split(GPT(architecture, rngs=nnx.Rngs(params=key)))[1])


def abstract_model(architecture: Architecture) -> tuple[nnx.GraphDef, Params]:
    """The static graphdef and the shapes and dtypes of the parameters, without computing anything.

    Raises UserError for `init_multipliers` that match no parameter.
    """
    model = nnx.eval_shape(lambda: GPT(architecture, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    paths = [parameters.path_string(path) for path, _ in jax.tree.leaves_with_path(params)]
    random = [path for path in paths if parameters.find(path).initial in ("normal", "residual")]
    parameters.multipliers(architecture.init_multipliers, random, "model.init_multipliers")
    return graphdef, params


def abstract_params(architecture: Architecture) -> Params:
    """The shapes and dtypes of the parameters, without computing anything."""
    return abstract_model(architecture)[1]


@functools.cache
def graphdef(architecture: Architecture) -> nnx.GraphDef:
    """The static part of a model. Equal architectures share it, and with it their compiled programs."""
    return abstract_model(architecture)[0]


def bind(architecture: Architecture, params: Params) -> GPT:
    """The model with these parameters, for use inside a pure function."""
    return nnx.merge(graphdef(architecture), params)


def _unit(x: Float[Array, "batch length embed"], epsilon: float) -> Float[Array, "batch length embed"]:
    """x over its root mean square: RMSNorm without parameters."""
    square = jnp.square(x.astype(jnp.float32)).mean(-1, keepdims=True)
    return (x * jax.lax.rsqrt(square + epsilon)).astype(x.dtype)


def parameter_count(params: Params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))
