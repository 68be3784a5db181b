"""--describe compared with the parameters themselves, published numbers and arithmetic by hand."""

import json

import pytest

from gptjax import cli, train
from gptjax import config as config_lib
from gptjax.errors import UserError
from gptjax.model import presets
from gptjax.planning.description import describe, show


@pytest.fixture
def gpt2():
    config = config_lib.get_default()
    config.model.update(presets.get("gpt2-124m"), vocab_multiple=1)
    config.train.update(num_steps="10B tokens", batch_size=512)
    return config


def test_gpt2(gpt2):
    about = describe(gpt2)
    assert about["parameters"] == 124_439_808
    assert about["embedding_parameters"] == (50257 + 1024) * 768
    assert sum(row["flops"] for row in about["rows"]) == pytest.approx(about["flops_per_token"])
    # nanoGPT: 6 N + 12 layers heads head_dim context, N without positions; half of that for causal attention, no norms.
    matrices = 12 * 12 * 768**2 + 50257 * 768
    assert about["flops_per_token"] == 6 * matrices + 6 * 12 * 768 * 1024
    assert about["num_steps"] == round(10e9 / 2**19) and about["tokens_per_step"] == 2**19
    sizes = about["memory"]
    assert sizes["parameters"] == sizes["gradients"] == 4 * 124_439_808
    assert sizes["optimizer"] == pytest.approx(2 * sizes["parameters"], rel=1e-6)  # AdamW's two moments
    assert sizes["average"] == 0


def test_experts_count_where_they_compute(tiny_config):
    tiny_config.model.update(num_experts=4, experts_per_token=2)
    about = describe(tiny_config)
    assert sum(row["flops"] for row in about["rows"]) == pytest.approx(about["flops_per_token"])
    rows = {row["module"]: row for row in about["rows"]}
    up = rows["blocks/mlp/expert_up/kernel"]
    assert up["flops"] == 6 * up["parameters"] / 2


def test_adapters_alone_have_gradients_and_moments(gpt2):
    whole = describe(gpt2)
    gpt2.model.update(lora_rank=8, lora_targets="attention/query")
    about = describe(gpt2)
    adapters = 12 * 8 * 2 * 768
    assert about["parameters"] == whole["parameters"] + adapters
    assert about["memory"]["gradients"] == 4 * adapters
    assert about["memory"]["optimizer"] == pytest.approx(8 * adapters, rel=1e-3)
    attention = 6 * 12 * 768 * 1024
    assert about["flops_per_token"] - attention == pytest.approx((whole["flops_per_token"] - attention) * 4 / 6)
    assert sum(row["flops"] for row in about["rows"]) == pytest.approx(about["flops_per_token"])


@pytest.mark.parametrize(("tokenizer", "size"), [("byte", 257), ("bpe:1000", 1000)])
def test_a_vocabulary_that_is_known_needs_no_data(tiny_config, tokenizer, size):
    tiny_config.model.vocab_size = 0
    tiny_config.tokenizer = tokenizer
    tiny_config.data.source = "text:/nowhere/*.txt"
    assert describe(tiny_config)["vocab_size"] == size


def test_otherwise_the_data_are_opened(tiny_config, tiny_corpus):
    tiny_config.model.vocab_size = 0
    tiny_config.tokenizer = "char"
    tiny_config.data.source = "text:/nowhere/*.txt"
    with pytest.raises(UserError):
        describe(tiny_config)
    tiny_config.data.source = f"text:{tiny_corpus}/*.txt"
    tiny_config.train.num_steps = "2 epochs"
    about = describe(tiny_config)
    characters = len({c for path in tiny_corpus.glob("*.txt") for c in path.read_text()})
    assert about["vocab_size"] == characters + 1
    assert about["num_steps"] > 1


def test_the_command(tmp_path, capsys):
    config = tmp_path / "config.py"
    config.write_text("from gptjax.config import get_default\n\ndef get_config(arg=''):\n    return get_default()\n")
    assert cli.run(train.main, ["train", f"--config={config}", "--describe", "--config.tokenizer=byte"]) == 0
    printed = capsys.readouterr().out
    assert "blocks/attention/query/kernel" in printed and "FLOPs per token" in printed
    assert list(tmp_path.iterdir()) == [config]


def test_every_line_fits(gpt2, capsys):
    show(gpt2)
    printed = capsys.readouterr().out
    assert "…" not in printed and "12 x 768 x 3072" in printed
    assert json.dumps(124_439_808) in printed.replace(",", "")
