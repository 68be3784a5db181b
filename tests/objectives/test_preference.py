"""Preference losses against numbers by hand, and against TRL on the same weights and texts."""

import math
import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import config as config_lib
from gptjax.errors import UserError
from gptjax.model import gpt
from gptjax.model.architecture import Architecture
from gptjax.model.huggingface import weights as huggingface
from gptjax.objectives import preference, preference_losses
from gptjax.objectives.objective import Models
from gptjax.objectives.preference_losses import Answers

ROWS, T, VOCABULARY = 4, 16, 97
HYPER = {"beta": 0.3, "label_smoothing": 0.0, "simpo_margin": 0.5, "desirable_weight": 1.3, "undesirable_weight": 0.7}
HYPER = {name: jnp.float32(value) for name, value in (HYPER | {"balance_loss": 0.0}).items()}
ONE = Answers(jnp.array([[-10.0, -14.0]]), jnp.array([[-12.0, -11.0]]), jnp.array([[4.0, 7.0]]))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def make(name: str = "dpo", smoothing: float = 0.0) -> preference.Preference:
    config = config_lib.get_default()
    config.objective.update(name="preference", preference_loss=name, label_smoothing=smoothing)
    return preference.make(config)


def by_hand(name: str) -> float:
    """The loss of `ONE`: log-ratios 2 and -3, 4 and 7 tokens."""
    odds = [p / (1 - p) for p in (math.exp(-10 / 4), math.exp(-14 / 7))]
    return {
        "dpo": -math.log(sigmoid(0.3 * 2 - 0.3 * -3)),
        "ipo": (2 / 4 - -3 / 7 - 1 / 0.6) ** 2,
        "simpo": -math.log(sigmoid(0.3 * (-10 / 4 + 14 / 7) - 0.5)),
        "orpo": 10 / 4 - 0.3 * math.log(sigmoid(math.log(odds[0] / odds[1]))),
    }[name]


@pytest.mark.parametrize("name", preference_losses.OF_PAIRS)
def test_the_loss_of_a_pair_by_hand(name):
    found = preference_losses.OF_PAIRS[name](ONE, HYPER)
    np.testing.assert_allclose(found.loss, [by_hand(name)], rtol=1e-5)


def test_the_loss_of_judged_answers_by_hand():
    ratio, kl = jnp.array([2.0, -3.0]), jnp.float32(0.5)
    loss, value = preference_losses.kto(ratio, jnp.array([1.0, 0.0]), kl, HYPER)
    np.testing.assert_allclose(value, [0.3 * 1.5, 0.3 * 3.5], rtol=1e-6)
    np.testing.assert_allclose(loss, [1.3 * (1 - sigmoid(0.45)), 0.7 * (1 - sigmoid(1.05))], rtol=1e-6)


def test_label_smoothing_takes_a_share_of_the_pairs_the_other_way_round():
    h = 0.3 * 5
    found = preference_losses.dpo(ONE, HYPER | {"label_smoothing": jnp.float32(0.2)}).loss
    np.testing.assert_allclose(found, [-0.8 * math.log(sigmoid(h)) - 0.2 * math.log(sigmoid(-h))], rtol=1e-6)
    for name in ("ipo", "kto", "orpo"):
        with pytest.raises(UserError, match=f"label_smoothing is 0.1, and objective.preference_loss={name} has none"):
            make(name, 0.1)


def test_extreme_log_probabilities_have_finite_losses_and_gradients():
    for values in ([[-1e4, 0.0]], [[0.0, -1e4]], [[0.0, 0.0]]):
        policy = jnp.array(values)
        for name, formula in preference_losses.OF_PAIRS.items():

            def loss(policy, formula=formula):
                return formula(Answers(policy, jnp.zeros((1, 2)), jnp.ones((1, 2))), HYPER).loss.sum()

            value, gradient = jax.value_and_grad(loss)(policy)
            assert np.isfinite(value) and np.isfinite(gradient).all(), (name, values)


# ---- With a model -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def architecture() -> Architecture:
    model = config_lib.get_default().model
    model.update(num_layers=2, num_heads=2, embed_dim=16, context_length=T, norm="rmsnorm", activation="swiglu")
    model.update(qk_norm=False, tie_embeddings=False, init_std=0.2)
    return Architecture.from_config(model, VOCABULARY)


@pytest.fixture(scope="module")
def params(architecture):
    """Different parameters of the policy and the reference."""
    return [gpt.initialise(architecture, jax.random.key(seed)) for seed in range(2)]


