"""Train a GPT: config -> checkpoints, metrics, samples and a report in a work directory.

  python -m gptjax.train --config=configs/quickstart.py --workdir=runs/quickstart
  python -m gptjax.train --config=configs/quickstart.py:runlocal --workdir=runs/try --config.train.num_steps=9
  python -m gptjax.train --config=configs/ladder.py:d6 --describe

The same command on the same work directory continues where it stopped; with --allow_changes it may be longer, or have
another schedule. Ctrl-C, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 save first. On several machines, start it once on each:
`srun` and Cloud TPU need no flags (`gptjax launch` writes the job).
"""

import sys
import time
import types
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from gptjax import cli, failures, files
from gptjax import config as config_lib
from gptjax.errors import UserError
from gptjax.processes import cluster, distributed

if TYPE_CHECKING:
    from gptjax.training.run import Ending


def main(argv: list[str]) -> None:
    flag_values = flags.FlagValues()
    cli.define_config(flag_values)
    flags.DEFINE_string(
        "workdir",
        None,
        "where everything of the run is written, e.g. --workdir=runs/first",
        flag_values=flag_values,
    )
    flags.DEFINE_string(
        "profile",
        None,
        "trace COUNT steps from STEP on and print what takes the time, e.g. --profile=100:5",
        flag_values=flag_values,
    )
    flags.DEFINE_bool(
        "describe",
        False,
        "print parameters, FLOPs, tokens and memory, and train nothing, e.g. --describe",
        flag_values=flag_values,
    )
    flags.DEFINE_bool(
        "allow_changes",
        False,
        "continue a run with a changed schedule, changed rates or other options of training, e.g. "
        "--config.train.num_steps=4000 --allow_changes",
        flag_values=flag_values,
    )
    cluster.define_flags(flag_values)
    cli.parse(flag_values, argv, __doc__)
    if flag_values.describe:
        describe(cli.read_config(flag_values), chosen=cli.chosen_options(flag_values))
        return
    if not flag_values.workdir:
        raise UserError("--workdir is missing; e.g. --workdir=runs/first")
    config, workdir = cli.read_config(flag_values), flag_values.workdir
    with distributed.join(flag_values, failures.describe):
        asked = {"allow_changes": flag_values.allow_changes, "profile": flag_values.profile}
        train(config, workdir, chosen=cli.chosen_options(flag_values), **asked)


def describe(config: config_lib.Config, *, chosen: Collection[str] = ()) -> None:
    """Prints parameters, FLOPs, tokens and memory of a config, and trains nothing."""
    from gptjax.planning import description
    from gptjax.training import pretrained

    description.show(pretrained.adopt(config, pretrained.find(config.init_from), chosen))


def train(
    config: config_lib.Config,
    workdir: str | Path,
    *,
    chosen: Collection[str] = (),
    allow_changes: bool = False,
    profile: str | None = None,
) -> None:
    """Trains to the end, or raises RunError after saving what there is. Every process of a run calls it.

    The set-up is in `training/run.py`, the update in `training/step.py`, metrics in `training/recorder.py`, validation
    in `evaluation/validation.py`.

    `workdir`: a directory, or gs://BUCKET/PATH, which is then kept in a mirror as well (`artifacts/mirror.py`).
    `chosen`: options that were set on the command line; those of the model are not taken from `init_from`.
    `allow_changes`: whether a run may continue with other values of options that affect the rest of its training.
    `profile`: STEP:COUNT, the steps to trace.
    """
    from gptjax.artifacts import mirror
    from gptjax.training.run import Ending

    group = distributed.current()
    place = mirror.writable(workdir, process=group.index)
    with Ending() as ending:
        summary = _train(config, place, ending, chosen, allow_changes, profile)
    if group.index == 0:
        print(summary)
        print(f"curves:   {mirror.shown(place / 'report.html')}")
        print(f"evaluate: python -m gptjax.evaluate --workdir={mirror.shown(place)}")
        print(f"generate: python -m gptjax.generate --workdir={mirror.shown(place)} --prompt='...'")


