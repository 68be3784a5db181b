"""Load, generate, score from Python."""

import math
import subprocess
import sys

import pytest

import gptjax
from gptjax import cli, convert, train
from gptjax.errors import UserError


@pytest.fixture(scope="module")
def model(tiny_corpus, tmp_path_factory):
    directory = tmp_path_factory.mktemp("python")
    (directory / "config.py").write_text(
        "from gptjax.config import get_default\n\n\ndef get_config():\n    config = get_default()\n"
        "    config.tokenizer = 'byte'\n"
        f"    config.data.update(source='text:{tiny_corpus}/*.txt', split_by='document', validation_fraction=0.4)\n"
        "    config.model.update(num_layers=1, num_heads=2, embed_dim=16, context_length=64)\n"
        "    config.model.update(positions='learned', norm='layernorm', activation='gelu_tanh', use_bias=True)\n"
        "    config.model.qk_norm = False\n"
        "    config.train.update(num_steps=20, batch_size=8)\n"
        "    config.logging.update(samples=0, tensorboard=False)\n    return config\n"
    )
    options = [f"--config={directory}/config.py", f"--workdir={directory}/run"]
    assert cli.run(train.main, ["train", *options]) == 0
    return gptjax.load(directory / "run")


def test_training_is_a_call_and_goes_on(model, tmp_path):
    config = model.config.copy_and_resolve_references().unlock()
    config.update(schedule={"name": "constant", "warmup": 0}, train={"num_steps": 2})
    config.update(evaluation={"every": 2}, logging={"every": 1})
    gptjax.train(config, tmp_path / "run")
    gptjax.train(config, str(tmp_path / "run"))
    trained = gptjax.load(tmp_path / "run")
    assert trained.config.train.num_steps == 2 and trained.params and trained.tokenizer.vocab_size
    config.train.num_steps = 1
    with pytest.raises(UserError, match=r"train.num_steps is 1, and the run"):
        gptjax.train(config, tmp_path / "run", allow_changes=True)


def test_a_stream_is_the_completion_and_a_conversation_has_turns(model):
    options = {"max_new_tokens": 12, "temperature": 1.0, "seed": 3}
    assert "".join(model.stream("the cat", **options)) == model.generate("the cat", **options)
    chat = model.chat(**options)
    first = chat.ask("the cat")
    chat.ask("sat")
    assert first.text and [message["role"] for message in chat.messages] == ["user", "assistant"] * 2
    with pytest.raises(UserError, match="there is no option 'heat'"):
        model.chat(heat=1)


def test_three_lines(model):
    text = model.generate("the cat", max_new_tokens=8, temperature=0)
    assert text == model.generate("the cat", max_new_tokens=8, temperature=0) and 0 < len(text) <= 8
    whole, start = model.score("the cat sat"), model.score("the cat")
    assert whole["tokens"] == 11 and whole["log_likelihood"] < start["log_likelihood"] < 0
    assert whole["perplexity"] == pytest.approx(math.exp(-whole["log_likelihood"] / 11))
    long = model.score("the cat sat " * 30)
    assert long["tokens"] == 360, "longer than the context"


def test_a_published_model_is_opened_where_it_is(model, tmp_path):
    run = model.trained.path.parents[1]
    assert cli.run(convert.main, ["convert", f"--from={run}", f"--to=hf:{tmp_path}/model"]) == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    published = gptjax.load(f"hf:{tmp_path}/model")
    assert published.generate("the cat", max_new_tokens=8, temperature=0) == model.generate(
        "the cat", max_new_tokens=8, temperature=0
    )
    ours, theirs = published.score("the cat sat"), model.score("the cat sat")
    assert ours["log_likelihood"] == pytest.approx(theirs["log_likelihood"], rel=1e-6)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before, "nothing is written"
    with pytest.raises(UserError):
        gptjax.load(f"hf:{tmp_path}/nothing")


def test_what_cannot_be_done_is_said(model, tmp_path):
    with pytest.raises(UserError, match="no option 'max_tokens'; choose from max_new_tokens"):
        model.generate("a", max_tokens=3)
    with pytest.raises(UserError, match="not empty"):
        model.score("")
    with pytest.raises(UserError, match="no checkpoint"):
        gptjax.load(tmp_path)


def test_importing_the_package_imports_no_jax():
    code = "import sys, gptjax; assert not {'jax', 'numpy', 'pydantic'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
