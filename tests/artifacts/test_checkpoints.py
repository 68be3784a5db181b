import errno
import json
import logging
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from absl import logging as absl_logging

from gptjax import config as config_lib
from gptjax.artifacts import checkpoints, loading
from gptjax.artifacts.checkpoints import Checkpoints
from gptjax.data.tokenization.tokenizer import build_tokenizer
from gptjax.errors import RunError, UserError
from gptjax.model.architecture import Architecture
from gptjax.parallel import partition
from gptjax.parallel.mesh import make_mesh
from gptjax.training.program import Program
from gptjax.training.state import TrainState

TOKENIZER = build_tokenizer("byte")
# Orbax abandons its reads where the shapes of a checkpoint are not those that are wanted.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class Run:
    """A tiny model's states on a mesh, and a work directory to save them in."""

    def __init__(self, config: config_lib.Config, workdir: Path, **mesh: int):
        config = config.copy_and_resolve_references()
        config.mesh.update(mesh or {"data": 1})
        self.config, self.workdir = config, workdir
        self.architecture = Architecture.from_config(config.model, 0)
        self.mesh = make_mesh(config.mesh)
        self.program = Program.of(config, self.mesh)
        self.target = self.program.target

    def state(self, seed: int) -> TrainState:
        """A state in which every leaf, including moments and average, has different values."""
        state = self.program.initial_state(seed)
        leaves, tree = jax.tree.flatten(state)
        changed = [leaf + jnp.asarray(seed + i, leaf.dtype) for i, leaf in enumerate(leaves)]
        return jax.device_put(tree.unflatten(changed), jax.tree.map(lambda a: a.sharding, self.target))

    def save(self, steps: dict[int, float | None], *, keep: int = 2) -> None:
        """Saves a state for each step; the value is its validation loss."""
        manager = Checkpoints(self.workdir, keep=keep)
        for step, loss in steps.items():
            metrics = {} if loss is None else {"validation_loss": loss}
            manager.save(step, self.state(step), config=self.config, tokenizer=TOKENIZER, metrics=metrics)
        manager.wait()
        manager.close()

    def restore(self, step: int, target=None) -> TrainState:
        manager = Checkpoints(self.workdir)
        try:
            return manager.restore(step, self.target if target is None else target)
        finally:
            manager.close()


def assert_same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.fixture(scope="module")
def ema_run(tmp_path_factory) -> Run:
    """Steps 3, 6 and 9, of which 6 is the best, with averaged parameters; made on a 2 x 2 mesh."""
    config = config_lib.get_default()
    config.model.update(num_layers=2, num_heads=2, embed_dim=16, context_length=16, vocab_size=97)
    config.train.ema_decay = 0.9
    run = Run(config, tmp_path_factory.mktemp("ema"), data=2, fsdp=2)
    run.save({3: 2.0, 6: 1.0, 9: 3.0}, keep=3)
    return run


def test_what_is_restored_is_what_was_saved_bit_by_bit(ema_run):
    for step in (3, 9):
        assert_same(ema_run.restore(step), ema_run.state(step))


@pytest.mark.parametrize(
    "mesh", [{"data": 1}, {"data": 1, "fsdp": 2, "context": 2, "tensor": 2}], ids=["one device", "eight"]
)
def test_a_checkpoint_moves_to_another_mesh(ema_run, mesh):
    other = Run(ema_run.config, ema_run.workdir, **mesh)
    restored = ema_run.restore(6, other.target)
    assert_same(restored, ema_run.state(6))
    jax.tree.map(
        lambda a, t: a.sharding.is_equivalent_to(t.sharding, a.ndim) or pytest.fail(str(t)),
        restored,
        other.target,
    )


def test_muon_state_is_restored(tiny_config, tmp_path):
    tiny_config.optimizer.name = "muon"
    run = Run(tiny_config, tmp_path, data=1, fsdp=2)
    run.save({1: None})
    assert_same(run.restore(1), run.state(1))


@pytest.mark.parametrize(
    "change",
    [{"embed_dim": 32}, {"num_layers": 3}, {"use_bias": True, "norm": "layernorm"}],
    ids=["width", "depth", "more parameters"],
)
def test_the_checkpoint_of_another_model_is_refused(ema_run, change):
    config = ema_run.config.copy_and_resolve_references()
    config.model.update(change)
    other = Run(config, ema_run.workdir)
    with pytest.raises(
        UserError, match=r"checkpoints/6 is of another model or optimizer \(ema_params/.* saved, .* expected"
    ):
        ema_run.restore(6, other.target)


