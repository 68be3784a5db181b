"""Memory of train steps on TPU slices according to the TPU compiler, compared with MaxText for the same work.

  python tools/plan_targets.py                      # all rows, one compilation after the other
  python tools/plan_targets.py --rows=T1a,T1d --output=targets.json

AdamW, float32 parameters and moments, bfloat16 compute, scanned layers, vocabulary 50,304. GiB per chip: temporary +
arguments. MaxText 0.2.5 was measured with its own train_compile, jax 0.12.0 and libtpu 0.0.51.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path

from gptjax import config as config_lib
from gptjax.planning import chips, tpu
from gptjax.planning.facts import Facts
from gptjax.planning.roofline import roofline


@dataclasses.dataclass(frozen=True)
class Target:
    """One row. `peer`: the GiB of MaxText (temporary, arguments) by variant; ours should be below `must`."""

    name: str
    topology: str
    model: dict
    mesh: dict
    rows_a_chip: float
    peer: str
    must: float
    stretch: float
    packed: bool = False
    options: dict = dataclasses.field(default_factory=dict)


def gpt(layers: int, width: int, heads: int, length: int) -> dict:
    return dict(num_layers=layers, embed_dim=width, num_heads=heads, context_length=length)


ROTARY = {"model.positions": "rope"}
SMALL, LARGE = gpt(12, 768, 12, 1024), gpt(32, 4096, 32, 2048)
TARGETS = (
    Target("T1a", "v5e:2x4", SMALL, dict(fsdp=8), 32, "6.97 + 0.19 plain, 13.12 + 0.19 flash", 7.16, 3.58),
    Target("T1b", "v6e:4x4", gpt(48, 1600, 25, 1024), dict(fsdp=16), 16, "7.53 + 1.20 plain", 8.73, 4.37),
    Target("T1c", "v5p:4x4x4", LARGE, dict(fsdp=64), 8, "8.52 + 1.00 flash", 9.52, 6.66),
    Target(
        "T1d", "v5p:8x8x8", gpt(96, 12288, 96, 2048), dict(fsdp=64, tensor=8), 2,
        "17.35 + 3.83 plain, 15.30 + 3.83 flash", 19.13, 15.30,
    ),
    Target("T1c offload", "v5p:4x4x4", LARGE, dict(fsdp=64), 8, "8.52 + 1.00 flash", 9.52, 6.66,
           options={"model.remat": "offload"}),
    Target("T1d offload", "v5p:8x8x8", gpt(96, 12288, 96, 2048), dict(fsdp=64, tensor=8), 2,
           "17.35 + 3.83 plain, 15.30 + 3.83 flash", 19.13, 15.30, options={"model.remat": "offload"}),
    Target("T1c two micro-batches", "v5p:4x4x4", LARGE, dict(fsdp=64), 8, "8.52 + 1.00 flash", 9.52, 6.66,
           options={"train.accumulation": 2}),
    Target("T1d four micro-batches", "v5p:8x8x8", gpt(96, 12288, 96, 2048), dict(fsdp=64, tensor=8), 2,
           "17.35 + 3.83 plain, 15.30 + 3.83 flash", 19.13, 15.30, options={"train.accumulation": 4}),
    Target("T1a plain", "v5e:2x4", SMALL, dict(fsdp=8), 32, "6.97 + 0.19 plain", 7.16, 3.58,
           options={"model.attention": "reference"}),
    Target("T1c plain", "v5p:4x4x4", LARGE, dict(fsdp=64), 8, "", 9.52, 6.66,
           options={"model.attention": "reference"}),
    Target("T2a", "v5e:2x4", SMALL, dict(fsdp=8), 32, "fits, below T1a plain", 15.75, 7.16, packed=True,
           options={"model.attention": "splash"}),
    Target("T2c", "v5p:4x4x4", LARGE, dict(fsdp=64), 8, "fits, below T1c plain", 95.73, 9.52, packed=True,
           options={"model.attention": "splash"}),
    # T5b has rows 16 times as long on 16 times as many chips: at most 1.3 times the memory of T5a. T5c gathers keys.
    Target("T5a", "v5p:2x2x1", gpt(32, 4096, 32, 8192), dict(fsdp=4), 1, "", 95.73, 95.73, options=ROTARY),
    Target("T5b", "v5p:4x4x4", gpt(32, 4096, 32, 131072), dict(fsdp=4, context=16), 1 / 16, "", 41.6, 32.0,
           options=ROTARY | {"objective.logits_chunk": 2048}),
    Target("T5c", "v5p:4x4x4", gpt(32, 4096, 32, 131072), dict(fsdp=4, context=16), 1 / 16, "",
           41.6, 32.0, options=ROTARY | {"objective.logits_chunk": 2048, "model.attention": "splash"}),
)  # fmt: skip


def config_of(target: Target, extra: list[str]) -> config_lib.Config:
    """GPT-2's block at the shape of the target, with full rematerialisation and chunked logits."""
    config = config_lib.get_default()
    config.model.update(
        vocab_size=50257,
        norm="layernorm",
        activation="gelu_tanh",
        positions="learned",
        qk_norm=False,
        use_bias=True,
        compute_dtype="bfloat16",
        scan_unroll=1,
        remat="full",
        **target.model,
    )
    config.objective.logits_chunk = 128
    config.data.isolate_documents = target.packed
    config.mesh.update(data=1, **target.mesh)
    config.train.batch_size = round(target.rows_a_chip * chips.parse_topology(target.topology).num_chips)
    options = {**target.options, **dict(o.split("=") for o in extra)}
    for path, value in options.items():
        section, name = path.split(".")
        config[section][name] = type(config[section][name])(value)
    config_lib.validate(config)
    return config_lib.resolve(config, 50257, 1000)


