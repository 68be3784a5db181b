"""Memory of the served models, and arrays that several of them share."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from gptjax.generation import decoding
from gptjax.generation.model import Model
from gptjax.model import gpt

MIB, GIB = 1 << 20, 1 << 30


@dataclasses.dataclass(frozen=True)
class Taken:
    """Bytes of a model: its own parameters, those shared with models before it, and the state of its engine."""

    name: str
    parameters: int
    shared: int
    state: int

    @property
    def own(self) -> int:
        """Bytes that would be free without the model."""
        return self.parameters + self.state

    def __str__(self) -> str:
        shared = f" ({self.shared / MIB:.1f} MiB more are shared)" if self.shared else ""
        return f"{self.name}: {self.parameters / MIB:.1f} MiB of weights{shared}, {self.state / MIB:.1f} MiB of caches"


def taken(name: str, model: Model, *, slots: int, capacity: int, others: Sequence[Model] = ()) -> Taken:
    """The memory of a model with these slots, given that `others` are loaded. `capacity`: tokens of each slot."""
    known = {id(leaf) for other in others for leaf in jax.tree.leaves(other.params)}
    leaves = jax.tree.leaves(model.params)
    state = jax.eval_shape(
        lambda: decoding.new_state(architectures=(model.architecture,), slots=slots, capacity=capacity)
    )
    return Taken(
        name,
        sum(_bytes(leaf) for leaf in leaves if id(leaf) not in known),
        sum(_bytes(leaf) for leaf in leaves if id(leaf) in known),
        sum(map(_bytes, jax.tree.leaves(state))),
    )


def share(params: gpt.Params, others: Sequence[gpt.Params]) -> gpt.Params:
    """The parameters, with arrays replaced by those of `others` that have the same path and the same bits."""
    known = [dict(jax.tree_util.tree_leaves_with_path(other)) for other in others]

    def one(path: tuple, leaf: jax.Array) -> jax.Array:
        alike = (other[path] for other in known if path in other)
        return next((other for other in alike if _same_bits(leaf, other)), leaf)

    return jax.tree_util.tree_map_with_path(one, params)


def _same_bits(a: jax.Array, b: jax.Array) -> bool:
    if (a.shape, a.dtype, a.sharding) != (b.shape, b.dtype, b.sharding):
        return False
    return np.array_equal(*(np.asarray(x).reshape(-1).view(np.uint8) for x in (a, b)))


def _bytes(leaf: Any) -> int:
    itemsize = 8 if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
    return math.prod(leaf.shape) * itemsize
