"""LoRA fine-tuning of GPT-2 (124M) on a CPU: gptjax compared with PEFT and transformers.

  python tools/bench_lora.py
  python tools/bench_lora.py --batch=4 --context=256 --steps=6 --rounds=3

Weights and tokens are random and equal for both, and so are the initial adapters (rank 8, on the attention output and
both layers of the MLP, each of which is one module in PEFT). Each runs in its own process, alternately. Prints the
median seconds per step, their ratio, the peak resident memory, and the largest difference between two losses of the
same step. Needs torch, transformers and peft.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

TARGETS = "attention/out|mlp/(up|down)"
RATE, RANK = 3e-4, 8
BETAS, EPSILON, CLIP = (0.9, 0.95), 1e-8, 1.0
SLOW_STEPS = 1  # the first step compiles


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4, help="rows of a batch (default: 4)")
    parser.add_argument("--context", type=int, default=256, help="tokens of a row (default: 256)")
    parser.add_argument("--steps", type=int, default=6, help="steps in a round, the first not timed (default: 6)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each (default: 3)")
    parser.add_argument("--logits_chunk", type=int, default=0, help="objective.logits_chunk of ours (default: 0)")
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps <= SLOW_STEPS or options.rounds < 1:
        parser.error(f"--steps must be at least {SLOW_STEPS + 1} and --rounds at least 1")
    if options.worker:
        WORKERS[options.worker](options)
        return
    found: dict[str, list[dict]] = {"ours": [], "peft": []}
    with tempfile.TemporaryDirectory() as folder:
        run("export", options, folder)
        for _ in range(options.rounds):
            for name, results in found.items():
                results.append(run(name, options, folder))
    step = {name: statistics.median(x for one in results for x in one["seconds"]) for name, results in found.items()}
    for name, label in (("ours", "gptjax"), ("peft", "PEFT")):
        peak = max(one["peak"] for one in found[name])
        losses = " ".join(f"{loss:.5f}" for loss in found[name][0]["losses"])
        print(f"{label:8} {step[name]:8.3f} s/step   peak {peak / 2**30:6.2f} GiB   losses {losses}")
    pairs = zip(found["ours"][0]["losses"], found["peft"][0]["losses"], strict=True)
    largest = max(abs(a - b) for a, b in pairs)
    print(f"gptjax / PEFT {step['ours'] / step['peft']:.2f}, largest difference of losses {largest:.1e}")


def run(worker: str, options: argparse.Namespace, folder: str) -> dict:
    """Runs a worker in its own process; returns the last line of its output."""
    command = [sys.executable, __file__, f"--worker={worker}", f"--folder={folder}"]
    command += [f"--{name}={getattr(options, name)}" for name in ("batch", "context", "steps", "logits_chunk")]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"the process of {worker} ended with status {result.returncode}")
    return json.loads(result.stdout.splitlines()[-1])


def tokens_of(step: int, options: argparse.Namespace) -> np.ndarray:
    """The same batch for both; every second one repeats the first, so that there is something to learn."""
    return np.random.default_rng(step % 2).integers(0, 50257, (options.batch, options.context), dtype=np.int32)


def tell(losses: list[float], seconds: list[float]) -> None:
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"losses": losses, "seconds": seconds[SLOW_STEPS:], "peak": peak}))


# ---- The processes -------------------------------------------------------------------------------------------------


def program(options: argparse.Namespace):
    """The run and its initial state."""
    from gptjax.config import get_default
    from gptjax.model import presets
    from gptjax.parallel.mesh import make_mesh
    from gptjax.processes import runtime
    from gptjax.training.program import Program

    config = get_default()
    config.model.update(presets.get("gpt2-124m"), context_length=options.context, dropout=0.0)
    config.model.update(lora_rank=RANK, lora_alpha=2.0 * RANK, lora_targets=TARGETS, lora_dropout=0.0)
    config.train.update(batch_size=options.batch, num_steps=options.steps)
    config.schedule.update(name="constant", warmup=0)
    config.optimizer.update(name="adamw", learning_rate=RATE, weight_decay=0.0, clip_norm=CLIP)
    config.optimizer.update(beta1=BETAS[0], beta2=BETAS[1], epsilon=EPSILON)
    config.objective.logits_chunk = options.logits_chunk
    config.data.isolate_documents = False
    config.mesh.data = 1
    runtime.start(config.mesh, rows=1, cache_dir=options.folder / "cache")
    run = Program.of(config, make_mesh(config.mesh))
    return run, run.initial_state(0)


def export(options: argparse.Namespace) -> None:
    """Writes the base model and the adapters of our initial state for PEFT."""
    import dataclasses

    import jax

    from gptjax.model.huggingface import adapters, weights

    run, state = program(options)
    params = jax.device_get(state.params)
    base = options.folder / "base"
    plain = dataclasses.replace(run.architecture, lora_rank=0)
    weights.write_directory(base, plain, params, eot_id=50256)
    adapters.write_adapter(options.folder / "adapter", run.architecture, params, base=str(base))
    print("{}")


def ours(options: argparse.Namespace) -> None:
    import jax

    run, state = program(options)
    losses, seconds = [], []
    for step in range(options.steps):
        tokens = tokens_of(step, options)
        weights = np.ones(tokens.shape, np.float32)
        weights[:, -1] = 0  # the last token of a row predicts nothing
        positions = np.broadcast_to(np.arange(options.context, dtype=np.int32), tokens.shape)
        batch = {"tokens": tokens, "targets": np.roll(tokens, -1, 1), "weights": weights, "positions": positions}
        begin = time.perf_counter()
        state, metrics = run.step(state, run.to_device(batch), run.hyper(step))
        losses.append(float(jax.block_until_ready(metrics)["loss"]))
        seconds.append(time.perf_counter() - begin)
    tell(losses, seconds)


def peft(options: argparse.Namespace) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    none = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    base = AutoModelForCausalLM.from_pretrained(options.folder / "base", dtype=torch.float32, **none)
    model = PeftModel.from_pretrained(base, options.folder / "adapter", is_trainable=True).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=BETAS, eps=EPSILON, weight_decay=0.0)
    losses, seconds = [], []
    for step in range(options.steps):
        tokens = torch.from_numpy(tokens_of(step, options)).long()
        begin = time.perf_counter()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        seconds.append(time.perf_counter() - begin)
    tell(losses, seconds)


WORKERS = {"export": export, "ours": ours, "peft": peft}


if __name__ == "__main__":
    main()
