"""At a constant learning rate, does a growing batch do what a decaying rate does?

Both make the updates at the end less noisy: one by a smaller rate, one by gradients of more tokens. All arms see
the same tokens; `grown` makes fewer updates.

python -m gptjax.ablate --study=experiments/batch_schedule.py --workdir=runs/batch_schedule
"""

from gptjax.studies.bases import small
from gptjax.studies.study import Study, apply_arg


def get_study(arg: str = "") -> Study:
    base = small(num_steps=1200)
    base.train.batch_size = 4
    base.schedule.name = "constant"
    study = Study(
        question="At a constant learning rate, does a growing batch do what a decaying rate does?",
        source="Smith et al. 2018, arXiv:1711.00489, section 4: increase the batch instead of decaying the rate",
        found="the same curves with growing batches as with decaying rates, with fewer updates",
        base=base,
        arms={
            "constant": {},
            "grown": {"schedule.batch_stages": "50%:2,70%:4,85%:8"},
            "decayed": {"schedule.name": "wsd", "schedule.decay": "50%"},
        },
        claims=("grown < constant", "decayed < constant"),
        seeds=5,
        smoke={"train.num_steps": 40},
    )
    return apply_arg(study, arg)
