"""Start a training run on other machines: Slurm, Cloud TPU VMs, GKE or SkyPilot.

  python -m gptjax.launch slurm --nodes=2 --gpus_per_node=8 --config=configs/gpt2_124m.py --workdir=/shared/runs/a
  python -m gptjax.launch tpu create --name=a --zone=us-west4-a --topology=v5e:4x4 (setup, describe, delete)
  python -m gptjax.launch tpu train --name=a --zone=us-west4-a --topology=v5e:4x4 --config=C --workdir=gs://B/runs/a
  python -m gptjax.launch tpu keep --name=a --zone=us-west4-a --topology=v5e:4x4 --spot --config=C --workdir=gs://B/runs/a
  python -m gptjax.launch gke --name=a --topology=v5e:4x4 --image=IMAGE --config=C --workdir=gs://B/runs/a
  python -m gptjax.launch sky --nodes=2 --accelerators=H100:8 --spot --config=C --workdir=gs://B/runs/a
  python -m gptjax.launch managed --config=C      in a container of Vertex AI, SageMaker or ModelArts

Arguments after `--` are passed to `gptjax train` unchanged, e.g. -- --config.train.num_steps=500. With --dry_run the
script, the commands or the manifest are only printed. All processes of a run share one work directory: on a file system
that every machine has, or in a bucket, gs://BUCKET/PATH. On Cloud TPU and GKE, --bucket=B --workdir=PATH mounts the
bucket instead (with hierarchical namespace, whose renames are atomic). The same command again continues the run.
"""

import argparse

from gptjax import cli
from gptjax.launchers import gke, managed, sky, slurm, tpu
from gptjax.launchers.arguments import Parser

ENGINES = {"slurm": slurm, "tpu": tpu, "gke": gke, "sky": sky, "managed": managed}


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options; `.arguments` are those after `--`, `.engine` is the launcher's module. Raises UserError."""
    parser = Parser(prog="gptjax launch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    places = parser.add_subparsers(dest="place", required=True)
    for name, engine in ENGINES.items():
        one = places.add_parser(name, description=engine.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        one.set_defaults(engine=engine)
        engine.define(one)
    own, rest = arguments, []
    if "--" in arguments:
        own, rest = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
    options = parser.parse_args(own)
    options.arguments = rest
    return options


def main(argv: list[str]) -> None:
    options = parse(argv[1:])
    options.engine.run(options)


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
