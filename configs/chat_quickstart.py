"""The four stages of `make chat-quickstart`: a chat model from scratch in minutes; each stage starts from the last one.

  python tools/chat_quickstart.py --workdir=runs/chat

runs all of them, measures each, and writes one report; a stage alone, such as the second:

  python -m gptjax.train --config=configs/chat_quickstart.py:dialogue --workdir=runs/dialogue \\
      --config.init_from=runs/text

text: the documentation of Python. dialogue: questions about it, and a few of a task with checkable answers.
preference: the right answers against the model's own (ORPO; DPO at 1e-4 lowered the share of right answers to the
task). reward: the task by reinforcement learning (GRPO).
"""

from gptjax.config import apply_arg, get_default
from gptjax.errors import UserError

STAGES = ("text", "dialogue", "preference", "reward")


def get_config(arg: str = ""):
    if arg not in ("", "runlocal", *STAGES):
        takes = ", ".join(map(repr, (*STAGES, "runlocal")))
        raise UserError(f"--config=FILE:{arg}: unknown argument {arg!r}; this config takes {takes} or nothing")
    config = get_default()
    config.tokenizer = "bpe:2048"
    config.model.update(num_layers=4, num_heads=4, embed_dim=192, context_length=128)
    config.logging.update(every=10, tensorboard=False, samples=0)
    config.schedule.update(name="wsd", warmup="2%", decay="50%", final_fraction=0.02)
    config.evaluation.update(every="20%", tasks="perplexity", max_prompts=100)
    if arg in ("", "runlocal", "text"):
        config.optimizer.update(name="muon", learning_rate=3e-3, muon_learning_rate=0.02)
        config.train.update(num_steps=250, batch_size=16)
    elif arg == "dialogue":
        config.data.source = "python_docs:dialogues@0.97 + toy:sort#length=3,size=900@0.03"
        config.optimizer.update(name="muon", learning_rate=2e-3, muon_learning_rate=0.01)
        config.train.update(num_steps=150, batch_size=16)
    elif arg == "preference":
        config.data.source = "preference:runs/chat/pairs.jsonl"
        config.objective.update(name="preference", preference_loss="orpo", beta=0.1)
        config.optimizer.update(learning_rate=3e-4, beta2=0.999, weight_decay=0.0)
        config.train.update(num_steps=60, batch_size=16)
    else:
        config.data.source = "toy:sort#length=3,size=900"
        config.objective.update(name="reinforcement", reward="exact_match", max_new_tokens=8, group_size=8)
        config.optimizer.update(learning_rate=2e-4, weight_decay=0.0)
        config.schedule.update(name="constant", warmup=5)
        config.train.update(num_steps=80, batch_size=128)
    return apply_arg(config, "" if arg in STAGES else arg)
