"""Learning rate over steps: warm-up, then one of six shapes. Built from optax's own pieces."""

import itertools

import jax.numpy as jnp
import optax
from ml_collections import ConfigDict


def make_schedule(schedule: ConfigDict, *, peak: float, num_steps: int) -> optax.Schedule:
    """The schedule of a resolved `config.schedule`: it rises linearly over `warmup` steps to the peak.

    * cosine, linear: from the peak to `peak * final_fraction` at `num_steps`.
    * cosine_restarts: `cycles` cosines of equal length (Loshchilov and Hutter 2017, "SGDR").
    * wsd: constant, then down over the last `decay` steps: linearly (Hu et al. 2024, "MiniCPM"), or, with
      `decay_shape` sqrt, as 1 - sqrt(share of the decay) (Haegele et al. 2024, arXiv:2405.18392).
    * rsqrt: peak * sqrt(warmup / step) (Vaswani et al. 2017); `final_fraction` is not used.
    * constant: the peak.

    Step 0 uses the first non-zero rate, peak / warmup, as nanoGPT and PyTorch recipes do.
    """
    name, warmup, final_fraction = schedule.name, schedule.warmup, schedule.final_fraction
    final, rest = peak * final_fraction, max(num_steps - warmup, 1)
    if name == "cosine":
        body = optax.cosine_decay_schedule(peak, rest, alpha=final_fraction)
    elif name == "cosine_restarts":
        starts = [round(rest * cycle / schedule.cycles) for cycle in range(schedule.cycles + 1)]
        lengths = [max(end - start, 1) for start, end in itertools.pairwise(starts)]
        cosines = [optax.cosine_decay_schedule(peak, length, alpha=final_fraction) for length in lengths]
        body = optax.join_schedules(cosines, starts[1:-1])
    elif name == "linear":
        body = optax.linear_schedule(peak, final, rest)
    elif name == "wsd":
        decay = min(schedule.decay, rest)
        down = optax.linear_schedule(peak, final, max(decay, 1))
        if schedule.decay_shape == "sqrt":
            down = lambda step: final + (peak - final) * (1 - jnp.sqrt(jnp.clip(step / max(decay, 1), 0, 1)))  # noqa: E731
        body = optax.join_schedules([optax.constant_schedule(peak), down], [rest - decay])
    elif name == "rsqrt":
        offset = max(warmup, 1)
        body = lambda step: peak * jnp.sqrt(offset / (offset + jnp.maximum(step, 0)))  # noqa: E731
    elif name == "constant":
        body = optax.constant_schedule(peak)
    else:
        raise ValueError(f"unknown schedule {name!r}")
    if not warmup:
        return body
    return optax.join_schedules([lambda step: peak * (step + 1) / warmup, body], [warmup])
