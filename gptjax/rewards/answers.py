"""The number that an answer of GSM8K ends in (Cobbe et al. 2021, arXiv:2110.14168)."""

import re

_FINAL = re.compile(r"####\s*(-?[$]?-?[0-9.,]+)")  # grade-school-math, dataset.py, with a dollar sign allowed
_NUMBER = re.compile(r"-?[$]?-?[0-9.,]*[0-9][0-9.,]*")


def final_number(text: str) -> str | None:
    """The number after "####", without commas and dollar signs; None where there is none."""
    match = _FINAL.search(text)
    return _plain(match[1]) if match else None


def reference_number(text: str) -> str | None:
    """The same for a reference answer, which may be only the number."""
    number = final_number(text)
    if number is None and _NUMBER.fullmatch(text.strip()):
        number = _plain(text.strip())
    return number


def _plain(text: str) -> str:
    return text.replace(",", "").replace("$", "").rstrip(".")
