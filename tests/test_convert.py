"""The convert verb: a model comes in, generates, and goes out again."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from gptjax import cli, config, convert, generate
from gptjax.data.tokenizers import build_tokenizer
from gptjax.model import gpt, huggingface
from gptjax.model.architecture import Architecture


@pytest.fixture
def directory(tmp_path):
    """A small GPT-2 with random weights and a byte tokenizer."""
    model = config.get_default().model
    model.update(num_layers=2, num_heads=2, embed_dim=16, context_length=32, vocab_multiple=1, init_std=0.5)
    model.update(norm="layernorm", positions="learned", activation="gelu_tanh", qk_norm=False, use_bias=True)
    architecture = Architecture.from_config(model, 257)
    huggingface.write_directory(
        tmp_path / "in", architecture, gpt.initialise(architecture, jax.random.key(0)), eot_id=256
    )
    build_tokenizer("byte").save(tmp_path / "in" / "tokenizer.json")
    return tmp_path / "in"


def test_in_and_out_again(directory, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "out"
    assert cli.run(convert.main, ["convert", f"--from=hf:{directory}", f"--to={run}"]) == 0
    options = ["--prompt=abc", "--temperature=0", "--max_new_tokens=8", "--ignore_eos"]
    assert cli.run(generate.main, ["generate", f"--workdir={run}", *options]) == 0
    assert cli.run(convert.main, ["convert", f"--from={run}", f"--to=hf:{out}"]) == 0
    before, after = (load_file(place / "model.safetensors") for place in (directory, out))
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)
    assert json.loads((out / "config.json").read_text()) == json.loads((directory / "config.json").read_text())
    assert (out / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--from=hf:a"], "--to is missing"),
        (["--from=hf:a", "--to=hf:b"], "exactly one of the two is a work directory"),
        (["--from=hf:./absent", "--to=new"], "hf:./absent: there is no such directory"),
    ],
)
def test_a_wrong_request(options, message, capsys):
    assert cli.run(convert.main, ["convert", *options]) == 2
    assert message in capsys.readouterr().err


def test_what_exists_is_kept(directory, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").write_text("x")
    assert cli.run(convert.main, ["convert", f"--from=hf:{directory}", f"--to={tmp_path / 'run'}"]) == 2
    assert "exists" in capsys.readouterr().err
