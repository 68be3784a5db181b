"""A reward model: its loss by hand and compared with transformers and TRL, its training, and its uses."""

import collections
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import chat, cli, evaluate, generate, serve
from gptjax import config as config_lib
from gptjax.errors import RunError, UserError
from gptjax.files import read_json
from gptjax.model import gpt, reward
from gptjax.model.architecture import Architecture
from gptjax.model.huggingface import weights as huggingface
from gptjax.objectives import reward_model
from gptjax.objectives.objective import Models
from gptjax.train import train

ROWS, T, VOCABULARY = 4, 16, 97


@pytest.fixture(scope="module")
def architecture() -> Architecture:
    model = config_lib.get_default().model
    model.update(num_layers=2, num_heads=2, embed_dim=16, context_length=T, norm="rmsnorm", activation="swiglu")
    model.update(qk_norm=False, tie_embeddings=False, init_std=0.2)
    return Architecture.from_config(model, VOCABULARY)


@pytest.fixture(scope="module")
def params(architecture) -> gpt.Params:
    return gpt.initialise(architecture, jax.random.key(0))


@pytest.fixture(scope="module")
def texts() -> dict[str, np.ndarray]:
    """Pairs of several lengths, the last as long as the context."""
    random = np.random.default_rng(0)
    tokens, weights = np.zeros((ROWS, 2, T), np.int32), np.zeros((ROWS, 2, T), np.float32)
    for row in range(ROWS):
        for side in range(2):
            prompt, length = 2 + row, 4 + 4 * row - 2 * side * (row % 2)
            length = min(max(length, prompt + 1), T)
            tokens[row, side, :length] = random.integers(1, VOCABULARY, length)
            weights[row, side, prompt - 1 : length - 1] = 1
    targets = np.concatenate([tokens[..., 1:], np.zeros((ROWS, 2, 1), np.int32)], -1)
    return {"tokens": tokens, "targets": targets, "weights": weights}


def loss_and_gradient(architecture, params, batch):
    objective = reward_model.make(config_lib.get_default())
    batch = jax.tree.map(jnp.asarray, batch)

    @jax.jit
    def function(params):
        models = Models(gpt.bind(architecture, params))
        return objective.loss(models, batch, total_weight=objective.weight(batch), hyper={})

    (loss, metrics), gradient = jax.value_and_grad(function, has_aux=True)(params)
    return float(loss), metrics, gradient


def test_the_loss_is_that_of_rewards_read_text_by_text(architecture, params, texts):
    model = gpt.bind(architecture, params)
    expected = np.zeros((ROWS, 2))
    for row in range(ROWS):
        for side in range(2):
            length = int(np.count_nonzero(texts["tokens"][row, side]))
            alone = jnp.asarray(texts["tokens"][row, side, None, :length])
            hidden, _ = model.hidden(alone, positions=jnp.arange(length)[None])
            expected[row, side] = model.logits(hidden)[0, -1, reward.TOKEN]
    margins = expected[:, 0] - expected[:, 1]
    losses = [math.log(1 + math.exp(-margin)) for margin in margins]
    filled = {name: np.concatenate([values, np.zeros_like(values[:2])]) for name, values in texts.items()}
    for batch in (texts, filled):  # rows that only fill the batch count nothing
        loss, metrics, _ = loss_and_gradient(architecture, params, batch)
        assert loss == pytest.approx(np.mean(losses), rel=1e-5)
        assert metrics["margin"] == pytest.approx(margins.mean(), rel=1e-4)
        assert metrics["accuracy"] == (margins > 0).mean()
        assert metrics["chosen_reward"] - metrics["rejected_reward"] == pytest.approx(margins.mean(), rel=1e-4)


