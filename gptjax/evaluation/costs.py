"""What a run cost: tokens, arithmetic, device hours, money, and where the time went. From its metrics and manifest."""

from typing import Any

ACTIVITIES = {
    "step": "training steps",
    "start": "start-up",
    "compile": "compilation",
    "data": "waiting for data",
    "eval": "evaluation and samples",
    "checkpoint": "saving",
    "idle": "all else",
}


def rows(train: list[dict[str, Any]], manifest: dict[str, Any], config: dict[str, Any]) -> list[tuple[str, str]]:
    """(what, how much) of a run with training lines in metrics.jsonl; what is not known is left out."""
    found: list[tuple[str, str]] = []
    if not train:
        return found
    last = train[-1]
    tokens, flops = last.get("tokens_seen"), manifest.get("flops_per_token")
    if tokens:
        found.append(("tokens", f"{tokens:,}"))
    if tokens and flops:
        convention = manifest.get("flops_convention", "")
        found.append(("arithmetic", f"{tokens * flops:.3g} FLOP ({flops:.3g} a token, {convention})"))
    seconds = {name: last[f"seconds/{name}"] for name in ACTIVITIES if f"seconds/{name}" in last}
    total = sum(seconds.values())
    if not total:
        return found
    devices = manifest.get("devices", {})
    count = devices.get("count", 1)
    hours = count * total / 3600
    found.append(("device time", f"{hours:,.3g} hours ({count} x {devices.get('kind', 'device')}, {total:,.0f} s)"))
    price = config.get("logging", {}).get("price_per_device_hour", 0)
    if price:
        found.append(("price", f"{hours * price:,.2f} at {price:g} an hour"))
    for name, seconds_of in seconds.items():
        found.append((ACTIVITIES[name], f"{seconds_of:,.1f} s, {seconds_of / total:.1%}"))
    return found
