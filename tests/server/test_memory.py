"""Models that share arrays: adapters beside their base."""

import dataclasses

import jax
import numpy as np
import pytest

from gptjax.errors import UserError
from gptjax.generation.params import SamplingParams
from gptjax.model import lora
from gptjax.server import memory
from gptjax.server import models as models_lib
from gptjax.server.served import EngineOptions

OPTIONS = EngineOptions(slots=2, chunk=16, rounds=2, max_waiting=16)
GREEDY = SamplingParams(max_new_tokens=12, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, make_trained, save_run):
    """A base model, and two runs that trained adapters for it."""
    directory, base = tmp_path_factory.mktemp("runs"), make_trained()
    save_run(directory / "base", 1, base)
    for seed in (1, 2):
        adapted = make_trained(seed=seed, lora_rank=2, lora_alpha=4.0)
        params = lora.join(lora.split(adapted.params)[0], base.params)
        save_run(directory / f"adapted{seed}", 1, dataclasses.replace(adapted, params=params))
    return directory


def adapter_bytes(model):
    leaves = jax.tree_util.tree_leaves_with_path(model.model.params)
    return sum(leaf.nbytes for path, leaf in leaves if "lora_" in jax.tree_util.keystr(path))


def answer(model):
    model.start(warm_up=False)
    with model.pumping() as pump:
        events = list(pump.submit(model.encode("the same prompt"), GREEDY))
    model.close(0)
    tokens = [token for event in events for token in event.tokens]
    return tokens, [value for event in events for value in event.log_probabilities]


def test_adapters_share_their_base(runs):
    texts = [f"{name}={runs / name}" for name in ("base", "adapted1", "adapted2")]
    models = models_lib.load(texts, OPTIONS)
    base, first, second = models.taken
    adapters = adapter_bytes(models.find("adapted1"))
    assert base.shared == 0 and first.parameters == second.parameters == adapters < base.parameters / 4
    assert first.shared == second.shared == base.parameters and first.state == base.state
    assert f"({base.parameters / memory.MIB:.1f} MiB more are shared)" in str(first)
    answers = {model.name: answer(model) for model in models}
    for text in texts:  # alone, adapters are merged into the kernels
        (alone,) = models_lib.load([text], OPTIONS)
        assert not adapter_bytes(alone)
        tokens, values = answer(alone)
        assert tokens == answers[alone.name][0]
        np.testing.assert_allclose(values, answers[alone.name][1], atol=1e-4)
    assert answers["adapted1"][0] != answers["base"][0] != answers["adapted2"][0]


def test_memory_counts_what_is_shared_once(runs):
    texts = [f"{name}={runs / name}" for name in ("base", "adapted1", "adapted2")]
    need = sum(one.own for one in models_lib.load(texts, OPTIONS).taken)
    models_lib.load(texts, OPTIONS, (need + 1) / memory.GIB)
    with pytest.raises(UserError, match=r"up to adapted2 need 0.00 GiB.*\(base: 0.0 MiB of weights, .*more are shared"):
        models_lib.load(texts, OPTIONS, (need - 1) / memory.GIB)
    with pytest.raises(UserError, match="one of them twice while it is replaced"):
        models_lib.load(texts, OPTIONS, (need + 1) / memory.GIB, reload=True)


def test_only_equal_bits_are_shared():
    one = {"a": jax.numpy.array([0.0, 1.0]), "b": jax.numpy.ones(3), "c": jax.numpy.ones(2)}
    other = {"a": jax.numpy.array([-0.0, 1.0]), "b": jax.numpy.ones(3), "c": jax.numpy.ones(3)}
    shared = memory.share(one, [other])
    assert shared["a"] is one["a"] and shared["b"] is other["b"] and shared["c"] is one["c"]
