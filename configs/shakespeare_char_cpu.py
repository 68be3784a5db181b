"""nanoGPT's CPU recipe on Shakespeare's characters.

  python -m gptjax.train --config=configs/shakespeare_char_cpu.py --workdir=runs/shakespeare \\
      --config.data.source=text:input.txt
  (or --config.data.source=tfds:tiny_shakespeare --config.data.data_dir=DIR)

4 layers, 128 wide, 64 characters of context, 2,000 steps of 12 rows: 0.8M parameters.
Expected: validation loss 1.911 (3 seeds) in windows of 64 that do not overlap, as nanoGPT measures; 1.886 with
`gptjax evaluate --stride=32`. See experiments/RESULTS.md. About 50 s on two CPU cores.
"""

from gptjax.config import apply_arg, get_default


def get_config(arg: str = ""):
    config = get_default()
    config.tokenizer = "char"
    config.data.update(source="text:input.txt", split_by="position", validation_fraction=0.1, test_fraction=0.0)
    config.model.update(
        num_layers=4,
        num_heads=4,
        embed_dim=128,
        context_length=64,
        vocab_multiple=1,
        norm="layernorm",
        activation="gelu",
        positions="learned",
        qk_norm=False,
        use_bias=False,
    )
    config.optimizer.update(learning_rate=1e-3, beta2=0.99, weight_decay=0.1, clip_norm=1.0)
    config.schedule.update(name="cosine", warmup=100, final_fraction=0.1)
    config.train.update(num_steps=2000, batch_size=12, checkpoint_every=1000)
    config.evaluation.update(every=250, batch_size=128, tasks="perplexity")
    config.logging.every = 10
    return apply_arg(config, arg)
