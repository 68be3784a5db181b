"""Does Muon reach a lower loss than AdamW on the same tokens?

python -m gptjax.ablate --study=experiments/muon.py --workdir=runs/muon
"""

from gptjax.studies.bases import small
from gptjax.studies.study import Grid, Study, apply_arg


def get_study(arg: str = "") -> Study:
    base = small()
    study = Study(
        question="Does Muon reach a lower loss than AdamW on the same tokens?",
        source="modded-nanogpt, track 3; Jordan 2024, kellerjordan.github.io/posts/muon",
        found="3,250 steps (n 10) against 5,625 to a loss of 3.28",
        base=base,
        arms={
            "adamw": {"optimizer.learning_rate": Grid(1.25e-3, 2.5e-3, 5e-3, 1e-2, 2e-2)},
            "muon": {"optimizer.name": "muon", "optimizer.muon_learning_rate": Grid(0.0025, 0.005, 0.01, 0.02, 0.04)},
        },
        claims=("muon < adamw",),
        seeds=5,
        tuning_seeds=2,
        smoke={"train.num_steps": 40},
        full={"model.num_layers": 12, "model.embed_dim": 768, "train.num_steps": 5000, "train.batch_size": 256},
    )
    return apply_arg(study, arg)
