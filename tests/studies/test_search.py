"""A search: Optuna proposes, cells run, it continues after a kill, and it reports where the optimum lies."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest

from gptjax import ablate
from gptjax.errors import RunError, UserError
from gptjax.studies import local, search
from gptjax.studies.search import Search, read

RATE, DECAY = "optimizer.learning_rate", "optimizer.weight_decay"


@pytest.fixture
def base(tiny_config, tiny_corpus):
    tiny_config.tokenizer, tiny_config.model.vocab_size = "byte", 0
    tiny_config.data.update(source=f"text:{tiny_corpus}/*.txt", split_by="position", validation_fraction=0.1)
    tiny_config.train.num_steps = 4
    return tiny_config


class Machine:
    """Runs cells at once, two at a time: the loss is least at a rate of 1e-3; above 1 they diverge.

    It breaks down before the cell number `breaks`. Cells write a line of their validation at each look.
    """

    def __init__(self, breaks: int = sys.maxsize):
        self.breaks, self.started, self.stopped = breaks, [], []

    def run(self, jobs, *, halt=lambda cell: False, ended=lambda cell: None, **options):
        waiting, running = iter(jobs), []
        while True:
            while len(running) < 2 and (job := next(waiting, None)):
                if len(self.started) == self.breaks:
                    raise KeyboardInterrupt
                self.started.append(job[0])
                job[0].workdir.mkdir(parents=True, exist_ok=True)
                running.append((job[0], []))
            if not running:
                return
            for cell, lines in list(running):
                rate = cell.config.optimizer.learning_rate
                loss = 3 + abs(math.log10(rate / 1e-3)) + 0.01 * cell.seed
                lines.append({"step": len(lines) + 1, "split": "validation", "loss": loss})
                (cell.workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
                if rate > 1:
                    cell.fail("failed: the training loss is nan at step 1")
                if halt(cell):
                    self.stopped.append(cell)
                if cell.outcome() or cell in self.stopped:
                    running.remove((cell, lines))
                    ended(cell)


@pytest.fixture
def machine(monkeypatch):
    pytest.importorskip("optuna")

    def build(**options) -> Machine:
        made = Machine(**options)
        monkeypatch.setattr(local, "run", made.run)
        return made

    return build


def run(base, workdir, *flags: str) -> Search:
    one = Search(base, read(flags), workdir)
    one.run(workers=1, show=lambda states: None)
    return one


def trials(one: Search) -> list[tuple]:
    states = {"COMPLETE", "PRUNED"}
    return [(t.params, t.value, t.state.name) for t in one._study.get_trials() if t.state.name in states]


RANDOM = (f"{RATE}=1e-5..1e-1", f"{DECAY}=0,0.1", "method=random", "trials=6", "prune=none")


@pytest.mark.parametrize("breaks", [1, 4])
def test_after_a_kill_it_goes_on_with_the_same_trials(base, machine, tmp_path, breaks):
    whole = machine()
    expected = trials(run(base, tmp_path / "whole", *RANDOM))
    assert len(expected) == len(whole.started) == 6
    broken = machine(breaks=breaks)
    with pytest.raises(KeyboardInterrupt):
        run(base, tmp_path / "killed", *RANDOM)
    with (tmp_path / "killed" / "search.log").open("a") as log:
        log.write('{"op_code": 5, "wor')  # what a kill leaves of a line
    (tmp_path / "killed" / "search.log.lock").touch()
    after = machine()
    found = run(base, tmp_path / "killed", *RANDOM)
    assert sorted(trials(found), key=repr) == sorted(expected, key=repr)
    done = {cell.key for cell in broken.started[: breaks - 1]}
    assert not done & {cell.key for cell in after.started}, "what was finished does not run again"
    again = machine()
    assert trials(run(base, tmp_path / "killed", *RANDOM)) == trials(found)
    assert again.started == []
    run(base, tmp_path / "killed", *RANDOM[:3], "trials=8", "prune=none")
    assert len(again.started) == 2, "more trials may be asked for"


def test_a_grid_has_its_ends_and_says_that_the_best_is_at_one(base, machine, tmp_path):
    seen = machine()
    one = run(base, tmp_path, f"{RATE}=1e-3..1e-1", "method=grid", "points=3", "seeds=2")
    assert [(c.config.optimizer.learning_rate, c.seed) for c in seen.started] == [
        (rate, seed) for rate in (1e-3, 1e-2, 1e-1) for seed in (base.seed, base.seed + 1)
    ]
    assert trials(one)[0] == ({RATE: 1e-3}, pytest.approx(3.005), "COMPLETE")
    text = one.text(["python", "-m", "gptjax.train", "--config=a b.py"])
    assert "best: optimizer.learning_rate 0.001, with a validation loss of 3.005" in text
    assert "the best optimizer.learning_rate is the smallest that was tried: widen the range" in text
    command = text.splitlines()[-1].strip()
    assert command.startswith("python -m gptjax.train '--config=a b.py' --config.optimizer.learning_rate=0.001 --work")


def test_an_optimum_inside_is_no_edge_and_divergence_is_told(base, machine, tmp_path):
    machine()
    text = run(base, tmp_path / "a", f"{RATE}=1e-4,1e-3,10", "method=grid").text()
    assert "tried" not in text
    assert text.splitlines()[3].endswith("diverged")
    text = run(base, tmp_path / "b", f"{RATE}=10..1000", "method=grid").text()
    assert text.endswith("every trial diverged: search lower learning rates")


def test_tpe_finds_the_optimum_and_bad_trials_are_pruned(base, machine, tmp_path):
    seen = machine()
    one = run(base, tmp_path, f"{RATE}=1e-8..1", "trials=30")
    found = trials(one)
    assert len(found) == 30
    best = min((value, params[RATE]) for params, value, state in found if state == "COMPLETE")
    assert 1e-4 < best[1] < 1e-2
    pruned = [params[RATE] for params, _, state in found if state == "PRUNED"]
    assert len(pruned) == len(seen.stopped) > 3
    assert "pruned at step 1" in one.text()


def test_a_trial_without_a_result_is_taken_up(base, machine, tmp_path, monkeypatch):
    machine()
    monkeypatch.setattr(local, "run", lambda jobs, ended, **options: [ended(cell) for (cell,) in jobs])
    with pytest.raises(RunError, match="3 trials have no result"):
        run(base, tmp_path, f"{RATE}=1e-4,1e-3,1e-2", "method=grid")
    seen = machine()
    assert len(trials(run(base, tmp_path, f"{RATE}=1e-4,1e-3,1e-2", "method=grid"))) == len(seen.started) == 3


def test_another_search_is_refused_and_a_damaged_log_is_named(base, machine, tmp_path):
    machine()
    run(base, tmp_path, f"{RATE}=1e-4,1e-3,1e-2", "method=grid")
    with pytest.raises(UserError, match="holds another search: its axes differs"):
        run(base, tmp_path, f"{RATE}=1e-4,1e-3,1e-1", "method=grid")
    base.model.embed_dim = 32
    with pytest.raises(UserError, match="holds another search: its config differs"):
        run(base, tmp_path, f"{RATE}=1e-4,1e-3,1e-2", "method=grid")
    base.model.embed_dim = 16
    (tmp_path / "search.log").write_text("nonsense\n{}\n")
    with pytest.raises(UserError, match=r"search.log is damaged; remove it"):
        run(base, tmp_path, f"{RATE}=1e-4,1e-3,1e-2", "method=grid")


@pytest.mark.parametrize(
    ("text", "points", "values", "log"),
    [
        ("1e-4..1e-2", 3, [1e-4, 1e-3, 1e-2], True),
        ("1e-4..5e-4", 3, [1e-4, 3e-4, 5e-4], False),
        ("1e-4..1e-2", 5, [1e-4, 0.000316, 1e-3, 0.00316, 1e-2], True),
        ("0..1", 3, [0, 0.5, 1], False),
        ("3e-4,1e-4", 5, [3e-4, 1e-4], False),
    ],
)
def test_values_of_a_range(text, points, values, log):
    (axis,) = read([f"{RATE}={text}"]).axes
    assert (axis.grid(points), axis.log) == (values, log)
    (axis,) = read(["train.batch_size=4..64"]).axes
    assert axis.grid(3) == [4, 16, 64]


def test_optuna_is_asked_for(base, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"--search needs Optuna: pip install 'gptjax\[search\]'"):
        Search(base, read([f"{RATE}=1e-4..1e-2"]), tmp_path)


def test_the_words_of_the_config_are_kept():
    argv = ["--search", "--config", "a.py:x", "--config.train.num_steps=5", "--noconfig.data.x", "--workdir=b"]
    assert ablate._config_words(argv) == ["--config", "a.py:x", "--config.train.num_steps=5", "--noconfig.data.x"]
    assert search.SETTINGS.keys() == {field for field in search.Request.__dataclass_fields__ if field != "axes"}


CONFIG = """
from gptjax.config import get_default


