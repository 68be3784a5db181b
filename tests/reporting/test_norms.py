"""The section of norms by layer."""

from gptjax.reporting import norms


def line(step: int, update: float) -> dict:
    paths = {"blocks/0/mlp/up/kernel": 2.0, "blocks/1/mlp/up/kernel": 4.0, "final_norm/scale": 0.0}
    found = {f"norms/parameter/{path}": norm for path, norm in paths.items()}
    found |= {f"norms/gradient/{path}": 0.5 for path in paths}
    found |= {f"norms/update/{path}": update for path in paths}
    return {"step": step, "split": "train", "loss": 1.0, **found}


def test_a_row_for_each_layer_and_a_curve_of_ratios():
    html = norms.section([{"step": 5, "loss": 2.0}, line(10, 0.02), line(20, 0.01)])
    assert "Step 20" in html and html.count("<tr") == 4
    assert "blocks/1/mlp/up/kernel" in html
    assert "5.00e-03" in html and "2.50e-03" in html, "of the last step, layer by layer"
    assert all(name in html for name in ("the largest", "the median", "the smallest")), "three curves"


def test_without_norms_there_is_no_section():
    assert norms.section([{"step": 5, "split": "train", "loss": 2.0}]) == ""


def test_a_line_with_null_norms_is_no_error():
    broken = {key: None if key.startswith("norms/update") else value for key, value in line(10, 1.0).items()}
    assert "Step 10" in norms.section([broken])
