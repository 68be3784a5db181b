"""Kills a run in a bucket at random times, and stops the store, until the run has ended; its losses are then compared.

  python tools/kill_bucket_runs.py --kills=20 --seed=0

The store is that of the tests, on this machine. In every second life the store stops for a moment before the process is
killed with SIGKILL. Prints one line a kill, and ends with status 1 where a loss is not bitwise that of the run that
nobody disturbed.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
sys.path.insert(0, str(REPOSITORY / "tests"))
from bucket_runs import CONFIG, losses  # noqa: E402
from object_store import ObjectStore  # noqa: E402

BUCKET, RUN = "kills", "run"


def start(config: Path, workdir: str, errors: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "gptjax.train", f"--config={config}", f"--workdir={workdir}"]
    with errors.open("w") as file:
        return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=file)


def live(process: subprocess.Popen, errors: Path, store: ObjectStore, generator: random.Random, stop: bool) -> bool:
    """Kills the process a random time after its first step. Returns whether it was there to be killed."""
    while process.poll() is None and "first step after" not in errors.read_text():
        time.sleep(0.02)
    time.sleep(generator.uniform(0, 2))
    if stop:
        store.running.clear()
        time.sleep(generator.uniform(0, 2))
        if generator.random() < 0.5:  # the store is back before the process is killed
            store.running.set()
            time.sleep(generator.uniform(0, 1))
    alive = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    store.running.set()
    return alive


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1000)
    options = parser.parse_args()
    generator = random.Random(options.seed)
    store = ObjectStore(BUCKET)
    os.environ |= {"STORAGE_EMULATOR_HOST": store.url, "TENSORSTORE_GCS_HTTP_URL": store.url, "JAX_PLATFORMS": "cpu"}
    os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # asks for the kind of a bucket by gRPC
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["GPTJAX_CACHE"] = str(folder / "cache")
        (folder / "a.txt").write_text("".join(f"{n} cats sat on {n * n} mats.\n" for n in range(500)))
        config, errors = folder / "config.py", folder / "errors"
        config.write_text(CONFIG.format(folder=folder, steps=options.steps))
        if start(config, str(folder / "undisturbed"), errors).wait():
            print(errors.read_text())
            return 1
        killed = 0
        while killed < options.kills:
            process = start(config, f"gs://{BUCKET}/{RUN}", errors)
            if not live(process, errors, store, generator, stop=killed % 2 == 1):
                break
            killed += 1
            said = [line for line in errors.read_text().splitlines() if "continuing at step" in line]
            print(f"kill {killed}: {said[-1] if said else 'from the beginning'}", flush=True)
        if killed < options.kills:
            print(f"ended by itself after {killed} kills; give it more --steps")
        if start(config, f"gs://{BUCKET}/{RUN}", errors).wait():
            print(errors.read_text())
            return 1
        ours = losses(store.buckets[BUCKET][f"{RUN}/metrics.jsonl"][0].decode())
        same = ours == losses((folder / "undisturbed" / "metrics.jsonl").read_text())
        print(f"{len(ours)} losses after {killed} kills: {'bitwise the same' if same else 'NOT THE SAME'}")
    return 0 if same and killed == options.kills else 1


if __name__ == "__main__":
    raise SystemExit(main())
