import json
import subprocess
from pathlib import Path

import jax
import pytest
from jax.sharding import PartitionSpec

from gptjax.artifacts import manifest
from gptjax.config import Config, sha256
from gptjax.model import gpt
from gptjax.model.architecture import Architecture
from gptjax.parallel.mesh import make_mesh


@pytest.fixture
def mesh(tiny_config):
    tiny_config.mesh.update(data=2, fsdp=2, tensor=2)
    return make_mesh(tiny_config.mesh)


def table_of(config: Config, mesh) -> dict[str, dict]:
    _, params = gpt.abstract_model(Architecture.from_config(config.model, 0))
    return {row.pop("path"): row for row in manifest.parameter_table(config, mesh, params)}


def test_rows_of_the_parameter_table(tiny_config, mesh):
    tiny_config.optimizer.name = "muon"
    tiny_config.model.update(use_bias=True)
    table = table_of(tiny_config, mesh)
    assert table["blocks/mlp/down/kernel"] == {
        "shape": [2, 64, 16],
        "sharding": str(PartitionSpec(None, "tensor", "fsdp")),
        "init": "normal(0.02 / sqrt(2 x 2))",
        "decay": True,
        "optimizer": "muon",
    }
    assert table["embedding/embedding"] == {
        "shape": [128, 16],
        "sharding": str(PartitionSpec("tensor", "fsdp")),
        "init": "normal(0.02)",
        "decay": True,
        "optimizer": "adamw",
    }
    assert (table["blocks/mlp/up/bias"]["init"], table["blocks/mlp/up/bias"]["decay"]) == ("zeros", False)
    assert (table["final_norm/scale"]["init"], table["final_norm/scale"]["decay"]) == ("ones", False)


def test_the_table_tells_how_parameters_really_start(tiny_config, mesh):
    tiny_config.model.update(use_bias=True, norm="layernorm", positions="learned", tie_embeddings=False, embed_dim=32)
    params = gpt.initialise(Architecture.from_config(tiny_config.model, 0), jax.random.key(0))
    rows = manifest.parameter_table(tiny_config, mesh, params)
    assert len(rows) == len(jax.tree.leaves(params))
    expected = {
        "ones": (1, 0),
        "zeros": (0, 0),
        "normal(0.02)": (0, 0.02),
        "normal(0.02 / sqrt(2 x 2))": (0, 0.01),
    }
    for row, leaf in zip(rows, jax.tree.leaves(params), strict=True):
        mean, deviation = expected[row["init"]]
        assert leaf.mean() == pytest.approx(mean, abs=3e-3), row
        assert leaf.std() == pytest.approx(deviation, rel=0.1), row


def test_a_manifest_is_json_and_says_what_ran(tiny_config, mesh):
    _, params = gpt.abstract_model(Architecture.from_config(tiny_config.model, 0))
    data = {"source": "text:a.txt", "source_fingerprint": "123"}
    about = json.loads(json.dumps(manifest.build(tiny_config, mesh, params, data)))
    assert about["config_sha256"] == sha256(tiny_config)
    assert about["mesh"] == {"data": 2, "fsdp": 2, "expert": 1, "context": 1, "tensor": 2}
    assert about["devices"]["count"] == 8 and about["devices"]["platform"] == "cpu"
    assert about["packages"]["jax"] == jax.__version__
    assert "--xla_force_host_platform_device_count=8" in about["environment"]["XLA_FLAGS"]
    assert about["data"] == data
    assert about["prng"] == {"implementation": "threefry2x32", "seed": 0}
    assert [row["path"] for row in about["parameters"]] == sorted(row["path"] for row in about["parameters"])


def test_the_commit_and_uncommitted_changes_are_told(tmp_path, monkeypatch):
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", *identity, "-C", str(tmp_path), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    module = tmp_path / "gptjax" / "artifacts" / "manifest.py"
    module.parent.mkdir(parents=True)
    module.write_text("1\n")
    monkeypatch.setattr(manifest, "__file__", str(module))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert manifest.git_state() is None, "not a checkout"
    git("init")
    git("add", ".")
    git("commit", "-m", "one")
    clean = manifest.git_state()
    assert clean == {"commit": git("rev-parse", "HEAD"), "diff_sha256": ""}
    module.write_text("2\n")
    first = manifest.git_state()
    module.write_text("3\n")
    second = manifest.git_state()
    assert first["commit"] == second["commit"] == clean["commit"]
    assert len({clean["diff_sha256"], first["diff_sha256"], second["diff_sha256"]}) == 3


def test_a_package_installed_inside_another_checkout_is_not_that_checkout(tmp_path, monkeypatch):
    subprocess.run(["git", "init", str(tmp_path)], check=True, capture_output=True)
    monkeypatch.setattr(manifest, "__file__", str(Path(tmp_path) / "venv" / "gptjax" / "artifacts" / "manifest.py"))
    (tmp_path / "venv").mkdir()
    assert manifest.git_state() is None
