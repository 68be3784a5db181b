"""The cost of a run in tokens, FLOPs, device hours and money, from its metrics, manifest and config."""

from typing import Any


def rows(
    train: list[dict[str, Any]], seconds: float, manifest: dict[str, Any], config: dict[str, Any]
) -> list[tuple[str, str]]:
    """(kind of cost, amount) as texts; unknown costs are left out.

    Args:
      train: the run's training lines of metrics.jsonl.
      seconds: how long the run used all its devices.
    """
    found: list[tuple[str, str]] = []
    tokens, flops = (train[-1].get("tokens_seen") if train else None), manifest.get("flops_per_token")
    if tokens:
        found.append(("tokens", f"{tokens:,}"))
    if tokens and flops:
        convention = manifest.get("flops_convention", "")
        found.append(("arithmetic", f"{tokens * flops:.3g} FLOP ({flops:.3g} per token, {convention})"))
    if seconds:
        devices = manifest.get("devices", {})
        count = devices.get("count", 1)
        hours = count * seconds / 3600
        found.append(
            ("device time", f"{hours:,.3g} hours ({count} x {devices.get('kind', 'device')}, {seconds:,.0f} s)")
        )
        if price := config.get("logging", {}).get("price_per_device_hour", 0):
            found.append(("price", f"{hours * price:,.2f} at {price:g} per hour"))
    return found
