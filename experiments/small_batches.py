"""At a batch of 2 rows, is a slow second moment better than the usual one?

beta2 = 0.95 at 16 rows and 0.95 ** (2 / 16) = 0.9936 at 2 rows have the same half-life in tokens.

python -m gptjax.ablate --study=experiments/small_batches.py --workdir=runs/small_batches
"""

from gptjax.studies.bases import small
from gptjax.studies.study import Study, apply_arg


def get_study(arg: str = "") -> Study:
    base = small(num_steps=1200)
    base.train.batch_size = 2
    base.optimizer.learning_rate = 1e-3
    study = Study(
        question="At a batch of 2 rows, is a slow second moment better than the usual one?",
        source="Marek et al. 2025, arXiv:2507.07101, section 3: beta2 of constant half-life in tokens",
        found="at batch 1 beta2 = 0.9999 beats 0.95; the usual values fit large batches only",
        base=base,
        arms={
            "fixed": {"optimizer.beta2": 0.95},
            "half_life": {"optimizer.beta2": 0.9936},
        },
        claims=("half_life < fixed",),
        seeds=5,
        smoke={"train.num_steps": 40},
    )
    return apply_arg(study, arg)
