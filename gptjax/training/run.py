"""A training run: its set-up, its batches, its checkpoints, and how it ends. The loop is in `gptjax.train`."""

import contextlib
import dataclasses
import errno
import json
import math
import os
import sys
from collections.abc import Callable, Collection, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import optax

from gptjax import config as config_lib
from gptjax import files
from gptjax.artifacts import checkpoints as checkpoints_lib
from gptjax.artifacts import integrity, manifest, mirror
from gptjax.artifacts import workdir as workdir_lib
from gptjax.artifacts.lock import Lock
from gptjax.data.building.build import Progress
from gptjax.data.opening import RunData
from gptjax.data.pipeline import batches as batches_lib
from gptjax.data.pipeline.batches import BatchSource
from gptjax.errors import RunError, UserError
from gptjax.files import write_whole
from gptjax.model import gpt, kernels
from gptjax.objectives import objective as objectives
from gptjax.objectives.objective import Batch
from gptjax.optim.hyper import Hyperparameters
from gptjax.parallel import mesh as mesh_lib
from gptjax.parallel import partition
from gptjax.processes import distributed, runtime
from gptjax.training import footprint, pretrained, reference, sinks, stopping
from gptjax.training.program import Program
from gptjax.training.rollouts import Rollouts
from gptjax.training.state import TrainState


class Ending:
    """Calls what was added, the last first, when a run ends for any reason.

    If one call fails, the others are still made, and the error that ended the run is still raised.
    """

    def __init__(self):
        self._closings: list[Callable[[], Any]] = []

    def add(self, close: Callable[[], Any]) -> None:
        self._closings.append(close)

    def __enter__(self) -> "Ending":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        first: BaseException | None = None
        for close in reversed(self._closings):
            try:
                close()
            except (Exception, KeyboardInterrupt) as failure:
                if error or first:
                    about = files.explain(failure) if isinstance(failure, OSError) else str(failure)
                    if about != str(error or first):  # a disk that cannot says the same again
                        print(f"while the run ended: {about}", file=sys.stderr)
                else:
                    first = failure
        if isinstance(first, OSError):
            text = files.explain(first)
            raise RunError(text if files.goes_on(text) else f"{text}. The same command continues") from first
        if first:
            raise first


