"""All GPU numbers by one command in under ten minutes: kernels, training, decoding, quality within a minute.

  python tools/bench_gpu.py --output=out --data=input.txt
  python tools/bench_gpu.py --rows=G2 --output=out
  python tools/bench_gpu.py --tiny --output=out          # toy sizes, on a CPU too

Prints a table with the targets and writes OUT/bench_gpu.json. Each measurement is a separate process: if it runs out
of memory, only its row is lost. With torch and transformers installed, their GPT-2 (torch.compile,
SDPA, bfloat16 autocast, fused AdamW) is measured on the same GPU.

| row | what |
|---|---|
| check | attention kernels against the reference, a real step, decoding; whether two runs are bit-identical |
| G1 | Shakespeare's characters: validation loss of configs/shakespeare_char_gpu_best.py, seconds of the whole command |
| G2 | GPT-2 124M: tokens per second and MFU of the training step, several settings |
| G3 | 355M and 1.5B |
| G5 | decoding: tools/bench_decode.py |
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent
TOKENS_A_STEP = 524_288
TINY = [
    "num_layers=2",
    "num_heads=2",
    "num_kv_heads=0",
    "head_dim=0",
    "mlp_dim=0",
    "embed_dim=64",
    "context_length=128",
    "vocab_size=512",
    "compute_dtype=float32",
]

# Runs in an interpreter with torch: prints tokens per second, one figure per block of steps.
PEER = """
import sys, time, torch
from transformers import GPT2Config, GPT2LMHeadModel
layers, heads, width, context, rows, blocks = map(int, sys.argv[1:])
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.set_float32_matmul_precision("high")
shape = dict(n_layer=layers, n_head=heads, n_embd=width, n_positions=context, vocab_size=50304)
model = GPT2LMHeadModel(GPT2Config(**shape, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, attn_implementation="sdpa"))
model = torch.compile(model.to(device)) if device == "cuda" else model
optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=device == "cuda")
def step():
    tokens = torch.randint(50257, (rows, context), device=device)
    with torch.autocast(device, torch.bfloat16):
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss
speeds = []
for _ in range(blocks + 1):
    begin = time.perf_counter()
    for _ in range(5):
        loss = step()
    loss.item()
    speeds.append(5 * rows * context / (time.perf_counter() - begin))
print("speeds", *speeds[1:])
"""


@dataclasses.dataclass(frozen=True)
class Training:
    """One measurement of the training step. `options` are --config overrides of the model's config file."""

    row: str
    config: str
    micro_batch: int
    options: tuple[str, ...] = ()


# This config recomputes activations to fit on sixteen chips; one large GPU need not recompute anything.
WHOLE = ("model.scan_unroll=0", "model.remat=none", "objective.logits_chunk=0")
TRAININGS = (
    Training("G2", "gpt2_124m", 64),
    Training("G2", "gpt2_124m", 64, ("model.matmul=float8",)),
    Training("G3", "gpt2_1558m", 16, WHOLE),
    Training("G3", "gpt2_355m", 32),
)
DETERMINISTIC = "--xla_gpu_exclude_nondeterministic_ops=true"
TARGETS = {"G1": "<= 1.47 in 60 s", "G2": "400k tokens/s (35 %)", "G3": "45 % at 1.5B", "G5": "3x transformers"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="G2,G3,G5,G1,check", help="in this order (default: all)")
    parser.add_argument("--output", type=Path, default=Path("bench_gpu"), help="results (default: bench_gpu)")
    parser.add_argument("--data", type=Path, help="Shakespeare's plays, input.txt, for G1")
    parser.add_argument("--budget", type=float, default=560, help="total seconds; rows that no longer fit are skipped")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to try the script")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # one measurement, in a process of its own
    options = parser.parse_args()
    if options.measure:
        request = json.loads(options.measure)
        print("result", json.dumps(MEASUREMENTS[request.pop("kind")](**request)))
        return

    options.output.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"rows": []}
    end = time.monotonic() + options.budget

    def record(row: str, what: str, *, flags: str = "", **request: Any) -> None:
        left = end - time.monotonic()
        answer = _in_process(request, left, flags) if left > 5 else {"failed": "no time was left"}
        results["rows"].append({"row": row, "what": what, **answer})
        (options.output / "bench_gpu.json").write_text(json.dumps(results, indent=1) + "\n")
        print(f"{row:6} {what:60} {_summary(answer)}", flush=True)

    for row in options.rows.split(","):
        if row == "check":
            record(row, "device and kernels", kind="check", tiny=options.tiny)
            for attention, flags in (("auto", ""), ("xla", DETERMINISTIC)):
                record(row, f"two runs, bfloat16, attention {attention} {flags}",
                       flags=flags, kind="equality", attention=attention, tiny=options.tiny)  # fmt: skip
        for training in [t for t in TRAININGS if t.row == row]:
            what = f"{training.config}, {training.micro_batch} rows, {' '.join(training.options) or 'as shipped'}"
            request = dataclasses.asdict(training)
            del request["row"]
            record(row, what, kind="training", tiny=options.tiny, **request)
        if row == "G2":
            record(row, "peer: transformers GPT-2, torch.compile, SDPA", kind="peer", tiny=options.tiny)
        if row == "G5":
            record(row, "decoding", kind="decoding", tiny=options.tiny, output=str(options.output))
        if row == "G1":
            for seed in range(3):
                record(row, f"shakespeare_char_gpu_best, seed {seed}{', nothing cached' if seed == 0 else ''}",
                       kind="shakespeare", tiny=options.tiny, data=str(options.data or ""), seed=seed,
                       workdir=str(options.output / f"shakespeare{seed}"))  # fmt: skip
    _print_table(results["rows"])


