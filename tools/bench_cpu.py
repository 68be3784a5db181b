"""The speed of gptjax on this machine: import, time to the first training step, and the training step itself.

  python tools/bench_cpu.py
  python tools/bench_cpu.py --data=input.txt --peer=nanoGPT --peer_python=venv-with-torch/bin/python

All numbers are for configs/shakespeare_char_cpu.py, run by the real command. If a checkout of nanoGPT is given as
peer, its model and ours run alternately on the same shapes, and the ratio of the medians is printed.
"""

import argparse
import json
import os
import random
import statistics
import string
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).parent.parent
CONFIG = REPOSITORY / "configs" / "shakespeare_char_cpu.py"
VERBS = "import gptjax.cli, gptjax.train, gptjax.evaluate, gptjax.prepare, gptjax.generate"
BATCH, CONTEXT = 12, 64
SKIPPED_LINES = 3  # first lines of metrics.jsonl, whose steps are slower

# Runs in the peer's interpreter: prints the milliseconds of each block of ten steps.
PEER = """
import sys, time
import torch
sys.path.insert(0, sys.argv[1])
from model import GPT, GPTConfig
blocks, vocabulary, batch, context = map(int, sys.argv[2:])
shape = dict(n_layer=4, n_head=4, n_embd=128, dropout=0.0, bias=False)
model = GPT(GPTConfig(block_size=context, vocab_size=vocabulary, **shape))
optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")
times = []
for _ in range(blocks):
    begin = time.perf_counter()
    for _ in range(10):
        tokens = torch.randint(vocabulary, (batch, context + 1))
        _, loss = model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    times.append(100 * (time.perf_counter() - begin))
print("times", *times)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a text file; default: 1 MB of random words")
    parser.add_argument("--steps", type=int, default=400, help="training steps in a round (default: 400)")
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds of ours and the peer (default: 3)")
    parser.add_argument("--peer", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("--peer_python", default=sys.executable, help="an interpreter that has torch")
    options = parser.parse_args()
    if options.steps < 10 * (SKIPPED_LINES + 1) or options.rounds < 1:
        parser.error(f"--steps must be at least {10 * (SKIPPED_LINES + 1)} and --rounds at least 1")

    with tempfile.TemporaryDirectory() as directory:
        directory = Path(directory)
        data = options.data.absolute() if options.data else random_text(directory / "input.txt")
        vocabulary = len(set(data.read_text(encoding="utf-8"))) + 1
        train(data, directory, steps=40)  # builds the token store and compiles
        first_steps, ours, theirs = [], [], []
        for _ in range(options.rounds):
            first_step, times = train(data, directory, steps=options.steps)
            first_steps.append(first_step)
            ours += times
            if options.peer:
                theirs += time_peer(options.peer_python, options.peer, options.steps // 10, vocabulary)

    table = Table("figure", "median", "target", title=f"gptjax on {os.cpu_count()} CPU cores", title_justify="left")
    table.add_row("start with all verbs imported", f"{statistics.median(import_times()):.2f} s", "2 s")
    table.add_row("command to first step, warm cache", f"{statistics.median(first_steps):.1f} s", "6 s")
    step = statistics.median(ours)
    table.add_row("training step", f"{step:.1f} ms", "")
    table.add_row("tokens per second", f"{1000 * BATCH * CONTEXT / step:,.0f}", "")
    if theirs:
        peer_step = statistics.median(theirs)
        table.add_row("training step of the peer", f"{peer_step:.1f} ms", "")
        table.add_row("ours / peer", f"{step / peer_step:.2f}", "1.00")
    Console().print(table)


def random_text(path: Path) -> Path:
    """1 MB of random words over the 65 characters of Shakespeare's plays."""
    generator = random.Random(0)
    letters = string.ascii_letters + "'-.,:;!?&$3"
    words = ["".join(generator.choices(letters, k=generator.randint(1, 8))) for _ in range(2000)]
    text = "".join(word + generator.choice("  \n") for word in generator.choices(words, k=200_000))
    path.write_text(letters + text[:1_000_000])
    return path


def train(data: Path, directory: Path, *, steps: int) -> tuple[float, list[float]]:
    """Seconds from the command to its first step, and milliseconds per step in each line of metrics.jsonl."""
    workdir = Path(tempfile.mkdtemp(dir=directory))
    command = [sys.executable, "-m", "gptjax.train", f"--config={CONFIG}", f"--workdir={workdir}"]
    command += [f"--config.data.source=text:{data}", f"--config.data.cache_dir={directory / 'cache'}"]
    command += [f"--config.train.num_steps={steps}", f"--config.evaluation.every={steps}"]
    command += ["--config.evaluation.max_tokens=10000", "--config.logging.samples=0"]
    begin = time.perf_counter()
    first_step, said = None, []
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        for line in process.stderr:
            said.append(line)
            if line.startswith("first step"):
                first_step = time.perf_counter() - begin
    if process.returncode or first_step is None:
        raise SystemExit("".join(said))
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return first_step, [1000 * x["step_time_s"] for x in lines if x["split"] == "train"][SKIPPED_LINES:]


def time_peer(python: str, checkout: Path, blocks: int, vocabulary: int) -> list[float]:
    """Milliseconds per step of the peer, in blocks of ten steps."""
    arguments = [str(checkout.absolute()), *map(str, (blocks, vocabulary, BATCH, CONTEXT))]
    result = subprocess.run([python, "-c", PEER, *arguments], capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"the peer failed:\n{result.stderr}")
    times = result.stdout.partition("times")[2].split()
    return [float(value) for value in times][SKIPPED_LINES:]


def import_times(repeats: int = 5) -> list[float]:
    """Seconds of a process that only imports the verbs."""
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-c", VERBS], check=True)
        seconds.append(time.perf_counter() - begin)
    return seconds


if __name__ == "__main__":
    main()
