import json
import subprocess
import sys
from unittest.mock import Mock

import pytest

from gptjax import cli, config, plan
from gptjax.errors import UserError

CONFIG = """
from gptjax.config import get_default

def get_config(arg=""):
    config = get_default()
    config.model.update(num_layers=2, num_heads=2, embed_dim=16, context_length=16, vocab_size=97)
    config.train.update(batch_size=8, num_steps=50)
    config.mesh.data = 8
    return config
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    return path


def test_the_devices_of_this_machine(config_file, tmp_path, capsys):
    output = tmp_path / "deep" / "plan.json"
    command = ["gptjax plan", f"--config={config_file}", "--topology=local", f"--output={output}"]
    assert cli.run(plan.main, command) == 0
    printed = capsys.readouterr().out
    assert "FITS: it needs" in printed
    assert "8 x cpu, mesh data 8" in printed
    content = json.loads(output.read_text())
    assert content["fits"]
    assert content["memory"]["peak"] > content["memory"]["temporaries"] > 0
    assert [c["kind"] for c in content["collectives"]] == ["all-reduce"]
    assert content["cost"]["tokens"] == 50 * 8 * 16
    assert content["flops_convention"].startswith("6N")


@pytest.mark.slow
def test_a_suggestion_for_this_machine(config_file, tmp_path, capsys):
    output = tmp_path / "plan.json"
    command = ["gptjax plan", f"--config={config_file}", "--topology=local", "--suggest", f"--output={output}"]
    command.append("--config.train.batch_size=48")
    assert cli.run(plan.main, [*command, "--compiles=1", "--config.mesh.data=16"]) == 0
    printed = capsys.readouterr().out
    assert "the config as it is: the mesh data 16 x fsdp 1 x expert 1 x context 1 x tensor 1 does not fit 8" in printed
    assert "The fastest that fits: " in printed
    content = json.loads(output.read_text())
    assert "does not fit 8" in content["problem"]
    assert content["suggestion"]["fits"]
    assert cli.run(plan.main, [*command, "--compiles=1", *content["suggestion"]["flags"]]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--topology is missing; choose from v4:{2x2x1,"),
        (["--topology=v5e:5x5"], "v5e has no such slice; choose from v5e:1x1, v5e:2x2"),
        (["--topology=local", "--config.mesh.data=3", "--config.train.batch_size=9"], "does not fit 8 cpu device"),
        (["--topology=local", "--config.mesh.data=4"], "uses 4 of the 8 chips"),
        (["--topology=local", "--config.train.batch_size=12"], "by mesh.data x mesh.fsdp x mesh.expert = 8"),
        (["--topology=local", "--config.mesh.data=1", "--config.mesh.tensor=8"], "num_heads 2 is not divisible"),
        (["--topology=local", "--tokens=many"], "--tokens=many is not a number"),
        (["--topology=local", "--tokens=1e999"], "--tokens=1e999 is not a number of tokens, 1 to 1e+18"),
        (["--topology=local", "--tokens=0"], "--tokens=0 is not a number of tokens"),
        (["--topology=local", "--tokens=1.2.3"], "--tokens=1.2.3 is not a number of tokens"),
        (["--topology=local", "--price=nan"], "--price=nan: expected a finite number"),
        (["--topology=local", "--price=-1"], "--price=-1.0: a chip costs 0 to 1000000 an hour"),
        (["--topology=local", "--compiles=0"], "--compiles=0: --suggest compiles 1 to 1000 programs"),
        (["--topology=local", "--output=/"], "--output=/ is a directory; name a file"),
        (["--topology=v5e:16x16*9999"], "9999 slices; a run can join 1 to 256"),
        (["--topology=h100:8"], "--topology=h100:8: there is no such topology; choose from v4:{"),
        (["--topology=local", "--config.model.vocab_size=0", "--config.tokenizer=hf:gpt2"], "model.vocab_size=N"),
    ],
)
def test_bad_requests(config_file, capsys, options, message):
    assert cli.run(plan.main, ["gptjax plan", f"--config={config_file}", *options]) == 2
    assert message in capsys.readouterr().err


def test_vocabularies_without_data(monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", Mock(side_effect=OSError("no network")))
    options = config.get_default()
    options.tokenizer = "bpe:4096"
    assert plan.vocab_size(options) == 4096
    options.model.vocab_size = 50257
    assert plan.vocab_size(options) == 50257
    options.model.vocab_size, options.tokenizer = 0, "byte"
    assert plan.vocab_size(options) == 257, "256 bytes and the end of a text"
    options.tokenizer = "char"
    assert plan.vocab_size(options) == 256, "is not known without the text"
    options.tokenizer = "hf:01-ai/Yi-6B"
    with pytest.raises(UserError, match=r"tokenizer=hf:01-ai/Yi-6B is not known without its files.*vocab_size=N"):
        plan.vocab_size(options)


def test_tokens():
    assert plan.number_of_tokens("10B") == 1e10
    assert plan.number_of_tokens("2.5e9") == 2.5e9
    with pytest.raises(UserError):
        plan.number_of_tokens("10 billion")
    options = config.get_default()
    options.train.num_steps = "1M tokens"
    assert plan.tokens_of(options) == pytest.approx(1e6, rel=0.01)
    options.train.num_steps = "2 epochs"
    assert plan.tokens_of(options) is None


def test_help_needs_no_jax():
    code = "import sys, gptjax.plan; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