def _in_process(request: dict[str, Any], seconds: float, flags: str) -> dict[str, Any]:
    environment = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()}
    command = [sys.executable, __file__, "--measure", json.dumps(request)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment)
    except subprocess.TimeoutExpired:
        return {"failed": f"not finished after {seconds:.0f} s"}
    for line in done.stdout.splitlines():
        if line.startswith("result "):
            return json.loads(line.removeprefix("result "))
    return {"failed": (done.stderr.strip().splitlines() or ["no output"])[-1][:300]}


# ---- Measurements: each returns figures by name --------------------------------------------------------------------


def check(*, tiny: bool) -> dict[str, Any]:
    """The largest differences from the reference, which should be no more than rounding on this device."""
    import jax
    import jax.numpy as jnp

    from gptjax.model import kernels
    from gptjax.model.attention import Visibility, reference

    device = jax.devices()[0]
    dtype, length = (jnp.float32, 128) if tiny else (jnp.bfloat16, 1024)
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, cotangent = (jax.random.normal(key, (2, length, 12, 64), dtype) for key in keys)
    segments = jnp.broadcast_to(jnp.arange(length) // 100, (2, length)).astype(jnp.int32)
    answer = {"device": device.device_kind, "jax": jax.__version__}
    for name in ("xla", "cudnn") if device.platform == "gpu" else ("xla",):
        for case, visibility in (
            ("causal", Visibility.causal(length)),
            ("window", Visibility.causal(length, window=100)),
            ("packed", Visibility.causal(length, segments)),
        ):
            if name == "cudnn" and case == "packed":
                continue

            def run(attend, *tensors, visibility=visibility):
                out, pull = jax.vjp(lambda *qkv: attend(*qkv, visibility), *tensors)
                return out, *pull(cotangent.astype(out.dtype))

            exact = run(reference, *(x.astype(jnp.float32) for x in (q, k, v)))
            found = run(lambda *xs, name=name: kernels.attend(*xs, implementation=name), q, k, v)
            errors = [float(abs(a - b).max() / abs(b).max()) for a, b in zip(found, exact, strict=True)]
            answer[f"{name} {case}: largest relative error"] = round(max(errors), 5)
    return answer | _check_training() | _check_decoding()


def _check_training() -> dict[str, Any]:
    """Ten steps on one batch, in float32 and in bfloat16: the loss must fall."""
    import numpy as np

    answer = {}
    for dtype in ("float32", "bfloat16"):
        _, state, step, batch = _prepare("gpt2_124m", 8, (f"model.compute_dtype={dtype}",), tiny=True)
        losses = []
        for _ in range(10):
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
        assert np.isfinite(losses).all() and losses[-1] < losses[0], losses
        answer[f"losses of one batch, {dtype}"] = [round(losses[0], 4), round(losses[-1], 4)]
    return answer


def _check_decoding() -> dict[str, Any]:
    """Compares greedy tokens with the cache and with the full forward pass, in float32."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from gptjax.config import get_default
    from gptjax.data.tokenization.tokenizer import build_tokenizer
    from gptjax.generation.completion import Generator
    from gptjax.generation.engine import Model
    from gptjax.generation.params import SamplingParams
    from gptjax.model import gpt
    from gptjax.model.architecture import Architecture

    config, tokenizer = get_default(), build_tokenizer("byte")
    config.model.update(num_layers=2, num_heads=4, embed_dim=64, context_length=128, init_std=0.3)
    architecture = Architecture.from_config(config.model, tokenizer.vocab_size)
    params = jax.jit(gpt.initialise, static_argnums=0)(architecture, jax.random.key(0))
    prompts = [np.arange(1, n + 1) for n in (3, 10, 20)]
    sampling = SamplingParams(max_new_tokens=30, temperature=0.0, ignore_eos=True)
    completions = Generator(Model.prepare(architecture, params), tokenizer).complete_tokens(prompts, sampling)

    @jax.jit
    def next_token(tokens, length):
        model = gpt.bind(architecture, params)
        hidden, _ = model.hidden(tokens, positions=jnp.arange(128)[None])
        return model.logits(hidden)[0, length - 1].argmax()

    agree = 0
    for prompt, completion in zip(prompts, completions, strict=True):
        text = [*prompt, *completion.tokens]
        for length in range(len(prompt), len(text)):
            padded = jnp.zeros((1, 128), jnp.int32).at[0, :length].set(jnp.asarray(text[:length]))
            agree += int(next_token(padded, length)) == text[length]
    return {"greedy tokens equal to the full forward": f"{agree} of {3 * 30}"}


def equality(*, attention: str, tiny: bool) -> dict[str, Any]:
    """Whether two runs of ten steps from the same state are bit-identical, and the time of a step."""
    import jax
    import numpy as np

    ends, options = [], (f"model.attention={attention}", "model.num_layers=4")
    global TOKENS_A_STEP  # this process makes one measurement
    TOKENS_A_STEP = 8 * 1024
    _, state, step, batch = _prepare("gpt2_124m", 8, options, tiny=tiny)
    start = jax.tree.map(np.asarray, state)
    for _ in range(2):
        state = jax.tree.map(lambda old, like: jax.device_put(old, like.sharding), start, state)
        for i in range(10):
            if i == 2:
                jax.block_until_ready(state)
                begin = time.perf_counter()
            state, _ = step(state, batch)
        jax.block_until_ready(state)
        seconds = (time.perf_counter() - begin) / 8
        ends.append(jax.tree.leaves(jax.tree.map(np.asarray, state.params)))
    equal = [bool((a == b).all()) for a, b in zip(*ends, strict=True)]
    largest = max(float(np.abs(a - b).max()) for a, b in zip(*ends, strict=True))
    return {
        "equal arrays": f"{sum(equal)} of {len(equal)}",
        "largest difference": largest,
        "ms": round(1e3 * seconds, 2),
    }


def training(*, config: str, micro_batch: int, options: list[str], tiny: bool) -> dict[str, Any]:
    """Tokens per second of the real train step on random tokens: the median of 3 to 6 steps."""
    import jax

    from gptjax.model.architecture import Architecture
    from gptjax.training.throughput import peak_flops

    begin = time.perf_counter()
    resolved, state, step, batch = _prepare(config, micro_batch, tuple(options), tiny=tiny)
    state, metrics = step(state, batch)
    jax.block_until_ready(metrics)
    compile_seconds = time.perf_counter() - begin
    tokens = resolved.train.batch_size * resolved.model.context_length
    speeds = []
    while len(speeds) < 3 or (len(speeds) < 6 and tokens / speeds[0] < 5):
        begin = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        speeds.append(tokens / (time.perf_counter() - begin))
    architecture = Architecture.from_config(resolved.model, 0)
    speed, device = statistics.median(speeds), jax.devices()[0]
    peak = peak_flops(device, resolved.model.compute_dtype)
    memory = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return {
        "tokens_per_second": round(speed),
        "mfu": peak and round(speed * architecture.flops_per_token() / peak, 4),
        "mfu_nanogpt": peak and round(speed * _nanogpt_flops(architecture) / peak, 4),
        "peak_gib": memory and round(memory / 2**30, 2),
        "compile_s": round(compile_seconds, 1),
        "loss": round(float(metrics["loss"]), 4),
        "spread": round((max(speeds) - min(speeds)) / speed, 3),
    }


def _nanogpt_flops(a) -> float:
    """nanoGPT's 6N + 12 L H Q T: all parameters but positions; attention not halved (855 MFLOP for 124M)."""
    block = 4 * a.embed_dim**2 + 2 * a.embed_dim * a.mlp_dim
    parameters = a.num_layers * block + a.padded_vocab_size * a.embed_dim
    return 6 * parameters + 12 * a.num_layers * a.num_heads * a.head_dim * a.context_length


def _prepare(name: str, micro_batch: int, options: tuple[str, ...], *, tiny: bool):
    """(config, state, compiled step, batch on the device), built as in `train`, with random tokens."""
    import importlib.util

    import jax
    import numpy as np

    from gptjax import config as config_lib
    from gptjax.parallel import mesh as mesh_lib
    from gptjax.processes import runtime
    from gptjax.training.program import Program

    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    accumulation = 1 if tiny else TOKENS_A_STEP // (micro_batch * config.model.context_length)
    config.train.update(batch_size=micro_batch * accumulation, accumulation=accumulation, num_steps=1000)
    config.schedule.update(warmup=10, decay=10)
    for option in [*(f"model.{o}" for o in (TINY if tiny else ())), *options]:
        path, _, value = option.partition("=")
        section, key = path.split(".")
        config[section][key] = type(config[section][key])(value)
    config.data.isolate_documents = False
    config.mesh.update(config_lib.get_default().mesh)
    runtime.start(config.mesh, rows=micro_batch, cache_dir=Path(os.environ.get("GPTJAX_CACHE", "/tmp/gptjax-bench")))
    mesh = mesh_lib.make_mesh(config.mesh)
    config.mesh.data = mesh.shape["data"]
    config_lib.validate(config)
    config = config_lib.resolve(config, config.model.vocab_size, steps_per_epoch=1000.0)
    program = Program.of(config, mesh)
    state, hyper = program.initial_state(), program.hyper(0)
    shape = (config.train.batch_size, config.model.context_length)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, (shape[0], shape[1] + 1), dtype=np.int32)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": np.ones(shape, np.float32),
        "positions": np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1)),
    }
    batch = program.to_device(jax.tree.map(np.ascontiguousarray, batch))
    return config, state, lambda state, batch: program.step(state, batch, hyper), batch


