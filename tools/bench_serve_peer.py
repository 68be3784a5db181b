"""Tokens per second of parallel streams: gptjax serve compared with transformers serve on the same model.

  python tools/bench_serve_peer.py
  python tools/bench_serve_peer.py --streams=8 --max_tokens=128 --rounds=3 --layers=8 --width=512

The model is a Llama with random weights, created here and read by both. One server runs at a time; a round is
`streams` chats that are sent at once. Prints the medians and their ratio. Needs torch
and transformers[serving].
"""

import argparse
import concurrent.futures
import contextlib
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2

TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}<|assistant|>"
WORDS = ["the", "cat", "sat", "on", "a", "mat", "while", "rain", "fell", "over", "many", "small", "houses"]
READY_SECONDS = 180


def write_model(directory: Path, *, layers: int, width: int) -> None:
    """Writes a Llama with random weights and a byte-level BPE tokenizer in transformers' format."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=4096, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 10, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0], bos_token=special[0])
    fast.chat_template = TEMPLATE
    fast.save_pretrained(directory)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(directory)


@contextlib.contextmanager
def served(name: str, directory: Path, streams: int) -> Iterator[tuple[str, str]]:
    """Starts a server of the model; yields its address and the model's name."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if name == "gptjax":
        command = [sys.executable, "-m", "gptjax.serve", f"--model=peer=hf:{directory}", f"--port={port}"]
        command += [f"--slots={streams}"]
        model = "peer"
    else:
        command = [str(Path(sys.executable).parent / "transformers"), "serve", str(directory)]
        command += ["--host=127.0.0.1", f"--port={port}", "--device=cpu"]
        command += ["--continuous-batching"] if name.endswith("batching") else []
        model = str(directory)
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment) as process,
    ):
        try:
            address = f"http://127.0.0.1:{port}"
            wait(address, process, log)
            yield address, model
        finally:
            process.terminate()


def wait(address: str, process: subprocess.Popen, log) -> None:
    """Waits until the server answers. If it ends instead, raises SystemExit with its output."""
    for _ in range(READY_SECONDS):
        with contextlib.suppress(httpx2.HTTPError):
            if httpx2.get(f"{address}/health", trust_env=False).status_code == 200:
                return
        if process.poll() is not None:
            break
        time.sleep(1)
    log.seek(0)
    raise SystemExit(f"the server is not ready:\n{log.read()[-3000:]}")


def rate(address: str, model: str, *, streams: int, max_tokens: int, seed: int) -> float:
    """Tokens per second of parallel chats, from the first request to the last answer."""
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(WORDS, k=12)) for _ in range(streams)]

    def ask(text: str) -> int:
        body = {"model": model, "max_tokens": max_tokens, "messages": [{"role": "user", "content": text}]}
        body |= {"temperature": 1.0, "seed": seed}
        answer = httpx2.post(f"{address}/v1/chat/completions", json=body, timeout=600, trust_env=False)
        if answer.status_code != 200:
            raise SystemExit(f"{address}: {answer.status_code} {answer.text[:500]}")
        return answer.json()["usage"]["completion_tokens"]

    began = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(streams) as pool:
        tokens = sum(pool.map(ask, texts))
    return tokens / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=8, help="chats at once (default: 8)")
    parser.add_argument("--max_tokens", type=int, default=128, help="tokens per answer (default: 128)")
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds of each, after a warm-up round")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512, help="a multiple of 64 (default: 512)")
    options = parser.parse_args()
    rates = {}
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "model"
        write_model(directory, layers=options.layers, width=options.width)
        for name in ("gptjax", "transformers", "transformers, continuous batching"):
            with served(name, directory, options.streams) as (address, model):
                found = [
                    rate(address, model, streams=options.streams, max_tokens=options.max_tokens, seed=seed)
                    for seed in range(options.rounds + 1)
                ][1:]
            rates[name] = statistics.median(found)
            each = ", ".join(f"{value:.1f}" for value in found)
            print(f"{name:34} {rates[name]:8.1f} tokens/s  ({each})", flush=True)
    for name in list(rates)[1:]:
        print(f"gptjax / {name}: {rates['gptjax'] / rates[name]:.2f}")


if __name__ == "__main__":
    main()
