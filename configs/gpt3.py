"""GPT-3 at 6.7B (the default) and 175B parameters (Brown et al. 2020, table 2.1), dense attention in every layer.

  gptjax prepare --source='text:/shared/corpus/*.txt.zst' --tokenizer=hf:gpt2 --output=stores/corpus
  python -m gptjax.train --config=configs/gpt3.py:6.7b --workdir=/shared/runs/gpt3_6.7b
  python -m gptjax.train --config=configs/gpt3.py:175b --workdir=/shared/runs/gpt3_175b

/shared is a disk that every machine mounts: work directories are not written to buckets.

6.7b: 64 chips, with parameters and optimizer state sharded over all of them. 175b: 512 chips, sharded over 64, and
each layer over 8. Check the memory before renting anything:
  python -m gptjax.plan --config=configs/gpt3.py:6.7b --topology=v5p:4x4x4
  python -m gptjax.plan --config=configs/gpt3.py:175b --topology=v5p:8x8x8
"""

from gptjax.config import apply_arg, get_default
from gptjax.model import presets

# (layers, heads, width), mesh, rows of 2,048 tokens per step, peak learning rate
SIZES = {
    "6.7b": ((32, 32, 4096), {"fsdp": 64}, 1024, 1.2e-4),
    "175b": ((96, 96, 12288), {"fsdp": 64, "tensor": 8}, 1536, 0.6e-4),
}


def get_config(arg: str = ""):
    (layers, heads, width), mesh, rows, learning_rate = SIZES.get(arg, SIZES["6.7b"])
    config = get_default()
    config.tokenizer = "hf:gpt2"
    config.data.update(source="store:stores/corpus", isolate_documents=False)
    config.model.update(presets.get("gpt2-1558m"), compute_dtype="bfloat16", scan_unroll=1, remat="full")
    config.model.update(num_layers=layers, num_heads=heads, num_kv_heads=heads, embed_dim=width, mlp_dim=4 * width)
    config.model.context_length = 2048
    config.objective.logits_chunk = 512
    config.optimizer.update(learning_rate=learning_rate, beta2=0.95, weight_decay=0.1, clip_norm=1.0)
    config.schedule.update(name="cosine", warmup="375M tokens", final_fraction=0.1)
    config.mesh.update(mesh)
    config.train.update(num_steps="300B tokens", batch_size=rows, checkpoint_every="1%")
    config.evaluation.update(every="1%", batch_size=rows, max_tokens=20_000_000, tasks="perplexity")
    return apply_arg(config, "" if arg in SIZES else arg)