def _train(
    config: config_lib.Config,
    workdir: Path,
    ending: "Ending",
    chosen: Collection[str],
    allow_changes: bool,
    profile: str | None,
) -> str:
    """The run itself; `ending` closes what it opens. Returns one line on how it ended."""
    import jax

    from gptjax.artifacts import mirror
    from gptjax.artifacts.lock import Lock
    from gptjax.evaluation import tasks
    from gptjax.evaluation.validation import Validator
    from gptjax.training import metrics, profiling, stopping
    from gptjax.training.recorder import Recorder
    from gptjax.training.run import Run

    if profile:
        profiling.Profile.steps(profile)  # before the data are read
    # ---- Set-up; what is opened is closed by `ending`, the last first ---------------------------------------------
    started = time.perf_counter()
    tasks.check(config)
    group = distributed.current()
    chief = group.index == 0
    progress = cli.data_progress if chief and sys.stderr.isatty() else None
    stop = stopping.StopSignals(noting=False)
    ending.add(stop.restore)
    lock = Lock.take(workdir) if chief else None
    if lock:
        ending.add(lock.release)
    mirror.pull(workdir)
    if chief:
        ending.add(lambda: mirror.push(workdir))
    run = Run.open(config, workdir, chosen=chosen, allow_changes=allow_changes, progress=progress)
    run.lock = lock
    if chief:
        ending.add(lambda: _report(workdir))
    ending.add(run.close)
    program, options, start = run.program, run.program.config, run.start
    num_steps = options.train.num_steps
    trace = profile and profiling.Profile.parse(profile, workdir, start=start, num_steps=num_steps)
    state = run.state()
    validator = Validator(program, run.data, workdir, start=start, rollouts=run.rollouts)
    history = group.first(lambda: metrics.history(workdir / "metrics.jsonl", program.objective.monitor.name, start))
    told = {"start": start, "started": started, "chief": chief, "history": history, "advice": run.advice}
    record = Recorder(program, run.batches, workdir, **told)
    ending.add(record.close)
    for note in run.notes():
        record.print(note)
    if validator.without:
        record.print(f"without a validation split: {', '.join(validator.without)}")
    if trace:
        ending.add(trace.stop)
    stop.note()

    # ---- The loop. ITS ORDER IS A CONTRACT (tests/test_resume.py): -----------------------------------------------
    # 1 log, 2 evaluate, 3 save the OLD state, 4 end or go on, 5 take the batch, 6 advance.
    try:
        with jax.set_mesh(program.mesh):
            for step in range(start, num_steps + 1):
                last, due = step == num_steps, step > start
                evaluates = due and (last or step % options.evaluation.every == 0)
                saves = due and (last or step % options.train.checkpoint_every == 0)
                if evaluates or saves:
                    record.flush()  # 1
                line: dict = {}
                if evaluates:
                    with record.timed("eval"):
                        line = validator.line(step, state)  # 2
                    saves |= (bool(line) and record.validation(step, line)) or record.exhausted
                if evaluates or saves:
                    with record.timed("checkpoint"):
                        run.publish()  # before the checkpoint, so that logs are never behind it
                if saves:
                    with record.timed("checkpoint"):
                        run.save(step, state, line)  # 3
                if last or record.exhausted:
                    break  # 4
                run.stop_if_asked(step, state, stop, record.flush)

                if trace and chief:
                    trace.before(step, record.wait)
                norms = options.logging.norms_every and (step + 1) % options.logging.norms_every == 0
                with record.timed("data"):
                    batch = run.batch(step, state)  # 5
                with record.timed("step"):
                    update, hyper = program.step_with_norms if norms else program.step, program.hyper(step)
                    with jax.transfer_guard("disallow"):
                        state, step_metrics = update(state, batch, hyper)  # 6
                    if step == start:
                        jax.block_until_ready(step_metrics)
                record.dispatched(step + 1, step_metrics | run.batch_metrics, log=bool(norms))
                if trace and chief and (text := trace.after(step, state)):
                    record.print(text)
        run.checkpoints.wait()
    except OSError as error:
        raise run.checkpoints.stopped_by(error) from error
    return record.summary()


def _report(workdir: Path) -> None:
    """Writes report.html; a run that is done does not fail if that is impossible."""
    from gptjax.reporting.page import write_report

    try:
        write_report(workdir)
    except OSError as error:
        print(f"report.html could not be written: {files.explain(error)}", file=sys.stderr)


class _Callable(types.ModuleType):
    """Makes this module a function too: `gptjax.train(config, "runs/mine")`."""

    def __call__(self, config: config_lib.Config, workdir: str | Path, *, allow_changes: bool = False) -> None:
        """Trains to the end, or continues; `gptjax.load(workdir)` then loads the model.

        Raises UserError for a wrong config, RunError after saving what there is.
        """
        train(config, workdir, allow_changes=allow_changes)


sys.modules[__name__].__class__ = _Callable


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
