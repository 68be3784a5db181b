"""A new objective needs no change elsewhere: a toy preference loss, whose pairs are an axis of a field."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import Config
from gptjax.data.pipeline.batches import BatchSource
from gptjax.errors import UserError
from gptjax.evaluation.validation import Validator
from gptjax.objectives import language_modeling
from gptjax.objectives.objective import Field, Models, Monitor, check_fields
from gptjax.parallel.mesh import make_mesh
from gptjax.planning.compilation import compile_step
from gptjax.training.program import Program

ROWS, LENGTH, VOCABULARY = 8, 16, 97
TOKENS = Field(("row", "pair", "length"))


@dataclasses.dataclass(frozen=True)
class Preference:
    """log sigmoid of the difference between chosen and rejected, each against a reference (DPO with beta 1)."""

    fields: Mapping[str, Field] = dataclasses.field(
        default_factory=lambda: {
            "tokens": TOKENS,
            "targets": TOKENS,
            "weights": Field(("row", "pair", "length"), "float32"),
            "margin": Field(("row",), "float32"),
        }
    )
    sizes: Mapping[str, int] = dataclasses.field(default_factory=lambda: {"pair": 2})
    monitor: Monitor = dataclasses.field(default_factory=lambda: Monitor("preferred", lower_is_better=False))
    reference: bool = True

    def batches(self, data, config, rows=None):
        return Pairs()

    def validation(self, data, config, rows=None):
        return Pairs()

    def weight(self, batch):
        return jnp.float32(batch["margin"].shape[0])

    def loss(self, models, batch, *, total_weight, hyper, dropout_keys=None):
        rows = batch["tokens"].shape[0]
        flat = {name: batch[name].reshape(2 * rows, -1) for name in ("tokens", "targets", "weights")}
        positions = jnp.broadcast_to(jnp.arange(flat["tokens"].shape[1]), flat["tokens"].shape)

        def log_probability(model):
            hidden, _ = model.hidden(flat["tokens"], positions=positions)
            scores = jax.nn.log_softmax(model.logits(hidden))
            chosen = jnp.take_along_axis(scores, flat["targets"][..., None], axis=-1)[..., 0]
            return (chosen * flat["weights"]).sum(1).reshape(rows, 2)

        ratio = log_probability(models.policy) - jax.lax.stop_gradient(log_probability(models.reference))
        margin = ratio[:, 0] - ratio[:, 1] - batch["margin"]
        loss = -jax.nn.log_sigmoid(margin).sum() / total_weight
        return loss, {"loss": loss, "preferred": (margin > 0).sum() / total_weight}


class Pairs(BatchSource):
    """Two batches of pairs: the chosen text counts up, the rejected one is random."""

    def __init__(self):
        super().__init__(2 * ROWS, batch_size=ROWS)

    def read_rows(self, rows):
        raise NotImplementedError

    def tokens_before(self, row):
        return 2 * LENGTH * row

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        random = np.random.default_rng(step)
        rejected = random.integers(0, VOCABULARY, (ROWS, LENGTH + 1))
        chosen = (rejected[:, :1] + np.arange(LENGTH + 1)) % VOCABULARY
        text = np.stack([chosen, rejected], axis=1).astype(np.int32)
        return {
            "tokens": text[..., :-1],
            "targets": text[..., 1:],
            "weights": (random.random((ROWS, 2, LENGTH)) < 0.8).astype(np.float32),
            "margin": random.random(ROWS).astype(np.float32),
        }


@pytest.fixture
def config(tiny_config) -> Config:
    tiny_config.train.update(batch_size=ROWS, num_steps=8)
    tiny_config.optimizer.update(learning_rate=1e-2, epsilon=1e-6)
    tiny_config.logging.samples = 0
    tiny_config.mesh.data = 1
    return tiny_config


def trained(config: Config, steps: int = 6):
    devices = np.prod([config.mesh[axis] for axis in ("data", "fsdp", "context", "tensor")])
    program = Program.of(config, make_mesh(config.mesh, jax.devices()[:devices]), objective=Preference())
    state, history = program.initial_state(), []
    with jax.set_mesh(program.mesh):
        for step in range(steps):
            state, metrics = program.step(state, program.to_device(Pairs()[step]), program.hyper(step))
            history.append([float(metrics[name]) for name in ("loss", "preferred", "gradient_norm")])
    return program, state, np.array(history)


def test_it_learns_and_keeps_its_reference(config):
    program, state, history = trained(config)
    assert history[-1, 0] < history[0, 0]
    first = program.initial_state()
    jax.tree.map(np.testing.assert_array_equal, state.reference_params, first.params)
    moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), state.params, first.params)
    assert min(jax.tree.leaves(moved)) > 1e-4


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"accumulation": 4}, marks=pytest.mark.slow),
        pytest.param({"data": 2, "fsdp": 2}, marks=pytest.mark.slow),
        {"context": 2, "tensor": 2},
        {"data": 2, "fsdp": 2, "accumulation": 2},
    ],
    ids=str,
)
def test_fields_of_rows_and_pairs_are_split_as_they_say(config, changes):
    _, _, expected = trained(config)
    for name, value in changes.items():
        config[("train" if name in config.train else "mesh")][name] = value
    program, _, found = trained(config)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    batch = program.to_device(Pairs()[0])
    for name, array in batch.items():
        described = program.abstract_batch[name]
        assert (array.shape, array.dtype) == (described.shape, described.dtype)
        assert array.sharding.is_equivalent_to(described.sharding, array.ndim)


def test_it_can_be_planned(config, monkeypatch):
    monkeypatch.setattr(language_modeling, "make", lambda config: Preference())
    facts = compile_step(config, jax.devices()[:1], topology="local")
    assert facts.memory.arguments > 16 * facts.parameters, "parameters, two moments, reference"


def test_it_is_validated_by_its_own_metrics(config, tiny_corpus, tmp_path):
    from gptjax.data import opening

    config.tokenizer = "byte"
    config.model.vocab_size = 0
    config.data.update(source=f"text:{tiny_corpus}/*.txt", cache_dir=str(tmp_path))
    data = opening.RunData.open(config)
    program = Program.of(config, make_mesh(config.mesh, jax.devices()[:1]), 257, objective=Preference())
    validator = Validator(program, data, tmp_path, start=0)
    with jax.set_mesh(program.mesh):
        line = validator.line(0, program.initial_state())
    assert line["loss"] > 0.5 and 0 <= line["preferred"] <= 1, "the mean over pairs, of policy = reference"
    assert line["perplexity"] > 100 and line["nll"] > 4, "and the likelihood of the text"


def test_data_without_a_field_are_refused_by_name(config):
    with pytest.raises(UserError, match=r"objective\.name=auto needs positions, segment_ids in a batch, and .*gives"):
        check_fields(language_modeling.make(config), Pairs(), config)


@pytest.mark.slow
def test_with_adapters_the_reference_is_the_model_without_them(config):
    _, _, plain = trained(config, steps=1)
    config.model.update(lora_rank=2, lora_targets=".*")
    program, state, history = trained(config)
    assert state.reference_params is None
    np.testing.assert_allclose(history[0, :2], plain[0, :2], rtol=1e-5)
    assert history[-1, 0] < history[0, 0]
    assert program.target.reference_params is None


def test_the_reference_is_none_unless_it_is_wanted(config):
    program = Program.of(config, make_mesh(config.mesh, jax.devices()[:1]))
    assert program.target.reference_params is None
    assert Models(None).reference is None
