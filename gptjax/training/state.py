"""What changes from step to step."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from gptjax.model import gpt, lora
from gptjax.model.architecture import Architecture
from gptjax.parallel import partition


@struct.dataclass
class TrainState:
    """Parameters, optimizer state and, with an average, `ema_params`; `step` counts the updates made.

    `Any`, because JAX also builds this tree of shapes, of shardings and of its own markers.
    """

    step: Any
    params: Any
    opt_state: Any
    ema_params: Any

    @property
    def evaluation_params(self) -> gpt.Params:
        """The averaged parameters if there are any."""
        return self.params if self.ema_params is None else self.ema_params


def create_state(params: gpt.Params, optimizer: optax.GradientTransformation, *, ema: bool) -> TrainState:
    """The state before the first step."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(lora.split(params)[0]),
        ema_params=jax.tree.map(jnp.copy, params) if ema else None,
    )


def abstract_state(
    architecture: Architecture, optimizer: optax.GradientTransformation, mesh: Mesh, *, ema: bool
) -> Any:
    """Shapes, dtypes and shardings of the state: what a checkpoint is restored into."""
    _, params = gpt.abstract_model(architecture)
    state = jax.eval_shape(lambda p: create_state(p, optimizer, ema=ema), params)
    shardings = partition.state_shardings(state, params, mesh)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, shardings)


def initial_state(
    architecture: Architecture, optimizer: optax.GradientTransformation, mesh: Mesh, *, ema: bool, seed: int
) -> TrainState:
    """A fresh state, made where it lives: each device computes only its own shards."""
    abstract = abstract_state(architecture, optimizer, mesh, ema=ema)

    def create(key):
        return create_state(gpt.initialise(architecture, key), optimizer, ema=ema)

    shardings = jax.tree.map(lambda a: a.sharding, abstract)
    return jax.jit(create, out_shardings=shardings)(jax.random.key(seed))
