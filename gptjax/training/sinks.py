"""Where the numbers of a run go beside metrics.jsonl: TensorBoard, Weights & Biases, trackio, MLflow.

A sink never stops, delays or fails a run. Each has a thread of its own and a bounded queue. A sink that raises is
turned off, with a warning. A sink that is stuck loses lines, with a warning; at the end, the run waits a limited time
for it.
"""

import atexit
import contextlib
import importlib.util
import json
import os
import queue
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from gptjax import files, interrupts
from gptjax.errors import UserError

TRACKERS = ("wandb", "trackio", "mlflow")
_LINES = 1000  # in the queue of a sink before further lines are dropped
_CLOSE_SECONDS = 20.0  # for all sinks together to empty their queues
_naming = threading.Lock()
_EXIT_SECONDS = 10.0  # for the libraries of a stuck sink at the exit of the process


class Sink(Protocol):
    """A place for the numbers of a run. It is made, written and closed in one thread; any of it may raise or block."""

    def write(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class Sinks:
    """The sinks of a run, behind one method that takes a line and never waits."""

    def __init__(self, makers: dict[str, Callable[[], Sink]], *, capacity: int = _LINES):
        """`makers`: what makes the sink of each name; it is called in the thread of the sink."""
        self._threads = [_Background(name, make, capacity) for name, make in makers.items()]

    def write(self, line: dict[str, Any]) -> None:
        """A line of metrics.jsonl: its numbers go to every sink, by the names SPLIT/NAME."""
        values = {
            f"{line['split']}/{name}": float(value)
            for name, value in line.items()
            if name != "step" and isinstance(value, int | float)
        }
        for thread in self._threads:
            thread.put(line["step"], values)

    def close(self, timeout: float = _CLOSE_SECONDS) -> None:
        """Waits at most `timeout` seconds until all is written. Never raises."""
        for thread in self._threads:
            thread.end()
        deadline = time.monotonic() + timeout
        stuck = [thread for thread in self._threads if not thread.join(deadline - time.monotonic())]
        for thread in stuck:
            thread.warn(f"it has not ended within {timeout:g} s; what it has not written is lost")
        if stuck:  # its library may wait for ever in a function of its own that runs at the exit of the process
            _leave_after_exit_begins()


class _Background:
    """A sink in a daemon thread of its own."""

    def __init__(self, name: str, make: Callable[[], Sink], capacity: int):
        self.name, self._make = name, make
        self._queue: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(capacity)
        self._off = self._dropped = False
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"sink {name}", daemon=True)
        self._thread.start()

    def put(self, step: int, values: dict[str, float]) -> None:
        if self._off:
            return
        try:
            self._queue.put_nowait((step, values))
        except queue.Full:
            if not self._dropped:
                self._dropped = True
                self.warn(f"it is stuck; from step {step} on lines are left out (metrics.jsonl has them all)")

    def end(self) -> None:
        self._ending.set()
        with contextlib.suppress(queue.Full):  # the thread looks at the event once the queue is empty
            self._queue.put_nowait(None)

    def join(self, seconds: float) -> bool:
        """Whether the thread has ended."""
        self._thread.join(max(seconds, 0.0))
        return not self._thread.is_alive()

    def warn(self, what: str) -> None:
        print(f"warning: {self.name}: {what}", file=sys.stderr, flush=True)

    def _run(self) -> None:
        sink = None
        try:
            sink = self._make()
            while (entry := self._next()) is not None:
                sink.write(*entry)
        except BaseException as error:
            self._turn_off(error)
        finally:
            try:
                if sink:
                    sink.close()
            except BaseException as error:
                self._turn_off(error)

    def _next(self) -> tuple[int, dict[str, float]] | None:
        while True:
            try:
                return self._queue.get(timeout=1.0)
            except queue.Empty:
                if self._ending.is_set():
                    return None

    def _turn_off(self, error: BaseException) -> None:
        if self._off:
            return
        self._off = True
        lines = (files.explain(error) if isinstance(error, OSError) else str(error)).strip().splitlines()
        self.warn(f"{(lines or [type(error).__name__])[0][:300]}; it is off for the rest of this run, which goes on")


def _leave_after_exit_begins() -> None:
    """Ends the process some seconds after its exit has begun, if exit handlers of libraries do not return.

    The thread is started now: from Python 3.12 on, no thread can be started during the exit.
    """
    exits = threading.Event()

    def leave() -> None:
        exits.wait()
        time.sleep(_EXIT_SECONDS)
        sys.stdout.flush()
        os._exit(interrupts.status)

    atexit.register(exits.set)
    threading.Thread(target=leave, daemon=True).start()


# ---- Which sinks a run has ---------------------------------------------------------------------------------


def check(trackers: str) -> list[str]:
    """The names in `logging.trackers`. Raises UserError for one that is unknown or whose library is not installed."""
    names = [name.strip() for name in trackers.split(",") if name.strip()]
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"logging.trackers={trackers}: {name} is not one of {', '.join(TRACKERS)}")
        if importlib.util.find_spec(name) is None:
            raise UserError(f"logging.trackers={trackers}: {name} is not installed; pip install {name}")
    return list(dict.fromkeys(names))


