"""Memory does not grow with the corpus."""

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parent.parent
BLOCK_BYTES = 10_000_000
BLOCKS = {"small": 1, "large": 40, "largest": 100}
# Runs a command and prints the largest resident set of its process, in KiB.
MEASURE = """
import resource, subprocess, sys

subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> dict[str, Path]:
    """Text files of 10 MB, 400 MB and 1 GB, of random words."""
    directory = tmp_path_factory.mktemp("corpora")
    generator = random.Random(0)
    words = ["".join(generator.choices("etaoinshrdlu", k=generator.randint(2, 9))) for _ in range(20_000)]
    blocks = [" ".join(generator.choices(words, k=BLOCK_BYTES // 5)).encode()[:BLOCK_BYTES] for _ in range(4)]
    for name, count in BLOCKS.items():
        with (directory / name).open("wb") as file:
            for index in range(count):
                file.write(blocks[index % len(blocks)])
    yield {name: directory / name for name in BLOCKS}
    for name in BLOCKS:
        (directory / name).unlink()


def peak_mebibytes(corpus: Path, tokenizer: str, directory: Path) -> float:
    """Peak memory of a process that builds the token store and trains on it for a few steps."""
    command = [
        *(sys.executable, "-c", MEASURE, sys.executable, "-m", "gptjax.train"),
        *("--config=configs/quickstart.py:runlocal", f"--workdir={directory / 'run'}"),
        *(f"--config.data.source=text:{corpus}", f"--config.data.cache_dir={directory / 'cache'}"),
        *(f"--config.tokenizer={tokenizer}", "--config.logging.samples=0"),
    ]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["XLA_FLAGS"] = " ".join(re.findall(r"--xla_cpu_max_isa=\S+", os.environ["XLA_FLAGS"]))
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return int(result.stdout) / 1024


@pytest.mark.parametrize(("tokenizer", "name"), [("byte", "largest"), ("bpe:512", "large")])
def test_training_on_so_much_more_text_takes_no_more_memory(corpora, tokenizer, name, tmp_path):
    small, large = (peak_mebibytes(corpora[size], tokenizer, tmp_path / size) for size in ("small", name))
    assert large - small < 200, f"{small:.0f} MiB for 10 MB, {large:.0f} MiB for {10 * BLOCKS[name]} MB"
