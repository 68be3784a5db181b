"""A run as an object: from a settled config and a mesh to the model, the objective, the state and the compiled step.

Training, planning, descriptions, benchmarks, studies and tests all use it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from gptjax import config as config_lib
from gptjax.config import Config
from gptjax.model import gpt, lora
from gptjax.model.architecture import Architecture
from gptjax.objectives import objective as objectives
from gptjax.objectives.objective import Batch, Metrics, Objective
from gptjax.optim import optimizers
from gptjax.optim.gathering import WEIGHT, gathered
from gptjax.optim.hyper import UPDATES, Hyper, Hyperparameters, names
from gptjax.parallel import partition
from gptjax.training.state import TrainState, create_state
from gptjax.training.step import Step

CompiledStep = Callable[[TrainState, Batch, Hyper], tuple[TrainState, Metrics]]


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """What a config means on a mesh. Nothing is computed or compiled before it is asked for.

    Attributes:
      config: resolved, with its objective settled.
      members: how many runs are packed into the step; 0: one run, whose arrays have no axis for members.
    """

    config: Config
    mesh: Mesh
    architecture: Architecture
    objective: Objective
    members: int = 0

    @classmethod
    def of(
        cls,
        config: Config,
        mesh: Mesh,
        vocab_size: int = 0,
        *,
        objective: Objective | None = None,
        members: int = 0,
    ) -> "Program":
        """The program of a config.

        Args:
          vocab_size: of the tokenizer, where `model.vocab_size` is 0.
          objective: instead of the one that `objective.name` says.
          members: runs that differ in hyper-parameters and seeds alone, packed into one program. Arrays of states,
            batches and hyper-parameters then have one more axis in front, split over the mesh's axis "member".
        """
        architecture = Architecture.from_config(config.model, vocab_size)
        return cls(config, mesh, architecture, objective or objectives.make(config), members)

    @cached_property
    def hyperparameters(self) -> Hyperparameters:
        return Hyperparameters(self.config)

    @cached_property
    def abstract_params(self) -> gpt.Params:
        """Shapes and dtypes of the parameters of one run."""
        return gpt.abstract_params(self.architecture)

    def optimizer(self, hyper: Hyper) -> optax.GradientTransformation:
        """The optimizer with the values of one step. With `schedule.batch_stages` they include the batch's weight."""
        optimizer = optimizers.make_optimizer(
            self.config.optimizer, lora.split(self.abstract_params)[0], hyper, widening=self.architecture.widening
        )
        if not self.config.schedule.batch_stages:
            return optimizer
        return gathered(optimizer, hyper.get(UPDATES, 1.0), hyper.get(WEIGHT, 1.0))

    @cached_property
    def target(self) -> TrainState:
        """Shapes, dtypes and shardings of the state: what a checkpoint is restored into."""
        state = jax.eval_shape(self._initializer, self._keys(0))
        shardings = partition.state_shardings(state, self.abstract_params, self.mesh, members=self.members)
        return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, shardings)

    def initial_state(self, *seeds: int) -> TrainState:
        """A fresh state; each device computes only its own shards.

        Args:
          seeds: of each member; default: `config.seed`.
        """
        shardings = jax.tree.map(lambda a: a.sharding, self.target)
        return jax.jit(self._initializer, out_shardings=shardings)(self._keys(*(seeds or [self.config.seed])))

    def _keys(self, *seeds: int) -> jax.Array:
        if not self.members:
            return jax.random.key(seeds[0])
        if len(seeds) not in (1, self.members):
            raise ValueError(f"{len(seeds)} seeds for {self.members} members")
        seeds = seeds if len(seeds) == self.members else seeds * self.members
        return jnp.stack([jax.random.key(seed) for seed in seeds])

    @cached_property
    def _initializer(self) -> Callable[[jax.Array], TrainState]:
        """From a random key, or those of the members, to the state before the first step."""
        optimizer = self.optimizer(dict.fromkeys(names(), 0.0))  # the structure of its state does not depend on them
        ema, reference = config_lib.averages(self.config), self.objective.reference

        def create(key: jax.Array) -> TrainState:
            return create_state(gpt.initialise(self.architecture, key), optimizer, ema=ema, reference=reference)

        return jax.vmap(create) if self.members else create

    @property
    def batch_specs(self) -> dict[str, PartitionSpec]:
        """How each field of a batch is split."""
        return {
            name: PartitionSpec(*self._stacked, *partition.field_spec(field.axes))
            for name, field in self.objective.fields.items()
        }

    @property
    def _stacked(self) -> tuple[str | None, ...]:
        """The beginning of a PartitionSpec: how the axis of members is split; empty without members."""
        return () if not self.members else ("member",) if "member" in self.mesh.shape else (None,)

    @property
    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The global batch, of all members, as shapes with shardings."""
        shapes = objectives.abstract_batch(self.objective, self.config)
        front = (self.members,) if self.members else ()
        return {
            name: jax.ShapeDtypeStruct(
                (*front, *a.shape), a.dtype, sharding=NamedSharding(self.mesh, self.batch_specs[name])
            )
            for name, a in shapes.items()
        }

    def to_device(self, batch: dict[str, ArrayLike]) -> Batch:
        """The objective's fields as sharded arrays, from the rows that this process has read."""
        rows = self.config.train.batch_size
        batch = {name: batch[name] for name in self.objective.fields}
        return partition.to_device(batch, self.mesh, batch_size=None if self.members else rows, specs=self.batch_specs)

    def hyper(self, step: int) -> Hyper:
        """The hyper-parameters of a step on the devices; what does not change is sent once."""
        return self._constant_hyper | self._placed(self.hyperparameters.rates(step))

    def hyper_of_members(self, members: Sequence[Hyperparameters], step: int) -> Hyper:
        """The hyper-parameters of a step, stacked over the packed runs."""
        values = [member.at(step) for member in members]
        return self._placed({name: np.stack([value[name] for value in values]) for name in values[0]})

    @cached_property
    def _constant_hyper(self) -> Hyper:
        return self._placed(self.hyperparameters.constant)

    def _placed(self, values: Hyper) -> Hyper:
        sharding = NamedSharding(self.mesh, PartitionSpec(*self._stacked))
        if jax.process_count() == 1:
            return jax.device_put(values, sharding)
        return {name: partition.place(value, sharding) for name, value in values.items()}

    @cached_property
    def step(self) -> CompiledStep:
        """The jitted step(state, batch, hyper) -> (state, metrics). The old state's buffers become the new one's."""
        return self._compiled(norms=False)

    @cached_property
    def step_with_norms(self) -> CompiledStep:
        """`step` with the norms of every layer among the metrics."""
        return self._compiled(norms=True)

    def _compiled(self, *, norms: bool) -> CompiledStep:
        model = self.config.model
        update = Step(
            architecture=self.architecture,
            objective=self.objective,
            optimizer=self.optimizer,
            mesh=self.mesh,
            compute_dtype=model.compute_dtype,
            average=optimizers.average(self.config.optimizer),
            accumulation=self.config.train.accumulation,
            dropout=model.dropout > 0 or (model.lora_rank > 0 and model.lora_dropout > 0),
            norms=norms,
        )
        if self.members:
            update = jax.vmap(update, spmd_axis_name="member" if "member" in self.mesh.shape else None)

        def step(state: TrainState, batch: Batch, hyper: Hyper) -> tuple[TrainState, Metrics]:
            return update(state, batch, hyper)  # the compiled program has the name of this function

        place = partial(NamedSharding, self.mesh)
        shardings = jax.tree.map(lambda a: a.sharding, self.target)
        batch = {name: place(spec) for name, spec in self.batch_specs.items()}
        rest = place(PartitionSpec(*self._stacked))
        return jax.jit(step, in_shardings=(shardings, batch, rest), out_shardings=(shardings, rest), donate_argnums=0)

    @property
    def abstract_hyper(self) -> Any:
        """The hyper-parameters as shapes with shardings."""
        front = (self.members,) if self.members else ()
        sharding = NamedSharding(self.mesh, PartitionSpec(*self._stacked))
        scalar = jax.ShapeDtypeStruct(front, jnp.float32, sharding=sharding)
        key = jax.ShapeDtypeStruct((*front, 2), jnp.uint32, sharding=sharding)
        return dict.fromkeys(names(), scalar) | {"dropout_key": key}

    @property
    def tokens_per_step(self) -> int:
        """Positions in a batch, with padding."""
        return self.config.train.batch_size * self.config.model.context_length
