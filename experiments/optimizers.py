"""Does Muon beat AdamW at matched tokens?

python -m gptjax.ablate --study=experiments/optimizers.py:smoke --workdir=runs/optimizers
"""

from gptjax.config import get_default
from gptjax.studies.study import Study, apply_arg


def get_study(arg: str = "") -> Study:
    base = get_default()
    base.tokenizer = "bpe:1024"
    base.model.update(num_layers=4, num_heads=4, embed_dim=128, context_length=128)
    base.train.update(num_steps=600, batch_size=16)
    base.schedule.update(name="wsd", warmup="5%", decay="40%")
    base.evaluation.update(every="25%", tasks="perplexity")
    base.logging.samples = 0
    study = Study(
        question="Does Muon reach a lower loss than AdamW on the same tokens?",
        source="modded-nanogpt, track 3; Jordan 2024, kellerjordan.github.io/posts/muon.",
        found="3,250 steps (n 10) against 5,625 to a loss of 3.28",
        base=base,
        arms={
            "adamw": {"optimizer.name": "adamw", "optimizer.learning_rate": 3e-3},
            "muon": {"optimizer.name": "muon", "optimizer.learning_rate": 3e-3, "optimizer.muon_learning_rate": 0.02},
            "lion": {"optimizer.name": "lion", "optimizer.learning_rate": 5e-4},
            "slow_adamw": {"optimizer.name": "adamw", "optimizer.learning_rate": 3e-4},
        },
        claims=("muon < adamw", "adamw < slow_adamw"),
        smoke={"train.num_steps": 60},
        full={"model.num_layers": 12, "model.embed_dim": 768, "train.num_steps": 5000, "train.batch_size": 256},
    )
    return apply_arg(study, arg)
