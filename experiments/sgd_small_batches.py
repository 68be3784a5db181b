"""Is SGD as good as Adam at a batch of 2 rows?

python -m gptjax.ablate --study=experiments/sgd_small_batches.py --workdir=runs/sgd_small_batches
"""

from gptjax.studies.bases import small
from gptjax.studies.study import Grid, Study, apply_arg


def get_study(arg: str = "") -> Study:
    base = small(num_steps=1200)
    base.train.batch_size = 2
    base.optimizer.beta2 = 0.9936
    study = Study(
        question="Is SGD as good as Adam at a batch of 2 rows?",
        source="Marek et al. 2025, arXiv:2507.07101, figure 10",
        found="equal at batches up to 16; the gap grows with the batch",
        base=base,
        arms={
            "adamw": {"optimizer.learning_rate": Grid(5e-4, 1e-3, 2e-3, 4e-3, 8e-3)},
            "sgd": {
                "optimizer.name": "sgd",
                "optimizer.beta1": 0.0,
                "optimizer.weight_decay": 0.0,
                "optimizer.learning_rate": Grid(0.03, 0.1, 0.3, 1.0, 3.0),
            },
        },
        claims=("sgd <= adamw + 0.05",),
        seeds=5,
        tuning_seeds=2,
        smoke={"train.num_steps": 40},
    )
    return apply_arg(study, arg)
