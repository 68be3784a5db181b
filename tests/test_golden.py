"""Golden files: what every config resolves to, its parameters, and the losses of its first ten steps.

A difference is either a mistake or a change that the author means; `make golden` writes the files anew, and
their diff then shows in the commit what the change did. Losses depend on the compiler: they are stamped with
the version of JAX that wrote them, and another version is allowed more.
"""

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from gptjax import config as config_lib
from gptjax.artifacts.manifest import parameter_table
from gptjax.config import resolve
from gptjax.data import opening
from gptjax.model import gpt
from gptjax.model.architecture import Architecture
from gptjax.parallel.mesh import make_mesh
from gptjax.training.program import Program
from gptjax.training.run import settle

TESTS = Path(__file__).parent
CONFIGS = sorted(path.stem for path in (TESTS.parent / "configs").glob("*.py"))
# Whose losses are made by the programs of others
LIKE_OTHERS = {"chat_quickstart", "finetune_gpt2", "gpt2_355m", "gpt2_1558m"} | {
    f"shakespeare_char_{device}_best" for device in ("cpu", "gpu")
}
UPDATE = "pytest tests/test_golden.py --update-golden"
SAME_VERSION, OTHER_VERSION = 1e-5, 1e-3  # relative; another CPU rounds differently in the last digits


def load_config(name: str, arg: str = "") -> config_lib.Config:
    spec = importlib.util.spec_from_file_location(name, TESTS.parent / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arg)


def resolved_config(name: str) -> config_lib.Config:
    """The config as `train` resolves it, for a vocabulary of 4,096 and an epoch of 200 steps."""
    return resolve(load_config(name), vocab_size=4096, steps_per_epoch=200.0)


def parameters(config: config_lib.Config) -> list[dict]:
    """The parameter table on a mesh that splits over every axis."""
    sharded = config.copy_and_resolve_references()
    sharded.mesh.update(data=-1, fsdp=2, context=1, tensor=2)
    _, params = gpt.abstract_model(Architecture.from_config(config.model, 0))
    return parameter_table(config, make_mesh(sharded.mesh), params)


def first_losses(name: str, source: str, cache: Path, steps: int = 10) -> list[float]:
    """Losses of the config's small form on one device."""
    config = load_config(name, "runlocal")
    config.data.update(source=source, cache_dir=str(cache))
    if config.data.validation_fraction < 0.05:  # of 120 documents, none would be left for it
        config.data.validation_fraction = 0.1
    if config.objective.name in ("preference", "reinforcement"):  # their data are others; the model learns from text
        config.objective.name = "auto"
    data = opening.RunData.open(config)
    config, _, batches = settle(config, None, data)
    program = Program.of(config, make_mesh(config.mesh, jax.devices()[:1]))
    state = program.initial_state()
    losses = []
    for step in range(steps):
        state, metrics = program.step(state, program.to_device(batches[step]), program.hyper(step))
        losses.append(float(metrics["loss"]))
    return losses


class Golden:
    """One file of tests/golden: `check` compares with it, or writes it where --update-golden is given."""

    def __init__(self, name: str, update: bool):
        self.path, self._update = TESTS / "golden" / f"{name}.json", update
        self.content = json.loads(self.path.read_text()) if self.path.exists() else {}

    def check(self, key: str, value) -> None:
        if self._update:
            self.write(key, value)
        assert key in self.content, f"{self.path} has no {key}; write it with `{UPDATE}`"
        assert value == self.content[key], f"the {key} changed; if that is meant: `{UPDATE}`"

    def check_losses(self, losses: list[float]) -> None:
        if self._update:
            self.write("losses", {"jax": jax.__version__, "trace": losses})
        assert "losses" in self.content, f"{self.path} has no losses; write them with `{UPDATE}`"
        version, trace = self.content["losses"]["jax"], self.content["losses"]["trace"]
        tolerance = SAME_VERSION if version == jax.__version__ else OTHER_VERSION
        message = f"the losses changed (JAX {jax.__version__}, golden {version}); if that is meant: `{UPDATE}`"
        np.testing.assert_allclose(losses, trace, rtol=tolerance, err_msg=message)

    def write(self, key: str, value) -> None:
        self.content[key] = value
        self.path.parent.mkdir(exist_ok=True)
        self.path.write_text(json.dumps(self.content, indent=1, sort_keys=True) + "\n")


@pytest.fixture(params=CONFIGS)
def name(request) -> str:
    return request.param


@pytest.fixture
def golden(name, update_golden) -> Golden:
    return Golden(name, update_golden)


@pytest.mark.xdist_group("golden")  # tests of one file write it one after another
def test_the_resolved_config_is_the_golden_one(name, golden):
    golden.check("config", json.loads(config_lib.to_json(resolved_config(name))))


@pytest.mark.xdist_group("golden")
def test_the_parameters_are_the_golden_ones(name, golden):
    golden.check("parameters", parameters(resolved_config(name)))


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in LIKE_OTHERS else ()) for name in CONFIGS],
    indirect=True,
)
@pytest.mark.xdist_group("golden")
def test_the_first_losses_are_the_golden_ones(name, golden, tiny_corpus, tmp_path):
    losses = first_losses(name, f"text:{tiny_corpus}/*.txt", tmp_path)
    assert losses[-1] < losses[0], "nothing was learned"
    golden.check_losses(losses)


def test_every_golden_file_has_its_config():
    assert sorted(path.stem for path in (TESTS / "golden").glob("*.json")) == CONFIGS
