"""Speed and memory of preparing a corpus: cleaning, exact deduplication, tokenisation, writing the store.

  python tools/bench_prepare.py --data='/data/text/**/*.txt' --tokenizer=hf:/data/gpt2_bpe
  python tools/bench_prepare.py --sizes=10,100,1000 --tokenizer=byte     # the memory slope

The speed is compared with `encode_batch` of the tokenizers library on all cores and the same documents. Both run
alternately, so that a busy machine slows both. CPU seconds are less noisy. The documents are lines of the data in
random order, so that no two are equal.
"""

import argparse
import glob
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROGRAM = """
import json, re, resource, sys, time
from pathlib import Path
from gptjax.data.building.build import build_store
from gptjax.data.sources.opening import open_source

def main(path, output, options):
    begin = time.perf_counter()
    build_store(open_source(f"jsonl:{path}"), output, **options)
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    cpu = sum(usage.ru_utime + usage.ru_stime for usage in (own, children))
    status = Path("/proc/self/status")  # ru_maxrss also counts the process that this one was forked from
    peak = int(re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1]) if status.exists() else own.ru_maxrss
    mib = [kib / 1024 for kib in (peak, children.ru_maxrss)]
    print(json.dumps({"seconds": time.perf_counter() - begin, "cpu": cpu, "mib": mib}))

if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
"""


def lines_of(pattern: str) -> list[str]:
    """The lines of the data files, or generated lines."""
    paths = glob.glob(pattern, recursive=True)  # noqa: PTH207 (Path.glob takes no absolute pattern)
    if paths:
        return [line for path in paths for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    source = random.Random(0)
    words = ["".join(source.choices("etaoinshrdlcumwfgypbvk", k=source.randint(1, 10))) for _ in range(20_000)]
    weights = [1 / (i + 1) for i in range(len(words))]
    return [" ".join(source.choices(words, weights, k=source.randint(5, 25))) + "." for _ in range(20_000)]


def write_corpus(path: Path, lines: list[str], num_bytes: int) -> list[str]:
    """Writes `num_bytes` of documents of about 3 kB each; returns the first 20 MB of them."""
    source, written, kept = random.Random(1), 0, []
    with path.open("w", encoding="utf-8") as file:
        while written < num_bytes:
            text, size = [], 0
            while size < 3000:
                text.append(source.choice(lines))
                size += len(text[-1].encode())
            document = "\n".join(text)
            file.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")
            if written < 20_000_000:
                kept.append(document)
            written += size
    return kept


def encode_batch(tokenizer: str, documents: list[str]) -> dict[str, float]:
    """Seconds and CPU seconds of `encode_batch` alone."""
    from gptjax.data.tokenization.tokenizer import build_tokenizer

    alone = build_tokenizer(tokenizer, documents)._tokenizer
    before, begin = os.times(), time.perf_counter()
    for start in range(0, len(documents), 1000):
        alone.encode_batch(documents[start : start + 1000], add_special_tokens=False)
    after = os.times()
    return {
        "seconds": time.perf_counter() - begin,
        "cpu": after.user + after.system - before.user - before.system,
    }


def prepare(path: Path, tokenizer: str, workers: int) -> dict:
    """One build in a separate process: seconds, CPU seconds, peak memory of the parent and of its largest child."""
    output = path.with_name("store")
    shutil.rmtree(output, ignore_errors=True)
    options = {"tokenizer": tokenizer, "cleaning": "plain", "deduplicate": "exact", "workers": workers}
    program = path.with_name("program.py")
    program.write_text(PROGRAM)
    command = [sys.executable, str(program), str(path), str(output), json.dumps(options)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="", help="glob of text files whose lines are used; default: generated lines")
    parser.add_argument("--tokenizer", default="byte", help="hf:DIR, or byte")
    parser.add_argument("--sizes", default="20", help="sizes of the corpus in MB, e.g. 10,100,1000")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--directory", default=None, help="directory for the corpus and the store")
    options = parser.parse_args()
    lines = lines_of(options.data)
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        for size in map(float, options.sizes.split(",")):
            path = Path(directory) / "corpus.jsonl"
            documents = write_corpus(path, lines, int(size * 1e6))
            compared = sum(len(document.encode()) for document in documents) / 1e6
            builds, alone = [], []
            for _ in range(options.repeats):
                builds.append(prepare(path, options.tokenizer, options.workers))
                if options.tokenizer.startswith("hf:"):
                    alone.append(encode_batch(options.tokenizer, documents))
            report(size, compared, builds, alone)


def report(size: float, compared: float, builds: list[dict], alone: list[dict]) -> None:
    def rate(runs: list[dict], megabytes: float, kind: str) -> float:
        return statistics.median(megabytes / run[kind] for run in runs)

    parent, child = (max(build["mib"][i] for build in builds) for i in (0, 1))
    print(
        f"{size:g} MB: prepare {rate(builds, size, 'seconds'):.2f} MB/s, "
        f"{rate(builds, size, 'cpu'):.2f} MB per CPU second; "
        f"peak {parent:.0f} MiB in the parent, {child:.0f} MiB in the largest worker",
        flush=True,
    )
    if alone:
        print(
            f"      encode_batch alone {rate(alone, compared, 'seconds'):.2f} MB/s, "
            f"{rate(alone, compared, 'cpu'):.2f} MB per CPU second; ratio "
            f"{rate(builds, size, 'seconds') / rate(alone, compared, 'seconds'):.2f} by the clock, "
            f"{rate(builds, size, 'cpu') / rate(alone, compared, 'cpu'):.2f} by CPU seconds",
            flush=True,
        )


if __name__ == "__main__":
    main()
