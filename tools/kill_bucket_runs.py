"""Kills a run in a bucket at random times, and stops the store, until the run finishes; then compares its losses.

  python tools/kill_bucket_runs.py --kills=20 --seed=0
  python tools/kill_bucket_runs.py --kills=0 --outage=60 --verbs=train,prepare,ablate,serve

The store is that of the tests, on this machine. In every second life of the run the store stops for at most --outage
seconds, before the process is killed with SIGKILL. Prints one line per kill; the exit status is 1 if the losses are not
bit-identical to those of an undisturbed run.

With --verbs only the store is stopped: for --outage seconds it does not answer, and in a second round it is gone and
comes back at the same port with its objects, while a run trains, evaluates and saves, a corpus is prepared, a study
runs, and a server looks for better checkpoints. A command that ends with status 1 is then run again.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
sys.path.insert(0, str(REPOSITORY / "tests"))
from bucket_runs import CONFIG, environment, losses  # noqa: E402
from object_store import ObjectStore  # noqa: E402

BUCKET, RUN = "kills", "run"
STUDY = """
from pathlib import Path
from gptjax.studies.study import Study

def get_study(arg=""):
    names = {{}}
    exec(Path({config!r}).read_text(), names)
    arms = {{"same": {{}}, "other": {{"model.dropout": 0.0}}}}
    return Study(question="?", base=names["get_config"](), arms=arms, claims=(), seeds=1)
