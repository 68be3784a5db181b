"""DPO: a chat model learns which of two answers people prefer (Rafailov et al. 2023).

  python -m gptjax.prepare --source=preference:pairs.jsonl --output=stores/preferences --tokenizer=bpe:4096
  python -m gptjax.train --config=configs/dialogue.py --workdir=runs/chosen --config.objective.name=instruction \\
      --config.data.source=store:stores/preferences
  python -m gptjax.train --config=configs/dpo.py --workdir=runs/dpo --config.init_from=runs/chosen

The second command trains on the preferred answers alone; any model of dialogues can replace it. The log-probabilities
of the reference model are computed once and stored, so that no second copy of the model is in memory.
Other losses: --config.objective.preference_loss=ipo | kto | orpo | simpo; orpo needs no model to start from, kto also
reads single answers with a label. Adapters only: --config.model.lora_rank=8 --config.optimizer.learning_rate=1e-4.
A reward model instead, for `generate --best_of=8 --reward=model:runs/reward` and objective.reward=model:runs/reward:
  python -m gptjax.train --config=configs/dpo.py --workdir=runs/reward --config.init_from=runs/chosen \\
      --config.objective.name=reward_model --config.logging.samples=0
The learning rate is for small models; for one with a billion parameters it is about 1e-6.
Expected for 730 pairs of oaast_rm_zh, 2 layers of width 32, 200 steps at 3e-4, one seed: on the 128 pairs of the
test split `evaluate --tasks=preference` gives accuracy 0.71 (0.63 to 0.79), margin 0.17 (0.09 to 0.26). Always taking
the longer answer is right in 0.81 of them. With 4 layers of width 128 at 5e-5 the margin on held-out pairs stayed at 0.
"""

from gptjax.config import apply_arg, get_default


def get_config(arg: str = ""):
    config = get_default()
    config.tokenizer = "bpe:4096"
    config.data.source = "store:stores/preferences"
    config.objective.update(name="preference", preference_loss="dpo", beta=0.1)
    config.model.update(num_layers=4, num_heads=4, embed_dim=192, context_length=256)
    config.optimizer.update(learning_rate=5e-5, beta2=0.999, weight_decay=0.0)
    config.schedule.update(name="linear", warmup="10%", final_fraction=0.0)
    config.train.update(num_steps="2 epochs", batch_size=16)
    config.evaluation.update(every="10%", tasks="perplexity,preference")
    return apply_arg(config, arg)