@dataclasses.dataclass
class Run:
    """Everything of a run that does not change from step to step.

    Attributes:
      start: the step at which it begins: 0, or that of the last checkpoint.
      origin: the model that it starts from, if any.
      attention: the kernel that is used.
      changes: options with other values than before `start`.
      lock: of the work directory, in the process that holds it.
      rollouts: makes the batches of an objective for which the model writes texts.
    """

    workdir: Path
    program: Program
    data: RunData
    batches: BatchSource
    checkpoints: checkpoints_lib.Checkpoints
    start: int
    origin: pretrained.Origin | None
    attention: str
    changes: workdir_lib.Changes
    lock: Lock | None = None
    rollouts: Rollouts | None = None
    _told: list[str] = dataclasses.field(default_factory=list)

    @classmethod
    def open(
        cls,
        config: config_lib.Config,
        workdir: Path,
        *,
        chosen: Collection[str] = (),
        allow_changes: bool = False,
        progress: Progress | None = None,
    ) -> "Run":
        """Sets a run up. Everything that can be wrong is found here, before anything is compiled.

        Args:
          chosen: options that were set on the command line; those of the model are not taken from `init_from`.
          allow_changes: whether a run may go on with other values of options that affect the rest of its training.
          progress: called with the progress of building a token store.

        Raises UserError. Every process of a run calls it.
        """
        # 1. The model to start from, the devices, and a config that fits both.
        group = distributed.current()
        sinks.check(config.logging.trackers)
        origin = pretrained.of_own(workdir, config) or pretrained.find(config.init_from)
        config = pretrained.adopt(config, origin, chosen)
        rows = config.train.batch_size // config.train.accumulation
        cache, dtype = config_lib.cache_directory(config), config.model.compute_dtype
        runtime.start(config.mesh, rows=rows, cache_dir=cache, compute_dtype=dtype)
        mesh = mesh_lib.make_mesh(config.mesh)
        with_devices = config.copy_and_resolve_references()
        with_devices.mesh.data = mesh.shape["data"]
        config_lib.validate(with_devices)
        footprint.check_batch(config, mesh, len(partition.process_rows(config.train.batch_size, mesh)))

        # 2. Data, objective and program. All processes must have the same config and data.
        with group.first_goes_first(), _naming_cache(cache):  # process 0 builds the token store, if there is none
            data = RunData.open(config, tokenizer=pretrained.own_tokenizer(origin, config), progress=progress)
        config, objective, batches = settle(config, origin, data, partition.process_rows(config.train.batch_size, mesh))
        group.same("config", dict(config_lib.flat_values(config)))
        group.same("data", {"source_fingerprint": data.identity["source_fingerprint"]})
        program = Program.of(config, mesh, objective=objective)
        _ = program.hyperparameters  # raises UserError for values that are not finite
        # 3. Limits of the attention kernel and of sharding, before the work directory is changed.
        task = kernels.Task.of(
            program.architecture, packed=config.data.isolate_documents, context=mesh.shape["context"]
        )
        attention = kernels.resolve(program.architecture.attention, task, mesh.devices.flat[0].platform)
        footprint.check_sharded(program.abstract_params, mesh, allow_replicated=config.mesh.allow_replicated)
        identity = {"source": config.data.source, **data.identity}
        # 4. The work directory, and the checkpoint from which the run continues.
        changes = group.first(lambda: claim(workdir, config, allow_changes=allow_changes))
        monitor = objective.monitor
        checkpoints = checkpoints_lib.Checkpoints(
            workdir,
            keep=config.train.keep_checkpoints,
            monitor=monitor.name,
            lower_is_better=monitor.lower_is_better,
        )
        start = group.first(lambda: max(checkpoints.steps(), default=0))
        if start > (num_steps := config.train.num_steps):
            raise UserError(
                f"train.num_steps is {num_steps}, and the run in {mirror.shown(workdir)} is at step {start}; use at "
                "least that"
            )
        saved = checkpoints.directory / str(start) if start else None
        footprint.check_fits(program.target, mesh, checkpoint=saved)
        group.advice = checkpoints.advice
        rollouts = Rollouts(program, data, batches.questions) if isinstance(objective, objectives.Writing) else None
        models = batches.models | (rollouts.reward.models if rollouts else {})
        if models and group.index == 0:
            identity["models"] = {name: reference.fingerprint(params) for name, params in models.items()}
        if start:
            group.first(lambda: workdir_lib.check_data(workdir, identity))
        run = cls(workdir, program, data, batches, checkpoints, start, origin, attention, changes, rollouts=rollouts)
        if group.index == 0:
            run._describe(identity)
        return run

    def _describe(self, identity: dict[str, Any]) -> None:
        """Writes the files that describe the run: manifest.json, config.json, tokenizer.json, data_card.md.

        The manifest comes first, so that changes are on record before config.json has them.
        """
        config, program = self.program.config, self.program
        for directory in (self.workdir, *(self.workdir / "checkpoints").glob("*/")):
            files.sweep(directory)
        changes = workdir_lib.read_changes(self.workdir) if self.start else []
        if self.start and self.changes:
            change = {"step": self.start, "options": {name: list(values) for name, values in self.changes.items()}}
            changes += [] if change in changes[-1:] else [change]
        about = manifest.build(config, program.mesh, program.abstract_params, identity, changes)
        write_whole(self.workdir / "manifest.json", json.dumps(about, indent=1) + "\n")
        write_whole(self.workdir / "config.json", config_lib.to_json(config))
        self.data.tokenizer.save(self.workdir / "tokenizer.json")
        if card := self.data.card:
            write_whole(self.workdir / "data_card.md", card)
        self.publish()

    def notes(self) -> Iterator[str]:
        """Lines for the user before the first step."""
        program, group = self.program, distributed.current()
        num_steps = program.config.train.num_steps
        yield (
            f"{gpt.parameter_count(program.abstract_params):,} parameters, {self.data.num_training_tokens:,} training "
            f"tokens, vocabulary {self.data.tokenizer.vocab_size}, {num_steps} steps of {program.tokens_per_step:,} "
            f"tokens ({num_steps / self.batches.steps_per_epoch:.2f} epochs)"
        )
        yield from (f"beware: {note}" for source in self.data.stores for note in source.store.notes)
        yield from self.batches.notes
        yield from self._told
        yield f"attention: {self.attention}"
        yield from footprint.warnings(program.target, program.mesh)
        processes = f"; {group.size} processes" if group.size > 1 else ""
        yield footprint.describe(program.target, program.mesh) + processes
        if self.start:
            yield f"continuing at step {self.start} from {mirror.shown(self.checkpoints.directory / str(self.start))}"
            for name, (before, now) in self.changes.items():
                yield f"changed from here on: {name} is {now!r}, it was {before!r}"
            yield from self._rates_laid_anew()

    def _rates_laid_anew(self) -> Iterator[str]:
        """The learning rates after the changes, with those without them in brackets."""
        old = self.program.config.copy_and_resolve_references().unlock()
        for name, (before, _) in self.changes.items():
            section, _, option = name.rpartition(".")
            (old[section] if section else old)[option] = before
        now, before, end = self.program.hyperparameters, Hyperparameters(old), self.program.config.train.num_steps
        steps = sorted({self.start + round(share * (end - 1 - self.start)) for share in (0, 0.25, 0.5, 0.75, 1)})
        for name in now.rates(0):
            laid = [(float(now.rates(step)[name]), float(before.rates(step)[name])) for step in steps]
            if any(new != was for new, was in laid):
                ended = old.train.num_steps
                told = [
                    f"step {step + 1}: {new:.3g}" + (f" (was {was:.3g})" if step < ended else "")
                    for step, (new, was) in zip(steps, laid, strict=True)
                ]
                yield f"new {name.replace('_', ' ')}: {', '.join(told)}"

    def state(self) -> TrainState:
        """The state of the last checkpoint, of the model that the run starts from, or a fresh one.

        Where the objective compares with the initial model, examples get its log-probabilities.
        """
        if self.start:
            state = self.checkpoints.restore(self.start, self.program.target)
            self._compare_with(lambda: self._first_state().params)
        else:
            state = self._first_state()
            self._compare_with(lambda: state.params)
        return state

    def _compare_with(self, beginning: Callable[[], gpt.Params]) -> None:
        self._told += reference.fill(self.program, self.data, self.workdir, beginning, continues=self.start > 0)

    def _first_state(self) -> TrainState:
        """The state before the first step, also for a run that continues."""
        state = self.program.initial_state()
        origin = self.origin
        if origin is None:
            return state
        if origin.is_own:
            origin = pretrained.find(origin.init_from)
        return pretrained.load(origin, state, self.program.optimizer(self.program.hyperparameters.at(0)))

    def batch(self, step: int, state: TrainState) -> Batch:
        """The batch of a step, on the devices.

        `state` is for objectives for which the model writes texts; batches of data depend on seed and step only.
        """
        rows = self.rows(step)
        if self.rollouts is not None:
            return self.rollouts.batch(step, rows["questions"], state)
        return self.program.to_device(rows)

    @property
    def batch_metrics(self) -> dict[str, float]:
        """Metrics of the last batch that are no arrays of it: the rewards of the texts written for it."""
        return self.rollouts.metrics if self.rollouts is not None else {}

    def rows(self, step: int) -> dict[str, Any]:
        """The batch of a step on the host: the rows of this process. Steps are asked for one after the other."""
        number, rows = next(self._stream)
        if number != step:
            raise ValueError(f"batch {number} was read for step {step}")
        return rows

    @cached_property
    def _stream(self) -> Iterator[tuple[int, dict]]:
        return batches_lib.iterate(self.batches, self.start)

    @cached_property
    def _parameter_norm(self) -> Any:
        return jax.jit(optax.tree.norm)

    def publish(self) -> None:
        """Copies changed files to the bucket, if the run is in one."""
        if distributed.current().index == 0:
            mirror.push(self.workdir)

    def save(self, step: int, state: TrainState, line: dict[str, Any]) -> None:
        """Begins to save a state and its validation line. Raises RunError if the parameters are not finite."""
        if self.lock:
            self.lock.check()
        if not math.isfinite(self._parameter_norm(state.params)):  # else it would replace a good checkpoint
            raise RunError(f"the parameters are not finite after step {step}. {self.advice()}")
        monitor = self.program.objective.monitor.name
        self.checkpoints.save(
            step,
            state,
            config=self.program.config,
            tokenizer=self.data.tokenizer,
            template=self.data.template,
            generation=self.origin and self.origin.generation,
            metrics={f"validation_{monitor}": line[monitor]} if line else {},
        )

    def stop_if_asked(
        self, step: int, state: TrainState, stop: stopping.StopSignals, before: Callable[[], None]
    ) -> None:
        """If this or another process got a signal: calls `before`, saves, and raises RunError.

        Between two updates with the same texts nothing can be saved; a later step then looks again.
        """
        if self.rollouts is not None and step % self.rollouts.num_iterations:
            return
        signal = distributed.current().stops_at(step, stop.received)
        if not signal:
            return
        before()
        if step not in self.checkpoints.steps():
            self.publish()
            self.save(step, state, {})
        self.checkpoints.wait()
        where = mirror.shown(self.checkpoints.directory / str(step))
        raise RunError(f"stopped by {signal} at step {step}; saved in {where}. The same command continues")

    def advice(self) -> str:
        """What to do after a divergence."""
        saved = self.checkpoints.steps() or "none"
        where = mirror.shown(self.checkpoints.directory)
        return f"Try a lower --config.optimizer.learning_rate. Checkpoints: {saved} in {where}"

    def close(self) -> None:
        """Stops reading ahead; waits for the last save."""
        if "_stream" in vars(self):
            self._stream.close()
        if self.rollouts is not None:
            self.rollouts.close()
        self.checkpoints.close()