def test_the_checkpoint_of_another_optimizer_is_refused(ema_run):
    config = ema_run.config.copy_and_resolve_references()
    config.optimizer.name = "muon"
    with pytest.raises(UserError, match="of another model or optimizer"):
        ema_run.restore(6, Run(config, ema_run.workdir).target)


@pytest.mark.parametrize(
    ("losses", "keep", "kept", "best"),
    [
        ({1: 3.0, 2: 1.0, 3: 2.0, 4: 4.0, 5: 5.0}, 2, [2, 4, 5], 2),
        ({1: 3.0, 2: 2.0, 3: 1.0}, 2, [2, 3], 3),  # the best is among the newest
        ({1: 1.0, 2: None, 3: None, 4: None}, 1, [1, 4], 1),  # without a loss a checkpoint is never the best
        ({1: None, 2: None, 3: None}, 2, [2, 3], 3),  # no losses at all: the last stands for the best
        ({1: math.nan, 2: 2.0, 3: math.inf, 4: 3.0}, 1, [2, 4], 2),  # what is not a number is never the best
    ],
)
def test_the_newest_and_the_best_are_kept(tiny_config, tmp_path, losses, keep, kept, best):
    run = Run(tiny_config, tmp_path)
    run.save(losses, keep=keep)
    assert checkpoints.finished_steps(tmp_path / "checkpoints") == kept
    manager = Checkpoints(tmp_path, keep=keep)
    assert manager.steps() == kept
    manager.close()
    assert loading.find(tmp_path, "best").name == str(best)


def test_the_best_is_kept_by_a_run_that_continues(tiny_config, tmp_path):
    run = Run(tiny_config, tmp_path)
    run.save({1: 1.0, 2: 2.0}, keep=1)
    run.save({3: 3.0, 4: 4.0}, keep=1)
    assert checkpoints.finished_steps(tmp_path / "checkpoints") == [1, 4]


@pytest.mark.parametrize(("which", "step"), [("best", 6), ("last", 9), ("3", 3)])
def test_load_gives_the_averaged_parameters_on_one_device(ema_run, which, step):
    trained = loading.load(ema_run.workdir, which)
    assert trained.step == step
    assert trained.path == ema_run.workdir / "checkpoints" / str(step)
    state = ema_run.state(step)
    assert_same(trained.params, state.ema_params)
    assert not np.array_equal(trained.params["final_norm"]["scale"], state.params["final_norm"]["scale"])
    assert all(len(a.sharding.device_set) == 1 for a in jax.tree.leaves(trained.params))


def test_a_checkpoint_is_self_contained(ema_run, tmp_path):
    """The directory of one step, moved away from its run, has config, tokenizer and parameters."""
    shutil.copytree(ema_run.workdir / "checkpoints" / "9", tmp_path / "mine")
    trained = loading.load(tmp_path / "mine")
    assert trained.step == 9
    assert trained.config == ema_run.config.copy_and_resolve_references().lock()
    assert trained.architecture == ema_run.architecture
    assert trained.tokenizer.sha256 == TOKENIZER.sha256
    assert trained.tokenizer.encode("é").tolist() == TOKENIZER.encode("é").tolist()
    assert_same(trained.params, ema_run.state(9).ema_params)


def test_without_an_average_the_parameters_themselves_are_loaded(tiny_config, tmp_path):
    run = Run(tiny_config, tmp_path)
    run.save({1: None, 2: None})
    trained = loading.load(tmp_path)  # no losses: the best is the last
    assert trained.step == 2
    assert_same(trained.params, run.state(2).params)


def test_load_onto_a_mesh(ema_run):
    mesh = Run(ema_run.config, ema_run.workdir, data=1, fsdp=4).mesh
    trained = loading.load(ema_run.workdir, shardings=lambda abstract: partition.parameter_shardings(abstract, mesh))
    assert_same(trained.params, ema_run.state(6).ema_params)
    table = trained.params["embedding"]["embedding"]
    assert table.addressable_shards[0].data.shape == (128, 4)


@pytest.mark.parametrize("which", ["4", "9 ", "newest", "-1", "²", "03"])
def test_a_step_that_is_not_there_is_told_with_those_that_are(ema_run, which):
    with pytest.raises(UserError) as caught:
        loading.find(ema_run.workdir, which)
    assert str(caught.value) == f"--checkpoint={which}: choose best, last or one of 3, 6, 9"