def test_loss_and_gradient_are_those_of_trl(architecture, params, texts, tmp_path):
    """The head of transformers' model is the column from which the reward is read."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    trl = pytest.importorskip("trl")
    huggingface.write_directory(tmp_path, architecture, params, eot_id=96)
    options = {"num_labels": 1, "pad_token_id": 0, "dtype": torch.float32}
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, **options)
    with torch.no_grad():
        model.score.weight[0] = torch.tensor(np.asarray(params["head"]["kernel"])[:, reward.TOKEN])
    ids = torch.tensor(np.concatenate([texts["tokens"][:, 0], texts["tokens"][:, 1]]), dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    logged = collections.defaultdict(list)
    trainer = SimpleNamespace(
        args=SimpleNamespace(center_rewards_coefficient=None),
        model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
        _metrics={"eval": logged},
        _total_train_tokens=0,
    )
    expected = trl.RewardTrainer.compute_loss(trainer, model, dict(inputs))
    expected.backward()
    norm = math.sqrt(sum(float((p.grad**2).sum()) for p in model.parameters() if p.grad is not None))
    loss, metrics, gradient = loss_and_gradient(architecture, params, texts)
    assert loss == pytest.approx(float(expected.detach()), rel=1e-4)
    for name in ("accuracy", "margin"):
        assert metrics[name] == pytest.approx(logged[name][0], rel=1e-4)
    found = math.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(gradient)))
    assert found == pytest.approx(norm, rel=1e-4)


# ---- Runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """Questions whose better answer is polite, whatever its length."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [
        {
            "prompt": f"Where is {i}?",
            "chosen": f"It is {'there ' * (i % 3)}, sir",
            "rejected": f"No idea{'!' * (i % 5)}",
        }
        for i in range(150)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def trained(pairs: Path, workdir: Path, **changes) -> list[dict]:
    """The lines of metrics.jsonl of a run with options as section__name."""
    config = config_lib.get_default()
    config.tokenizer = "byte"
    config.data.update(source=f"preference:{pairs}", test_fraction=0.0, validation_fraction=0.2)
    config.objective.name = "reward_model"
    config.model.update(num_layers=1, num_heads=2, embed_dim=16, context_length=64)
    config.optimizer.update(learning_rate=5e-3, weight_decay=0.0)
    config.train.update(num_steps=12, batch_size=8, checkpoint_every=4, keep_checkpoints=3)
    config.evaluation.update(every=6, max_tokens=500)
    config.logging.update(every=1, samples=0, tensorboard=False)
    config.mesh.data = 1
    for path, value in changes.items():
        section, _, name = path.rpartition("__")
        (config[section] if section else config)[name] = value
    train(config, workdir)
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def plain(pairs, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("reward")
    trained(pairs, workdir)
    return workdir


def test_it_learns_to_tell_better_answers(plain, tmp_path):
    lines = [json.loads(line) for line in (plain / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["split"] == "validation"][-1]
    assert last["accuracy"] > 0.9 and last["margin"] > 0.5 and last["loss"] < 0.5
    evaluate.main(
        ["evaluate", f"--workdir={plain}", "--checkpoint=last", "--tasks=preference", f"--output={tmp_path}/e.json"]
    )
    found = read_json(tmp_path / "e.json")["results"]["preference"]
    assert found.keys() == {"accuracy", "margin"} and found["accuracy"]["n"] > 10
    for name in found:
        assert found[name]["value"] == pytest.approx(last[name], rel=1e-4), name


def test_it_continues_bitwise(pairs, plain, tmp_path):
    shutil.copytree(plain, tmp_path / "run")
    for step in (8, 12):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))
    again = trained(pairs, tmp_path / "run")
    told = [
        [(line["split"], line["step"], line["loss"], line["margin"]) for line in lines if "loss" in line]
        for lines in (again, map(json.loads, (plain / "metrics.jsonl").read_text().splitlines()))
    ]
    assert told[0] == told[1]


@pytest.mark.slow
def test_micro_batches_meshes_and_adapters(pairs, plain, tmp_path):
    expected = trained(pairs, tmp_path / "plain", train__num_steps=4)
    for number, way in enumerate(
        [{"mesh__data": 2, "mesh__fsdp": 2, "train__accumulation": 2}, {"mesh__context": 2, "mesh__tensor": 2}]
    ):
        found = trained(pairs, tmp_path / str(number), train__num_steps=4, **way)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-5, abs=2e-5), way
    adapted = {"init_from": str(plain), "model__lora_rank": 2, "model__lora_targets": ".*"}
    first, *_, last = [line for line in trained(pairs, tmp_path / "lora", **adapted) if line["split"] == "train"]
    assert last["loss"] < first["loss"]


