"""Expressions are computed exactly and within limits, and nothing in them is executed."""

from fractions import Fraction

import pytest

from gptjax.rewards.arithmetic import value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1 + 2 * 3", 7),
        (" (1 + 2) * -3 ", -9),
        ("0.1 + 0.2", Fraction(3, 10)),
        ("7 / 2", Fraction(7, 2)),
        ("7 // 2", 3),
        ("-7 % 3", 2),
        ("2 ** 10", 1024),
        ("2 ** -2", Fraction(1, 4)),
        ("1_000", 1000),
        ("1e3", 1000),
        ("2 ** 3 ** 2", 512),
    ],
)
def test_arithmetic_has_its_exact_value(text, expected):
    assert value(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1 +",
        "1 / 0",
        "0 ** -1",
        "2 ** 0.5",
        "9 ** 9 ** 9 ** 9",
        "10 ** 99 ** 2",
        "(((10 ** 100) ** 100) ** 100)",
        "1e999999999",
        "0x10",
        "1j",
        "True",
        "'a' * 3",
        "x",
        "__import__('os').system('true')",
        "[1][0]",
        "1 if 1 else 2",
        "1 << 100000000",
        "-" * 400 + "1",
        "(" * 240 + "1" + ")" * 240,
        "1" * 501,
        "1\x00",
        "1 < 2",
        "١ + ١",
    ],
)
def test_all_else_has_none(text):
    assert value(text) is None
