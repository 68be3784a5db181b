"""How fast a run goes: tokens per second, and the share of the hardware's peak it uses (MFU)."""

import time

import jax
import numpy as np

CONVENTION = "6N + causal attention; peak: dense, compute dtype"

# Dense peak in TFLOP/s for (bfloat16, float32), from the vendors' data sheets. Float32 on GPUs: TF32 is off.
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
    for kind, (bfloat16, float32) in PEAK_TFLOPS.items():
        if device.device_kind.startswith(kind):
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


class Meter:
    """Times the steps between two readings, leaving out what `pause` covers (evaluation, checkpoints)."""

    def __init__(self, tokens_per_step: int, flops_per_token: float, peak: float | None):
        self.tokens_per_step, self.flops_per_token, self.peak = tokens_per_step, flops_per_token, peak
        self.begin = time.perf_counter()
        self._reset()

    def _reset(self) -> None:
        self._start, self._paused, self._waited, self._steps = time.perf_counter(), 0.0, 0.0, 0

    def step(self, data_wait: float) -> None:
        self._steps += 1
        self._waited += data_wait

    def pause(self, seconds: float) -> None:
        self._paused += seconds

    def read(self) -> dict[str, float | str]:
        """Per-step figures since the last reading. `data_wait_s` and `step_time_s` are seconds a step."""
        now = time.perf_counter()
        steps = max(self._steps, 1)
        step_time = max(now - self._start - self._paused, 1e-9) / steps
        figures = {
            "tokens_per_second": self.tokens_per_step / step_time,
            "step_time_s": step_time,
            "data_wait_s": self._waited / steps,
            "wall_time_s": now - self.begin,
        }
        if self.peak:
            figures["mfu"] = self.flops_per_token * figures["tokens_per_second"] / self.peak
            figures["mfu_convention"] = CONVENTION
        self._reset()
        return figures
