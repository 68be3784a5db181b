"""The time to read a batch of a token store, as windows of text and as packed dialogues.

  python tools/bench_stream.py
  python tools/bench_stream.py --rows=512 --context=1024 --tokens=50000000

The documents have 20 to 1,000 random tokens; after the first pass they are in the page cache. The numbers are medians
over the batches. CPU time is also given, because other programs do not change it.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from gptjax.data.pipeline.batches import Batches
from gptjax.data.pipeline.packing import PackedBatches
from gptjax.data.store.shards import DOCUMENTS, TokenSplit

VOCABULARY, EOT = 50_257, 50_256


def write_split(directory: Path, num_tokens: int, *, mask: bool) -> TokenSplit:
    """A split of random documents; with a mask, the second half of each document has loss."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, EOT, num_tokens, dtype=np.uint16)
    lengths = rng.integers(20, 1000, num_tokens // 400)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    starts = starts[starts < num_tokens - 20]
    tokens[starts] = EOT
    directory.mkdir()
    tokens.tofile(directory / "tokens-00000.bin")
    np.save(directory / DOCUMENTS, np.stack([starts, np.diff(np.append(starts, num_tokens)) * 4], axis=1))
    shard = {"file": "tokens-00000.bin", "tokens": num_tokens}
    if mask:
        ends = np.append(starts[1:], num_tokens)
        place = np.arange(num_tokens) - np.repeat(starts, ends - starts)
        (place >= np.repeat((ends - starts) // 2, ends - starts)).astype(np.uint8).tofile(directory / "mask-00000.bin")
        shard["mask"] = "mask-00000.bin"
    about = {"tokens": num_tokens, "documents": len(starts), "bytes": 4 * num_tokens, "characters": 4 * num_tokens}
    return TokenSplit(directory, "train", "uint16", about | {"shards": [shard]})


def measure(batches: Batches | PackedBatches, count: int) -> tuple[float, float]:
    """Milliseconds per batch, by the clock and in CPU time, after one pass that warms the page cache."""
    clock, cpu = [], []
    for repeat in range(2):
        for step in range(count):
            begin, begin_cpu = time.perf_counter(), time.process_time()
            batches[step]
            if repeat:
                clock.append(1000 * (time.perf_counter() - begin))
                cpu.append(1000 * (time.process_time() - begin_cpu))
    return statistics.median(clock), statistics.median(cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=50_000_000)
    parser.add_argument("--batches", type=int, default=40)
    args = parser.parse_args()
    shape = {"context_length": args.context, "batch_size": args.rows, "seed": 0}
    table = Table("batches", "ms", "ms of CPU", "target", title=f"{args.rows} x {args.context} tokens")
    with tempfile.TemporaryDirectory() as directory:
        text = write_split(Path(directory, "text"), args.tokens, mask=False)
        dialogues = write_split(Path(directory, "dialogues"), args.tokens, mask=True)
        for name, batches in (("windows", Batches(text, **shape)), ("packed", PackedBatches(dialogues, **shape))):
            clock, cpu = measure(batches, args.batches)
            table.add_row(name, f"{clock:.1f}", f"{cpu:.1f}", "10")
    Console().print(table)


if __name__ == "__main__":
    main()
