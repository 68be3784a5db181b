"""One optimizer step, compiled for a mesh."""

import re
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from gptjax.config import Config
from gptjax.model import gpt, lora
from gptjax.objectives import language_modeling
from gptjax.parallel import partition
from gptjax.training.state import TrainState

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
MATRICES = r"(?!.*router/).*kernel"


def make_train_step(
    config: Config,
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    mesh: Mesh,
    abstract_state: TrainState,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The jitted step(state, batch) -> (state, metrics). The old state's buffers are given to the new one.

    Gradients of `train.accumulation` micro-batches are summed before one update. A row's dropout depends on
    (seed, step, row in the global batch) only.
    """
    accumulation, ema_decay = config.train.accumulation, config.train.ema_decay
    dropout = config.model.dropout > 0 or (config.model.lora_rank > 0 and config.model.lora_dropout > 0)
    objective = partial(
        language_modeling.loss,
        z_loss=config.objective.z_loss,
        label_smoothing=config.objective.label_smoothing,
        balance_loss=config.objective.balance_loss,
        logits_chunk=config.objective.logits_chunk,
    )

    def gradients(trained: gpt.Params, frozen: gpt.Params, batch: Batch, step: jax.Array) -> tuple[gpt.Params, Metrics]:
        total_weight = jnp.maximum(batch["weights"].sum(), 1.0)
        keys = _dropout_keys(config.seed, step, batch["tokens"].shape[0]) if dropout else None
        cast, fixed = (_cast_kernels(part, config.model.compute_dtype) for part in (trained, frozen))

        def micro_gradients(batch, keys):
            def loss(trained):
                model = nnx.merge(graphdef, lora.join(trained, fixed))
                return objective(model, batch, total_weight=total_weight, dropout_keys=keys)

            grads, metrics = jax.grad(loss, has_aux=True)(cast)
            return jax.tree.map(lambda g, p: g.astype(p.dtype), grads, trained), metrics

        if accumulation == 1:
            return micro_gradients(batch, keys)

        def add(total, inputs):
            return jax.tree.map(jnp.add, total, micro_gradients(*inputs)), None

        micro_batches = jax.tree.map(partial(_split_rows, parts=accumulation, mesh=mesh), (batch, keys))
        zeros = jax.tree.map(
            lambda a: jnp.zeros(a.shape, a.dtype),
            jax.eval_shape(micro_gradients, *jax.tree.map(lambda a: a[0], micro_batches)),
        )
        total, _ = jax.lax.scan(add, zeros, micro_batches)
        return total

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return update(state, batch)

    def update(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        trained, frozen = lora.split(state.params)
        grads, metrics = gradients(trained, frozen, batch, state.step)
        updates, opt_state = optimizer.update(grads, state.opt_state, trained)
        trained = optax.apply_updates(trained, updates)
        ema_params = state.ema_params
        if ema_params is not None:
            # The warm-up of the average (1 + n) / (10 + n) forgets the initial parameters quickly.
            decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))
            average, _ = lora.split(ema_params)
            average = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, average, trained)
            ema_params = lora.join(average, frozen)
        metrics |= {
            "gradient_norm": optax.tree.norm(grads),
            "parameter_norm": optax.tree.norm(state.params),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
        }
        return TrainState(state.step + 1, lora.join(trained, frozen), opt_state, ema_params), metrics

    shardings = jax.tree.map(lambda a: a.sharding, abstract_state)
    return jax.jit(
        step,
        in_shardings=(shardings, NamedSharding(mesh, partition.BATCH)),
        out_shardings=(shardings, partition.replicated(mesh)),
        donate_argnums=0,
    )


def _cast_kernels(params: gpt.Params, dtype: str) -> gpt.Params:
    """The matrices of blocks and head in the compute dtype: cast once a step, and half as much to gather from others.

    Norms, embedding tables and the router of a mixture of experts are used in float32.
    """

    def cast(path, leaf):
        return leaf.astype(dtype) if re.fullmatch(MATRICES, partition.path_string(path)) else leaf

    return jax.tree_util.tree_map_with_path(cast, params)


def _dropout_keys(seed: int, step: jax.Array, rows: int) -> jax.Array:
    """One key for each row of the global batch."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 1), step)
    return jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(rows))


def _split_rows(x: jax.Array, parts: int, mesh: Mesh) -> jax.Array:
    """[batch, ...] -> [parts, batch / parts, ...] such that every device keeps the rows it has.

    Row r goes to micro-batch r % parts. The rows of a micro-batch are then spread over all devices, where
    consecutive rows would lie on a few.
    """
    x = jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)
    spec = partition.BATCH if x.ndim == 3 else partition.ROWS
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, jax.sharding.PartitionSpec(None, *spec)))
