"""Numbers of steps as people write them: 500, 1e3, "2%", "1 epoch", "10M tokens"."""

import re
from typing import Any

UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
EXAMPLES = "steps (500), '2%', '1 epoch' or '10M tokens'"
LARGEST = 10**18  # steps or tokens
_PATTERN = re.compile(
    r"\+?(\d+(?:_\d+)*(?:\.(?:\d+(?:_\d+)*)?)?|\.\d+)(?:[eE]([+-]?\d{1,4}))?\s*([KMB]?)\s*(%|epochs?|tokens?|steps?|)",
    re.ASCII,
)
_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}  # the digits and signs of Chinese input methods


def ascii_digits(text: str) -> str:
    """The text with full-width digits and signs as the usual ones."""
    return text.translate(_FULL_WIDTH)


def duration_problem(value: Any) -> str | None:
    """What is wrong with the text of a duration, or None."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        known = value is None or isinstance(value, bool | float)
        return f"is {value!r}, not a duration; use {EXAMPLES}" if known else f"is not a duration; use {EXAMPLES}"
    text = repr(value) if not isinstance(value, str) or len(value) <= 60 else f"{value[:60]!r}..."
    try:
        steps = resolve_duration(value, total=100, tokens_per_step=1, steps_per_epoch=1.0)
    except ValueError:
        return f"is {text}, not a duration; use {EXAMPLES}"
    return f"is {text}; a duration is not negative" if steps < 0 else None


def resolve_duration(value: int | str, *, total: int | None, tokens_per_step: int, steps_per_epoch: float) -> int:
    """Steps in a duration, at most LARGEST; a percentage is a share of `total`. Raises ValueError for other texts."""
    if isinstance(value, int):
        return min(value, LARGEST)
    match = _PATTERN.fullmatch(ascii_digits(value).strip()) if len(value) <= 100 else None
    if not match or (match[4] == "%" and (total is None or match[3])):
        raise ValueError(value)
    number = min(float(f"{match[1].replace('_', '')}e{match[2] or 0}") * UNITS[match[3]], float(LARGEST))
    if match[4] == "%":
        return round(number / 100 * total)
    if match[4].startswith("epoch"):
        return round(number * steps_per_epoch)
    if match[4].startswith("token"):
        return round(number / tokens_per_step)
    if not number.is_integer():
        raise ValueError(value)
    return int(number)


def is_zero(value: int | str) -> bool:
    """Whether a duration is zero in every run: 0, "0%", "0 epochs"."""
    return resolve_duration(value, total=10**9, tokens_per_step=1, steps_per_epoch=1e9) == 0


def in_epochs(value: int | str) -> bool:
    """Whether the length of the data must be known to resolve a duration."""
    return "epoch" in str(value)
