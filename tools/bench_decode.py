"""The speed of decoding: tokens per second at several batch sizes, and the time to the first token.

  python tools/bench_decode.py                  # GPT-2 124M, random weights, alternating with transformers
  python tools/bench_decode.py --tiny           # a test of the script, in seconds

Our numbers include everything, from prompts to text and log-probabilities. The peer is greedy `generate` of
transformers with its cache, in float32 on a CPU and in bfloat16 on a GPU. Its process waits while ours runs. On a GPU
memory bandwidth is the limit: every step reads all parameters, and the keys and values of the text so far.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
import tokenizers
from rich.console import Console
from rich.table import Table

from gptjax.config import get_default
from gptjax.data.tokenization.tokenizer import Tokenizer
from gptjax.generation import decoding
from gptjax.generation.completion import Generator
from gptjax.generation.engine import Model
from gptjax.generation.params import SamplingParams
from gptjax.model import gpt
from gptjax.model.architecture import Architecture
from gptjax.processes import runtime

VOCAB = 50257
SHAPE = {"num_layers": 12, "num_heads": 12, "embed_dim": 768}
TINY = {"num_layers": 2, "num_heads": 2, "embed_dim": 64}
GPT2 = {"norm": "layernorm", "positions": "learned", "activation": "gelu_tanh", "use_bias": True, "qk_norm": False}
BATCHES = {"cpu": (1, 8), "gpu": (1, 8, 32, 128)}
TARGETS = {"cpu": "1.5 (stretch 3)", "gpu": "3 at batch 1"}
# Read bandwidth in bytes/s, from the vendors' data sheets.
BANDWIDTHS = {"NVIDIA H200": 4.8e12, "NVIDIA H100": 3.35e12, "NVIDIA A100": 2.0e12}

# Runs in the peer's interpreter: for each line "batch new_tokens", prints the seconds of one call.
PEER = """
import json, sys, time
import torch
from transformers import GPT2Config, GPT2LMHeadModel
shape, prompt, device, threads = json.loads(sys.argv[1])
torch.set_num_threads(threads)
if device == "gpu" and not torch.cuda.is_available():
    raise SystemExit("this torch has no GPU")
