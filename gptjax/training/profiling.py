"""--profile=STEP:COUNT: a trace of some steps, and the operations that took the most time."""

import contextlib
import re
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from gptjax import files
from gptjax.errors import UserError


class Operation(NamedTuple):
    """One operation of a compiled program: seconds and calls over all devices and steps."""

    name: str
    seconds: float
    calls: int
    share: float


class Profile:
    """Traces `count` steps from `step` on into WORKDIR/profile; for TensorBoard, XProf and Perfetto as well."""

    def __init__(self, step: int, count: int, directory: Path):
        self.step, self.count, self.directory = step, count, directory
        self._tracing = False

    @staticmethod
    def steps(text: str) -> tuple[int, int]:
        """(step, count) of "STEP:COUNT". Raises UserError."""
        match = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", text)
        if not match or int(match[2]) < 1:
            raise UserError(
                f"--profile={text[:60]}: expected STEP:COUNT, such as 100:5 for five steps from step 100 on"
            )
        return int(match[1]), int(match[2])

    @classmethod
    def parse(cls, text: str, workdir: Path, *, start: int, num_steps: int) -> "Profile":
        """From "STEP:COUNT". Raises UserError if this run does not make these steps."""
        step, count = cls.steps(text)
        if not start <= step or step + count > num_steps:
            raise UserError(f"--profile={text}: this run makes the steps {start} to {num_steps - 1}")
        return cls(step, count, workdir / "profile")

    def before(self, step: int, wait: Callable[[], None]) -> None:
        """To be called before each step; `wait` returns when no step is under way."""
        if step != self.step:
            return
        wait()
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # calls of Python functions would be most of the trace
        with self._never_failing():
            jax.profiler.start_trace(str(self.directory), profiler_options=options)
            self._tracing = True

    def after(self, step: int, result: Any) -> str | None:
        """To be called after each step: the table, after the last one of the trace."""
        if not self._tracing or step < self.step + self.count - 1:
            return None
        jax.block_until_ready(result)
        with self._never_failing():
            self._stop()
            trace = max(self._traces(), key=lambda path: path.stat().st_mtime)
            return f"{table(operations(trace), self.count)}\ntrace: {trace.parent}"
        return None

    def stop(self) -> None:
        """Ends a trace that a run which ends has begun."""
        with self._never_failing():
            self._stop()

    def _stop(self) -> None:
        if self._tracing:
            self._tracing = False
            before = self._traces()
            try:
                jax.profiler.stop_trace()
            except Exception:
                for half in self._traces() - before:
                    shutil.rmtree(half.parent, ignore_errors=True)
                raise

    def _traces(self) -> set[Path]:
        return set(self.directory.glob("**/*.xplane.pb"))

    @contextlib.contextmanager
    def _never_failing(self) -> Iterator[None]:
        """A trace is a side product: a disk that does not take it costs a warning and not the run."""
        try:
            yield
        except Exception as error:
            reason = f"{error.filename}: {files.words(error)}" if isinstance(error, OSError) else str(error)
            reason = re.sub(r"^[A-Z_]+: ", "", reason.strip().partition("\n")[0])[:300] or type(error).__name__
            print(f"warning: --profile={self.step}:{self.count}: no trace: {reason}; the run goes on", file=sys.stderr)


def operations(trace: Path) -> list[Operation]:
    """The operations of a trace by their own time, the most expensive first.

    The own time of a loop or a call excludes the operations in it.
    """
    seconds: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
        for line in plane.lines:
            events = [(event.start_ns, event.end_ns, event) for event in line.events if event.duration_ns > 0]
            open_events: list[tuple[float, str]] = []  # (end, name) of the enclosing operations
            for start, end, event in sorted(events, key=lambda e: (e[0], -e[1])):
                stats = dict(event.stats)
                if "hlo_op" not in stats:
                    continue
                while open_events and open_events[-1][0] <= start:
                    open_events.pop()
                if open_events:
                    seconds[open_events[-1][1]] -= (min(end, open_events[-1][0]) - start) / 1e9
                name = str(stats["hlo_op"])
                if name.startswith("command_buffer"):  # many operations in one launch: use the kernel's name
                    name = event.name[:60]
                seconds[name] += (end - start) / 1e9
                calls[name] += 1
                open_events.append((end, name))
    total = sum(seconds.values()) or 1.0
    return [Operation(name, spent, calls[name], spent / total) for name, spent in seconds.most_common()]


# The names of kernels from NVIDIA's libraries contain one of these words, at any place.
LIBRARY_KERNELS = {"attention": r"sdpa|flash|fmha|cudnn::fusion", "matrix product": r"gemm|nvjet|cutlass|cublas"}


def kind(name: str) -> str:
    """The kind of an operation: its name without numbers (fusion.12 is a fusion), or that of a library's kernel."""
    for kind, pattern in LIBRARY_KERNELS.items():
        if re.search(pattern, name):
            return kind
    return re.sub(r"[._\d]+$", "", name)


def table(found: list[Operation], steps: int, most: int = 10) -> str:
    """The most expensive operations as text, and below them the share of each `kind`."""
    if not found:
        return "the trace has no operations of a compiled program"
    lines = [f"{'ms/step':>10} {'share':>6} {'calls':>6}  operation"]
    lines += [f"{o.seconds / steps * 1e3:10.2f} {o.share:6.1%} {o.calls:6}  {o.name}" for o in found[:most]]
    kinds: defaultdict[str, float] = defaultdict(float)
    for operation in found:
        kinds[kind(operation.name)] += operation.share
    largest = sorted(kinds.items(), key=lambda item: -item[1])[:6]
    return "\n".join([*lines, "by kind: " + ", ".join(f"{kind} {share:.0%}" for kind, share in largest)])
