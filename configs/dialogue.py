"""A small GPT that answers: trained on dialogues, with loss on the assistant's words only.

  python -m gptjax.prepare --source=messages:dialogues.jsonl --output=stores/dialogues --tokenizer=bpe:4096 \\
      --cleaning=dialogue
  python -m gptjax.train --config=configs/dialogue.py --workdir=runs/dialogue
  python -m gptjax.generate --workdir=runs/dialogue --prompt='Good morning!' --temperature=0

Any source of dialogues works, or a mixture with text:
  --config.data.source='store:stores/dialogues@0.5 + python_docs@0.5'
To start from a model of text, train that one with the tokenizer of the dialogues first:
  python -m gptjax.train --config=configs/quickstart.py --workdir=runs/text --config.tokenizer=hf:stores/dialogues
  python -m gptjax.train --config=configs/dialogue.py --workdir=runs/dialogue --config.init_from=runs/text
"""

from gptjax.config import apply_arg, get_default


def get_config(arg: str = ""):
    config = get_default()
    config.tokenizer = "bpe:4096"
    config.data.source = "store:stores/dialogues"
    config.model.update(num_layers=4, num_heads=4, embed_dim=192, context_length=256)
    config.optimizer.update(name="muon", learning_rate=2e-3, muon_learning_rate=0.01)
    config.schedule.update(name="wsd", warmup="2%", decay="50%", final_fraction=0.02)
    config.train.update(num_steps="5 epochs", batch_size=16, early_stopping_patience=3)
    config.evaluation.update(every="10%", tasks="perplexity")
    config.logging.sample_prompt = "Good morning!"
    return apply_arg(config, arg)
