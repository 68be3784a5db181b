"""A small modern GPT on the documentation that ships with Python: no data to find, no network.

  python -m gptjax.train --config=configs/quickstart.py --workdir=runs/quickstart

Byte-level BPE of 4,096 tokens. Expected on two CPU cores: see README.
"""

from gptjax.config import apply_arg, get_default


def get_config(arg: str = ""):
    config = get_default()
    config.tokenizer = "bpe:4096"
    config.model.update(num_layers=4, num_heads=4, embed_dim=192, context_length=128)
    config.optimizer.update(name="muon", learning_rate=3e-3, muon_learning_rate=0.02)
    config.schedule.update(name="wsd", warmup="2%", decay="50%", final_fraction=0.02)
    config.train.update(num_steps=400, batch_size=16)
    config.evaluation.update(every="20%")
    return apply_arg(config, arg)
