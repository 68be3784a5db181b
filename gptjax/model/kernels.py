"""One attention interface, five implementations. All return what `attention.reference` returns.

| name | what it is | where it pays | what it cannot do |
|---|---|---|---|
| reference | the whole matrix of scores at once | CPU and short rows | long rows: memory grows with their square |
| xla | blocks of keys, scores never held whole (forward and backward) | everywhere; on a GPU for packed documents | |
| ring | those blocks, passed from device to device along a context axis | very long rows | |
| cudnn | cuDNN's flash attention | GPU | float32, packed documents, ALiBi, a context axis |
| splash | Pallas kernel for TPU; interpreted, and slow, elsewhere | TPU | ALiBi, lengths that 128 does not divide |
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from gptjax.errors import UserError
from gptjax.model import sharding
from gptjax.model.architecture import Architecture
from gptjax.model.attention import Visibility, reference
from gptjax.model.blocked import Keys, Queries, blocked, ring

BLOCK = 512  # tokens in a block of keys, and of queries, of splash
SHORT = 1024  # rows up to this long: their matrix of scores is small, and one product is faster than blocks
LONG = 32768  # split rows up to this long gather their keys; chosen by memory and traffic, not by a measured time


class Task(NamedTuple):
    """The properties of an attention call that decide which implementation can compute it."""

    dtype: jax.typing.DTypeLike
    length: int
    head_dim: int
    packed: bool
    alibi: bool = False
    context: int = 1  # devices over which a row is split

    @classmethod
    def of(cls, a: Architecture, *, packed: bool, context: int) -> "Task":
        """The task of training on whole rows."""
        alibi = a.positions == "alibi"
        return cls(jnp.dtype(a.compute_dtype), a.context_length, a.head_dim, packed, alibi, context)


def attend(q: Queries, k: Keys, v: Keys, visibility: Visibility, *, implementation: str = "auto") -> Queries:
    """Attention of whole rows by the named implementation; "auto" takes the best possible one.

    On a mesh with a context axis, each device has its part of the queries and all keys. Memory for scores and
    activations falls with the axis, at the price of gathering keys and values once per layer. "ring" gathers nothing.

    Raises UserError where the named implementation cannot compute this task.
    """
    task = Task(
        dtype=q.dtype,
        length=q.shape[1],
        head_dim=q.shape[3],
        packed=visibility.segments is not None,
        alibi=visibility.slopes is not None,
        context=sharding.axis_size("context"),
    )
    implementation = resolve(implementation, task, sharding.platform())
    q = sharding.constrain(q, sharding.BATCH, "context", "tensor", None)
    rows = "context" if implementation == "ring" else None
    k, v = (sharding.constrain(x, sharding.BATCH, rows, "tensor", None) for x in (k, v))
    return IMPLEMENTATIONS[implementation](q, k, v, visibility)


def limits(implementation: str, task: Task) -> str | None:
    """Why an implementation cannot compute this task, or None if it can."""
    if implementation == "cudnn":
        if task.dtype not in (jnp.bfloat16, jnp.float16):
            return f"computes in bfloat16, not {jnp.dtype(task.dtype).name} (model.compute_dtype)"
        if task.head_dim % 8 or task.head_dim > 128:
            return f"needs a head dimension that is a multiple of 8 and at most 128, not {task.head_dim}"
        if task.packed:
            return "cannot mask packed documents (data.isolate_documents)"
        if task.context > 1:
            return "cannot split rows over devices (mesh.context)"
    if implementation == "splash" and task.length // task.context % 128:
        return f"needs rows that are a multiple of 128 tokens on each device, not {task.length // task.context}"
    if implementation in ("cudnn", "splash") and task.alibi:
        return "has no ALiBi"
    return None


def resolve(implementation: str, task: Task, platform: str) -> str:
    """The implementation that will be used. Raises UserError where the requested one cannot compute the task."""
    if implementation == "auto":
        return choose(task, platform)
    if reason := limits(implementation, task):
        raise UserError(f"model.attention={implementation} {reason}; use xla or auto")
    return implementation


def choose(task: Task, platform: str) -> str:
    """The implementation that "auto" takes on cpu, gpu or tpu."""
    if task.context > 1 and task.length > LONG:
        return "ring"
    best = {"gpu": "cudnn", "tpu": "splash"}.get(platform)
    if best and limits(best, task) is None:
        return best
    return "reference" if task.length <= SHORT else "xla"


# ---- The kernels of vendors ------------------------------------------------------------------------------------------


def cudnn(q: Queries, k: Keys, v: Keys, visibility: Visibility) -> Queries:
    """cuDNN's flash attention, through JAX."""
    window = (visibility.window - 1, 0) if visibility.window else None
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=window, implementation="cudnn")


def splash(q: Queries, k: Keys, v: Keys, visibility: Visibility) -> Queries:
    """Splash attention: blocks that the mask leaves empty are skipped. Interpreted, so slow, without a TPU."""
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    _, length, heads, head_dim = q.shape
    context, tensor = sharding.axis_size("context"), sharding.axis_size("tensor")
    window = visibility.window or length
    mask = kernels.LocalMask((length, length), (window - 1, 0), 0, shard_count=context)
    block = next(size for size in (BLOCK, 256, 128) if (length // context) % size == 0)
    blocks = kernels.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block,
        block_kv_compute=block, block_kv_dkv_compute=block,
    )  # fmt: skip
    kernel = kernels.make_splash_mha(
        kernels.MultiHeadMask([mask] * heads),
        head_shards=tensor,
        q_seq_shards=context,
        block_sizes=blocks,
        interpret=sharding.platform() != "tpu",
    )
    q = (q * head_dim**-0.5).astype(q.dtype)

    def local(kernel, q, k, v, segments):
        q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
        if segments is None:
            out = jax.vmap(lambda *row: kernel(*row))(q, k, v)
        else:
            out = jax.vmap(kernel)(q, k, v, kernels.SegmentIds(*segments))
        return jnp.swapaxes(out, 1, 2)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return local(kernel, q, k, v, visibility.segments)
    query_spec = sharding.fitting(q.shape, (sharding.BATCH, "context", "tensor", None))
    key_spec = sharding.fitting(k.shape, (sharding.BATCH, None, "tensor", None))
    segment_spec = None
    if visibility.segments is not None:
        segment_spec = (PartitionSpec(*query_spec[:2]), PartitionSpec(*key_spec[:2]))
    kernel_spec = kernel.manual_sharding_spec(jax.sharding.NamedSharding(mesh, PartitionSpec("tensor", "context")))
    return jax.shard_map(
        local,
        in_specs=(kernel_spec, query_spec, key_spec, key_spec, segment_spec),
        out_specs=query_spec,
        check_vma=False,
    )(kernel, q, k, v, visibility.segments)


IMPLEMENTATIONS: dict[str, Callable[[Queries, Keys, Keys, Visibility], Queries]] = {
    "reference": reference,
    "xla": blocked,
    "ring": ring,
    "cudnn": cudnn,
    "splash": splash,
}
