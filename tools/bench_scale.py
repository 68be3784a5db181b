"""How cost grows: compile time with depth, step time with batch and context, memory with the mesh, evaluation and
store build with data size. Prints small tables with the fitted log-log slope (1 = proportional).

  python tools/bench_scale.py
  python tools/bench_scale.py --tables=compile,memory

Memory and compile times come from the compiler for CPU devices; it compiles for 512 virtual devices and runs
nothing. The other times are medians on this machine.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

TOOLS = Path(__file__).parent
Rows = Iterator[tuple[float, ...]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tables", default=",".join(TABLES), help=f"comma-separated, from {', '.join(TABLES)} (default: all)"
    )
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        for row in TABLES[options.measure][1]():
            print("row", json.dumps(row), flush=True)
        return
    for name in options.tables.split(","):
        heading, _ = TABLES[name]
        # JAX fixes its devices when it starts, so each table needs a new process.
        command = [sys.executable, __file__, "--measure", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        rows = [json.loads(line.removeprefix("row ")) for line in done.stdout.splitlines() if line.startswith("row ")]
        _print(name, heading, rows)


def _print(name: str, heading: tuple[str, ...], rows: list[list[float]]) -> None:
    print(f"\n{name}\n\n| {' | '.join(heading)} |\n|{'---|' * len(heading)}")
    for row in rows:
        print(f"| {' | '.join(f'{value:,.4g}' for value in row)} |")
    if len(rows) > 1:
        logs = np.log(np.array(rows, float))
        slopes = [np.polyfit(logs[:, 0], column, 1)[0] for column in logs[:, 1:].T]
        print(f"| slope | {' | '.join(f'{slope:.2f}' for slope in slopes)} |", flush=True)


def _config(**model):
    from gptjax.config import get_default

    config = get_default()
    config.model.update(num_layers=4, num_heads=4, embed_dim=128, context_length=64, vocab_size=4096)
    config.model.update(model)
    config.data.isolate_documents = False
    config.train.update(num_steps=100, batch_size=8)
    return config


def _compiled(config, devices):
    from gptjax import config as config_lib
    from gptjax.planning.compilation import compile_step

    config = config_lib.resolve(config, config.model.vocab_size, steps_per_epoch=100.0)
    return compile_step(config, devices, topology="local")


def compile_with_depth() -> Rows:
    """Seconds to trace and compile a step: layers scanned, and unrolled for depths where that is fast enough."""
    import jax

    for layers in (4, 8, 16, 32, 64, 96):
        scanned = _compiled(_config(num_layers=layers, scan_unroll=1), jax.devices()[:1]).compile_seconds
        yield layers, scanned


def compile_unrolled() -> Rows:
    """The same with layers unrolled."""
    import jax

    for layers in (4, 8, 16, 32):
        yield layers, _compiled(_config(num_layers=layers), jax.devices()[:1]).compile_seconds


def memory_with_mesh() -> Rows:
    """MiB of state and temporaries per device, for a fixed number of rows per device and parameters split over fsdp."""
    import jax

    jax.config.update("jax_num_cpu_devices", 512)
    for devices in (1, 2, 8, 32, 128, 512):
        config = _config(num_layers=8, num_heads=8, embed_dim=1024, vocab_size=32768, scan_unroll=1, remat="full")
        config.mesh.update(data=1, fsdp=devices)
        config.objective.logits_chunk = 16
        config.train.batch_size = 4 * devices
        memory = _compiled(config, jax.devices()[:devices]).memory
        yield devices, memory.arguments / 2**20, memory.temporaries / 2**20


def step_with_batch() -> Rows:
    """Milliseconds per step with 64 tokens of context."""
    for batch in (2, 8, 32, 128):
        yield batch, _step_milliseconds(batch, 64)


def step_with_context() -> Rows:
    """Milliseconds per step of 4,096 tokens."""
    for context in (64, 256, 1024, 4096):
        yield context, _step_milliseconds(4096 // context, context)


def _step_milliseconds(batch: int, context: int) -> float:
    import jax

    from gptjax import config as config_lib
    from gptjax.parallel import mesh as mesh_lib
    from gptjax.training.program import Program

    config = _config(context_length=context)
    config.train.batch_size = batch
    config = config_lib.resolve(config, config.model.vocab_size, steps_per_epoch=100.0)
    config.data.isolate_documents = False
    program = Program.of(config, mesh_lib.make_mesh(config.mesh, jax.devices()[:1]))
    state, hyper = program.initial_state(), program.hyper(0)
    tokens = np.random.default_rng(0).integers(0, 4096, (batch, context), dtype=np.int32)
    positions = np.tile(np.arange(context, dtype=np.int32), (batch, 1))
    arrays = {"tokens": tokens, "targets": tokens, "positions": positions, "weights": np.ones_like(tokens, np.float32)}
    arrays = program.to_device(arrays)
    times = []
    for _ in range(8):
        begin = time.perf_counter()
        state, metrics = program.step(state, arrays, hyper)
        jax.block_until_ready(metrics)
        times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times[2:])


def evaluation_with_size() -> Rows:
    """Seconds to score a split, after compilation, by its number of tokens."""
    import jax

    from gptjax.data.building.build import build_store
    from gptjax.data.sources.opening import open_source
    from gptjax.evaluation.likelihood import Scorer
    from gptjax.model import gpt
    from gptjax.model.architecture import Architecture
    from gptjax.parallel import mesh as mesh_lib

    config = _config(vocab_size=0)
    with tempfile.TemporaryDirectory() as directory:
        text = Path(directory) / "text.txt"
        text.write_text("\n".join(f"{i} times {i + 1} is {i * (i + 1)}" for i in range(80_000)))
        store = build_store(
            open_source(f"text:{text}"), Path(directory) / "store", tokenizer="byte", validation_fraction=0.6
        )
        split, tokenizer = store.split("validation"), store.tokenizer()
        architecture = Architecture.from_config(config.model, tokenizer.vocab_size)
        params = jax.jit(gpt.initialise, static_argnums=0)(architecture, jax.random.key(0))
        mesh = mesh_lib.make_mesh(config.mesh, jax.devices()[:1])
        scorer = Scorer(architecture, mesh, batch_size=64)
        scorer.score(params, split, eot_id=tokenizer.eot_id, max_tokens=5000)
        for tokens in (10_000, 100_000, 1_000_000):
            begin = time.perf_counter()
            scorer.score(params, split, eot_id=tokenizer.eot_id, max_tokens=tokens)
            yield tokens, time.perf_counter() - begin


TABLES = {
    "compile": (("layers, scanned", "seconds"), compile_with_depth),
    "unrolled": (("layers, unrolled", "seconds"), compile_unrolled),
    "memory": (("devices (fsdp)", "MiB of state", "MiB of temporaries"), memory_with_mesh),
    "batch": (("rows", "ms per step"), step_with_batch),
    "context": (("context, 4,096 tokens per step", "ms per step"), step_with_context),
    "evaluation": (("tokens scored", "seconds"), evaluation_with_size),
}


if __name__ == "__main__":
    main()