place, dtype = ("cuda", torch.bfloat16) if device == "gpu" else ("cpu", torch.float32)
config = GPT2Config(n_layer=shape["num_layers"], n_head=shape["num_heads"], n_embd=shape["embed_dim"])
model = GPT2LMHeadModel(config).to(place, dtype).eval()
print("ready", flush=True)
for line in sys.stdin:
    batch, new = map(int, line.split())
    tokens = torch.randint(config.vocab_size - 1, (batch, prompt), device=place)
    begin = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, min_new_tokens=new, do_sample=False,
            pad_token_id=config.eos_token_id,
        )
    if place == "cuda":
        torch.cuda.synchronize()
    print(time.perf_counter() - begin, flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small model, one round")
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds of ours and the peer (default: 5)")
    parser.add_argument("--prompt_tokens", type=int, default=32)
    parser.add_argument("--new_tokens", type=int, default=96)
    parser.add_argument("--batches", type=int, nargs="+", help="default: 1 8; on a GPU 1 8 32 128")
    parser.add_argument("--peer_python", default=sys.executable, help="an interpreter with torch and transformers")
    options = parser.parse_args()
    cache = Path(os.environ.get("GPTJAX_CACHE", "/tmp/gptjax-bench"))
    runtime.start(get_default().mesh, rows=1, cache_dir=cache)
    device = "cpu" if jax.default_backend() == "cpu" else "gpu"
    shape, rounds = (TINY, 1) if options.tiny else (SHAPE, options.rounds)
    ours = our_model(shape, "float32" if device == "cpu" else "bfloat16")
    peer = Peer(options.peer_python, shape, options.prompt_tokens, device)

    name = jax.devices()[0].device_kind if device == "gpu" else f"{os.cpu_count()} CPU cores"
    title = f"decoding {shape['num_layers']} x {shape['embed_dim']}, {ours.architecture.compute_dtype}, {name}: "
    title += f"{options.prompt_tokens} tokens, then {options.new_tokens} more; medians of {rounds}"
    columns = (
        "batch",
        "tokens/s",
        "first token",
        "transformers",
        "first token",
        "ratio",
        "target",
        "bound",
        "of bound",
    )
    table = Table(*columns, title=title, title_justify="left")
    for batch in options.batches or BATCHES[device]:
        times = {"ours": [], "ours first": [], "peer": [], "peer first": []}
        for round_ in range(rounds + 1):
            for what, new in (("", options.new_tokens), (" first", 1)):
                seconds = complete(ours, batch, options.prompt_tokens, new)
                peer_seconds = peer.time(batch, new)
                print(f"batch {batch}, {new} tokens: ours {seconds:.2f} s, peer {peer_seconds:.2f} s", file=sys.stderr)
                if round_:  # the first round compiles
                    times["ours" + what].append(seconds)
                    times["peer" + what].append(peer_seconds)
        median = {what: statistics.median(values) for what, values in times.items()}
        tokens = batch * options.new_tokens
        bound = memory_bound(ours.architecture, batch, options.prompt_tokens + options.new_tokens / 2)
        table.add_row(
            str(batch),
            f"{tokens / median['ours']:,.1f}",
            f"{1000 * median['ours first']:.1f} ms",
            f"{tokens / median['peer']:,.1f}",
            f"{1000 * median['peer first']:.1f} ms",
            f"{median['peer'] / median['ours']:.2f}",
            TARGETS[device],
            f"{bound:,.0f}" if bound else "",
            f"1/{bound / (tokens / median['ours']):.1f}" if bound else "",
        )
    Console(width=150).print(table)
    if peer.fault:
        print(f"no transformers: {peer.fault}")


def our_model(shape: dict[str, int], compute_dtype: str) -> Generator:
    """GPT-2 with random weights and a vocabulary of made-up words."""
    config = get_default()
    config.model.update(**shape, **GPT2, context_length=1024, compute_dtype=compute_dtype)
    architecture = Architecture.from_config(config.model, VOCAB)
    params = jax.jit(gpt.initialise, static_argnums=0)(architecture, jax.random.key(0))
    words = {f"w{i}": i for i in range(VOCAB - 1)} | {"<|end|>": VOCAB - 1}
    vocabulary = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<|end|>"))
    vocabulary.add_special_tokens(["<|end|>"])
    return Generator(Model.prepare(architecture, params), Tokenizer(vocabulary, "<|end|>"), batch_size=1024)


def complete(generator: Generator, batch: int, prompt_tokens: int, new_tokens: int) -> float:
    """Seconds to complete a batch of prompts, greedily."""
    prompts = list(np.random.default_rng(0).integers(0, VOCAB - 1, (batch, prompt_tokens)))
    begin = time.perf_counter()
    completions = generator.complete_tokens(
        prompts, SamplingParams(max_new_tokens=new_tokens, temperature=0.0, ignore_eos=True)
    )
    seconds = time.perf_counter() - begin
    assert all(len(completion.tokens) == new_tokens for completion in completions)
    return seconds


def memory_bound(a: Architecture, batch: int, length: float) -> float | None:
    """Tokens per second if each step only read parameters and cache; None for an unknown device."""
    kind = jax.devices()[0].device_kind
    bandwidth = next((value for name, value in BANDWIDTHS.items() if kind.startswith(name)), None)
    if bandwidth is None:
        return None
    width = np.dtype(a.compute_dtype).itemsize
    params = jax.eval_shape(partial(decoding.prepare, architecture=a), gpt.abstract_model(a)[1])
    read = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params["blocks"]))
    read += a.padded_vocab_size * a.embed_dim * width
    cached = 2 * a.num_layers * a.num_kv_heads * a.head_dim * width * length
    return batch * bandwidth / (read + batch * cached)


class Peer:
    """transformers in its own process. If it does not start, `fault` says why, and all times are NaN."""

    def __init__(self, python: str, shape: dict[str, int], prompt_tokens: int, device: str):
        arguments = json.dumps([shape, prompt_tokens, device, os.cpu_count()])
        self._process = subprocess.Popen(
            [python, "-c", PEER, arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Threads that spin while they wait take ten times as long if another process uses one of the cores.
            env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "TRANSFORMERS_VERBOSITY": "error"},
        )
        ready = self._process.stdout.readline().strip() == "ready"
        self.fault = None if ready else self._process.stderr.read().strip().splitlines()[-1]

    def time(self, batch: int, new_tokens: int) -> float:
        if self.fault:
            return float("nan")
        self._process.stdin.write(f"{batch} {new_tokens}\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())


if __name__ == "__main__":
    main()
