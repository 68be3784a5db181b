"""What changes from step to step."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from gptjax.model import gpt, lora


@struct.dataclass
class TrainState:
    """Parameters, optimizer state, the parameters' average if there is one; `step` counts the batches taken.

    `reference_params` are the initial parameters, for objectives that compare with them. Types are `Any`, because JAX
    also builds this tree with shapes, shardings and markers of its own as leaves.
    """

    step: Any
    params: Any
    opt_state: Any
    ema_params: Any
    reference_params: Any = None

    @property
    def evaluation_params(self) -> gpt.Params:
        """The averaged parameters if there are any."""
        return self.params if self.ema_params is None else self.ema_params


def create_state(
    params: gpt.Params, optimizer: optax.GradientTransformation, *, ema: bool, reference: bool = False
) -> TrainState:
    """The state before the first step. With adapters, the reference is the model without them, and is not copied."""
    trained, frozen = lora.split(params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(trained),
        ema_params=jax.tree.map(jnp.copy, params) if ema else None,
        reference_params=jax.tree.map(jnp.copy, params) if reference and not frozen else None,
    )
