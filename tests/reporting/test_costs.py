import pytest

from gptjax.reporting import costs

MANIFEST = {"flops_per_token": 6e3, "flops_convention": "6N", "devices": {"count": 4, "kind": "H200"}}


def test_costs_by_hand():
    config = {"logging": {"price_per_device_hour": 3.0}}
    rows = dict(costs.rows([{"tokens_seen": 500}, {"tokens_seen": 1000}], 36.0, MANIFEST, config))
    assert rows == {
        "tokens": "1,000",
        "arithmetic": "6e+06 FLOP (6e+03 per token, 6N)",
        "device time": "0.04 hours (4 x H200, 36 s)",
        "price": "0.12 at 3 per hour",
    }


@pytest.mark.parametrize("lines", [[], [{"step": 1}]])
def test_what_is_not_known_is_left_out(lines):
    assert costs.rows(lines, 0.0, {}, {}) == []
