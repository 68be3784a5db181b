"""Where the stages of a build run: in processes on this machine, or in an Apache Beam pipeline.

A stage is a picklable function of one item that leaves its result in files, so it does not matter
who calls it, in which order, or how often.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from gptjax import interrupts
from gptjax.errors import RunError, UserError

RUNNERS = ("local", "beam")
_LOOK_SECONDS = 0.1  # between two checks for Ctrl-C

Stage = Callable[[Any], None]
Done = Callable[[Any], None]


@runtime_checkable
class Runner(Protocol):
    """Runs a stage on many items."""

    def run(self, stage: Stage, items: Sequence[Any], done: Done) -> None:
        """Calls stage(item) for each item, in any order, and in this process done(item) after each.

        Raises:
          UserError: the stage raised it.
          RunError: a worker died.
        """
        ...


def open_runner(name: str, *, workers: int, beam_options: Sequence[str], directory: Path) -> Runner:
    """The runner `name`, one of `RUNNERS`.

    Args:
      workers: processes of the local runner; 0 for one per core.
      beam_options: flags of Beam's pipeline, such as --runner=FlinkRunner.
      directory: where Beam's workers may leave messages.
    """
    if name == "local":
        if workers < 0:
            raise UserError(f"data.workers={workers}: expected a number of processes, or 0 for one per core")
        return LocalRunner(workers or num_cores())
    if name == "beam":
        return BeamRunner(beam_options, directory)
    raise UserError(f"runner={name!r}: expected one of {', '.join(RUNNERS)}")


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class LocalRunner:
    """Worker processes on this machine. A single item, or a single worker, runs in this process.

    The processes are new ones that import the main module again, as `multiprocessing` does: a script that
    builds a store keeps its own work under `if __name__ == "__main__"`.
    """

    def __init__(self, workers: int):
        self.workers = workers

    def run(self, stage: Stage, items: Sequence[Any], done: Done) -> None:
        workers = min(self.workers, len(items))
        if workers <= 1:
            for item in items:
                stage(item)
                done(item)
            return
        others = set(multiprocessing.active_children())
        executor = ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(stage,)
        )
        try:
            # There is one worker per core, so tokenizers start no threads.
            with _environment(TOKENIZERS_PARALLELISM="false"), _noted_interrupts() as interrupted:
                futures = {executor.submit(_run_item, item): item for item in items}
                pending = set(futures)
                while pending:
                    finished, pending = wait(pending, timeout=_LOOK_SECONDS, return_when=FIRST_COMPLETED)
                    for future in finished:
                        future.result()
                        done(futures[future])
                    if interrupted():
                        break
        except BrokenProcessPool:
            raise RunError(
                f"a worker process died, one of {workers}: perhaps memory was short, and fewer workers need less; or "
                "the script that builds the store lacks `if __name__ == '__main__'`. Run again to continue"
            ) from None
        except BaseException:
            _kill(executor, others)
            raise
        executor.shutdown()


def _kill(executor: ProcessPoolExecutor, others: Collection[BaseProcess]) -> None:
    """Kills the workers of an executor: all child processes except `others`."""
    workers = set(multiprocessing.active_children()) - set(others)  # Python 3.14 has kill_workers
    executor.shutdown(wait=False, cancel_futures=True)
    for worker in workers:
        worker.kill()


@contextlib.contextmanager
def _noted_interrupts() -> Iterator[Callable[[], bool]]:
    """Delays Ctrl-C and other stopping signals until the context ends; yields a function: whether one has come.

    Raised at once, KeyboardInterrupt could hit the start of a process, whose other end would print a traceback, or a
    callback of the garbage collector, which would print and drop it.
    """
    came: list[int] = []
    before: dict[int, Any] = {}
    for number in (signal.SIGINT, *interrupts.STOPPING):
        with contextlib.suppress(ValueError):  # not the main thread: signals go elsewhere
            if callable(signal.getsignal(number)):  # a handler of Python's, neither ignored nor the default
                before[number] = signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        raise KeyboardInterrupt


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Environment variables for the processes that are started within."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


_stage: Stage | None = None  # of this worker process


def _start_worker(stage: Stage) -> None:
    global _stage
    _stage = stage
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _run_item(item: Any) -> None:
    _stage(item)


class BeamRunner:
    """An Apache Beam pipeline. On other machines, the build's directory must be one that all of them see."""

    def __init__(self, options: Sequence[str], directory: Path):
        self.options = list(options)
        self.directory = directory

    def run(self, stage: Stage, items: Sequence[Any], done: Done) -> None:
        try:
            import apache_beam as beam
            from apache_beam.options.pipeline_options import PipelineOptions
        except ImportError:
            raise UserError("--runner=beam needs Apache Beam: pip install 'gptjax[data]'") from None
        recorded = _Recorded(stage, self.directory / f"errors-{uuid.uuid4().hex}")
        try:
            opened = beam.Pipeline(options=PipelineOptions(self.options))
        except (Exception, SystemExit) as error:  # Beam's parser of options ends the program
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"--beam_options={' '.join(self.options)[:200]!r}: Beam refuses them: {reason}") from None
        with opened as pipeline:
            _ = pipeline | beam.Create(list(items)) | beam.Reshuffle() | beam.Map(recorded)
        recorded.raise_first()
        for item in items:
            done(item)


class _Recorded:
    """A stage whose UserError becomes a file: as an exception it would reach the caller as Beam's traceback."""

    def __init__(self, stage: Stage, directory: Path):
        self.stage = stage
        self.directory = directory

    def __call__(self, item: Any) -> None:
        try:
            self.stage(item)
        except UserError as error:
            self.directory.mkdir(parents=True, exist_ok=True)
            (self.directory / uuid.uuid4().hex).write_text(str(error), encoding="utf-8")

    def raise_first(self) -> None:
        if self.directory.is_dir():
            raise UserError(min(path.read_text(encoding="utf-8") for path in self.directory.iterdir()))
