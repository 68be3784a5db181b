"""report.md and report.html have the same facts; times are only in the page and in timing.csv."""

import csv
import html
import json
import math
import re

import pytest

from gptjax.studies import facts, noise, page, report, timing
from gptjax.studies.study import Grid

RATE = "optimizer.learning_rate"
COMMAND = ["--study=rates.py:smoke", "--study.seeds=2", "--workdir=/somewhere", "--report", "--workers=3"]


@pytest.fixture
def timed(made):
    """The slow arm has the lower loss, 3 against 4, plus 1 / steps; it takes 16 seconds, the quick one 8."""
    return made(quick={RATE: 1e-2}, slow={RATE: 1e-3}, wild={RATE: 1e3, "optimizer.clip_norm": 0.0})


def test_arms_are_compared_at_the_seconds_of_the_fastest(timed):
    limit, fastest, arms = timing.matched(timed)
    assert (limit, fastest) == (8, "quick")
    quick, slow = arms
    assert (quick.seconds, quick.share, quick.cells) == (8, 1, 2)
    assert quick.reached == pytest.approx(4 + 0.05 + 1 / 8)
    assert (slow.seconds, slow.share, slow.tokens_per_second) == (16, 0.5, 32)
    assert slow.reached == pytest.approx(3 + 0.055 + 1 / 4), "at 8 of its 16 seconds it has done 4 of 8 steps"
    (cell, *_) = [one for one in timing.cells(timed) if one.cell.arm == "slow"]
    assert cell.score_at(12) == pytest.approx(3 + (1 / 4 + 1 / 8) / 2), "in proportion between two validations"
    assert math.isnan(cell.score_at(7.9)), "nothing is known before the first"
    report.write(timed)
    rows = list(csv.DictReader((timed.workdir / "timing.csv").open()))
    assert [(row["arm"], row["seconds"], row["matched_seconds"]) for row in rows[::2]] == [
        ("quick", "8", "8"),
        ("slow", "16", "8"),
    ]


def test_the_page_says_what_was_packed(timed):
    for cell in timed.cells:
        if cell.arm == "slow":
            (cell.workdir / "packed.txt").write_text("4\n")
    assert [arm.together for arm in timing.matched(timed)[2]] == [1, 4]
    rows = {row[0]: row for row in page.wall_clock(timed).rows}
    assert rows["quick"][1:4] == ("8.0", "no", "8.0")
    assert rows["slow"][1:4] == ("16.0", "4", "4.0")


def test_the_page_and_the_text_have_the_same_facts(timed):
    (timed.workdir / "noise.json").write_text(
        json.dumps(
            {"sigma": 0.0123, "low": 0.01, "high": 0.02, "n": 3, "seeds": [0, 1, 2]}
            | timed._noise_wanted(timed.noise_cells())
        )
    )
    text = report.write(timed, COMMAND).read_text()
    source = (timed.workdir / "report.html").read_text()
    page = html.unescape(re.sub(r"<[^>]*>", " ", source))
    (verdict,) = re.findall(r"\*\*slow < quick: (\w+)\*\*", text)
    assert verdict == "supported"
    for fact in (
        "a paper",
        "supported",
        facts.scale(timed, facts.findings(timed)[0][0])[3:],
        "power 100%",
        "one run of quick deviates by 0.0123 in loss from seed to seed",
        "clipping",
        "failed: the training loss is nan at step 4",
        "python -m gptjax.ablate --study=rates.py:smoke --study.seeds=2 --workdir=runs/rates",
        f"{timed.arms['slow'].parameters:,}",
        f"sha256 of the modules {timed.code[:12]}",
        "loss (nats per token) of the last validation",
        timed.cells[0].workdir.name,
    ):
        assert fact in text and fact in page, fact
    assert "loss at 8.0 s" in page and "8.0 s" not in text, "no time of a clock is in report.md"
    assert not re.search(r"""<script|(src|href)=["']?(http|//)|@import|url\(['"]?http""", source), "it needs no network"


def test_the_page_is_made_anew_from_the_same_files(timed):
    report.write(timed, COMMAND)
    names = ("report.md", "report.html", "timing.csv", "results.csv")
    first = {name: (timed.workdir / name).read_bytes() for name in names}
    report.write(timed, COMMAND)
    assert first == {name: (timed.workdir / name).read_bytes() for name in names}


def test_what_a_person_wrote_is_text(timed):
    timed.study.question = timed.study.source = "<script>alert('&')</script>"
    report.write(timed)
    assert "<script" not in (timed.workdir / "report.html").read_text()


def test_another_clock_changes_neither_the_text_nor_the_table(timed):
    """As after a kill and a restart, or on another machine."""
    report.write(timed, COMMAND)
    before = [(timed.workdir / name).read_bytes() for name in ("report.md", "results.csv")]
    for cell in timed.cells:
        path = cell.workdir / "metrics.jsonl"
        path.write_text(re.sub(r'"(seconds/step|tokens_per_second)": ', r'"\1": 3', path.read_text()))
    report.write(timed, COMMAND)
    assert [(timed.workdir / name).read_bytes() for name in ("report.md", "results.csv")] == before


def test_an_optimum_at_the_edge_gives_no_verdict(made):
    grids = {"low": Grid(1e-3, 1e-2, 1e-1), "inside": Grid(1e-4, 1e-3, 1e-2)}
    arms = {
        name: {RATE: grid, "optimizer.name": kind}
        for (name, grid), kind in zip(grids.items(), ("adamw", "lion"), strict=True)
    }
    plan = made(**arms)
    report.write(plan)
    page = (plan.workdir / "report.html").read_text()
    assert '<span class="verdict inconclusive">inconclusive</span>' in page
    assert "the optimum of low is at the edge of its grid" in page
    assert "the best optimizer.learning_rate of low is 0.001, the smallest that was tried" in page


def test_a_study_that_has_not_begun_has_a_page(made, monkeypatch):
    plan = made()
    for cell in plan.cells:
        for path in cell.workdir.iterdir():
            path.unlink()
    assert "cells are missing" in report.write(plan).read_text()
    assert "0 of 8 cells have ended" in (plan.workdir / "report.html").read_text()


def test_noise_of_another_arm_is_not_shown(timed):
    stored = timed._noise_wanted(timed.noise_cells()) | {"arm": "slow"}
    found = noise.Noise(**stored, sigma=0.5, low=0.1, high=1.0, n=3, seeds=(0, 1, 2))
    noise.write(timed.workdir, found)
    assert "noise sigma" not in report.text(timed) and "is not measured" in report.text(timed)