@pytest.mark.parametrize("prepare", ["missing", "empty", "no steps"])
def test_a_directory_without_checkpoints(tmp_path, prepare):
    workdir = tmp_path / "run"
    if prepare != "missing":
        (workdir / "checkpoints" if prepare == "no steps" else workdir).mkdir(parents=True)
    with pytest.raises(UserError, match=r"no checkpoint in .*/run/checkpoints; train one with"):
        loading.load(workdir)


def test_metadata_that_cannot_be_read(ema_run, tmp_path):
    shutil.copytree(ema_run.workdir / "checkpoints" / "9", tmp_path / "9")
    (tmp_path / "9" / "metadata" / "metadata").write_text('{"step": 9, "conf')
    with pytest.raises(UserError, match="/9 is not a readable gptjax checkpoint"):
        loading.load(tmp_path / "9")


def test_half_written_directories_are_ignored_and_removed(tiny_config, tmp_path):
    run = Run(tiny_config, tmp_path)
    run.save({1: 2.0})
    directory = tmp_path / "checkpoints"
    half = directory / "2.orbax-checkpoint-tmp-123456"
    shutil.copytree(directory / "1", half)
    shutil.rmtree(half / "metadata")
    assert loading.find(tmp_path, "last") == directory / "1"
    manager = Checkpoints(tmp_path)
    assert manager.steps() == [1]
    manager.save(2, run.state(2), config=run.config, tokenizer=TOKENIZER, metrics={})
    manager.close()
    assert sorted(path.name for path in directory.iterdir()) == ["1", "2"]
    assert_same(run.restore(2), run.state(2))


@pytest.mark.parametrize(
    ("code", "words"),
    [(errno.EDQUOT, "the quota of the disk is used up. Make room"), (errno.EIO, "the disk reports an error. See what")],
)
def test_a_disk_that_refuses_a_save_is_told_with_what_to_do(tiny_config, tmp_path, monkeypatch, code, words):
    run = Run(tiny_config, tmp_path / "run")
    run.save({1: None})
    reason = f"UNKNOWN: Error writing \"a\": Failed to write 9 bytes: {os.strerror(code)} [os_error_code='{code}']"

    def save(*arguments, **options):
        raise ValueError(reason)

    monkeypatch.setattr(ocp.CheckpointManager, "save", save)
    with pytest.raises(RunError) as caught:
        run.save({2: None})
    directory = tmp_path / "run" / "checkpoints"
    assert str(caught.value).startswith(f"{directory}: {words}")
    assert str(caught.value).endswith(f"; the same command then goes on from step 1 ({directory / '1'})")


def test_what_is_stored_beside_the_state(ema_run):
    metadata = json.loads((ema_run.workdir / "checkpoints" / "6" / "metadata" / "metadata").read_text())
    assert metadata["metrics"] == {"validation_loss": 1.0}
    assert metadata["config_sha256"] == config_lib.sha256(ema_run.config)
    assert metadata["config"] == ema_run.config.to_dict()


def test_the_import_leaves_the_log_of_an_absl_program_alone():
    code = (
        "from absl import logging\n"
        "logging.set_verbosity(logging.INFO)\n"
        "import gptjax.artifacts.loading\n"
        "logging.info('of the program')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8", check=True)
    assert "of the program" in done.stderr


def test_of_all_log_lines_only_those_of_orbax_are_hidden(tiny_config, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    caplog.set_level(logging.INFO, logger="absl")
    run = Run(tiny_config, tmp_path)
    manager = Checkpoints(tmp_path)
    manager.save(1, run.state(1), config=run.config, tokenizer=TOKENIZER, metrics={})
    absl_logging.info("while it is saved")
    manager.close()
    loading.load(tmp_path)
    absl_logging.info("afterwards")
    messages = [record.getMessage() for record in caplog.records if record.name in ("absl", "asyncio")]
    assert messages == ["while it is saved", "afterwards"]


def test_orbax_has_its_log_back_when_a_run_is_closed(tiny_config, tmp_path, caplog, monkeypatch):
    """Programs may also use Orbax directly."""
    monkeypatch.setattr(checkpoints, "_at_work", set())  # other tests leave saves that have failed
    Run(tiny_config, tmp_path).save({1: None})
    caplog.set_level(logging.INFO, logger="absl")
    with ocp.CheckpointManager(tmp_path / "checkpoints"):
        pass
    assert any("/orbax/" in record.pathname for record in caplog.records)
