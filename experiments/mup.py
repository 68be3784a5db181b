"""Does the best learning rate stay the same when the model is four times as wide?

The chosen rates and the sensitivity curves answer it: with muP the wide model chooses the rate of the narrow one,
or a neighbouring one.

python -m gptjax.ablate --study=experiments/mup.py --workdir=runs/mup
"""

from gptjax.studies.bases import small
from gptjax.studies.study import Grid, Study, apply_arg


def get_study(arg: str = "") -> Study:
    base = small()
    rates = Grid(2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2)
    narrow = {"model.embed_dim": 32, "model.num_heads": 1, "optimizer.learning_rate": rates}
    wide = {"model.embed_dim": 128, "model.num_heads": 4, "optimizer.learning_rate": rates}
    study = Study(
        question="Does the best learning rate stay the same when the model is four times as wide?",
        source="Yang et al. 2022, arXiv:2203.03466, figure 1; Lingle 2024, arXiv:2404.05728",
        found="with muP yes; without it the best rate falls from 9.8e-4 to 6.1e-5 from width 128 to 2,048",
        base=base,
        arms={
            "narrow": narrow,
            "mup_wide": wide | {"model.mup_base_width": 32},
            "standard_wide": wide,
        },
        claims=("mup_wide < narrow", "mup_wide <= standard_wide + 0.02"),
        seeds=2,
        unmatched={"parameters": "the width is the subject of the study", "flops_per_token": "the same"},
        smoke={"train.num_steps": 40},
    )
    return apply_arg(study, arg)