@pytest.fixture(scope="module")
def texts() -> dict[str, np.ndarray]:
    """Prompts of several lengths, shared by the sides, with answers of several lengths."""
    random = np.random.default_rng(0)
    tokens, weights = np.zeros((2, ROWS, 2, T), np.int32)
    for row in range(ROWS):
        prompt = random.integers(1, VOCABULARY, 2 + row)
        for side in range(2):
            answer = random.integers(1, VOCABULARY, 2 + (5 * row + 3 * side) % 7)
            text = np.concatenate([prompt, answer])
            tokens[row, side, : len(text)] = text
            weights[row, side, len(prompt) - 1 : len(text) - 1] = 1
    targets = np.concatenate([tokens[..., 1:], np.zeros((ROWS, 2, 1), np.int32)], -1)
    return {"tokens": tokens, "targets": targets, "weights": weights.astype(np.float32)}


def judged_texts(texts):
    """Single labelled answers from the texts of pairs, half of them good."""
    return texts | {"desirable": np.array([1, 0, 0, 1], np.float32)}


def loss_and_gradient(architecture, params, batch, name):
    objective = make(name)
    batch = jax.tree.map(jnp.asarray, batch)
    reference = objective.log_probabilities(gpt.bind(architecture, params[1]), batch)
    batch["reference"] = reference
    weight = objective.weight(batch)

    @jax.jit
    def function(policy):
        models = Models(gpt.bind(architecture, policy))
        numbers = objective.whole_batch(models, batch, total_weight=weight)
        return objective.loss(models, batch, total_weight=weight, hyper=HYPER | numbers)

    (loss, metrics), gradient = jax.value_and_grad(function, has_aux=True)(params[0])
    return float(loss), metrics, gradient


def test_padding_and_rows_that_only_fill_count_nothing(architecture, params, texts):
    loss, metrics, _ = loss_and_gradient(architecture, params, texts, "dpo")
    filled = {name: np.concatenate([values, np.zeros_like(values[:2])]) for name, values in texts.items()}
    again, more, _ = loss_and_gradient(architecture, params, filled, "dpo")
    np.testing.assert_allclose(again, loss, rtol=1e-6)
    for name, value in metrics.items():
        np.testing.assert_allclose(more[name], value, rtol=1e-5, err_msg=name)
    noisy = dict(texts, tokens=np.where(texts["tokens"] == 0, 5, texts["tokens"]))
    np.testing.assert_allclose(loss_and_gradient(architecture, params, noisy, "dpo")[0], loss, rtol=1e-6)


@pytest.mark.parametrize("name", ["dpo", "ipo", "kto"])
def test_the_gradient_is_that_of_the_loss(architecture, params, texts, name):
    """Compared with finite differences of the loss along the gradient."""
    batch = judged_texts(texts) if name == "kto" else texts
    batch = dict(batch)
    _, _, gradient = loss_and_gradient(architecture, params, batch, name)
    norm = math.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(gradient)))
    objective = make(name)
    placed = jax.tree.map(jnp.asarray, batch)
    placed["reference"] = objective.log_probabilities(gpt.bind(architecture, params[1]), placed)
    weight = objective.weight(placed)
    numbers = objective.whole_batch(Models(gpt.bind(architecture, params[0])), placed, total_weight=weight)

    def loss(step):  # KTO's estimate is a constant of the gradient
        moved = jax.tree.map(lambda p, g: p + step * g / norm, params[0], gradient)
        models = Models(gpt.bind(architecture, moved))
        return float(objective.loss(models, placed, total_weight=weight, hyper=HYPER | numbers)[0])

    np.testing.assert_allclose((loss(1e-2) - loss(-1e-2)) / 2e-2, norm, rtol=2e-2)


# ---- Against TRL ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_simpo_is_that_of_trl(smoothing):
    torch = pytest.importorskip("torch")
    pytest.importorskip("trl")
    from trl.experimental.cpo import CPOTrainer

    policy = np.random.default_rng(0).normal(-9, 3, (5, 2)).astype(np.float32)
    lengths = np.arange(1, 11, dtype=np.float32).reshape(5, 2)
    told = {"beta": 0.3, "loss_type": "simpo", "simpo_gamma": 0.5, "label_smoothing": smoothing, "alpha": 0.0}
    trainer = SimpleNamespace(**told, accelerator=SimpleNamespace(device="cpu"))
    means = torch.tensor(policy / lengths)
    expected, *rewards = CPOTrainer.cpo_loss(trainer, means[:, 0], means[:, 1])
    smooth = {"label_smoothing": jnp.float32(smoothing)}
    found = preference_losses.simpo(Answers(*map(jnp.asarray, (policy, policy, lengths))), HYPER | smooth)
    np.testing.assert_allclose(found.loss, expected.numpy(), rtol=1e-5)
    np.testing.assert_allclose(found.rewards, torch.stack(rewards, 1).numpy(), rtol=1e-5)