def test_objectives_that_it_does_not_have_are_refused():
    config = config_lib.get_default()
    config.objective.update(name="reward_model", z_loss=1e-4)
    with pytest.raises(
        UserError, match=r"objective.z_loss is 0.0001, which objective.name=reward_model does not support"
    ):
        reward_model.make(config)


# ---- What it is used for -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def writer(pairs, tmp_path_factory) -> Path:
    """A generating model with the same tokenizer."""
    workdir = tmp_path_factory.mktemp("writer")
    trained(pairs, workdir, objective__name="instruction", train__num_steps=1, evaluation__every=1)
    return workdir


def completions(writer: Path, folder: Path, *options: str) -> list[dict]:
    prompts, output = folder / "prompts.jsonl", folder / "out.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Where is {i}?", "reference": "é"}) + "\n" for i in range(3)))
    output.unlink(missing_ok=True)
    command = ["generate", f"--workdir={writer}", f"--prompts={prompts}", f"--output={output}", "--max_new_tokens=6"]
    generate.main([*command, *options])
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_the_best_of_several_completions_is_kept(plain, writer, tmp_path):
    (tmp_path / "mine.py").write_text("def mine(prompt, completion, reference):\n    return len(completion)\n")
    every = completions(writer, tmp_path, "--num_samples=4")
    by_length = f"--reward=0.5*{tmp_path}/mine.py:mine"
    best = completions(writer, tmp_path, "--best_of=4", by_length)
    for number, line in enumerate(best):
        own = [one["completion"] for one in every[4 * number : 4 * number + 4]]
        assert line["completion"] == max(own, key=len) and line["reward"] == len(line["completion"]) / 2
    # A reward model: the same draws, the one with the highest reward of each alone.
    best = completions(writer, tmp_path, "--best_of=4", f"--reward=model:{plain}")
    alone = completions(writer, tmp_path, "--best_of=4", f"--reward=-1*model:{plain}")
    for number, (line, worst) in enumerate(zip(best, alone, strict=True)):
        own = [one["completion"] for one in every[4 * number : 4 * number + 4]]
        assert line["completion"] in own and worst["completion"] in own
        assert line["reward"] >= -worst["reward"]
    assert any(line["completion"] != worst["completion"] for line, worst in zip(best, alone, strict=True))


def test_an_evaluation_scores_the_best_of_several(writer, tmp_path):
    """With the same draws as `generate`, chosen by the same rule."""
    (tmp_path / "mine.py").write_text("def mine(prompt, completion, reference):\n    return len(completion)\n")
    best = ["--best_of=4", f"--reward={tmp_path}/mine.py:mine"]
    expected = completions(writer, tmp_path, *best)
    options = [f"--prompts={tmp_path}/prompts.jsonl", "--max_new_tokens=6", f"--output={tmp_path}/e.json"]
    evaluate.main(["evaluate", f"--workdir={writer}", "--tasks=chrf", *options, *best])
    signature = read_json(tmp_path / "e.json")["results"]["chrf"]["chrf"]["signature"]
    assert f"|decoding:best-of-4|reward:{tmp_path}/mine.py:mine|" in signature
    lines = map(json.loads, (tmp_path / "e.items.jsonl").read_text().splitlines())
    shown = [line["hypothesis"] for line in lines if "hypothesis" in line]
    assert shown == [line["completion"].strip() for line in expected]
    with pytest.raises(UserError, match="--beams=2 does not sample"):
        evaluate.main(["evaluate", f"--workdir={writer}", "--tasks=chrf", *options, *best, "--beams=2"])


