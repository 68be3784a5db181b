"""nanoGPT's GPU recipe on Shakespeare's characters, stopped where the validation loss is lowest.

  python -m gptjax.train --config=configs/shakespeare_char_gpu.py --workdir=runs/shakespeare_gpu \\
      --config.data.source=text:input.txt
  (or --config.data.source=tfds:tiny_shakespeare --config.data.data_dir=DIR)

6 layers, 384 wide, 256 characters of context, 5,000 steps of 64 rows, dropout 0.2: 10.8M parameters. Meant for one
GPU. nanoGPT publishes a validation loss of 1.4697 (an estimate) after about 3 minutes on an A100, with dropout on the
attention weights too, which cuDNN's attention does not have here.
Expected: validation loss 1.484 on the whole split (one H200, seed 0, stopped at step 2,500; lowest at 1,500). For a
lower loss in less time: configs/shakespeare_char_gpu_best.py.
"""

from gptjax.config import apply_arg, get_default


def get_config(arg: str = ""):
    config = get_default()
    config.tokenizer = "char"
    config.data.update(
        source="text:input.txt",
        split_by="position",
        validation_fraction=0.1,
        test_fraction=0.0,
        isolate_documents=False,
    )
    config.model.update(
        num_layers=6,
        num_heads=6,
        embed_dim=384,
        context_length=256,
        norm="layernorm",
        activation="gelu",
        positions="learned",
        qk_norm=False,
        use_bias=False,
        dropout=0.2,
        compute_dtype="bfloat16",
    )
    config.optimizer.update(learning_rate=1e-3, beta2=0.99, weight_decay=0.1, clip_norm=1.0)
    config.schedule.update(name="cosine", warmup=100, final_fraction=0.1)
    config.train.update(num_steps=5000, batch_size=64, checkpoint_every=1000, early_stopping_patience=4)
    config.evaluation.update(every=250, batch_size=256, tasks="perplexity")
    config.logging.update(every=50, samples=1)
    return apply_arg(config, arg)
