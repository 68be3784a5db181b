"""Is weight decay better where it does not work against the update?

python -m gptjax.ablate --study=experiments/cautious_weight_decay.py --workdir=runs/cautious_weight_decay
"""

from gptjax.studies.bases import small
from gptjax.studies.study import Study, apply_arg


def get_study(arg: str = "") -> Study:
    base = small()
    study = Study(
        question="Is weight decay better where it does not work against the update?",
        source="Chen et al. 2025, arXiv:2510.12402; modded-nanogpt, record 43",
        found="lower losses at 300M to 2B parameters",
        base=base,
        arms={
            "decoupled": {},
            "cautious": {"optimizer.cautious_weight_decay": True},
        },
        claims=("cautious < decoupled",),
        seeds=5,
        smoke={"train.num_steps": 40},
        full={"model.num_layers": 12, "model.embed_dim": 768, "train.num_steps": 5000, "train.batch_size": 256},
    )
    return apply_arg(study, arg)
