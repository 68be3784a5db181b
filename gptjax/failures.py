"""From the error that ended a command to its exit status and the last line on stderr, which says what to do."""

import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from gptjax import files, interrupts
from gptjax.config.values import shown
from gptjax.errors import RunError, UserError

_LONGEST_LINE = 1800  # characters
_JAX_RULES = ("JAX_DISABLE_JIT", "JAX_NUMPY_DTYPE_PROMOTION", "JAX_NUMPY_RANK_PROMOTION", "JAX_TRANSFER_GUARD")


def _with_urls(text: str) -> str:
    """A message in which the paths of mirrors are replaced by the URLs of their buckets."""
    mirror = sys.modules.get("gptjax.artifacts.mirror")
    return mirror.in_words(text) if mirror else text


def one_line(text: str) -> str:
    """A message as one line, shortened if it is long, with URLs of buckets and control characters escaped."""
    line = re.sub(r"(:?)\s*[\r\n\v\f]\s*", lambda match: ": " if match[1] else "; ", _with_urls(text.strip()))
    line = "".join(c if c.isprintable() or c == "\t" else ascii(c)[1:-1] for c in line)
    return line if len(line) <= _LONGEST_LINE else f"{line[: _LONGEST_LINE // 2]} [...] {line[-_LONGEST_LINE // 4 :]}"


def describe(error: BaseException) -> tuple[int, str]:
    """The exit status and the last line on stderr for the error that ended a command; prints a traceback for a bug."""
    if isinstance(error, KeyboardInterrupt) or (interrupts.received and not isinstance(error, RunError)):
        return interrupts.last_words()
    if isinstance(error, UserError):
        return 2, f"error: {error}"
    if isinstance(error, RunError):
        return 1, f"failed: {error}"
    if isinstance(error, OSError):  # a full disk, a file that went away
        return 1, f"failed: {files.explain(error)}"
    if "RESOURCE_EXHAUSTED" in str(error):  # XLA's error for memory, on every kind of device
        reason = str(error).splitlines()[0][:200]
        return 1, (
            f"failed: out of memory: {reason}. Lower --config.train.batch_size, raise --config.train.accumulation "
            "or set --config.model.remat=full"
        )
    if reason := _of_jax_variable(error):
        return 2, f"error: {reason}"
    if "jax" in sys.modules:
        from gptjax.processes import runtime

        if reason := runtime.missing_platform(error):
            return 2, f"error: {reason}"
    traceback.print_exception(error)
    return 1, f"failed: {type(error).__name__}: this is a bug in gptjax; please report the lines above"


def _of_jax_variable(error: BaseException) -> str | None:
    """Which of JAX's variables is to blame: one whose value JAX does not take, or whose rule gptjax does not keep.

    Nothing is imported: a wrong value shows at the import of JAX.
    """
    frames, text = traceback.extract_tb(error.__traceback__), " ".join(str(error).split())
    if frames and Path(frames[-1].filename).parts[-3:] == ("jax", "_src", "config.py"):
        for name in filter(re.compile("JAX_").match, os.environ):
            if name.lower() in text.lower():
                return f"{name}={shown(os.environ[name])[1:-1]}: JAX does not take this value; correct it, or unset it"
    if any("/jax/" in frame.filename for frame in frames) and (set_ := _set(_JAX_RULES)):
        return f"{', '.join(set_)}: gptjax does not run under this rule of JAX ({text[:200]}); unset it"
    return None


def _set(names: Sequence[str]) -> list[str]:
    """NAME=value of variables that ask for a rule, with those whose names they begin."""
    off = ("", "0", "false", "no", "off", "allow", "log", "standard")
    given = {name: value for name, value in os.environ.items() if name.startswith(tuple(names))}
    return [f"{name}={value[:60]}" for name, value in given.items() if value.lower() not in off]