def line(target: Target, facts: Facts, seconds: float) -> str:
    if facts.memory is None:
        needed = f"{facts.needed_bytes / chips.GIB:.2f}" if facts.needed_bytes else "?"
        return f"| {target.name} | {target.topology} | does not fit: {needed} | {target.peer} | | | {seconds:.0f} | |"
    temporary, arguments = facts.memory.temporaries / chips.GIB, facts.memory.arguments / chips.GIB
    total, times = temporary + arguments, roofline(facts)
    reached = "stretch" if total <= target.stretch else "must" if total < target.must else "NO"
    sent = ", ".join(f"{c.kind} {c.sent_bytes / chips.GIB:.2f}" for c in facts.collectives if c.sent_bytes > 1e7)
    spans = (
        f"{times.at_best_s:.2f} to {times.at_worst_s:.2f} s, MFU {times.mfu_at_worst:.0%} to {times.mfu_at_best:.0%}"
    )
    return (
        f"| {target.name} | {target.topology} | **{temporary:.2f} + {arguments:.2f}** | {target.peer} | "
        f"< {target.must:.2f}, {target.stretch:.2f}: {reached} | {sent} | {seconds:.0f} | {spans} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="", help="comma-separated names; default: all")
    parser.add_argument("--option", action="append", default=[], help="e.g. --option=objective.logits_chunk=64")
    parser.add_argument("--output", help="facts of every row as JSON")
    options = parser.parse_args()
    names = options.rows.split(",") if options.rows else [t.name for t in TARGETS]
    if unknown := set(names) - {t.name for t in TARGETS}:
        parser.error(f"no such rows: {', '.join(sorted(unknown))}; choose from {', '.join(t.name for t in TARGETS)}")
    print(
        "| row | slice | ours, GiB | MaxText, GiB | must, stretch | GiB sent per chip and step | seconds | roofline |"
    )
    print("|---|---|---|---|---|---|---|---|")
    found = {}
    for target in (t for name in names for t in TARGETS if t.name == name):
        begin = time.perf_counter()  # the whole process, start to end
        with tpu.TpuProcess(tpu.find_python()) as process:
            facts = process.compile(config_of(target, options.option), target.topology)
        print(line(target, facts, time.perf_counter() - begin), flush=True)
        found[target.name] = json.loads(facts.to_json())
    if options.output:
        Path(options.output).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