def peer(*, tiny: bool) -> dict[str, Any]:
    """Tokens per second of transformers' GPT-2."""
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        return {"failed": "torch and transformers are not installed"}
    best: dict[str, Any] = {"failed": "no batch size fits"}
    for rows in (2,) if tiny else (32, 64):
        shape = (2, 2, 64, 128, rows, 2) if tiny else (12, 12, 768, 1024, rows, 4)
        done = subprocess.run([sys.executable, "-c", PEER, *map(str, shape)], capture_output=True, text=True)
        speeds = [float(x) for x in done.stdout.partition("speeds")[2].split()]
        if speeds and statistics.median(speeds) > best.get("tokens_per_second", 0):
            best = {"tokens_per_second": round(statistics.median(speeds)), "rows": rows}
        elif not speeds and "failed" in best:
            best = {"failed": (done.stderr.strip().splitlines() or ["no output"])[-1][:300]}
    return best


def decoding(*, tiny: bool, output: str) -> dict[str, Any]:
    """Runs tools/bench_decode.py; its output is stored beside the results."""
    command = [sys.executable, str(REPOSITORY / "tools" / "bench_decode.py"), *(["--tiny"] if tiny else ["--rounds=3"])]
    done = subprocess.run(command, capture_output=True, text=True)
    (Path(output) / "bench_decode.txt").write_text(done.stdout + done.stderr)
    return {"output": done.stdout} if done.returncode == 0 else {"failed": done.stderr.strip()[-300:]}


