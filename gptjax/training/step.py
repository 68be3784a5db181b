"""One optimizer step, a pure function of state, batch and this step's hyper-parameters."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gptjax.model import gpt, lora
from gptjax.model.architecture import Architecture
from gptjax.objectives.objective import Batch, Field, Metrics, Models, Objective, OfWholeBatch
from gptjax.optim.gathering import WEIGHT
from gptjax.optim.hyper import Hyper
from gptjax.parallel import partition
from gptjax.parameters import map_rows, path_string
from gptjax.training.state import TrainState


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """step(state, batch, hyper) -> (state, metrics), for a mesh.

    Gradients of `accumulation` micro-batches are summed before one update. A row's dropout depends on (seed, step, row
    in the global batch) only. Under `jax.vmap`, with stacked arguments, it advances several runs at once.

    Attributes:
      optimizer: (hyper-parameters, which may be traced) -> the optimizer of this step.
      average: (hyper-parameters, optimizer state, parameters) -> the average that the optimizer keeps; None: it keeps
        none.
      dropout: whether rows get random keys.
      norms: metrics have the norms of each layer's parameters, gradients and updates.
    """

    architecture: Architecture
    objective: Objective
    optimizer: Callable[[Hyper], optax.GradientTransformation]
    mesh: Mesh
    compute_dtype: str
    average: Callable[[Hyper, Any, gpt.Params], gpt.Params] | None = None
    accumulation: int = 1
    dropout: bool = False
    norms: bool = False

    def __call__(self, state: TrainState, batch: Batch, hyper: Hyper) -> tuple[TrainState, Metrics]:
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            return self._update(state, batch, hyper)

    def _update(self, state: TrainState, batch: Batch, hyper: Hyper) -> tuple[TrainState, Metrics]:
        # 1. Gradients of what is trained: everything, or adapters alone.
        trained, frozen = lora.split(state.params)
        weight = self.objective.weight(batch)
        grads, metrics = self._gradients(trained, frozen, state, batch, hyper, weight)
        # 2. The update, with the values of this step.
        updates, opt_state = self.optimizer(hyper | {WEIGHT: weight}).update(grads, state.opt_state, trained)
        changed = optax.apply_updates(trained, updates)
        # 3. The average follows the new parameters.
        ema_params = state.ema_params
        if ema_params is not None:
            if self.average is None:
                average = _averaged(lora.split(ema_params)[0], changed, hyper["ema_decay"], state.step)
            else:
                average = self.average(hyper, opt_state, changed)
            ema_params = lora.join(average, frozen)
        metrics |= {
            "gradient_norm": optax.tree.norm(grads),
            "parameter_norm": optax.tree.norm(state.params),
            "update_norm": optax.tree.norm(updates),
            "learning_rate": hyper["learning_rate"],
        }
        if self.norms:
            for kind, tree in (("parameter", trained), ("gradient", grads), ("update", updates)):
                metrics |= _layer_norms(kind, tree)
        new = state.replace(
            step=state.step + 1, params=lora.join(changed, frozen), opt_state=opt_state, ema_params=ema_params
        )
        return new, metrics

    def _gradients(
        self,
        trained: gpt.Params,
        frozen: gpt.Params,
        state: TrainState,
        batch: Batch,
        hyper: Hyper,
        total_weight: jax.Array,
    ) -> tuple[gpt.Params, Metrics]:
        """The gradients and the metrics of a global batch, summed over its micro-batches."""
        cast, fixed = (_cast(part, self.compute_dtype) for part in (trained, frozen))
        first = fixed if frozen else _cast(state.reference_params or {}, self.compute_dtype)
        reference = reference_model(self.objective, self.architecture, first)
        keys = _dropout_keys(hyper["dropout_key"], state.step, _num_rows(batch)) if self.dropout else None
        split = batch
        if self.accumulation > 1:
            split = {name: self._split_rows(x, self.objective.fields[name]) for name, x in batch.items()}
        if isinstance(self.objective, OfWholeBatch):
            models = Models(gpt.bind(self.architecture, lora.join(cast, fixed)), reference)
            numbers = partial(self.objective.whole_batch, models, total_weight=total_weight)
            hyper = hyper | (numbers(batch) if self.accumulation == 1 else _summed(numbers, split))

        def micro_gradients(batch: Batch, keys: jax.Array | None) -> tuple[gpt.Params, Metrics]:
            def loss(trained: gpt.Params) -> tuple[jax.Array, Metrics]:
                models = Models(gpt.bind(self.architecture, lora.join(trained, fixed)), reference)
                return self.objective.loss(models, batch, total_weight=total_weight, hyper=hyper, dropout_keys=keys)

            grads, metrics = jax.grad(loss, has_aux=True)(cast)
            return jax.tree.map(lambda g, p: g.astype(p.dtype), grads, trained), metrics

        if self.accumulation == 1:
            return micro_gradients(batch, keys)
        return _summed(micro_gradients, split, keys if keys is None else self._split_rows(keys, Field(("row",))))

    def _split_rows(self, x: jax.Array, field: Field) -> jax.Array:
        """[rows, ...] -> [accumulation, rows / accumulation, ...] such that every device keeps the rows it has.

        Row r goes to micro-batch r % accumulation. So the rows of a micro-batch are on all devices; consecutive rows
        would be on a few.
        """
        parts = self.accumulation
        x = jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)
        spec = PartitionSpec(None, *partition.field_spec(field.axes))
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))


def _summed(function: Callable[..., Any], *micro_batches: Any) -> Any:
    """The sum of `function` over micro-batches, which are stacked on a leading axis."""

    def add(total: Any, inputs: tuple[Any, ...]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(*inputs)), None

    shapes = jax.eval_shape(function, *jax.tree.map(lambda a: a[0], micro_batches))
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    return jax.lax.scan(add, zeros, micro_batches)[0]


def reference_model(objective: Objective, architecture: Architecture, first: gpt.Params) -> gpt.GPT | None:
    """The initial model without adapters, if the objective needs it."""
    return first_model(architecture, first) if objective.reference else None


def first_model(architecture: Architecture, first: gpt.Params) -> gpt.GPT:
    """The initial model of a run, without adapters."""
    return gpt.bind(dataclasses.replace(architecture, lora_rank=0), first)


def _averaged(average: gpt.Params, params: gpt.Params, decay: jax.Array, step: jax.Array) -> gpt.Params:
    """The moving average with new parameters. The decay is at most (1 + n) / (10 + n), to forget the start quickly.

    Written as e + share (p - e), so that the average of equal numbers is exactly that number.
    """
    share = 1.0 - jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda e, p: e + share * (p - e), average, params)


def _cast(params: gpt.Params, dtype: str) -> gpt.Params:
    """Casts what is used in the compute dtype: once per step, before the all-gather, whose bytes it halves."""
    return map_rows(lambda row, leaf: leaf.astype(dtype) if row.dtype == "compute" else leaf, params)


def _num_rows(batch: Batch) -> int:
    return next(iter(batch.values())).shape[0]


def _dropout_keys(key_data: jax.Array, step: jax.Array, rows: int) -> jax.Array:
    """One key for each row of the global batch."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.wrap_key_data(key_data), 1), step)
    return jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(rows))


def _layer_norms(kind: str, tree: gpt.Params) -> Metrics:
    """{"norms/KIND/PATH": a scalar, or a norm for each layer of stacked parameters}."""
    norms = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = path_string(path)
        axes = tuple(range(name.startswith("blocks/"), leaf.ndim))
        norms[f"norms/{kind}/{name}"] = jnp.sqrt(jnp.square(leaf.astype(jnp.float32)).sum(axes))
    return norms
