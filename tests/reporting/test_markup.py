import math

import pytest

from gptjax.reporting import markup


@pytest.mark.parametrize(
    ("value", "text"), [(14.3, "14.300"), (0.4123, "0.41230"), (123456.7, "123,457"), (0.0, "0.0000")]
)
def test_five_significant_digits(value, text):
    assert markup.significant(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(12.4, "12s"), (200, "3m 20s"), (3720, "1h 02m")])
def test_durations(seconds, text):
    assert markup.duration(seconds) == text


@pytest.mark.parametrize("value", [None, "3", True, 10**400, [1]])
def test_what_is_no_number_is_nan(value):
    assert math.isnan(markup.as_number(value))


def test_nested_objects_are_flattened_and_escaped():
    rows = list(markup.flat({"a": {"b": "<i>", "c": {}}, "d": 1.5}))
    assert rows == [("a.b", "<i>"), ("a.c", "{}"), ("d", "1.5")]
    table = markup.table({"name": "key", "value": "code"}, rows)
    assert "&lt;i&gt;" in table and "<i>" not in table
    assert table.count("<tr>") == 4
