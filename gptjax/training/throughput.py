"""How fast a run goes: tokens per second, the share of the hardware's peak it uses (MFU), where its time goes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import numpy as np

from gptjax.model.architecture import FLOPS_CONVENTION

CONVENTION = f"{FLOPS_CONVENTION}; peak: dense, compute dtype"

# Dense peak in TFLOP/s for (bfloat16, float32), from the vendors' data sheets. Float32: without TF32.
PEAK_TFLOPS = {
    "NVIDIA H200": (989, 67),
    "NVIDIA H100": (989, 67),
    "NVIDIA A100": (312, 19.5),
    "TPU v4": (275, None),
    "TPU v5 lite": (197, None),
    "TPU v5p": (459, None),
    "TPU v5": (459, None),
    "TPU v6 lite": (918, None),
}


def peak_flops(device: jax.Device, dtype: str) -> float | None:
    """Peak FLOP/s of a device, or None if it is not known. A CPU's is measured: its float32 matrix product."""
    if device.platform == "cpu":
        return _measured_cpu_flops() / max(len(jax.local_devices()), 1)
    return datasheet_flops(device.device_kind, dtype)


def datasheet_flops(device_kind: str, dtype: str) -> float | None:
    """Peak FLOP/s of a kind of device by its vendor's data sheet, or None."""
    for kind, (bfloat16, float32) in PEAK_TFLOPS.items():
        if device_kind.startswith(kind):
            tflops = bfloat16 if dtype == "bfloat16" else float32
            return tflops * 1e12 if tflops else None
    return None


def _measured_cpu_flops(size: int = 1024, repeats: int = 3) -> float:
    matrix = np.ones((size, size), np.float32)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        matrix @ matrix
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


ACTIVITIES = ("start", "compile", "data", "step", "eval", "checkpoint", "idle")
_compiled = [0.0]  # seconds in the compiler since this process started


def _note_compilation(event: str, duration: float, **_: object) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _compiled[0] += duration


jax.monitoring.register_event_duration_secs_listener(_note_compilation)


class Meter:
    """Times the steps between two readings, and says where the time of the run goes.

    Seconds are those of this process, which runs ahead of the device by at most two steps: "data" is waiting for a
    batch and sending it, "step" is waiting for the device, "idle" is the rest (metrics, the loop itself). Only "step"
    is productive. A run that continues counts on from its last line; work that was lost is not counted.
    """

    def __init__(
        self,
        flops_per_token: float,
        peak: float | None,
        *,
        started: float | None = None,
        before: dict[str, float] | None = None,
    ):
        """`started`: when the set-up began (time.perf_counter); `before`: seconds of an earlier part of the run."""
        self.flops_per_token, self.peak = flops_per_token, peak
        self.begin = time.perf_counter()
        self._seconds = dict.fromkeys(ACTIVITIES, 0.0) | (before or {})
        self._seconds["start"] += self.begin - (self.begin if started is None else started)
        self._before = sum(self._seconds.values())
        self._reset()

    @contextmanager
    def doing(self, activity: str) -> Iterator[None]:
        """Counts the body as `activity`; what it compiles counts as "compile". Does not nest."""
        start, compiled = time.perf_counter(), _compiled[0]
        try:
            yield
        finally:
            took = time.perf_counter() - start
            compiled = 0.0 if activity == "compile" else min(_compiled[0] - compiled, took)
            self._seconds[activity] += took - compiled
            self._seconds["compile"] += compiled
            if activity == "data":
                self._waited += took
            else:
                self._paused += compiled if activity == "step" else took

    def goodput(self) -> dict[str, float]:
        """`seconds/ACTIVITY` since the run began, and `goodput`: the share of them that were steps."""
        total = self._before + time.perf_counter() - self.begin
        idle = max(total - sum(self._seconds.values()), 0.0)
        seconds = self._seconds | {"idle": self._seconds["idle"] + idle}
        figures = {f"seconds/{name}": round(value, 3) for name, value in seconds.items()}
        return figures | {"goodput": round(seconds["step"] / max(total, 1e-9), 4)}

    def _reset(self) -> None:
        self._start, self._paused, self._waited = time.perf_counter(), 0.0, 0.0

    def read(self, tokens: int, steps: int) -> dict[str, float | str]:
        """Figures since the last reading, for the tokens of its steps. `data_wait_s` and `step_time_s` are per step."""
        now = time.perf_counter()
        paused, steps = (self._paused, steps) if steps else (0.0, 1)  # only the first step: with its compilation
        step_time = max(now - self._start - paused, 1e-9) / steps
        figures = {
            "tokens_per_second": tokens / steps / step_time,
            "step_time_s": step_time,
            "data_wait_s": self._waited / steps,
            "wall_time_s": now - self.begin,
        }
        if self.peak:
            figures["mfu"] = self.flops_per_token * figures["tokens_per_second"] / self.peak
            figures["mfu_convention"] = CONVENTION
        self._reset()
        return figures
