"""Is it better to start the output projections at zero?

python -m gptjax.ablate --study=experiments/zero_outputs.py --workdir=runs/zero_outputs
"""

from gptjax.studies.bases import small
from gptjax.studies.study import Study, apply_arg


def get_study(arg: str = "") -> Study:
    base = small()
    study = Study(
        question="Is it better to start the output projections at zero?",
        source="modded-nanogpt, record 5; contradicted by its record 64",
        found="faster at first; -0.006 the other way later",
        base=base,
        arms={
            "none": {},
            "zero": {"model.init_multipliers": "blocks/(attention/out|mlp/down)/kernel=0"},
        },
        claims=("zero < none",),
        seeds=5,
        smoke={"train.num_steps": 40},
        full={"model.num_layers": 12, "model.embed_dim": 768, "train.num_steps": 5000, "train.batch_size": 256},
    )
    return apply_arg(study, arg)
