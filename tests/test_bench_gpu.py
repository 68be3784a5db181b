"""The GPU benchmark runs at toy size on a CPU, so that mistakes show before GPU time is paid for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parent.parent / "tools" / "bench_gpu.py"


@pytest.mark.slow
def test_every_row_of_training_is_measured(tmp_path, tiny_corpus):
    text = tmp_path / "input.txt"
    text.write_text("".join(path.read_text() for path in sorted(tiny_corpus.glob("*.txt"))) * 3)
    command = [
        sys.executable,
        TOOL,
        "--tiny",
        "--rows=check,G2,G3,G1",
        f"--output={tmp_path / 'out'}",
        f"--data={text}",
    ]
    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}  # not eight devices
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out" / "bench_gpu.json").read_text())["rows"]
    failed = {row["what"]: row["failed"] for row in rows if "failed" in row}
    assert set(failed) <= {"peer: transformers GPT-2, torch.compile, SDPA"}, failed
    check, first, second, *others = rows
    assert first["equal arrays"] == second["equal arrays"] == "20 of 20"
    assert check["greedy tokens equal to the full forward"] == "90 of 90"
    assert all(row["tokens_per_second"] > 0 for row in others if row["row"] in ("G2", "G3") and "failed" not in row)
