"""How good is Muon without its momentum?

python -m gptjax.ablate --study=experiments/muon_momentum.py --workdir=runs/muon_momentum
"""

from gptjax.studies.bases import small
from gptjax.studies.study import Study, apply_arg


def get_study(arg: str = "") -> Study:
    base = small()
    study = Study(
        question="How good is Muon without its momentum?",
        source="modded-nanogpt, track 3",
        found="8,225 steps to a loss of 3.28, where Muon needs 3,250",
        base=base,
        arms={
            "muon": {"optimizer.name": "muon"},
            "no_momentum": {"optimizer.name": "muon", "optimizer.muon_momentum": 0.0},
        },
        claims=("muon < no_momentum",),
        seeds=5,
        smoke={"train.num_steps": 40},
        full={"model.num_layers": 12, "model.embed_dim": 768, "train.num_steps": 5000, "train.batch_size": 256},
    )
    return apply_arg(study, arg)
