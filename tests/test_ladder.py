"""The dial of configs/ladder.py: each rule by its formula, and what must grow with depth."""

import importlib.util
import math
from pathlib import Path

import pytest

from gptjax import config as config_lib
from gptjax.errors import UserError
from gptjax.model import gpt
from gptjax.model.architecture import Architecture
from gptjax.model.huggingface import layouts

FILE = Path(__file__).parent.parent / "configs" / "ladder.py"
DEPTHS = [1, 2, 3, 4, 6, 8, 12, 20, 24, 36, 48]


@pytest.fixture(scope="module")
def ladder():
    spec = importlib.util.spec_from_file_location("ladder", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def architecture(config) -> Architecture:
    return Architecture.from_config(config.model, 32768)


def tokens(config) -> int:
    return config.train.num_steps * config.train.batch_size * config.model.context_length


@pytest.mark.parametrize("depth", DEPTHS)
def test_the_shape(ladder, depth):
    config = ladder.get_config(f"d{depth}")
    config_lib.validate(config)
    a = architecture(config)
    assert (a.num_layers, a.embed_dim, a.num_heads, a.head_dim) == (depth, 64 * depth, depth, 64)
    assert layouts.exportable(a)[0] == "qwen3"
    params = gpt.abstract_model(a)[1]
    matrices = sum(leaf.size for leaf in params["blocks"]["attention"]["out"].values())  # one of four
    assert matrices == depth * (64 * depth) ** 2
    norms = (2 * depth + 1) * 64 * depth + depth * 2 * 64
    assert gpt.parameter_count(params) == ladder.matrix_parameters(depth) + norms


@pytest.mark.parametrize("depth", DEPTHS)
def test_the_rules(ladder, depth):
    config = ladder.get_config(f"d{depth}")
    parameters, reference = ladder.matrix_parameters(depth), ladder.matrix_parameters(12)
    batch = config.train.batch_size * config.model.context_length
    assert batch == 2 ** round(math.log2(batch))
    assert abs(math.log2(batch / (2**19 * (parameters / reference) ** 0.383))) <= 0.5
    assert 20 * parameters - batch < tokens(config) <= 20 * parameters
    assert config.optimizer.muon_learning_rate == pytest.approx(0.02 * math.sqrt(batch / 2**19))
    assert config.optimizer.learning_rate == pytest.approx(3e-3 * math.sqrt(batch / 2**19 * 12 / depth))
    # Wang and Aitchison: the time scale of the average that weight decay makes is a fixed share of the run.
    share = batch / (config.optimizer.muon_learning_rate * config.optimizer.weight_decay * parameters)
    assert share == pytest.approx(2**19 / (0.02 * 0.1 * reference))


def test_what_grows_and_what_shrinks(ladder):
    rungs = [ladder.get_config(f"d{depth}") for depth in DEPTHS]
    assert all(a < b for a, b in zip(map(tokens, rungs), map(tokens, rungs[1:]), strict=False))
    batches = [config.train.batch_size for config in rungs]
    assert batches == sorted(batches) and batches[0] < batches[-1]
    decays = [config.optimizer.weight_decay for config in rungs]
    assert decays == sorted(decays, reverse=True)


def test_the_argument(ladder):
    assert ladder.get_config("") == ladder.get_config("d12")
    half = ladder.get_config("d6,ratio=10")
    assert tokens(half) == pytest.approx(tokens(ladder.get_config("d6")) / 2, rel=1e-2)
    small = ladder.get_config("d6,runlocal")
    config_lib.validate(small)
    assert small.train.num_steps == 20 and small.tokenizer == "byte"
    for wrong in ("x6", "d0", "d6,fast", "ratio=-1", "d"):
        with pytest.raises(UserError, match="unknown argument"):
            ladder.get_config(wrong)
