"""Makes a reference band, with which the report of a run tells whether its loss is normal.

for seed in 0 1 2; do gptjax train --config=configs/quickstart.py --workdir=runs/q$seed --config.seed=$seed; done
python tools/make_band.py runs/q0 runs/q1 runs/q2 --name=quickstart --about='seeds 0-2, two CPU cores, 2026-11-20'
"""

import argparse
import json
from pathlib import Path

from gptjax.reporting import bands


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="finished work directories that differ only in their seed")
    parser.add_argument("--name", required=True, help="name of the config")
    parser.add_argument("--about", required=True, help="seeds, machine, date")
    options = parser.parse_args()
    identities, curves = set(), []
    for run in options.runs:
        config, manifest = (json.loads((run / name).read_text()) for name in ("config.json", "manifest.json"))
        identities.add(bands.identity(config, manifest["data"]))
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses = {line["step"]: line["loss"] for line in lines if line["split"] == "validation"}
        curves.append(sorted(losses.items()))
    if len(identities) != 1:
        parser.error("the runs differ in more than their seed")
    band = {"about": options.about, "identity": identities.pop(), **bands.fit(curves)}
    path = bands.DIRECTORY / f"{options.name}.json"
    path.write_text(json.dumps(band) + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
