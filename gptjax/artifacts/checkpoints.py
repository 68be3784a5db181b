"""Checkpoints as a run writes and continues them; `loading` reads them for inference. No other module uses Orbax.

WORKDIR/checkpoints/STEP/ holds `state` (a tree with step, params, opt_state and ema_params) and `metadata` (config,
tokenizer, metrics), so that the directory of one step is self-contained. A save is asynchronous and atomic: it is
written beside its place and renamed. Its checksums follow in the background; `integrity` checks them.
"""

import contextlib
import logging
import math
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from gptjax import config as config_lib
from gptjax import files
from gptjax.artifacts import integrity, mirror
from gptjax.artifacts.integrity import FORMAT, finished_steps, read_metadata
from gptjax.artifacts.mirror import shown
from gptjax.data.tokenization.templates import ChatTemplate
from gptjax.data.tokenization.tokenizer import Tokenizer
from gptjax.errors import RunError, UserError
from gptjax.model import gpt
from gptjax.parameters import path_string

_ORBAX = str(Path(ocp.__file__).parent)
_FAILED_WRITE = re.compile(r"\b[A-Z_]{5,}: Error (opening|writing)\b")  # TensorStore's words for a disk that cannot


class _OrbaxRecords(logging.Filter):
    """Drops the log records of Orbax, from any of its threads, and passes all others.

    Orbax logs every phase of a save, and also every error that it raises: with absl's logger, and with asyncio's for
    tasks that are not awaited after an error.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        calls = traceback.extract_tb(record.exc_info[2]) if record.exc_info else []
        files = [record.pathname, *(call.filename for call in calls)]
        if record.exc_info and _FAILED_WRITE.search(str(record.exc_info[1])):
            return False
        return _ORBAX not in record.getMessage() and not any(file.startswith(_ORBAX) for file in files)


def _hook(what: Any) -> None:
    """Drops what Python prints when the remaining writes of a failed save end, up to the end of the process."""
    closed = str(what.exc_value) == "Event loop is closed" or _FAILED_WRITE.search(str(what.exc_value))
    left = getattr(getattr(what.object, "cr_code", None), "co_filename", "").startswith(_ORBAX)
    if not (closed or left):
        _hook.before(what)


_RECORDS = _OrbaxRecords()
_at_work: set[object] = set()


def _quiet(user: object) -> None:
    """Keeps the log lines of Orbax from the terminal until `_ended` was called for every user.

    It is never called after a failed save: asyncio may log its remains at any time until the process ends.
    """
    if sys.unraisablehook is not _hook:
        _hook.before, sys.unraisablehook = sys.unraisablehook, _hook
    _at_work.add(user)
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_RECORDS)  # adding it twice has no effect


def _ended(user: object) -> None:
    _at_work.discard(user)
    for name in ("absl", "asyncio") if not _at_work else ():
        logging.getLogger(name).removeFilter(_RECORDS)


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Keeps the log lines of Orbax from the terminal while the body runs."""
    user = object()
    _quiet(user)
    try:
        yield
    finally:
        _ended(user)


