"""Mixture of experts: a router sends each token to a few of many MLPs, and no token is dropped."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from gptjax import parameters
from gptjax.model import sharding
from gptjax.model.activations import ACTIVATIONS
from gptjax.model.architecture import Architecture
from gptjax.model.lora import Dropout
from gptjax.model.precision import products_in

OWNERS = parameters.find("blocks/mlp/expert_up/kernel").split[1]  # the mesh axes over which experts are split
Tokens = Float[Array, "tokens embed"]


class ExpertKernels(nnx.Module):
    """One matrix per expert; `path` is the path of the layer in a block, such as "mlp/expert_up"."""

    def __init__(self, a: Architecture, path: str, inputs: int, outputs: int, rngs: nnx.Rngs):
        init = nnx.initializers.normal(a.deviation(f"blocks/{path}/kernel"))
        self.kernel = nnx.Param(init(rngs.params(), (a.num_experts, inputs, outputs), jnp.float32))


class Experts(nnx.Module):
    """The MLP of a block as a mixture (Shazeer et al. 2017), dropless (Gale et al. 2022).

    A token's gates are the softmax over its `experts_per_token` highest router scores (Jiang et al. 2024). Tokens are
    sorted by expert and multiplied in groups (`jax.lax.ragged_dot`), so that no capacity is set and no token is lost.
    On a CPU, every group is computed for all tokens, which is affordable only in small studies.

    On a mesh, the experts are split over the expert and tensor axes, and no device ever holds the experts of another.
    The expert axis splits rows, too: each device gathers the tokens of its group and computes its own experts for
    them; the results are summed and scattered to the devices that the tokens came from. Devices along the tensor axis
    have the same tokens, so their results are only summed. Both axes divide the weights of experts. Each device still
    buffers all tokens of its group at input and output; only the hidden activations shrink.
    """

    def __init__(self, a: Architecture, *, rngs: nnx.Rngs):
        self.architecture = a
        router = nnx.initializers.normal(a.deviation("blocks/mlp/router/kernel"))
        self.router = nnx.Linear(a.embed_dim, a.num_experts, use_bias=False, kernel_init=router, rngs=rngs)
        self.expert_up = ExpertKernels(a, "mlp/expert_up", a.embed_dim, a.mlp_dim, rngs)
        if a.activation == "swiglu":
            self.expert_gate = ExpertKernels(a, "mlp/expert_gate", a.embed_dim, a.mlp_dim, rngs)
        self.expert_down = ExpertKernels(a, "mlp/expert_down", a.mlp_dim, a.embed_dim, rngs)

    def __call__(
        self, x: Float[Array, "batch length embed"], drop: Dropout | None = None
    ) -> tuple[Float[Array, "batch length embed"], Float[Array, "batch"]]:
        """(output, load-balancing loss of each row). `drop` is not used: experts have no adapters."""
        a, activation = self.architecture, ACTIVATIONS[self.architecture.activation]
        with products_in(jnp.float32):
            scores = self.router(x.astype(jnp.float32))
        top, chosen = jax.lax.top_k(scores, a.experts_per_token)
        gates = jax.nn.softmax(top, axis=-1).astype(x.dtype)
        modules = [self.expert_up, *([self.expert_gate] if a.activation == "swiglu" else []), self.expert_down]
        kernels = [module.kernel[...].astype(x.dtype) for module in modules]

        def compute(x, gates, chosen, *kernels, owners: tuple[str, ...] = (), gathered: tuple[str, ...] = ()):
            tokens = [y.reshape(-1, y.shape[-1]) for y in (x, gates, chosen)]
            first = jax.lax.axis_index(owners) * kernels[0].shape[0] if owners else 0
            if gathered:
                tokens = [jax.lax.all_gather(y, gathered, tiled=True) for y in tokens]
            out = _mixture(*tokens, kernels, first, activation, sharding.axis_size(*owners))
            if gathered:
                out = jax.lax.psum_scatter(out, gathered, tiled=True)
            if same := tuple(axis for axis in owners if axis not in gathered):
                out = jax.lax.psum(out, same)
            return out.reshape(x.shape)

        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1:
            return compute(x, gates, chosen, *kernels), balance_loss(scores, chosen)
        rows = sharding.fitting(x.shape, (sharding.BATCH, "context", None))
        split = sharding.fitting(kernels[0].shape, (OWNERS, None, None))
        gathered = ("expert",) if sharding.axis_size("expert") > 1 and rows[0] and split[0] else ()
        out = jax.shard_map(
            partial(compute, owners=split[0] or (), gathered=gathered),
            in_specs=(rows, rows, rows, *[PartitionSpec(*split)] * len(kernels)),
            out_specs=rows,
            check_vma=False,
        )(x, gates, chosen, *kernels)
        return out, balance_loss(scores, chosen)


def _mixture(
    x: Tokens,
    gates: Float[Array, "tokens chosen"],
    chosen: Int[Array, "tokens chosen"],
    kernels: Sequence[Float[Array, "experts _ _"]],
    first: int | Int[Array, ""],
    activation: Callable,
    shares: int,
) -> Tokens:
    """The sum over the experts in `kernels`, `first`, `first + 1`, ..., for each token; other experts are left out.

    `kernels` hold one of `shares` equal shares of all experts. The rows are computed in `shares` parts, and empty parts
    are skipped. While the experts are in balance, all parts but one or two are empty.
    """
    *up, down = kernels
    experts = down.shape[0]
    expert = chosen.reshape(-1) - first
    expert = jnp.where((expert >= 0) & (expert < experts), expert, experts)  # experts of other devices come last
    order = jnp.argsort(expert)
    sizes = jnp.bincount(expert, length=experts + 1)[:-1].astype(jnp.int32)

    def compute(rows, sizes):
        hidden, *gate = (jax.lax.ragged_dot(rows, kernel, sizes) for kernel in up)
        hidden = activation(gate[0]) * hidden if gate else activation(hidden)
        out = jax.lax.ragged_dot(hidden, down, sizes)
        # ragged_dot leaves the rows beyond the groups undefined.
        return jnp.where((jnp.arange(len(rows)) < sizes.sum())[:, None], out, 0)

    rows = x[order // chosen.shape[1]]
    if (parts := math.gcd(shares, len(rows))) > 1:
        out = _in_parts(compute, rows, sizes, parts)
    else:
        out = compute(rows, sizes)
    back = out[jnp.argsort(order)].reshape(*chosen.shape, -1)
    return jnp.einsum("tk,tke->te", gates, back)


def _in_parts(
    compute: Callable, rows: Float[Array, "rows embed"], sizes: Int[Array, "experts"], parts: int
) -> Float[Array, "rows embed"]:
    """`compute(rows, sizes)`, one part of the rows after the other; rows beyond the groups are zero.

    The backward pass computes each part again, so that the activations of only one part are in memory at a time.
    """
    ends = jnp.cumsum(sizes)
    length = len(rows) // parts

    @jax.checkpoint
    def part(_, inputs):
        begin, rows = inputs
        inside = jnp.clip(ends - begin, 0, length) - jnp.clip(ends - sizes - begin, 0, length)
        return None, jax.lax.cond(begin < ends[-1], compute, lambda rows, _: jnp.zeros_like(rows), rows, inside)

    _, out = jax.lax.scan(part, None, (jnp.arange(parts) * length, rows.reshape(parts, length, -1)))
    return out.reshape(rows.shape)


def balance_loss(
    scores: Float[Array, "batch length experts"], chosen: Int[Array, "batch length chosen"]
) -> Float[Array, "batch"]:
    """experts x sum over experts of (share of choices) x (mean probability), in each row; 1 when balanced.

    The loss of Fedus et al. 2021 (equation 4), taken in each row as DeepSeek-AI 2024 does (V3, equations 17 to 20).
    So the loss does not depend on how rows are split over devices and micro-batches.
    """
    experts = scores.shape[-1]
    share = jax.nn.one_hot(chosen, experts, dtype=jnp.float32).mean((1, 2))
    return experts * (share * jax.nn.softmax(scores, axis=-1).mean(1)).sum(-1)
