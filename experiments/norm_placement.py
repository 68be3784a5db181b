"""Does a pre-norm model train at a rate at which a post-norm model does not?

python -m gptjax.ablate --study=experiments/norm_placement.py --workdir=runs/norm_placement
"""

from gptjax.studies.bases import small
from gptjax.studies.study import Study, apply_arg


def get_study(arg: str = "") -> Study:
    base = small()
    base.schedule.warmup = 0
    base.optimizer.learning_rate = 1e-2
    study = Study(
        question="Does a pre-norm model train at a rate at which a post-norm model does not?",
        source="Xiong et al. 2020, arXiv:2002.04745, section 4",
        found="post-norm diverges without a long warm-up",
        base=base,
        arms={
            "post": {"model.norm_placement": "post"},
            "pre": {},
        },
        claims=("pre < post - 0.1",),
        seeds=5,
        smoke={"train.num_steps": 40},
        full={"model.num_layers": 12, "model.embed_dim": 768, "train.num_steps": 5000, "train.batch_size": 256},
    )
    return apply_arg(study, arg)
