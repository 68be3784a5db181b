"""The least time that a step can take, and the cost of a run."""

import dataclasses

from gptjax.planning import chips
from gptjax.planning.facts import Facts
from gptjax.training.throughput import datasheet_flops


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of one step, if each resource ran at its peak (Williams et al. 2009); None where a rate is not known.

    In `at_best`, computation, memory and links overlap fully; in `at_worst`, not at all. MFU counts only model FLOPs.
    All traffic is assumed to use the links within a slice; the slower network between slices is not modelled.
    """

    compute_s: float | None
    memory_s: float | None
    links_s: float | None
    at_best_s: float | None
    at_worst_s: float | None
    mfu_at_best: float | None
    mfu_at_worst: float | None
    bound: str


def roofline(facts: Facts, peak: float | None = None) -> Roofline:
    """The roofline of a compiled step. `peak`: FLOP/s of one device that is not in the tables."""
    chip = chips.find(facts.device_kind)
    peak = peak or datasheet_flops(facts.device_kind, facts.compute_dtype)
    seconds: dict[str, float | None] = {"compute": None, "memory": None, "links": None}
    if peak:
        seconds["compute"] = facts.executed_flops / facts.devices / peak
    if chip and facts.memory_bytes is not None:
        seconds["memory"] = facts.memory_bytes / chip.memory_rate
        seconds["links"] = sum(c.sent_bytes for c in facts.collectives) / chip.link_rate
    known = {name: value for name, value in seconds.items() if value is not None}
    best, worst = max(known.values(), default=None), sum(known.values()) or None
    ideal = facts.flops_per_token * facts.tokens_per_step / facts.devices / peak if peak else None
    return Roofline(
        compute_s=seconds["compute"],
        memory_s=seconds["memory"],
        links_s=seconds["links"],
        at_best_s=best,
        at_worst_s=worst,
        mfu_at_best=ideal / best if ideal and best else None,
        mfu_at_worst=ideal / worst if ideal and worst else None,
        bound=max(known, key=known.get) if known else "",
    )


@dataclasses.dataclass(frozen=True)
class Cost:
    """Time and money for a number of tokens; each pair is (at best, at worst)."""

    tokens: float
    price_per_chip_hour: float | None
    hours: tuple[float, float]
    chip_hours: tuple[float, float]
    price: tuple[float, float] | None


def cost(facts: Facts, times: Roofline, tokens: float, price_per_chip_hour: float | None) -> Cost | None:
    """The cost of training on `tokens`, without evaluation, checkpoints and restarts; None without a step time."""
    if facts.memory is None or times.at_best_s is None or times.at_worst_s is None:
        return None
    steps = tokens / facts.tokens_per_step
    hours = tuple(steps * seconds / 3600 for seconds in (times.at_best_s, times.at_worst_s))
    chip_hours = tuple(hour * facts.devices for hour in hours)
    price = None if price_per_chip_hour is None else tuple(h * price_per_chip_hour for h in chip_hours)
    return Cost(tokens, price_per_chip_hour, hours, chip_hours, price)