def test_the_odds_ratio_of_orpo_is_that_of_trl():
    torch = pytest.importorskip("torch")
    pytest.importorskip("trl")
    from trl.experimental.orpo import ORPOTrainer

    policy = np.random.default_rng(0).normal(-9, 3, (5, 2)).astype(np.float32)
    lengths = np.arange(1, 11, dtype=np.float32).reshape(5, 2)
    trainer = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device="cpu"))
    means = torch.tensor(policy / lengths)
    expected, *_ = ORPOTrainer.odds_ratio_loss(trainer, means[:, 0], means[:, 1])
    found = preference_losses.orpo(Answers(*map(jnp.asarray, (policy, policy, lengths))), HYPER)
    np.testing.assert_allclose(found.loss + means[:, 0].numpy(), -expected.numpy(), rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def trl_parts(architecture, params, tmp_path_factory):
    """(torch, tokenizer, policy, reference) in transformers, with the same weights."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pytest.importorskip("trl")
    tokenizers = pytest.importorskip("tokenizers")
    models = []
    for number, one in enumerate(params):
        directory = tmp_path_factory.mktemp(f"model{number}")
        huggingface.write_directory(directory, architecture, one, eot_id=96)
        models.append(transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32))
    words = {f"w{i}": i for i in range(VOCABULARY)}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w1"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="w96", pad_token="w0")
    return torch, tokenizer, *models


def trl_inputs(torch, texts, side):
    """The ids of one side of each row, and masks of the filled tokens and of the answer."""
    tokens, weights = texts["tokens"][:, side], texts["weights"][:, side]
    answers = np.concatenate([np.zeros((ROWS, 1)), weights[:, :-1]], 1)
    return {
        "input_ids": torch.tensor(tokens, dtype=torch.long),
        "attention_mask": torch.tensor((tokens != 0).astype(np.int64)),
        "completion_mask": torch.tensor(answers.astype(np.int64)),
    }


def trainer_of(kind, options, parts, folder, rows):
    from datasets import Dataset

    _, tokenizer, policy, reference = parts
    options = {"output_dir": str(folder), "report_to": [], "use_cpu": True, "bf16": False, "beta": 0.3} | options
    options |= {"gradient_checkpointing": False, "disable_dropout": True, "per_device_train_batch_size": ROWS}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(__import__("trl"), f"{kind}Trainer")(
            model=policy,
            ref_model=reference,
            args=getattr(__import__("trl"), f"{kind}Config")(**options),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )


def assert_as_trl(torch, trainer, inputs, loss, gradient):
    trainer.model.zero_grad()
    expected = trainer._compute_loss(trainer.model, inputs, False)
    expected.backward()
    norm = math.sqrt(sum(float((p.grad**2).sum()) for p in trainer.model.parameters() if p.grad is not None))
    np.testing.assert_allclose(loss, float(expected.detach()), rtol=1e-4)
    found = math.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(gradient)))
    np.testing.assert_allclose(found, norm, rtol=1e-4)


@pytest.mark.parametrize(("name", "theirs"), [("dpo", "sigmoid"), ("ipo", "ipo")])
def test_loss_gradient_and_metrics_are_those_of_trl(architecture, params, texts, trl_parts, tmp_path, name, theirs):
    torch = trl_parts[0]
    rows = [{"prompt": "w1 w2", "chosen": "w3", "rejected": "w4"}] * ROWS
    trainer = trainer_of("DPO", {"loss_type": [theirs]}, trl_parts, tmp_path, rows)
    sides = [trl_inputs(torch, texts, side) for side in range(2)]
    inputs = {key: torch.cat([side[key] for side in sides]) for key in sides[0]}
    loss, metrics, gradient = loss_and_gradient(architecture, params, texts, name)
    assert_as_trl(torch, trainer, inputs, loss, gradient)
    logged = {key: values[-1] for key, values in trainer._metrics["eval"].items() if values}
    for ours, key in {
        "accuracy": "rewards/accuracies",
        "margin": "rewards/margins",
        "chosen_reward": "rewards/chosen",
        "rejected_reward": "rewards/rejected",
        "chosen_log_probability": "logps/chosen",
        "rejected_log_probability": "logps/rejected",
    }.items():
        np.testing.assert_allclose(metrics[ours], logged[key], rtol=1e-4, atol=1e-5, err_msg=ours)


def test_kto_is_that_of_trl(architecture, params, texts, trl_parts, tmp_path):
    torch = trl_parts[0]
    rows = [{"prompt": f"w{i} w2", "completion": "w3", "label": bool(i % 2)} for i in range(ROWS)]
    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.7}
    trainer = trainer_of("KTO", weights, trl_parts, tmp_path, rows)
    own, foreign = (trl_inputs(torch, texts, side) for side in range(2))
    batch = judged_texts(texts)
    inputs = own | {f"KL_{key}": value for key, value in foreign.items()}
    inputs["label"] = torch.tensor(batch["desirable"] > 0)
    loss, metrics, gradient = loss_and_gradient(architecture, params, batch, "kto")
    assert_as_trl(torch, trainer, inputs, loss, gradient)
    np.testing.assert_allclose(metrics["kl"], trainer._metrics["eval"]["kl"][-1], rtol=1e-4, atol=1e-6)