class Checkpoints:
    """The checkpoints of one work directory: the newest `keep` and the best by a validation metric are kept."""

    def __init__(self, workdir: Path, *, keep: int = 2, monitor: str = "loss", lower_is_better: bool = True):
        self._monitor, self._lower_is_better = f"validation_{monitor}", lower_is_better
        self.directory = Path(workdir).absolute() / "checkpoints"
        self._seal: threading.Thread | None = None  # writes the checksums of the last save
        self._user = object()
        _quiet(self._user)
        policy = checkpoint_managers.AnyPreservationPolicy(
            [
                checkpoint_managers.LatestN(keep),
                checkpoint_managers.BestN(
                    get_metric_fn=self._score,
                    reverse=True,
                    n=1,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        )
        self._manager = ocp.CheckpointManager(
            mirror.orbax_path(self.directory),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy,
                best_fn=self._score,  # Orbax then stores the metrics: the best outlives a restart
                create=True,
                enable_async_checkpointing=True,
                cleanup_tmp_directories=True,
            ),
            item_handlers={"state": ocp.StandardCheckpointHandler(), "metadata": ocp.JsonCheckpointHandler()},
        )

    def steps(self) -> list[int]:
        """Steps that can be restored, ascending."""
        return sorted(self._manager.all_steps())

    def advice(self) -> str:
        """From where a run that ended continues, by what is on disk."""
        good = finished_steps(self.directory)
        where = (
            f"step {good[-1]} ({shown(self.directory / str(good[-1]))})"
            if good
            else "the beginning: nothing is saved yet"
        )
        return f"the same command continues from {where}"

    def stopped_by(self, error: OSError) -> RunError:
        """The error of a run that could not write: the file, why, what to do, and from where the run then continues."""
        text = files.explain(error)
        if not files.goes_on(text):
            text += ". Once this is fixed, the same command continues"
        return RunError(text + self.advice().removeprefix("the same command continues"))

    def save(
        self,
        step: int,
        state: Any,
        *,
        config: config_lib.Config,
        tokenizer: Tokenizer,
        template: ChatTemplate | None = None,
        generation: dict[str, Any] | None = None,
        metrics: dict[str, float],
    ) -> None:
        """Starts a save and returns. Raises RunError, for a failed save at the next call."""
        metadata = {
            "format": FORMAT,
            "step": step,
            "config": config.to_dict(),
            "config_sha256": config_lib.sha256(config),
            "tokenizer": {"json": tokenizer.to_str(), "eot_token": tokenizer.eot_token},
            "chat_template": template and template.to_json(),
            "generation": generation or {},
            "metrics": metrics,
            "monitor": [self._monitor, self._lower_is_better],
        }
        items = {"state": ocp.args.StandardSave(state), "metadata": ocp.args.JsonSave(metadata)}
        with _disk_errors(self):
            self._join_seal()
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics | {"step": step}, force=True)
        if jax.process_index() == 0:
            self._seal = threading.Thread(target=self._seal_when_saved, args=(step,), name="checksums", daemon=True)
            self._seal.start()

    def _join_seal(self) -> None:
        if self._seal is not None:
            self._seal.join()

    def _seal_when_saved(self, step: int) -> None:
        """Writes the checksums of a step once its save is complete; one that failed has no directory."""
        while self._manager.is_saving_in_progress():
            time.sleep(0.05)
        directory = self.directory / str(step)
        try:
            mirror.pull(self.directory.parent, "checkpoints")
            if directory.is_dir():
                integrity.seal(directory)
        except (OSError, UserError, RunError) as error:
            reason = files.explain(error) if isinstance(error, OSError) else error
            print(f"warning: {reason}; {shown(directory)} has no checksums", file=sys.stderr)

    def wait(self) -> None:
        """Waits until the last save is on disk. Raises RunError if it could not be written."""
        with _disk_errors(self):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        self._join_seal()

    def restore(self, step: int, abstract_state: Any) -> Any:
        """The state of a step, sharded as `abstract_state` says (not necessarily as it was saved)."""
        metadata = read_metadata(self.directory / str(step))
        if metadata["format"] > 1:
            return self._restore(step, abstract_state)
        # Format 1 has no reference_params, and without clipping no entry for it in the optimizer's state.
        clips = bool(metadata["config"]["optimizer"]["clip_norm"])
        nothing, inner = abstract_state.opt_state
        parts = {name: getattr(abstract_state, name) for name in ("step", "params", "opt_state", "ema_params")}
        restored = self._restore(step, parts if clips else parts | {"opt_state": inner})
        opt_state = restored["opt_state"] if clips else (nothing, restored["opt_state"])
        return abstract_state.replace(**restored | {"opt_state": opt_state})

    def _restore(self, step: int, abstract_state: Any) -> Any:
        with reading(self.directory / str(step)):
            there, here = map(_shapes, (self._manager.item_metadata(step)["state"].tree, abstract_state))
        if names := sorted(name for name in there | here if there.get(name) != here.get(name)):
            known = [f"{name}: {there.get(name, 'none')} saved, {here.get(name, 'none')} expected" for name in names]
            more = f" and {len(known) - 3} more" if len(known) > 3 else ""
            raise UserError(
                f"the checkpoint {shown(self.directory / str(step))} is of another model or optimizer ("
                f"{', '.join(known[:3])}{more}); use its own config or another --workdir"
            )
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
        with reading(self.directory / str(step)):
            return self._manager.restore(step, args=args)["state"]

    def _score(self, metrics: dict[str, float]) -> tuple[float, float]:
        """Lower is better. Among equal values the earliest step wins, among steps without a value the latest."""
        value, step = metrics.get(self._monitor, math.nan), metrics.get("step", 0)
        if not math.isfinite(value):
            return math.inf, -step
        return value if self._lower_is_better else -value, step

    def close(self) -> None:
        """Waits for the last save. Raises RunError if it could not be written."""
        with _disk_errors(self):
            self._manager.close()
        self._join_seal()
        _ended(self._user)


@contextlib.contextmanager
def reading(checkpoint: Path) -> Iterator[None]:
    """Turns errors of Orbax for a checkpoint that it cannot read into a UserError that names the checkpoint."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise
        raise UserError(
            f"the checkpoint {shown(checkpoint)} is damaged: {_first_line(error)}. Move it away to use the one before "
            "it"
        ) from error


class _disk_errors:
    """Turns errors of Orbax on a full or read-only disk into a RunError that says what is saved."""

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if error is None or isinstance(error, KeyboardInterrupt | RunError):
            return False
        reason = _reason(error, self._checkpoints.directory)
        if reason is None:
            what = f"a checkpoint could not be written to {shown(self._checkpoints.directory)}: {_first_line(error)}"
            raise RunError(f"{what}; {self._checkpoints.advice()}") from error
        raise self._checkpoints.stopped_by(reason) from error


def _reason(error: BaseException, directory: Path) -> OSError | None:
    """The OSError in an error of Orbax or in its causes; None if there is none."""
    seen: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        reason = waiting.pop(0)
        if reason is None or reason in seen:
            continue
        seen.append(reason)
        if isinstance(reason, OSError) and reason.errno:
            reason.filename = reason.filename or str(directory)
            return reason
        if match := re.search(r"os_error_code='(\d+)'|OS error (\d+)", str(reason)):  # TensorStore's, in C++
            number = int(match[1] or match[2])
            return OSError(number, os.strerror(number), str(directory))
        waiting += [reason.__cause__, reason.__context__, *getattr(reason, "exceptions", ())]
    return None


def write_parameters(
    workdir: Path,
    params: gpt.Params,
    *,
    config: config_lib.Config,
    tokenizer: Tokenizer,
    template: ChatTemplate | None = None,
    generation: dict[str, Any] | None = None,
) -> Path:
    """Writes parameters that were trained elsewhere as the checkpoint of step 0; returns its directory."""
    params = jax.tree.map(jnp.asarray, params)
    state = {"step": jnp.zeros((), jnp.int32), "params": params, "opt_state": (), "ema_params": None}
    checkpoints = Checkpoints(workdir)
    about = {"config": config, "tokenizer": tokenizer, "template": template, "generation": generation}
    checkpoints.save(0, state, **about, metrics={})
    checkpoints.wait()
    checkpoints.close()
    return checkpoints.directory / "0"


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """The shape of each array of a state, or of what Orbax knows about a stored one."""
    return {path_string(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]
