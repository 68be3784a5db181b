import pytest

from gptjax.planning import report
from gptjax.planning.facts import Facts, Memory
from gptjax.planning.roofline import cost, roofline
from gptjax.planning.traffic import Buffer, Collective


def facts(**changes) -> Facts:
    """A step of 1,000 tokens on four v5e chips: compute 0.5 s, memory 0.25 s, links 1 s."""
    values = dict(
        topology="v5e:2x2",
        devices=4,
        device_kind="TPU v5 lite",
        platform="tpu",
        mesh={"data": 1, "fsdp": 4, "expert": 1, "context": 1, "tensor": 1},
        rows=10,
        context_length=100,
        accumulation=1,
        parameters=10**6,
        flops_per_token=4 * 197e12 * 0.4 / 1000,
        executed_flops=4 * 197e12 * 0.5,
        compute_dtype="bfloat16",
        memory=Memory(2**30, 2**29, 4 * 2**30, 2**29, 0),
        needed_bytes=None,
        available_bytes=15 * 2**30,
        memory_bytes=int(819e9 * 0.25),
        collectives=(Collective("all-gather", 3, int(250e9), int(200e9)),),
        buffers=(Buffer("f32[8,8]", 256, 1, "fusion", "jit(step)/dot_general"),),
        compile_seconds=1.0,
        versions={"jax": "0"},
    )
    return Facts(**{**values, **changes})


def test_the_slowest_resource_bounds_the_step():
    times = roofline(facts())
    assert (times.compute_s, times.memory_s, times.links_s) == pytest.approx((0.5, 0.25, 1.0))
    assert times.bound == "links"
    assert times.at_best_s == pytest.approx(1.0)
    assert times.at_worst_s == pytest.approx(1.75)
    assert times.mfu_at_best == pytest.approx(0.4)
    assert times.mfu_at_worst == pytest.approx(0.4 / 1.75)


def test_cost_is_chips_times_hours_times_price():
    found = cost(facts(), roofline(facts()), tokens=3.6e6, price_per_chip_hour=2.0)
    assert found.hours == pytest.approx((1.0, 1.75))
    assert found.chip_hours == pytest.approx((4.0, 7.0))
    assert found.price == pytest.approx((8.0, 14.0))
    assert cost(facts(), roofline(facts()), 1e6, None).price is None
    large = facts(memory=None, memory_bytes=None, collectives=())
    assert cost(large, roofline(large), 1e6, 2.0) is None  # what does not fit costs nothing


def test_unknown_hardware_has_a_report_without_times():
    unknown = facts(device_kind="a new chip")
    times = roofline(unknown)
    assert times.at_best_s is None
    assert cost(unknown, times, 1e6, 1.0) is None
    assert "FITS" in report.text(unknown, times, None)


def test_peak_memory_counts_donated_buffers_once():
    assert facts().memory.peak == 5 * 2**30
    assert facts().fits
    assert not facts(available_bytes=4 * 2**30).fits
    assert not facts(memory=None, needed_bytes=2**40).fits


def test_the_verdict_has_the_numbers():
    assert report.verdict(facts()) == "FITS: it needs 5.00 GiB of 15.00 GiB per device (33%)"
    large = facts(memory=None, needed_bytes=20 * 2**30)
    assert report.verdict(large).startswith("DOES NOT FIT: it needs 20.00 GiB of 15.00 GiB per device")


def test_facts_survive_json():
    assert Facts.from_json(facts().to_json()) == facts()
    assert Facts.from_json(facts(memory=None).to_json()) == facts(memory=None)
