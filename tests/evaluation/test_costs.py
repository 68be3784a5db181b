import pytest

from gptjax.evaluation import costs

LINE = {"step": 10, "tokens_seen": 1000, "seconds/step": 30.0, "seconds/compile": 6.0}
MANIFEST = {"flops_per_token": 6e3, "flops_convention": "6N", "devices": {"count": 4, "kind": "H200"}}


def test_costs_by_hand():
    config = {"logging": {"price_per_device_hour": 3.0}}
    rows = dict(costs.rows([LINE | {"seconds/step": 1.0}, LINE], MANIFEST, config))
    assert rows["tokens"] == "1,000"
    assert rows["arithmetic"] == "6e+06 FLOP (6e+03 a token, 6N)"
    assert rows["device time"] == "0.04 hours (4 x H200, 36 s)"
    assert rows["price"] == "0.12 at 3 an hour"
    assert rows["training steps"] == "30.0 s, 83.3%"
    assert rows["compilation"] == "6.0 s, 16.7%"


@pytest.mark.parametrize("lines", [[], [{"step": 1}]])
def test_what_is_not_known_is_left_out(lines):
    assert costs.rows(lines, {}, {}) == []
