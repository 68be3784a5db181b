"""How a batch is computed (mesh, micro-batches, unrolling, recomputation) changes nothing about training."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptjax.config import Config, get_default, validate
from gptjax.model import gpt
from gptjax.model.architecture import Architecture
from gptjax.objectives import cross_entropy
from gptjax.parallel.mesh import make_mesh
from gptjax.training.program import Program
from gptjax.training.state import TrainState, create_state

STEPS, ROWS, LENGTH, VOCABULARY = 6, 16, 16, 97


def tiny_run(optimizer: str = "adamw", dropout: float = 0.0, **changes: int | str) -> Config:
    """Three layers, scanned, on one device; `changes`: mesh axes, `accumulation`, `scan_unroll`, `remat`."""
    config = get_default()
    config.model.update(
        num_layers=3, num_heads=4, num_kv_heads=2, embed_dim=16, context_length=LENGTH, vocab_size=VOCABULARY
    )
    config.model.update(ngram_order=3, ngram_rows=64, dropout=dropout, scan_unroll=1)
    # With AdamW's usual epsilon the rounding of a gradient near zero would be a whole step.
    config.optimizer.update(name=optimizer, learning_rate=5e-3, epsilon=1e-6)
    config.train.update(num_steps=STEPS, batch_size=ROWS)
    config.schedule.update(warmup=2, decay=1)
    config.mesh.data = 1
    for name, value in changes.items():
        section = next(s for s in (config.mesh, config.train, config.model, config.objective) if name in s)
        section[name] = value
    validate(config)
    return config


def ragged_batch(step: int) -> dict[str, np.ndarray]:
    """Rows of documents of different lengths, each with a different share of weighted tokens (row 0: none)."""
    random = np.random.default_rng(step)
    begins = random.random((ROWS, LENGTH)) < 0.25
    begins[:, 0] = True
    index = np.arange(LENGTH)
    tokens = random.integers(0, VOCABULARY, (ROWS, LENGTH + 1), dtype=np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": (random.random((ROWS, LENGTH)) < np.linspace(0, 1, ROWS)[:, None]).astype(np.float32),
        "segment_ids": begins.cumsum(1, dtype=np.int32),
        "positions": (index - np.maximum.accumulate(np.where(begins, index, 0), axis=1)).astype(np.int32),
    }


MIXTURE = {"num_experts": 4, "balance_loss": 0.1}


@pytest.fixture(scope="module")
def params() -> gpt.Params:
    """The initial parameters of all runs. (Initialisation on a mesh is tested in tests/parallel.)"""
    return jax.jit(gpt.initialise, static_argnums=0)(architecture_of(tiny_run()), jax.random.key(0))


def architecture_of(config: Config) -> Architecture:
    return Architecture.from_config(config.model, 0)


def prepare(config: Config, params: gpt.Params) -> tuple[Program, TrainState]:
    """The program of a config, and its first state with these parameters."""
    program = Program.of(config, make_mesh(config.mesh))
    optimizer = program.optimizer(program.hyperparameters.at(0))
    state = create_state(jax.tree.map(jnp.copy, params), optimizer, ema=False)
    return program, jax.device_put(state, jax.tree.map(lambda a: a.sharding, program.target))


def train(config: Config, params: gpt.Params) -> tuple[list[dict[str, float]], TrainState]:
    """The metrics of each step, and the last state."""
    program, state = prepare(config, params)
    history = []
    with jax.set_mesh(program.mesh):
        for i in range(STEPS):
            state, metrics = program.step(state, program.to_device(ragged_batch(i)), program.hyper(i))
            history.append({name: float(value) for name, value in metrics.items()})
    return history, state


@pytest.fixture(scope="module")
def baseline(params):
    """A function from (optimizer, dropout) to the result of `train` on one device, computed once."""
    return functools.cache(lambda **options: train(tiny_run(**options), params))


@pytest.fixture(scope="module")
def mixture():
    """The same for a mixture of experts, with its initial parameters: a function of the optimizer."""

    @functools.cache
    def trained(optimizer: str):
        config = tiny_run(optimizer, **MIXTURE)
        params = jax.jit(gpt.initialise, static_argnums=0)(architecture_of(config), jax.random.key(0))
        return params, train(config, params)

    return trained


def assert_same_training(found, expected):
    (metrics, state), (expected_metrics, expected_state) = found, expected
    for name in expected_metrics[0]:
        np.testing.assert_allclose(
            [m[name] for m in metrics],
            [m[name] for m in expected_metrics],
            rtol=1e-5,
            atol=1e-5,
            err_msg=name,
        )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5),
        state.params,
        expected_state.params,
    )


VARIANTS = {
    "1x8": {"data": 1, "fsdp": 8},
    "2x4": {"data": 2, "fsdp": 4},
    "4x2": {"data": 4, "fsdp": 2},
    "8x1": {"data": 8, "fsdp": 1},
    "tensor and context": {"data": 2, "context": 2, "tensor": 2},
    "all axes, accumulation": {"fsdp": 2, "context": 2, "tensor": 2, "accumulation": 2},
    "accumulation 4": {"accumulation": 4},
    "4x1, accumulation 2": {"data": 4, "accumulation": 2},
    "unrolled": {"scan_unroll": 0},
    "unrolled by two": {"scan_unroll": 2},
    "remat dots": {"remat": "dots"},
    "remat full, unrolled": {"remat": "full", "scan_unroll": 0},
    "remat offload": {"remat": "offload"},
    "context 4, attention by blocks": {"data": 2, "context": 4, "attention": "xla"},
    "attention around a ring of 4": {"data": 2, "context": 4, "attention": "ring", "remat": "full"},
    "logits by chunks": {"logits_chunk": 4},
    "logits by chunks on a mesh": {"fsdp": 2, "context": 2, "tensor": 2, "logits_chunk": 8},
    "experts over 2": {"data": 1, "expert": 2},
    "experts over 4": {"data": 2, "expert": 4},
    "experts over expert and tensor": {"data": 2, "expert": 2, "tensor": 2},
    "experts over expert, fsdp": {"data": 1, "fsdp": 2, "expert": 4},
    "experts over expert, context, accumulation, remat": {
        "data": 1, "expert": 2, "context": 2, "tensor": 2, "accumulation": 2, "remat": "full"
    },
}  # fmt: skip
QUICK = {
    "all axes, accumulation", "accumulation 4", "remat full, unrolled", "attention around a ring of 4",
    "experts over expert, context, accumulation, remat",
}  # fmt: skip


def variants(*names: str) -> list:
    """Parameters of a test; those that quick ones cover are marked as slow."""
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("variant", variants(*(name for name in VARIANTS if "expert" not in name)))
def test_training_does_not_depend_on_how_the_batch_is_computed(variant, params, baseline):
    assert_same_training(train(tiny_run(**VARIANTS[variant]), params), baseline())


@pytest.mark.parametrize("variant", variants("2x4", "accumulation 4", "remat full, unrolled"))
def test_dropout_falls_on_the_same_activations(variant, params, baseline):
    assert_same_training(train(tiny_run(dropout=0.3, **VARIANTS[variant]), params), baseline(dropout=0.3))
    without, with_dropout = baseline()[0], baseline(dropout=0.3)[0]
    assert abs(without[0]["loss"] - with_dropout[0]["loss"]) > 1e-4, "dropout was not on"


@pytest.mark.parametrize(
    "variant", variants("2x4", "all axes, accumulation", *(name for name in VARIANTS if "expert" in name))
)
def test_experts_see_all_tokens_however_they_are_split(variant, mixture):
    params, expected = mixture("adamw")
    assert expected[0][0]["balance_loss"] > 0.9
    assert_same_training(train(tiny_run(**MIXTURE, **VARIANTS[variant]), params), expected)


@pytest.mark.slow
def test_muon_sees_whole_experts_however_they_are_split(mixture):
    params, expected = mixture("muon")
    found = train(tiny_run("muon", **MIXTURE, **VARIANTS["experts over expert and tensor"]), params)
    assert_same_training(found, expected)


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
@pytest.mark.parametrize("activation", [pytest.param("gelu", marks=pytest.mark.slow), "swiglu"])
def test_no_device_gathers_the_experts_of_others(activation, optimizer):
    """In the compiled step no collective is as wide as the experts, except sums over data."""
    config = tiny_run(optimizer, num_experts=4, mlp_dim=88, activation=activation, data=2, expert=4)
    params = jax.jit(gpt.initialise, static_argnums=0)(architecture_of(config), jax.random.key(0))
    program, _ = prepare(config, params)
    with jax.set_mesh(program.mesh):
        lowered = program.step.lower(program.target, program.abstract_batch, program.abstract_hyper)
        text = lowered.compile().as_text()
    sent = re.findall(r"= (\S+|\(.*?\)) (all-\w+|reduce-scatter|collective-\w+)(?:-start)?\(", text)
    assert {"all-gather", "reduce-scatter"} <= {kind for _, kind in sent}, "tokens go to experts and back"
    wide = {(kind, shape) for shapes, kind in sent for shape in re.findall(r"\w+\[[\d,]*\b88\b[\d,]*\]", shapes)}
    assert wide == {("all-reduce", "f32[1,16,88]"), ("all-reduce", "f32[1,88,16]")}  # gradients of one expert


@pytest.mark.parametrize("variant", variants("1x8", "all axes, accumulation"))
def test_muon_sees_whole_matrices_however_they_are_split(variant, params, baseline):
    assert_same_training(train(tiny_run("muon", **VARIANTS[variant]), params), baseline(optimizer="muon"))


@pytest.mark.slow
def test_value_embeddings_scalars_and_gates_are_the_same_however_they_are_split():
    options = {"value_embeddings": 2, "residual_scalars": True, "attention_gate": True}
    params = jax.jit(gpt.initialise, static_argnums=0)(architecture_of(tiny_run(**options)), jax.random.key(0))
    expected = train(tiny_run(**options), params)
    moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), params, expected[1].params)
    assert min(jax.tree.leaves(moved)) > 1e-3
    changes = VARIANTS["all axes, accumulation"] | VARIANTS["remat full, unrolled"]
    assert_same_training(train(tiny_run(**options, **changes), params), expected)


def test_the_tiny_run_learns_something(params, baseline):
    """Invariance tests would mean nothing if the numbers did not change."""
    moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), params, baseline()[1].params)
    assert min(jax.tree.leaves(moved)) > 1e-3


@pytest.mark.parametrize("accumulation", [1, 4])
def test_every_token_counts_the_same_in_whatever_micro_batch(accumulation, params):
    """Micro-batches of few and of many tokens: loss and gradient are the sum over all tokens / their number.

    The mean of the micro-batches' means, which optax.MultiSteps takes, is another number.
    """
    config = tiny_run(accumulation=accumulation)
    architecture = architecture_of(config)
    params = jax.tree.map(lambda a: a * 4, params)  # losses far from uniform, so that rows differ
    batch = jax.tree.map(jnp.asarray, ragged_batch(0))
    row = np.arange(ROWS)
    counts = np.where(row % 4 == 0, 12, row % 4)  # row r is in micro-batch r % accumulation
    batch["weights"] = jnp.asarray(np.arange(LENGTH) < counts[:, None], jnp.float32)
    weights = np.float64(batch["weights"])

    def mean_loss(params):
        model = gpt.bind(architecture, params)
        hidden, _ = model.hidden(batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"])
        losses, *_ = cross_entropy.token_losses(model.logits(hidden), batch["targets"])
        return (losses * batch["weights"]).sum() / batch["weights"].sum(), losses

    (expected, losses), gradient = jax.jit(jax.value_and_grad(mean_loss, has_aux=True))(params)
    program, state = prepare(config, params)
    _, metrics = program.step(state, program.to_device(batch), program.hyper(0))
    np.testing.assert_allclose(metrics["loss"], (np.float64(losses) * weights).sum() / weights.sum(), rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-6)
    np.testing.assert_allclose(metrics["gradient_norm"], optax.tree.norm(gradient), rtol=1e-4)
    if accumulation > 1:
        parts = [slice(i, None, accumulation) for i in range(accumulation)]
        means = [np.average(np.float64(losses)[part], weights=weights[part]) for part in parts]
        assert abs(np.mean(means) - expected) > 1e-2
