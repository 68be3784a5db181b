"""GPT-2 fine-tuned on your own text. Needs the weights: a directory, the cache of the Hugging Face hub, or a network.

  python -m gptjax.train --config=configs/finetune_gpt2.py --workdir=runs/mine --config.data.source='text:books/*.txt'
  python -m gptjax.train --config=configs/finetune_gpt2.py:gpt2-medium --workdir=runs/mine
  python -m gptjax.train --config=configs/finetune_gpt2.py --config.init_from=hf:models/gpt2 --workdir=runs/mine \\
      --config.model.lora_rank=8 --config.optimizer.learning_rate=3e-4

Any GPT-2, Llama or Qwen3 layout works with `--config.init_from=hf:DIR_OR_NAME`, which gives the model and the
tokenizer. `convert --from=runs/mine --to=hf:DIR` writes the result for transformers.
Expected loss: not measured, since this machine has neither a network nor GPT-2's weights.
"""

from gptjax.config import apply_arg, get_default
from gptjax.errors import UserError
from gptjax.model import presets

SIZES = {"gpt2": "gpt2-124m", "gpt2-medium": "gpt2-355m", "gpt2-large": "gpt2-774m", "gpt2-xl": "gpt2-1558m"}


def get_config(arg: str = ""):
    if arg not in {"", "runlocal", *SIZES}:
        sizes = ", ".join(map(repr, SIZES))
        raise UserError(
            f"--config=FILE:{arg}: unknown argument {arg!r}; this config takes {sizes}, 'runlocal' or nothing"
        )
    name = arg if arg in SIZES else "gpt2"
    config = get_default()
    config.init_from = config.tokenizer = f"hf:{name}"
    config.model.update(presets.get(SIZES[name]), context_length=512, dropout=0.1, compute_dtype="bfloat16")
    config.optimizer.update(learning_rate=5e-5, beta2=0.999, weight_decay=0.01)
    config.schedule.update(name="linear", warmup="5%", final_fraction=0.0)
    config.train.update(num_steps="3 epochs", batch_size=16, accumulation=2, early_stopping_patience=3)
    config.evaluation.update(every="10%", tasks="perplexity")
    return apply_arg(config, "" if arg in SIZES else arg)
