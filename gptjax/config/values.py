"""A value of an option, however it is written: 1000, "1e3", 8.0, "yes", a NumPy scalar."""

import contextlib
import os
import re
from decimal import Decimal
from typing import Any

from gptjax.config.durations import LARGEST, ascii_digits, duration_problem
from gptjax.config.options import Option

SMALLEST = 1.2e-38  # the smallest positive float32 of full precision
LONGEST = 65_536  # characters of a text
_WORDS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
_NUMBER = re.compile(r"[+-]?(?:\d+(?:_\d+)*(?:\.(?:\d+(?:_\d+)*)?)?|\.\d+(?:_\d+)*)(?:[eE][+-]?\d{1,4})?", re.ASCII)
_HEXADECIMAL = re.compile(r"0[xX][0-9a-fA-F]{1,32}", re.ASCII)
_NOT_FINITE = re.compile(r"[+-]?(?:nan|inf|infinity)", re.IGNORECASE)


def shown(value: Any, width: int = 60) -> str:
    """The value in a message, cut to a sane length."""
    if isinstance(value, str):
        return repr(value) if len(value) <= width else f"{value[:width]!r}... ({len(value)} characters)"
    if value is not None and not isinstance(value, bool | int | float | list | tuple | dict):
        return f"a value of another kind ({type(value).__name__})"
    try:
        text = repr(value)
    except ValueError:  # a whole number of thousands of digits
        text = f"a number of {value.bit_length()} bits"
    return text if len(text) <= width else text[:width] + "..."


def read(option: Option, value: Any) -> Any:
    """The value in the type of the option's default. Raises ValueError "is ...", to be put after the option's name."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # a scalar of NumPy or JAX
        value = value.item()
    if option.duration:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, int) and not isinstance(value, bool):
            value = max(min(value, LARGEST), -LARGEST)
        if problem := duration_problem(value):
            raise ValueError(problem)
        with contextlib.suppress(ValueError):  # a number of steps in a text
            return _whole(value)
        return value
    if isinstance(option.default, bool):
        return _boolean(value)
    if isinstance(option.default, int):
        return _whole(value)
    if isinstance(option.default, float):
        return _real(value)
    return _text(value)


def _boolean(value: Any) -> bool:
    word = value if isinstance(value, str) else ""
    if isinstance(value, bool | int | float) and value in (0, 1):
        word = str(int(value))
    known = _WORDS.get(ascii_digits(word).strip().lower()) if len(word) < 100 else None
    if known is None:
        raise ValueError(f"is {shown(value)}; it must be true or false")
    return known


def _whole(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, float):
        if value.is_integer():
            return int(value)
    elif isinstance(value, str):
        text = ascii_digits(value).strip()
        if re.fullmatch(r"[+-]?\d{1,3}(?:[.,]\d{3})+", text, re.ASCII):
            written = re.sub("[.,]", "", text)
            raise ValueError(f"is {shown(value)}, which can be read in two ways; for {written} write {written}")
        if re.fullmatch(r"[\d.]+\s*[kKmMbBgG]", text, re.ASCII):
            raise ValueError(f"is {shown(value)}; write the number out, since K can mean 1000 or 1024")
        if _HEXADECIMAL.fullmatch(text):
            return int(text, 16)
        if len(text) <= 100 and _NUMBER.fullmatch(text):
            number = Decimal(text.replace("_", ""))
            # Beyond 10^40 every number is too large, and 1e9999 would have ten thousand digits.
            if number.adjusted() > 40:
                return int(Decimal(10) ** 40) * (-1 if number < 0 else 1)
            if number == number.to_integral_value():
                return int(number)
    raise ValueError(f"is {shown(value)}; it must be a whole number")


def _real(value: Any) -> float:
    number = _float(value)
    if 0 < abs(number) < SMALLEST:  # a step would take it as 0 and divide by it
        raise ValueError(f"is {shown(value)}, too near to 0 for a number of 32 bits; write 0 or at least {SMALLEST}")
    return number


def _float(value: Any) -> float:
    if isinstance(value, int) and not isinstance(value, bool):
        if abs(value) < 10**300:
            return float(value)
        raise ValueError(f"is {shown(value)}; it must be a finite number")
    if isinstance(value, float):
        return value
    if isinstance(value, str):
        text = ascii_digits(value).strip()
        if len(text) <= 100 and _NUMBER.fullmatch(text):
            return float(text)
        if _NOT_FINITE.fullmatch(text):
            raise ValueError(f"is {shown(value)}; it must be a finite number")
        if "," in text and len(text) <= 100 and _NUMBER.fullmatch(text.replace(",", ".")):
            raise ValueError(f"is {shown(value)}; write the fraction after a point: {text.replace(',', '.')}")
        if text.endswith("%") and _NUMBER.fullmatch(text[:-1]):
            raise ValueError(f"is {shown(value)}; it must be a number: 0.02 instead of 2%")
    raise ValueError(f"is {shown(value)}; it must be a number")


def _text(value: Any) -> str:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str):
        raise ValueError(f"is {shown(value)}; it must be a text")
    if len(value) > LONGEST:
        raise ValueError(f"is {shown(value)}; a text has at most {LONGEST} characters")
    if "\0" in value:
        raise ValueError(f"is {shown(value)}; a text has no zero byte")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"is {shown(value)}; a text must be UTF-8")
    return value