def shakespeare(*, tiny: bool, data: str, workdir: str, seed: int) -> dict[str, Any]:
    """The best validation loss of a whole command, and its seconds including start-up and compilation."""
    if not data:
        return {"failed": "needs --data=input.txt"}
    arg = ":runlocal" if tiny else ""
    command = [sys.executable, "-m", "gptjax.train", f"--config={REPOSITORY}/configs/shakespeare_char_gpu_best.py{arg}"]
    command += [f"--workdir={workdir}", f"--config.data.source=text:{data}", f"--config.seed={seed}"]
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - begin
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no output"])[-1][:300]}
    lines = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    losses = [(line["step"], line["loss"]) for line in lines if line["split"] == "validation"]
    return {"validation_loss": min(loss for _, loss in losses), "seconds": round(seconds, 1), "losses": losses}


MEASUREMENTS = {f.__name__: f for f in (check, equality, training, peer, decoding, shakespeare)}


def _summary(answer: dict[str, Any]) -> str:
    if "output" in answer:
        return "\n" + answer["output"]
    return "  ".join(f"{key} {value}" for key, value in answer.items() if key != "losses")


def _print_table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("row", "what", "tokens/s", "MFU", "MFU nanoGPT", "GiB", "compile", "target", title="gptjax on a GPU")
    for row in rows:
        if "tokens_per_second" in row:
            figures = (row.get(key) for key in ("mfu", "mfu_nanogpt", "peak_gib", "compile_s"))
            texts = ["" if value is None else f"{value}" for value in figures]
            table.add_row(row["row"], row["what"], f"{row['tokens_per_second']:,}", *texts, TARGETS.get(row["row"], ""))
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
