"""GPT-2 small, 124M parameters, by nanoGPT's recipe: 524,288 tokens per step, 10 billion tokens.

  gptjax prepare --source=hf:openwebtext --tokenizer=hf:gpt2 --output=stores/openwebtext
  python -m gptjax.train --config=configs/gpt2_124m.py --workdir=runs/gpt2_124m

Meant for one to eight GPUs or a v5e slice of eight chips, with data parallelism. On one H200: 527,500 tokens per
second, 39 GiB (experiments/RESULTS.md). On eight devices add --config.train.accumulation=1. For a
TPU add --config.model.scan_unroll=1 --config.model.remat=full --config.objective.logits_chunk=256:
  python -m gptjax.plan --config=configs/gpt2_124m.py --topology=v5e:2x4 --config.train.accumulation=2 \\
      --config.model.scan_unroll=1 --config.model.remat=full --config.objective.logits_chunk=256
says 5.8 of 15.75 GiB per chip, 0.56 to 0.85 s per step by the roofline, 24 to 36 chip-hours. Not trained here.
"""

from gptjax.config import apply_arg, get_default
from gptjax.model import presets


def get_config(arg: str = ""):
    config = get_default()
    config.tokenizer = "hf:gpt2"
    config.data.update(source="store:stores/openwebtext", isolate_documents=False)
    config.model.update(presets.get("gpt2-124m"), compute_dtype="bfloat16")
    config.optimizer.update(learning_rate=6e-4, beta2=0.95, weight_decay=0.1, clip_norm=1.0)
    config.schedule.update(name="cosine", warmup="1B tokens", final_fraction=0.1)
    config.train.update(num_steps="10B tokens", batch_size=512, accumulation=8, checkpoint_every="5%")
    config.evaluation.update(every="5%", batch_size=64, max_tokens=10_000_000, tasks="perplexity")
    return apply_arg(config, arg)
