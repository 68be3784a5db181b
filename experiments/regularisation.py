"""Which regularisation helps when a small corpus is read many times?

python -m gptjax.ablate --study=experiments/regularisation.py --workdir=runs/regularisation
"""

from gptjax.studies.bases import many_epochs
from gptjax.studies.study import Study, apply_arg


def get_study(arg: str = "") -> Study:
    base = many_epochs(num_steps=1000)
    base.optimizer.learning_rate = 1e-2
    study = Study(
        question="Which regularisation helps when a small corpus is read many times?",
        source="the usual advice of guides to fine-tuning; weight decay: Kim et al. 2025, arXiv:2509.14786",
        found="the best weight decay in many epochs is about 30 times the usual 0.1",
        base=base,
        arms={
            "plain": {"optimizer.weight_decay": 0.1},
            "dropout": {"model.dropout": 0.1},
            "decay": {"optimizer.weight_decay": 3.0},
        },
        claims=("decay < plain", "dropout < plain"),
        seeds=5,
        smoke={"train.num_steps": 40},
    )
    return apply_arg(study, arg)
