import math
import re

import pytest

from gptjax import config as config_lib
from gptjax.config import MESH_AXES
from gptjax.planning import suggestion
from gptjax.planning.compiler import Compiler
from gptjax.planning.facts import Memory
from gptjax.planning.suggestion import Candidate, Model
from tests.planning.test_roofline import facts

KIND, CHIPS = "TPU v5 lite", 16


@pytest.fixture
def config() -> config_lib.Config:
    config = config_lib.get_default()
    config.model.update(num_layers=24, num_heads=16, embed_dim=2048, context_length=1024, vocab_size=50257)
    config.model.update(compute_dtype="bfloat16", scan_unroll=1, attention="splash")
    config.train.update(batch_size=256, num_steps=10)
    return config_lib.resolve(config, 50257, 10.0)


class FakeCompiler:
    """Reports programs with `factor` times the estimated temporaries, and counts the compilations."""

    def __init__(self, config: config_lib.Config, gib: float, factor: float = 1.0):
        self.model, self.factor, self.asked = Model(config, KIND), factor, []
        self.compiler = Compiler(self.compile, CHIPS, KIND, int(gib * 2**30))

    def compile(self, config: config_lib.Config):
        config_lib.validate(config)
        mesh = {axis: config.mesh[axis] for axis in MESH_AXES}
        candidate = Candidate(config.train.batch_size, config.train.accumulation, config.model.remat, **mesh)
        self.asked.append(candidate)
        temporaries = self.factor * self.model.temporary_bytes(candidate)
        seconds = self.model.seconds(candidate)
        return facts(
            devices=CHIPS,
            mesh=mesh,
            rows=candidate.batch_size,
            context_length=1024,
            accumulation=candidate.accumulation,
            memory=Memory(int(self.model.state_bytes(candidate)), 0, int(temporaries), 0, 0),
            available_bytes=self.compiler.available_bytes,
            executed_flops=seconds * CHIPS * 197e12,
            memory_bytes=0,
            collectives=(),
        )


def test_candidates_are_valid_and_use_every_device(config):
    found = list(suggestion.candidates(config, CHIPS))
    assert len(found) == len(set(found)) > 50
    for candidate in found:
        assert devices_of(candidate) == CHIPS and candidate.expert == 1
        config_lib.validate(candidate.apply(config))


@pytest.mark.slow
def test_experts_are_split_over_what_divides_them(config):
    config.unlock().model.num_experts = 4
    found = list(suggestion.candidates(config, CHIPS))
    assert {candidate.expert for candidate in found} == {1, 2, 4}
    for candidate in found:
        assert devices_of(candidate) == CHIPS
        config_lib.validate(candidate.apply(config))


def devices_of(candidate: Candidate) -> int:
    return math.prod(getattr(candidate, axis) for axis in MESH_AXES)


def test_flags_give_the_candidate_back(config):
    candidate = Candidate(256, 4, "full", 2, 4, 1, 1, 2)
    assert not any("mesh.data" in flag for flag in candidate.flags(config))  # -1: all that the others leave
    config.unlock().mesh.data = 16
    changed = config.copy_and_resolve_references()
    for flag in candidate.flags(config):
        path, value = re.fullmatch(r"--config\.(\S+)=(\S+)", flag).groups()
        section, name = path.split(".")
        changed[section][name] = type(changed[section][name])(value)
    assert changed.to_dict() == candidate.apply(config).to_dict()


@pytest.mark.slow
@pytest.mark.parametrize("factor", [1.0, 1.6])
def test_it_finds_what_an_exhaustive_search_finds(config, factor):
    """Also if programs need more than estimated, which the search learns from the first answers."""
    fake = FakeCompiler(config, gib=10, factor=factor)
    trials = suggestion.search(config, fake.compiler, compiles=8)
    best = trials[0]
    assert best.times is not None
    assert len(fake.asked) <= 8
    every = [(c, fake.compile(c.apply(config))) for c in suggestion.candidates(config, CHIPS)]
    limit = 10 * 2**30 * suggestion.HEADROOM
    fitting = [fake.model.seconds(c) for c, found in every if found.memory.peak <= limit]
    assert len(fitting) < len(every)
    assert fake.model.seconds(best.candidate) <= 1.1 * min(fitting)


def test_what_fits_already_is_kept_where_nothing_is_faster(config):
    fake = FakeCompiler(config, gib=1000)
    best = min(suggestion.candidates(config, CHIPS), key=fake.model.seconds)
    chosen = best.apply(config)
    trials = suggestion.search(chosen, fake.compiler, first=fake.compile(chosen), compiles=4)
    assert trials[0].candidate == best
    assert trials[0].candidate.flags(chosen) == []


def test_where_nothing_fits_the_smallest_comes_first(config):
    fake = FakeCompiler(config, gib=0.5)
    trials = suggestion.search(config, fake.compiler, compiles=3)
    assert all(trial.times is None for trial in trials)
    needs = [suggestion.needed(trial.facts) for trial in trials]
    assert needs == sorted(needs)
    smallest = min(suggestion.candidates(config, CHIPS), key=fake.model.total_bytes)
    assert needs[0] == pytest.approx(fake.model.total_bytes(smallest), rel=1e-6)


def test_a_batch_that_no_mesh_divides_is_rounded(config):
    odd = config.copy_and_resolve_references()
    odd.model.update(num_heads=3, head_dim=128)
    odd.train.batch_size = 100
    sizes = {candidate.batch_size for candidate in suggestion.candidates(odd, CHIPS)}
    assert sizes == {96, 112}


def test_what_is_searched_changes_no_result_but_the_batch(config):
    """A suggestion can be applied in the middle of a run, unless it changes the batch."""
    searched = set(Candidate(8, 1, "none", 1, 1, 1, 1, 1)._options())
    assert searched - {"train.batch_size"} <= config_lib.affecting("computation")
