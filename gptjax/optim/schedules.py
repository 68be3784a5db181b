"""Learning rate over steps: warm-up, then one of five shapes. Built from optax's own pieces."""

import jax.numpy as jnp
import optax


def make_schedule(
    name: str, *, peak: float, num_steps: int, warmup: int, decay: int = 0, final_fraction: float = 0.0
) -> optax.Schedule:
    """A schedule that rises linearly over `warmup` steps and ends at `peak * final_fraction` at `num_steps`.

    * cosine, linear: from the peak to the end.
    * wsd: constant, then linear over the last `decay` steps (Hu et al. 2024, "MiniCPM").
    * rsqrt: peak * sqrt(warmup / step) (Vaswani et al. 2017); `final_fraction` is not used.
    * constant: the peak.

    Step 0 uses the first non-zero rate, peak / warmup, as nanoGPT and PyTorch recipes do.
    """
    final, rest = peak * final_fraction, max(num_steps - warmup, 1)
    if name == "cosine":
        body = optax.cosine_decay_schedule(peak, rest, alpha=final_fraction)
    elif name == "linear":
        body = optax.linear_schedule(peak, final, rest)
    elif name == "wsd":
        decay = min(decay, rest)
        body = optax.join_schedules(
            [optax.constant_schedule(peak), optax.linear_schedule(peak, final, max(decay, 1))], [rest - decay]
        )
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