def test_a_reward_model_reads_what_it_has_learnt_to_read(pairs, plain):
    """The rewards of held-out pairs equal those of the validation, whatever the lengths of other pairs."""
    from gptjax.artifacts import loading
    from gptjax.data.opening import RunData
    from gptjax.rewards.model import ModelReward
    from gptjax.rewards.processes import Item
    from gptjax.rewards.rewards import Reward

    model = loading.load(plain, "last")
    (examples,) = RunData.open(model.config).examples(model.config, "validation", judged=False).values()
    rows = examples.read(np.arange(len(examples)))
    lengths = examples.prompt_lengths + examples.answer_lengths
    items = [
        Item("", "", "", rows["tokens"][row, side, : lengths[row, side]])
        for row in range(len(rows["tokens"]))
        for side in range(2)
    ]
    too_long = Item("", "", "", np.zeros(65, np.int32))
    *verdicts, last = ModelReward(f"model:{plain}/checkpoints/12", model.tokenizer)([*items, too_long])
    assert "reads 64 tokens at most" in last.error
    config = model.config.copy_and_resolve_references().unlock()
    config.objective.reward = f"model:{plain} + 0.1*length"
    judges = Reward(config, model.tokenizer).models  # a run that continues must find them as they were
    assert [*judges] == [f"objective.reward=model:{plain}"]
    expected, _ = reward_model.rewards(gpt.bind(model.architecture, model.params), jax.tree.map(jnp.asarray, rows))
    np.testing.assert_allclose([v.value for v in verdicts], np.asarray(expected).ravel(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--best_of=4"], "--best_of=4 needs a reward to choose by"),
        (["--reward=format"], "--reward chooses among --best_of completions; add --best_of=8"),
        (["--best_of=4", "--reward=nothing"], "--reward='nothing': 'nothing' is not a reward; choose from exact_match"),
        (
            ["--best_of=4", "--reward=format", "--temperature=0"],
            "with --temperature=0 all --best_of=4 completions are equal",
        ),
        (["--best_of=4", "--reward=format", "--beams=2"], "--beams=2 does not sample; leave out --best_of"),
        (["--best_of=4", "--reward=exact_match", "--prompt=a"], "exact_match compares with a reference, and 'a' has"),
        (["--best_of=4", "--reward=model:{writer}", "--prompt=a"], "is not a reward model; train one with"),
        (["--best_of=4", "--reward=model:/nowhere", "--prompt=a"], "no checkpoint in /nowhere/checkpoints"),
    ],
)
def test_what_cannot_be_chosen_by_is_refused(writer, options, words):
    options = [option.format(writer=writer) for option in options]
    with pytest.raises(UserError) as error:
        generate.main(["generate", f"--workdir={writer}", "--prompt=a", *options])
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("verb", "options"),
    [
        (chat, ["--workdir={plain}", "--prompt=a"]),
        (generate, ["--workdir={plain}", "--prompt=a"]),
        (generate, ["--workdir={writer}", "--draft={plain}", "--prompt=a"]),
        (serve, ["--model=mine={plain}", "--port=0"]),
    ],
)
def test_it_writes_nothing(plain, writer, verb, options, capsys):
    options = [option.format(plain=plain, writer=writer) for option in options]
    assert cli.run(verb.main, ["verb", *options]) == 2
    assert f"{plain}/checkpoints/12 is a reward model: it judges answers and writes none" in capsys.readouterr().err


def test_a_reward_that_fails_is_named(writer, tmp_path):
    (tmp_path / "mine.py").write_text("def mine(prompt, completion, reference):\n    return 1 / 0\n")
    with pytest.raises(RunError, match=r"mine raised ZeroDivisionError.*for the question 'Where is 0.'"):
        completions(writer, tmp_path, "--best_of=2", f"--reward={tmp_path}/mine.py:mine")


@pytest.mark.slow
def test_reinforcement_learns_from_a_reward_model(pairs, plain, writer, tmp_path):
    options = {"objective__name": "reinforcement", "objective__reward": f"model:{plain}", "objective__group_size": 4}
    options |= {"objective__max_new_tokens": 8, "init_from": str(writer), "evaluation__every": 4, "train__num_steps": 4}
    dialogues = tmp_path / "dialogues.jsonl"
    rows = map(json.loads, pairs.read_text().splitlines())
    dialogues.write_text("".join(json.dumps({"q": row["prompt"], "a": row["chosen"]}) + "\n" for row in rows))
    lines = trained(pairs, tmp_path / "run", data__source=f"pairs:{dialogues}#q,a", **options)
    assert all(math.isfinite(line["reward"]) for line in lines if line["split"] == "train")
