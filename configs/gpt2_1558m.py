"""GPT-2 XL, 1.56B parameters: 524,288 tokens a step, 30 billion tokens.

  gptjax prepare --source=hf:openwebtext --tokenizer=hf:gpt2 --output=stores/openwebtext
  python -m gptjax.train --config=configs/gpt2_1558m.py --workdir=runs/gpt2_1558m

Meant for sixteen chips, with parameters and optimizer state sharded over all: a v6e:4x4 slice, or sixteen GPUs. On
one H200: --config.mesh.fsdp=1 --config.train.accumulation=32 --config.model.scan_unroll=0 --config.model.remat=none
--config.objective.logits_chunk=0, 51,200 tokens per second in 69 GiB (experiments/RESULTS.md). The plan of the slice:
  python -m gptjax.plan --config=configs/gpt2_1558m.py --topology=v6e:4x4
"""

from gptjax.config import apply_arg, get_default
from gptjax.model import presets


def get_config(arg: str = ""):
    config = get_default()
    config.tokenizer = "hf:gpt2"
    config.data.update(source="store:stores/openwebtext", isolate_documents=False)
    config.model.update(presets.get("gpt2-1558m"), compute_dtype="bfloat16", scan_unroll=1, remat="full")
    config.objective.logits_chunk = 256
    config.optimizer.update(learning_rate=2e-4, beta2=0.95, weight_decay=0.1, clip_norm=1.0)
    config.schedule.update(name="cosine", warmup="1B tokens", final_fraction=0.1)
    config.mesh.update(data=-1, fsdp=16)
    config.train.update(num_steps="30B tokens", batch_size=512, accumulation=1, checkpoint_every="2%")
    config.evaluation.update(every="2%", batch_size=128, max_tokens=10_000_000, tasks="perplexity")
    return apply_arg(config, arg)
