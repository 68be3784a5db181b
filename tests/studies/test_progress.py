"""What a study prints while it runs: a table on a terminal, a few lines elsewhere."""

import io
import json

import pytest
from rich.console import Console

from gptjax.studies.cell import Cell
from gptjax.studies.progress import Progress


@pytest.fixture
def cells(tiny_config, tmp_path) -> list[Cell]:
    config = tiny_config.copy_and_resolve_references()
    places = [tmp_path / f"arm{i}" for i in range(3)]
    return [Cell(f"arm{i}", 0, config, config, str(i), place, num_steps=100) for i, place in enumerate(places)]


def at(cell: Cell, step: int) -> dict[str, str]:
    cell.workdir.mkdir(exist_ok=True)
    lines = [{"step": s, "split": "train", "loss": 5 - s / 100} for s in range(1, step + 1)]
    lines += [{"step": 100, "split": "validation", "loss": 4.25}] * (step == 100)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (cell.workdir / "metrics.jsonl").write_text(text + '{"step": 1')  # a line that is being written
    return {cell.name: f"step {step} of 100"}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def progress(cells, *, terminal: bool, others=(), later=0) -> tuple[Progress, Clock, io.StringIO]:
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, force_terminal=terminal, width=100, highlight=False, color_system=None)
    return Progress(cells, others, later=later, console=console, clock=clock), clock, out


def test_a_table_of_the_cells_that_run(cells):
    shown, clock, _ = progress(cells, terminal=True)
    shown(at(cells[0], 0) | at(cells[1], 20))
    clock.now = 10
    shown(at(cells[0], 20) | at(cells[1], 30))
    table = shown.table()
    columns = {str(column.header): list(column.cells) for column in table.columns}
    assert columns == {
        "cell": ["arm0-seed0", "arm1-seed0"],
        "step": ["20/100", "30/100"],
        "loss": ["4.8000", "4.7000"],
        "steps/s": ["2.00", "1.00"],  # a cell that is continued at step 20 has done 10
        "left": ["40s", "1m 10s"],
    }
    assert shown.left == pytest.approx((80 + 70 + 100) / 3), "the third cell waits"
    assert table.title == "0 done, 3 missing, 0 diverged; about 1m 23s left"


def test_elsewhere_a_line_at_the_begin_at_ends_and_one_a_minute(cells):
    shown, clock, out = progress(cells, terminal=False, later=2)
    shown.start()
    for second in range(100):
        clock.now = float(second)
        shown(at(cells[0], second) | {cells[1].name: "step 0 of 100"})
    at(cells[0], 100)
    shown({cells[0].name: "done"})
    shown({cells[1].name: "failed: the training loss is nan at step 3"})
    shown({cells[2].name: "no result: failed: the disk is full (log.txt)"})
    shown.stop()
    begin, minute, *ends = out.getvalue().splitlines()
    assert begin == "3 cells to run; 0 done, 5 missing, 0 diverged"
    assert minute.startswith(
        "arm0-seed0 step 60 of 100, arm1-seed0 step 0 of 100; 0 done, 5 missing, 0 diverged; about"
    )
    assert ends[0].startswith("arm0-seed0: done, loss 4.2500 (1m 39s); 1 done, 4 missing, 0 diverged")
    assert ends[1].startswith(
        "arm1-seed0: failed: the training loss is nan at step 3 (1m 39s); 1 done, 3 missing, 1 div"
    )
    assert ends[2].startswith("arm2-seed0: no result: failed: the disk is full (log.txt)")
    assert "2 missing, 1 diverged, 1 without a result" in ends[2]
    assert len(ends) == 3


def test_what_has_ended_before_is_counted(cells):
    at(cells[0], 100)
    cells[1].workdir.mkdir()
    cells[1].fail("failed: the training loss is nan at step 3")
    shown, *_ = progress(cells[2:], terminal=False, others=cells[:2])
    assert shown.counts() == "1 done, 1 missing, 1 diverged"


def test_on_a_terminal_the_table_is_drawn_and_removed(cells):
    shown, clock, out = progress(cells, terminal=True)
    shown.start()
    shown(at(cells[0], 0))
    clock.now = 2
    shown(at(cells[0], 10))
    shown(at(cells[0], 100) and {cells[0].name: "done"})
    shown.stop()
    text = out.getvalue()
    assert "10/100" in text and "arm0-seed0: done, loss 4.2500" in text


def test_a_terminal_that_is_gone_does_not_end_the_study(cells):
    class Gone(io.StringIO):
        def write(self, text):
            raise OSError("no terminal")

    for terminal in (True, False):
        shown = Progress(cells, console=Console(file=Gone(), force_terminal=terminal), clock=Clock())
        shown.start()
        shown({cells[0].name: "done"})
        shown.stop()
        assert shown.done == 1


def test_the_end_of_a_long_file_is_enough(cells, monkeypatch):
    at(cells[0], 100)
    monkeypatch.setattr("gptjax.studies.cell.TAIL", 400)
    assert cells[0].last_line("train")["step"] == cells[0].step() == 100
    assert cells[1].last_line("train") == {}
