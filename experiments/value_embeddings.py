"""Do embeddings that are added to the values of attention help?

python -m gptjax.ablate --study=experiments/value_embeddings.py --workdir=runs/value_embeddings
"""

from gptjax.studies.bases import small
from gptjax.studies.study import Study, apply_arg


def get_study(arg: str = "") -> Study:
    base = small()
    study = Study(
        question="Do embeddings that are added to the values of attention help?",
        source="modded-nanogpt, records 14 and 15; nanochat, dev/LOG.md",
        found="4.66 to 4.41 minutes at 124M",
        base=base,
        arms={
            "none": {},
            "values": {"model.value_embeddings": 2},
        },
        claims=("values < none",),
        seeds=5,
        unmatched={
            "parameters": "the tables are the subject of the study; they add almost no FLOPs",
            "flops_per_token": "the same",
        },
        smoke={"train.num_steps": 40},
        full={"model.num_layers": 12, "model.embed_dim": 768, "train.num_steps": 5000, "train.batch_size": 256},
    )
    return apply_arg(study, arg)