"""


def start(words: list[str], errors: Path) -> subprocess.Popen:
    """Starts `gptjax VERB ...`."""
    with errors.open("a") as file:
        file.truncate(0)
        return subprocess.Popen([sys.executable, "-m", "gptjax", *words], cwd=REPOSITORY, stdout=file, stderr=file)


def live(process: subprocess.Popen, errors: Path, store: ObjectStore, generator: random.Random, outage: float) -> bool:
    """Kills the process a random time after its first step. Returns False if it had ended by itself."""
    while process.poll() is None and "first step after" not in errors.read_text():
        time.sleep(0.02)
    time.sleep(generator.uniform(0, 2))
    if outage:
        store.running.clear()
        time.sleep(generator.uniform(0, outage))
        if generator.random() < 0.5:  # the store is running again before the process is killed
            store.running.set()
            time.sleep(generator.uniform(0, 1))
    alive = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    store.running.set()
    return alive


class Outages:
    """Commands whose store fails for a while."""

    def __init__(self, folder: Path, config: Path, store: ObjectStore, seconds: float):
        self._folder, self._config, self._store, self._seconds = folder, config, store, seconds
        self._errors = folder / "errors"
        self.undisturbed = losses((folder / "undisturbed" / "metrics.jsonl").read_text())

    def _out(self, kind: str) -> None:
        self._store.running.clear() if kind == "silent" else self._store.stop()
        time.sleep(self._seconds)
        self._store.running.set() if kind == "silent" else self._store.start()

    def _through(self, kind: str, words: list[str], ready: Callable[[], bool]) -> str:
        """Runs a command, stops the store once the command is ready, and describes the outcome."""
        process = start(words, self._errors)
        while process.poll() is None and not ready():
            time.sleep(0.02)
        begin, alive = time.monotonic(), process.poll() is None
        self._out(kind)
        status, told = process.wait(), []
        while status == 1 and len(told) < 3:
            told.append(f"status 1 ({self._errors.read_text().strip().splitlines()[-1][:200]})")
            status = start(words, self._errors).wait()
        waits = sum("does not answer" in line for line in self._errors.read_text().splitlines())
        how = f"ended with {', '.join(told)}, and the same command went on" if told else f"went on, told {waits} times"
        took = time.monotonic() - begin
        return f"{how}; status {status}, {took:.0f} s after it began{'' if alive else '; IT HAD ENDED BEFORE'}"

    def _objects(self, place: str) -> dict[str, bytes]:
        found = self._store.buckets[BUCKET]
        return {name[len(place) + 1 :]: found[name][0] for name in found if name.startswith(f"{place}/")}

    def train(self, kind: str) -> tuple[str, bool]:
        place = f"train-{kind}"
        words = ["train", f"--config={self._config}", f"--workdir=gs://{BUCKET}/{place}"]
        told = self._through(kind, words, lambda: "checkpoints/10/" in str(list(self._objects(place))))
        return told, losses(self._objects(place)["metrics.jsonl"].decode()) == self.undisturbed

    def prepare(self, kind: str) -> tuple[str, bool]:
        place, disk = f"prepare-{kind}", self._folder / "store"
        text = (self._folder / "a.txt").read_bytes()
        self._store.buckets[BUCKET] |= {f"corpus/{n}.txt": (text + b"%d" % n, n, time.time()) for n in range(40)}
        words = ["prepare", f"--source=text:gs://{BUCKET}/corpus/*.txt", "--workers=1", "--tokenizer=byte"]
        if not disk.exists() and start([*words, f"--output={disk}"], self._errors).wait():
            return self._errors.read_text(), False
        before = self._store.generation
        words = [*words, f"--output=gs://{BUCKET}/{place}"]
        told = self._through(kind, words, lambda: self._store.generation > before)
        found = self._objects(place)
        return told, all(found.get(path.name) == path.read_bytes() for path in disk.glob("*.bin"))

    def ablate(self, kind: str) -> tuple[str, bool]:
        place, study = f"study-{kind}", self._folder / "study.py"
        study.write_text(STUDY.format(config=str(self._config)))
        words = ["ablate", f"--study={study}", f"--workdir=gs://{BUCKET}/{place}"]
        told = self._through(kind, words, lambda: "checkpoints/10/" in str(list(self._objects(place))))
        found = self._objects(place)
        cell = next(name for name in found if name.startswith("cells/same-") and name.endswith("metrics.jsonl"))
        return told, losses(found[cell].decode()) == self.undisturbed and "results.csv" in found

    def serve(self, kind: str) -> tuple[str, bool]:
        """A server answers while the store is down, and then loads the checkpoint that was written meanwhile."""
        source, place = self._objects("train-silent"), f"served-{kind}"
        steps = sorted({int(name.split("/")[1]) for name in source if name.startswith("checkpoints/")})
        newest = {name for name in source if name.startswith(f"checkpoints/{steps[-1]}/")}

        def put(names: set[str]) -> None:
            now = time.time()
            self._store.buckets[BUCKET] |= {f"{place}/{name}": (source[name], int(now), now) for name in names}

        put(source.keys() - newest)
        process = start(["serve", f"--model=m=gs://{BUCKET}/{place}", "--port=0", "--reload=1"], self._errors)
        while process.poll() is None and "page: " not in self._errors.read_text():
            time.sleep(0.1)
        address = next(line for line in self._errors.read_text().splitlines() if line.startswith("page: "))[6:]
        body = json.dumps({"model": "m", "prompt": "a cat", "max_tokens": 2}).encode()
        request = urllib.request.Request(f"{address}/v1/completions", body, {"Content-Type": "application/json"})
        self._store.running.clear() if kind == "silent" else self._store.stop()
        put(newest)
        end, answers = time.monotonic() + self._seconds, 0
        while time.monotonic() < end:
            answers += urllib.request.urlopen(request, timeout=60).status == 200
            time.sleep(1)
        self._store.running.set() if kind == "silent" else self._store.start()
        back = time.monotonic()
        swapped = f"checkpoints/{steps[-1]} replaces"
        while process.poll() is None and swapped not in self._errors.read_text() and time.monotonic() < back + 300:
            time.sleep(0.1)
        took, status = time.monotonic() - back, process.poll()
        process.terminate()
        process.wait()
        told = f"{answers} requests answered meanwhile, the new checkpoint served {took:.0f} s after the store was back"
        return told, status is None and swapped in self._errors.read_text()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--outage", type=float, default=2.0, help="most seconds for which the store stops")
    parser.add_argument("--verbs", default="", help="verbs whose store is stopped: train,prepare,ablate,serve")
    options = parser.parse_args()
    generator = random.Random(options.seed)
    store = ObjectStore(BUCKET)
    os.environ |= environment(store)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["GPTJAX_CACHE"] = str(folder / "cache")
        (folder / "a.txt").write_text("".join(f"{n} cats sat on {n * n} mats.\n" for n in range(500)))
        config, errors = folder / "config.py", folder / "errors"
        config.write_text(CONFIG.format(folder=folder, steps=options.steps, save=10, evaluate=50))

        def train(workdir: str) -> subprocess.Popen:
            return start(["train", f"--config={config}", f"--workdir={workdir}"], errors)

        if train(str(folder / "undisturbed")).wait():
            print(errors.read_text())
            return 1
        good = True
        outages = Outages(folder, config, store, options.outage)
        for verb in filter(None, options.verbs.split(",")):
            for kind in ("silent", "gone"):
                told, same = getattr(outages, verb)(kind)
                good &= same
                print(f"{verb}, the store {kind}: {told}; {'the same result' if same else 'NOT THE SAME'}", flush=True)
        if not options.kills:
            return 0 if good else 1
        killed = 0
        while killed < options.kills:
            process = train(f"gs://{BUCKET}/{RUN}")
            if not live(process, errors, store, generator, options.outage if killed % 2 == 1 else 0.0):
                break
            killed += 1
            said = [line for line in errors.read_text().splitlines() if "continuing at step" in line]
            print(f"kill {killed}: {said[-1] if said else 'from the beginning'}", flush=True)
        if killed < options.kills:
            print(f"ended by itself after {killed} kills; raise --steps")
        if train(f"gs://{BUCKET}/{RUN}").wait():
            print(errors.read_text())
            return 1
        ours = losses(store.buckets[BUCKET][f"{RUN}/metrics.jsonl"][0].decode())
        same = ours == outages.undisturbed
        print(f"{len(ours)} losses after {killed} kills: {'bit-identical' if same else 'NOT THE SAME'}")
    return 0 if good and same and killed == options.kills else 1


if __name__ == "__main__":
    raise SystemExit(main())
