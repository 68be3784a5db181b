"""Does dropout hurt in a single epoch?

python -m gptjax.ablate --study=experiments/dropout.py --workdir=runs/dropout
"""

from gptjax.studies.bases import small
from gptjax.studies.study import Study, apply_arg


def get_study(arg: str = "") -> Study:
    base = small()
    study = Study(
        question="Does dropout hurt in a single epoch?",
        source="Liu et al. 2025, arXiv:2505.24788, section 3",
        found="a single epoch is best without dropout",
        base=base,
        arms={
            "none": {"model.dropout": 0.0},
            "dropout": {"model.dropout": 0.1},
        },
        claims=("none < dropout",),
        seeds=5,
        smoke={"train.num_steps": 40},
    )
    return apply_arg(study, arg)
