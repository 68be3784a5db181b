import time
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import pytest

from gptjax.training import throughput


class Clock:
    def __init__(self):
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(throughput, "time", clock)
    return clock


def test_pauses_are_left_out_of_the_speed(clock):
    """Four steps in 10 s, of which 2 s are evaluation: 2 s per step, 500 tokens/s, half of the peak."""
    meter = throughput.Meter(flops_per_token=6.0, peak=6000.0)
    for _ in range(4):
        with meter.doing("data"):
            clock.now += 0.25
        with meter.doing("step"):
            clock.now += 1.75
    with meter.doing("eval"):
        clock.now += 2.0
    assert meter.read(4000, 4) == {
        "tokens_per_second": 500.0,
        "step_time_s": 2.0,
        "data_wait_s": 0.25,
        "wall_time_s": 10.0,
        "mfu": 0.5,
        "mfu_convention": throughput.CONVENTION,
    }


def test_a_reading_starts_anew_but_the_wall_time_goes_on(clock):
    meter = throughput.Meter(6.0, None)
    for seconds, wall in ((1.0, 1.0), (4.0, 5.0)):
        clock.now += seconds
        figures = meter.read(1000, 1)
        assert figures["step_time_s"] == seconds
        assert figures["tokens_per_second"] == 1000 / seconds
        assert figures["wall_time_s"] == wall
        assert "mfu" not in figures, "the peak is not known"


def test_the_seconds_of_a_run_add_up_and_go_on_after_a_restart(clock):
    """10 s of set-up, 4 s of compiling, 20 s of steps, 1 s of data, 3 s of evaluation, 2 s idle."""
    before = {}
    for part in (1, 2):
        started = clock.now
        clock.now += 10.0
        meter = throughput.Meter(6.0, None, started=started, before=before)
        with meter.doing("compile"):
            clock.now += 4.0
        for _ in range(10):
            with meter.doing("data"):
                clock.now += 0.1
            with meter.doing("step"):
                clock.now += 2.0
        with meter.doing("eval"):
            clock.now += 3.0
        clock.now += 2.0
        figures = meter.goodput()
        expected = {"start": 10, "compile": 4, "data": 1, "step": 20, "eval": 3, "checkpoint": 0, "idle": 2}
        assert figures == {f"seconds/{name}": part * seconds for name, seconds in expected.items()} | {"goodput": 0.5}
        before = {name.removeprefix("seconds/"): value for name, value in figures.items() if name != "goodput"}


def test_what_evaluation_compiles_is_compilation():
    meter = throughput.Meter(6.0, None)
    with meter.doing("eval"):
        begin = time.perf_counter()
        jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((7, 7))).block_until_ready()
        took = time.perf_counter() - begin
    figures = meter.goodput()
    assert 0 < figures["seconds/compile"] < took + 0.01
    assert figures["seconds/eval"] + figures["seconds/compile"] == pytest.approx(took, abs=0.01)


@pytest.mark.parametrize(
    ("kind", "dtype", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989),
        ("NVIDIA A100-SXM4-40GB", "float32", 19.5),
        ("TPU v5 lite", "bfloat16", 197),
        ("TPU v5p", "bfloat16", 459),
        ("TPU v6 lite", "float32", None),
        ("NVIDIA GeForce GTX 1080", "bfloat16", None),
    ],
)
def test_peaks_are_those_of_the_data_sheets(kind, dtype, tflops):
    device = Mock(spec=jax.Device, platform="gpu", device_kind=kind)
    assert throughput.peak_flops(device, dtype) == (tflops and tflops * 1e12)


def test_the_peak_of_a_cpu_is_measured_and_shared_by_its_virtual_devices(monkeypatch):
    monkeypatch.setattr(throughput, "_measured_cpu_flops", lambda: 8e9)
    assert throughput.peak_flops(jax.devices()[0], "float32") == 1e9
