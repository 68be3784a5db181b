import os
import sys
from pathlib import Path

import jax
import pytest

from gptjax import cli, plan
from gptjax.errors import RunError, UserError
from gptjax.planning import tpu


def test_a_missing_compiler_is_answered_with_the_command_that_installs_it(monkeypatch, tmp_path):
    monkeypatch.delenv("GPTJAX_TPU_PYTHON", raising=False)
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path))
    with pytest.raises(UserError) as error:
        tpu.find_python()
    message = str(error.value)
    assert "gptjax plan --setup" in message
    assert f"-m venv {tmp_path}/tpu-venv && {tmp_path}/tpu-venv/bin/python -m pip install" in message
    assert f"'jax[tpu]=={jax.__version__}'" in message


def test_an_environment_that_is_named_must_exist(monkeypatch, tmp_path):
    monkeypatch.setenv("GPTJAX_TPU_PYTHON", str(tmp_path / "python"))
    with pytest.raises(UserError, match="GPTJAX_TPU_PYTHON"):
        tpu.find_python()


def test_a_compiler_that_dies_is_a_failure_with_its_last_words(tmp_path, tiny_config):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'no such instruction' >&2\nexit 1\n")
    python.chmod(0o755)
    with tpu.TpuProcess(python) as process, pytest.raises(RunError, match="no such instruction"):
        process.compile(tiny_config, "v5e:2x2")


@pytest.fixture(scope="session")
def tpu_environment() -> Path:
    """The interpreter with libtpu; installed beside the user's cache if it is missing."""
    if "GPTJAX_TPU_PYTHON" in os.environ:
        return tpu.find_python()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("GPTJAX_CACHE", raising=False)
        try:
            return tpu.find_python()
        except UserError:
            try:
                return tpu.set_up()
            except RunError as error:
                pytest.skip(f"libtpu cannot be installed here: {error}")


CONFIG = """
from gptjax.config import get_default

def get_config(arg=""):
    config = get_default()
    config.model.update(num_layers=4, num_heads=4, embed_dim=512, context_length=512, vocab_size=8192)
    config.model.update(compute_dtype="bfloat16", scan_unroll=1, remat="full")
    config.mesh.update(data=1, fsdp=2, tensor=2)
    config.train.update(batch_size=16, num_steps=100)
    return config
"""


@pytest.mark.slow
def test_a_step_compiles_for_a_slice_that_is_not_here(tpu_environment, monkeypatch, tmp_path, capsys):
    """With the real compiler: a step fits, communicates as the mesh requires, and too large steps are reported."""
    monkeypatch.setenv("GPTJAX_TPU_PYTHON", str(tpu_environment))
    (tmp_path / "config.py").write_text(CONFIG)
    command = ["gptjax plan", f"--config={tmp_path / 'config.py'}", "--topology=v5e:2x2", "--price=1"]
    assert cli.run(plan.main, command) == 0
    output = capsys.readouterr().out
    assert "FITS: it needs" in output
    assert "4 x TPU v5 lite, mesh fsdp 2 x tensor 2" in output
    assert "chip-hours" in output
    for kind in ("all-gather", "reduce"):
        assert kind in output
    too_large = [*command, "--config.train.batch_size=65536", "--config.model.attention=reference"]
    assert cli.run(plan.main, too_large) == 0
    assert "DOES NOT FIT: it needs" in capsys.readouterr().out
    assert cli.run(plan.main, [*command, "--config.mesh.fsdp=8"]) == 2
    assert "does not fit 4" in capsys.readouterr().err
    assert "libtpu" not in sys.modules
