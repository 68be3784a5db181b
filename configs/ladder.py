"""One dial: depth sets width, heads, batch, learning rates, weight decay and tokens, by published scaling rules.

  python -m gptjax.train --config=configs/ladder.py:d6 --describe
  python -m gptjax.train --config=configs/ladder.py:d6 --workdir=runs/d6 --config.data.source=store:stores/web
  python -m gptjax.train --config=configs/ladder.py:d6,runlocal --workdir=runs/try

The layout is that of Qwen3, so every rung can be exported. A change of the model is tried at d4, d6, d8 and d12, and
kept if it helps on all of them. The rules, for depth d, with N12, D12 those of d12:

* width = 64 d, in d heads of 64. The dial of nanochat, scripts/base_train.py (there heads of 128).
* N = parameters of all matrix products, blocks and head: what gave nanochat its cleanest fits (dev/LOG.md).
* tokens D = 20 N. Hoffmann et al. 2022, "Training Compute-Optimal Large Language Models", table 3. nanochat measured
  10.5 for its own recipe: `d6,ratio=10.5`.
* batch = 2^19 (N / N12)^0.383 tokens, to a power of two. Bergsma et al. 2025, "Power Lines", arXiv 2505.13738; 2^19
  tokens at d12 is nanochat's.
* learning rates x sqrt(batch / 2^19). Malladi et al. 2022, "On the SDEs and Scaling Rules for Adaptive Gradient
  Algorithms", arXiv 2205.10287. Nobody has studied it with care for Muon.
* AdamW's rate (embeddings, norms) x sqrt(768 / width). nanochat, nanochat/gpt.py.
* weight decay x sqrt(batch / 2^19) N12 / N. Wang and Aitchison 2024, arXiv 2405.13698: keeps batch / (rate x decay x
  D) constant.

The rates at d12 (Muon 0.02, AdamW 3e-3, decay 0.1) are common choices, not tuned here. Expected: not measured yet.
"""

import math

from gptjax.config import apply_arg, get_default
from gptjax.errors import UserError
from gptjax.model import presets

VOCAB_SIZE, CONTEXT_LENGTH = 32768, 1024
REFERENCE_DEPTH, REFERENCE_BATCH = 12, 2**19
MUON_LEARNING_RATE, ADAMW_LEARNING_RATE, WEIGHT_DECAY = 0.02, 3e-3, 0.1


def matrix_parameters(depth: int) -> int:
    """Of all matrix products: attention, SwiGLU MLP of 8/3 the width (to a multiple of 64), head."""
    width = 64 * depth
    mlp_dim = -(-(8 * width // 3) // 64) * 64
    return depth * (4 * width**2 + 3 * width * mlp_dim) + width * VOCAB_SIZE


def tokens(depth: int, ratio: float) -> int:
    return round(ratio * matrix_parameters(depth))


def batch_tokens(depth: int) -> int:
    growth = matrix_parameters(depth) / matrix_parameters(REFERENCE_DEPTH)
    return 2 ** round(math.log2(REFERENCE_BATCH * growth**0.383))


def get_config(arg: str = f"d{REFERENCE_DEPTH}"):
    depth, ratio, rest = REFERENCE_DEPTH, 20.0, ""
    for part in filter(None, arg.split(",")):
        name, _, value = part.partition("=")
        if name.startswith("d") and name[1:].isdecimal() and 1 <= int(name[1:]) <= 96:
            depth = int(name[1:])
        elif name == "ratio" and value.replace(".", "", 1).isdecimal() and float(value) > 0:
            ratio = float(value)
        elif part == "runlocal":
            rest = part
        else:
            raise UserError(
                f"--config=configs/ladder.py:{arg}: unknown argument {part!r}; this config takes a depth ('d6'), "
                "'ratio=10.5' and 'runlocal', with commas between"
            )
    batch = batch_tokens(depth)
    growth = matrix_parameters(depth) / matrix_parameters(REFERENCE_DEPTH)
    faster = math.sqrt(batch / REFERENCE_BATCH)
    config = get_default()
    config.tokenizer = f"bpe:{VOCAB_SIZE}"
    config.model.update(presets.modern(depth), context_length=CONTEXT_LENGTH, compute_dtype="bfloat16")
    config.optimizer.update(
        name="muon",
        muon_learning_rate=MUON_LEARNING_RATE * faster,
        learning_rate=ADAMW_LEARNING_RATE * faster * math.sqrt(REFERENCE_DEPTH / depth),
        weight_decay=WEIGHT_DECAY * faster / growth,
    )
    config.schedule.update(name="wsd", warmup="2%", decay="50%", final_fraction=0.02)
    config.train.update(num_steps=max(tokens(depth, ratio) // batch, 1), batch_size=batch // CONTEXT_LENGTH)
    config.evaluation.update(every="5%", max_tokens=10 * 2**20, tasks="perplexity")
    return apply_arg(config, rest)
