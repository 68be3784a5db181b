"""Batches that grow during a run: from a given step on, the gradients of several steps make one update.

A step still takes one batch, so that its data, tokens and learning rate are the same as without stages (McCandlish et
al. 2018, arXiv:1812.06162, on when larger batches pay).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

WEIGHT = "batch_weight"  # key of the weight by which the loss of the batch was divided


class Gathered(NamedTuple):
    """The optimizer's own state, the sum of the gradients since its last update, and the sum of their weights."""

    inner: Any
    total: Any
    weight: Any


def gathered(
    optimizer: optax.GradientTransformation, updates: ArrayLike, weight: ArrayLike
) -> optax.GradientTransformation:
    """The optimizer on the mean of the gradients since its last update, which is the gradient of one large batch.

    Args:
      updates: whether this step ends with an update (more than 0) or only adds its gradients; it may be traced.
      weight: what the loss of this step's batch was divided by; it may be traced.
    """

    def init(params: Any) -> Gathered:
        return Gathered(optimizer.init(params), optax.tree.zeros_like(params), jnp.zeros((), jnp.float32))

    def update(gradients: Any, state: Gathered, params: Any = None) -> tuple[Any, Gathered]:
        total = jax.tree.map(lambda before, gradient: before + weight * gradient, state.total, gradients)
        whole = state.weight + weight
        nothing = optax.tree.zeros_like(gradients)

        def change() -> tuple[Any, Gathered]:
            changes, inner = optimizer.update(jax.tree.map(lambda sum_: sum_ / whole, total), state.inner, params)
            return changes, Gathered(inner, nothing, jnp.zeros_like(whole))

        return jax.lax.cond(jnp.asarray(updates) > 0, change, lambda: (nothing, Gathered(state.inner, total, whole)))

    return optax.GradientTransformation(init, update)


def update_steps(stages: Sequence[tuple[int, int]], num_steps: int) -> np.ndarray:
    """Whether each step ends with an update: bool [num_steps].

    Args:
      stages: (first step, batches per update), in order of steps; before the first, an update has one batch.

    An update that has begun when a stage starts is completed first. The last step ends with an update.
    """
    ends = np.zeros(num_steps, bool)
    step = 0
    while step < num_steps:
        batches = next((batches for begin, batches in reversed(stages) if begin <= step), 1)
        step = min(step + batches, num_steps)
        ends[step - 1] = True
    return ends
