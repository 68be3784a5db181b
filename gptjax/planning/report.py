"""A plan in words and as JSON."""

import dataclasses
from typing import Any

from gptjax.planning.facts import Facts
from gptjax.planning.roofline import Cost, Roofline
from gptjax.training.throughput import CONVENTION

GIB = 2**30


def text(facts: Facts, times: Roofline, cost: Cost | None) -> str:
    """The report that the command prints."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in facts.mesh.items() if size > 1) or "1 device"
    parts = f", {facts.accumulation} micro-batches" if facts.accumulation > 1 else ""
    lines = [
        f"{facts.parameters:,} parameters; a step of {facts.rows:,} rows x {facts.context_length:,} tokens{parts}",
        f"on {facts.topology}: {facts.devices} x {facts.device_kind}, mesh {mesh}",
        "",
        verdict(facts),
    ]
    if facts.memory is not None:
        lines += _memory(facts) + _buffers(facts) + _collectives(facts)
    lines += _time(facts, times)
    if cost is not None:
        lines += _cost(cost)
    versions = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    lines += ["", f"compiled in {facts.compile_seconds:.0f} s by {versions}"]
    return "\n".join(lines)


def verdict(facts: Facts) -> str:
    """One line that says whether the step fits, with the numbers."""
    there = facts.available_bytes
    have = f"{there / GIB:.2f} GiB per device" if there is not None else "an unknown amount of memory"
    if facts.memory is None:
        need = f"{facts.needed_bytes / GIB:.2f} GiB" if facts.needed_bytes else "more"
        return f"DOES NOT FIT: it needs {need} of {have}. --suggest finds what does"
    peak = f"{facts.memory.peak / GIB:.2f} GiB"
    if not facts.fits:
        return f"DOES NOT FIT: it needs {peak} of {have}. --suggest finds what does"
    share = f" ({facts.memory.peak / there:.0%})" if there else ""
    return f"FITS: it needs {peak} of {have}{share}"


def _memory(facts: Facts) -> list[str]:
    m = facts.memory
    rows = [
        ("arguments (parameters, optimizer state, batch)", m.arguments),
        ("outputs", m.outputs),
        ("  outputs that reuse the memory of arguments", -m.aliased),
        ("temporaries (activations, gradients)", m.temporaries),
        ("program", m.generated_code),
    ]
    lines = ["", "Peak memory per device, GiB"]
    lines += [f"  {name:<50}{size / GIB:>9.3f}" for name, size in rows]
    if m.host:
        lines.append(f"  {'in host memory':<50}{m.host / GIB:>9.3f}")
    return lines


def _buffers(facts: Facts) -> list[str]:
    lines = ["", "Largest temporary buffers (not all at the same time)"]
    for b in facts.buffers:
        times = f"{b.count} x " if b.count > 1 else ""
        lines.append(f"  {b.num_bytes / GIB:8.3f} GiB  {times}{b.shape}  {b.opcode}  {short_name(b.op_name)}")
    return lines


def _collectives(facts: Facts) -> list[str]:
    if not facts.collectives:
        return ["", "No collectives"]
    lines = ["", f"{'Collectives per device and step':<36}{'number':>8}{'payload GiB':>14}{'sent GiB':>12}"]
    for c in facts.collectives:
        lines.append(f"  {c.kind:<34}{c.count:>8,}{c.payload_bytes / GIB:>14.3f}{c.sent_bytes / GIB:>12.3f}")
    return lines


def _time(facts: Facts, times: Roofline) -> list[str]:
    flops = facts.flops_per_token * facts.tokens_per_step
    lines = [
        "",
        f"FLOPs per step: {_count(flops)}, {facts.flops_per_token / 1e6:,.1f} M per token ({CONVENTION})",
        f"  run by the program: {_count(facts.executed_flops)} "
        f"({facts.executed_flops / flops:.2f} x: with full attention squares and recomputation)",
    ]
    if times.at_best_s is None or facts.memory_bytes is None:
        return lines
    resources = [("compute", times.compute_s), ("memory", times.memory_s), ("links", times.links_s)]
    each = ", ".join(f"{name} {_seconds(s)}" for name, s in resources if s is not None)
    lines.append(f"Roofline of a step at peak rates: {each}; bound by {times.bound}")
    for name, seconds, mfu in (
        ("all overlapped", times.at_best_s, times.mfu_at_best),
        ("none overlapped", times.at_worst_s, times.mfu_at_worst),
    ):
        share = f", MFU {mfu:.1%}" if mfu is not None else ""
        rate = facts.tokens_per_step / seconds
        lines.append(f"  {name:<17}{_seconds(seconds)} per step, {rate:,.0f} tokens/s{share}")
    return lines


def _cost(cost: Cost) -> list[str]:
    def span(pair: tuple[float, float], digits: int = 1) -> str:
        return f"{pair[0]:,.{digits}f} to {pair[1]:,.{digits}f}"

    line = f"{_count(cost.tokens, 'B')} tokens: {span(cost.hours)} hours, {span(cost.chip_hours)} chip-hours"
    if cost.price is not None:
        line += f", {span(cost.price, 2)} at {cost.price_per_chip_hour:g} per chip-hour"
    return [f"{line} (only steps)"]


def _count(number: float, billion: str = "G") -> str:
    """A large number with its unit: 819,200 as 0.82 M."""
    for size, unit in ((1e12, "T"), (1e9, billion), (1e6, "M")):
        if number >= size / 10:
            return f"{number / size:,.2f} {unit}"
    return f"{number:,.0f}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def short_name(op_name: str) -> str:
    """The last part of an operation's path, which says what the operation is."""
    parts = [p for p in op_name.split("/") if p not in ("while", "body", "eval_jaxpr", "closed_call", "checkpoint")]
    return "/".join(parts[-4:])


def to_dict(facts: Facts, times: Roofline, cost: Cost | None, config_sha256: str) -> dict[str, Any]:
    """The JSON that --output writes: everything in the report, in bytes and seconds."""
    memory = facts.memory and {**dataclasses.asdict(facts.memory), "peak": facts.memory.peak}
    return {
        "config_sha256": config_sha256,
        "fits": facts.fits,
        **dataclasses.asdict(facts),
        "memory": memory,
        "flops_convention": CONVENTION,
        "roofline": dataclasses.asdict(times),
        "cost": cost and dataclasses.asdict(cost),
    }