def makers(
    workdir: Path, config: dict[str, Any], *, step: int, tensorboard: bool, trackers: str
) -> dict[str, Callable[[], Sink]]:
    """Makers of the sinks of a run that begins or continues at `step`. A maker imports its library when called."""
    found: dict[str, Callable[[], Sink]] = {}
    if tensorboard and importlib.util.find_spec("tensorboardX"):
        found["TensorBoard"] = lambda: TensorBoard(workdir / "tensorboard", step)
    kinds = {"wandb": WeightsAndBiases, "trackio": Trackio, "mlflow": MLflow}
    for name in check(trackers):
        found[name] = lambda kind=kinds[name]: kind(workdir, config)
    return found


def run_id(workdir: Path) -> str:
    """The run's id in the trackers, made once per work directory, so that a run that continues stays the same run."""
    path = workdir / "tracking.json"
    with _naming:
        try:
            known = files.read_json(path)["run"]
        except (OSError, ValueError, KeyError, TypeError):
            known = None
        if isinstance(known, str) and known.isalnum():
            return known
        new = uuid.uuid4().hex[:12]
        files.write_whole(path, json.dumps({"run": new}) + "\n")
        return new


# ---- The sinks ---------------------------------------------------------------------------------------------


class TensorBoard:
    """Event files by tensorboardX, without its thread, which ends on a full disk and then blocks the caller."""

    def __init__(self, directory: Path, step: int):
        # tensorboardX would import torch where it is installed (1 s). No tensor of torch is written here.
        hidden = {} if "torch" in sys.modules else {"torch": None}
        sys.modules.update(hidden)
        try:
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import Event, SessionLog
            from tensorboardX.proto.summary_pb2 import Summary
        finally:
            for name in hidden:
                del sys.modules[name]
        self._event, self._summary, self._directory = Event, Summary, directory
        with files.about(directory):
            directory.mkdir(parents=True, exist_ok=True)
            self._writer = EventsWriter(str(directory / "events"), f".{os.getpid()}")
            if step:  # TensorBoard then drops events after this step, which come again
                self._writer.write_event(
                    Event(wall_time=time.time(), step=step + 1, session_log=SessionLog(status=SessionLog.START))
                )
                self._writer.flush()

    def write(self, step: int, values: dict[str, float]) -> None:
        entries = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        with files.about(self._directory):
            self._writer.write_event(
                self._event(wall_time=time.time(), step=step, summary=self._summary(value=entries))
            )
            self._writer.flush()

    def close(self) -> None:
        with files.about(self._directory):
            self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases. WANDB_PROJECT, WANDB_NAME, WANDB_MODE=offline and its other variables apply."""

    def __init__(self, workdir: Path, config: dict[str, Any]):
        import wandb

        name = {} if "WANDB_NAME" in os.environ else {"name": workdir.absolute().name}
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "gptjax"),
            id=os.environ.get("WANDB_RUN_ID") or run_id(workdir),
            resume="allow",
            dir=os.environ.get("WANDB_DIR") or str(workdir),
            config=config,
            settings=wandb.Settings(console="off", silent=True),
            **name,
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A run of trackio. TRACKIO_PROJECT, TRACKIO_DIR, TRACKIO_SPACE_ID and its other variables apply."""

    def __init__(self, workdir: Path, config: dict[str, Any]):
        import trackio

        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", "gptjax"),
            name=f"{workdir.absolute().name}-{run_id(workdir)}",  # trackio finds a run that continues by this name
            resume="allow",
            config=config,
            embed=False,
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of MLflow. MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME apply; without the first, WORKDIR/mlflow.db."""

    def __init__(self, workdir: Path, config: dict[str, Any]):
        import mlflow

        self._metric = mlflow.entities.Metric
        own = f"sqlite:///{workdir.absolute() / 'mlflow.db'}"
        self._client = mlflow.MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or own)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "gptjax")
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(name)
        key = run_id(workdir)
        known = self._client.search_runs([experiment_id], f"tags.workdir = '{key}'", max_results=1)
        if known:
            self._run = known[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
            return
        tags = {"workdir": key, "mlflow.runName": workdir.absolute().name}
        self._run = self._client.create_run(experiment_id, tags=tags).info.run_id
        values = [mlflow.entities.Param(path, str(value)[:500]) for path, value in _flat(config)]
        for place in range(0, len(values), 100):  # the most that MLflow takes at once
            self._client.log_batch(self._run, params=values[place : place + 100])

    def write(self, step: int, values: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self._run)


def _flat(config: dict[str, Any], before: str = "") -> list[tuple[str, Any]]:
    """("section.option", value) of a nested config."""
    pairs = []
    for name, value in config.items():
        pairs += _flat(value, f"{before}{name}.") if isinstance(value, dict) else [(f"{before}{name}", value)]
    return pairs
