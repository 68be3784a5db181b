"""Numbers of steps as people write them: 500, "2%", "1 epoch", "10M tokens"."""

import re
from typing import Any

UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}


def duration_problem(value: Any) -> str | None:
    """What is wrong with the text of a duration, or None."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        return f"is {value!r}, not a duration; use steps (500), '2%', '1 epoch' or '10M tokens'"
    try:
        if resolve_duration(value, total=100, tokens_per_step=1, steps_per_epoch=1.0) < 0:
            return f"is {value!r}; a duration is not negative"
    except ValueError:
        return f"is {value!r}, not a duration; use steps (500), '2%', '1 epoch' or '10M tokens'"
    return None


def resolve_duration(value: int | str, *, total: int | None, tokens_per_step: int, steps_per_epoch: float) -> int:
    """Steps in a duration; a percentage is a share of `total`. Raises ValueError if the text is not a duration."""
    if isinstance(value, int):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([KMB]?)\s*(%|epochs?|tokens?|steps?|)\s*", value)
    if not match or (match[3] == "%" and (total is None or match[2])):
        raise ValueError(value)
    number = float(match[1]) * UNITS[match[2]]
    if match[3] == "%":
        return round(number / 100 * total)
    if match[3].startswith("epoch"):
        return round(number * steps_per_epoch)
    if match[3].startswith("token"):
        return round(number / tokens_per_step)
    return round(number)
