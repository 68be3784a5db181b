"""Do learned scalars of the residual stream help?

python -m gptjax.ablate --study=experiments/residual_scalars.py --workdir=runs/residual_scalars
"""

from gptjax.studies.bases import small
from gptjax.studies.study import Study, apply_arg


def get_study(arg: str = "") -> Study:
    base = small()
    study = Study(
        question="Do learned scalars of the residual stream help?",
        source="nanochat, dev/LOG.md",
        found="bits per byte -0.0103 at depth 8, -0.0039 at depth 20",
        base=base,
        arms={
            "none": {},
            "scalars": {"model.residual_scalars": True},
        },
        claims=("scalars < none",),
        seeds=5,
        smoke={"train.num_steps": 40},
        full={"model.num_layers": 12, "model.embed_dim": 768, "train.num_steps": 5000, "train.batch_size": 256},
    )
    return apply_arg(study, arg)
