"""Low-rank adapters of linear layers (Hu et al. 2021, "LoRA"): W + (alpha / rank) A B, where only A and B are trained.

A model with adapters has `lora_a` [in, rank] and `lora_b` [rank, out] beside the kernels that `model.lora_targets`
names. Everything else in it is frozen: `split` says what is trained, `merge` makes a model without adapters.
"""

import dataclasses
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from gptjax.config import LORA_PATHS
from gptjax.model import float8
from gptjax.model.architecture import Architecture
from gptjax.model.attention import dropout

Params = dict[str, Any]
QKV = ("attention/query", "attention/key", "attention/value")


class Dropout(NamedTuple):
    """What an adapter needs to drop its inputs: one key per row (None to evaluate), and its layer."""

    keys: jax.Array | None
    layer: Int[Array, ""]


class Linear(nnx.Linear):
    """x W + b, plus (alpha / rank) dropout(x) A B where the layer has an adapter.

    A starts uniform within 1 / sqrt(in), as in PEFT. B starts at zero, so that training starts from the base model.
    """

    def __init__(self, a: Architecture, path: str, inputs: int, outputs: int, rngs: nnx.Rngs):
        """`path` is the path of the layer in a block, such as "attention/query"."""
        super().__init__(
            inputs,
            outputs,
            use_bias=a.use_bias or (a.qkv_bias and path in QKV),
            dtype=jnp.dtype(a.compute_dtype),
            dot_general=float8.dot_general if a.matmul == "float8" else jax.lax.dot_general,
            kernel_init=nnx.initializers.normal(a.deviation(f"blocks/{path}/kernel")),
            rngs=rngs,
        )
        self.adapted = a.lora_rank > 0 and re.fullmatch(a.lora_targets, path) is not None
        if self.adapted:
            uniform = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
            self.lora_a = nnx.Param(uniform(rngs.params(), (inputs, a.lora_rank), jnp.float32))
            self.lora_b = nnx.Param(jnp.zeros((a.lora_rank, outputs), jnp.float32))
            self.scale, self.rate = a.lora_alpha / a.lora_rank, a.lora_dropout
            # Sites 0 to 2 num_layers belong to the dropout outside adapters.
            self.sites = 2 * a.num_layers + 1 + LORA_PATHS.index(path), len(LORA_PATHS)

    def __call__(
        self, x: Float[Array, "batch length inputs"], drop: Dropout | None = None
    ) -> Float[Array, "batch length outputs"]:
        y = super().__call__(x)
        if not self.adapted:
            return y
        if drop is not None and self.rate:
            first, stride = self.sites
            x = dropout(x, self.rate, drop.keys, first + stride * drop.layer)
        x = x.astype(self.dtype)
        return y + self.scale * (x @ self.lora_a[...].astype(self.dtype) @ self.lora_b[...].astype(self.dtype))


def split(params: Params) -> tuple[Params, Params]:
    """(trained, frozen): adapters and the rest. Without adapters, all is trained. `join` is the inverse."""
    trained = _select(params, adapters=True)
    return (trained, _select(params, adapters=False)) if trained else (params, {})


def join(trained: Params, frozen: Params) -> Params:
    """The whole tree from the two parts that `split` returns."""
    merged = dict(frozen)
    for name, value in trained.items():
        merged[name] = join(value, merged.get(name, {})) if isinstance(value, dict) else value
    return merged


def merge(params: Params, a: Architecture) -> tuple[Params, Architecture]:
    """The same model without adapters: each adapted W becomes W + (alpha / rank) A B."""

    def visit(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        if "lora_a" not in node:
            return {name: visit(value) for name, value in node.items()}
        update = jnp.einsum("lir,lro->lio", node["lora_a"], node["lora_b"], precision=jax.lax.Precision.HIGHEST)
        rest = {name: value for name, value in node.items() if not name.startswith("lora_")}
        return rest | {"kernel": node["kernel"] + (a.lora_alpha / a.lora_rank) * update}

    return visit(params) if a.lora_rank else params, dataclasses.replace(a, lora_rank=0)


def _select(params: Params, *, adapters: bool) -> Params:
    """The leaves whose names begin with lora_, or all others; branches without such leaves are left out."""
    selected = {}
    for name, value in params.items():
        if not isinstance(value, dict):
            if name.startswith("lora_") == adapters:
                selected[name] = value
        elif branch := _select(value, adapters=adapters):
            selected[name] = branch
    return selected
