"""GPT-2 medium, 355M parameters: 524,288 tokens per step, 20 billion tokens.

  gptjax prepare --source=hf:openwebtext --tokenizer=hf:gpt2 --output=stores/openwebtext
  python -m gptjax.train --config=configs/gpt2_355m.py --workdir=runs/gpt2_355m

Meant for one to eight GPUs or a v5e slice of sixteen chips, with data parallelism. On one H200: 204,400 tokens per
second, 39 GiB (experiments/RESULTS.md). The plan of sixteen chips:
  python -m gptjax.plan --config=configs/gpt2_355m.py --topology=v5e:4x4 --config.train.accumulation=1 \\
      --config.model.scan_unroll=1 --config.model.remat=full --config.objective.logits_chunk=256
"""

from gptjax.config import apply_arg, get_default
from gptjax.model import presets


def get_config(arg: str = ""):
    config = get_default()
    config.tokenizer = "hf:gpt2"
    config.data.update(source="store:stores/openwebtext", isolate_documents=False)
    config.model.update(presets.get("gpt2-355m"), compute_dtype="bfloat16")
    config.optimizer.update(learning_rate=3e-4, beta2=0.95, weight_decay=0.1, clip_norm=1.0)
    config.schedule.update(name="cosine", warmup="1B tokens", final_fraction=0.1)
    config.train.update(num_steps="20B tokens", batch_size=512, accumulation=16, checkpoint_every="5%")
    config.evaluation.update(every="5%", batch_size=64, max_tokens=10_000_000, tasks="perplexity")
    return apply_arg(config, arg)