def get_config():
    config = get_default()
    config.tokenizer = "byte"
    config.data.update(source="text:{corpus}/*.txt", split_by="position", validation_fraction=0.1)
    config.model.update(num_layers=1, num_heads=2, embed_dim=16, context_length=16)
    config.mesh.data = 1
    config.train.update(num_steps=60, batch_size=4, checkpoint_every=5)
    config.evaluation.update(every=10, max_tokens=200)
    config.logging.update(every=1, samples=0, tensorboard=False)
    return config
"""


@pytest.mark.slow
def test_killed_half_way_no_trial_is_lost_or_run_twice(tiny_corpus, tmp_path):
    pytest.importorskip("optuna")
    (tmp_path / "config.py").write_text(CONFIG.format(corpus=tiny_corpus))
    command = [sys.executable, "-m", "gptjax.ablate", "--search", f"--config={tmp_path / 'config.py'}"]
    command += [f"--search.{RATE}=1e-4,1e-3,1e-2,1e-1", "--search.method=grid", "--workers=2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    process = subprocess.Popen([*command, f"--workdir={tmp_path / 'killed'}"], **pipes)
    cells, deadline = tmp_path / "killed" / "cells", time.monotonic() + 300
    while process.poll() is None and not any(cells.glob("*/report.html")) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()[1]
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    stamps = {path: path.stat().st_mtime_ns for path in cells.glob("*/report.html")}
    assert stamps
    tables = []
    for name in ("killed", "straight"):
        done = subprocess.run([*command, f"--workdir={tmp_path / name}"], capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr
        tables.append(sorted(line.split()[1:] for line in done.stdout.split("\n\n")[0].splitlines()))
    assert tables[0] == tables[1]
    assert len(tables[0]) == 5
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert len(list(cells.iterdir())) == 4