@contextlib.contextmanager
def _naming_cache(cache: Path) -> Iterator[None]:
    """Turns an error of the cache's disk into a UserError that says how to move the cache."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT):
            raise
        there, path = cache.absolute(), Path(str(error.filename or "")).absolute()
        if not (path.is_relative_to(there) or (error.filename and there.is_relative_to(path))):
            raise
        name = "GPTJAX_CACHE" if os.environ.get("GPTJAX_CACHE") else "the cache"
        raise UserError(
            f"{name}={cache} cannot be written: {files.words(error)}; set GPTJAX_CACHE or --config.data.cache_dir to a "
            "directory that can"
        ) from None


def claim(workdir: Path, config: config_lib.Config, *, allow_changes: bool) -> workdir_lib.Changes:
    """`workdir.claim`, with damaged files repaired and damaged checkpoints moved aside. Raises UserError."""
    directory = workdir / "checkpoints"
    newest = integrity.newest_whole(directory)
    integrity.mend(workdir, newest)
    changes = workdir_lib.claim(workdir, config, step=newest, allow_changes=allow_changes)
    integrity.set_aside(directory, newest)
    return changes


def settle(
    config: config_lib.Config, origin: pretrained.Origin | None, data: RunData, rows: Any = None
) -> tuple[config_lib.Config, objectives.Objective, BatchSource]:
    """The resolved config of a run, which config.json holds, with its objective and its batches.

    Args:
      config: what the user asks for, with the model of `origin` adopted.
      rows: rows of the global batch that this process reads.
    """
    name = objectives.settled_name(config, data)
    config = pretrained.with_vocabulary(config, origin, data.tokenizer).copy_and_resolve_references().unlock()
    config.objective.name = name
    objective = objectives.make(config)
    batches = objective.batches(data, config, rows)
    objectives.check_fields(objective, batches, config)
    config = config_lib.resolve(config, data.tokenizer.vocab_size, batches.steps_per_epoch)
    return config, objective, batches
